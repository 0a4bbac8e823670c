"""Models by their Hugging Face Hub id, downloaded once into the Hub's own cache and shared with other tools."""

import re
from pathlib import Path
from typing import Final

from engine.errors import CheckpointError

_ID: Final = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w. -]+\.gguf))?")
# Weights that load no code, and the text files beside them. Subfolders hold other formats of the same weights.
_WANTED: Final = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_UNWANTED: Final = ["*/*", "consolidated*"]


def download(model: str, revision: str | None) -> Path:
    """The directory of ``owner/name``, or the file of ``owner/name:file.gguf``, downloaded unless it is cached.

    Raises CheckpointError if ``model`` is no Hub id, is not there, may not be read, or the Hub cannot be reached.
    """
    match = _ID.fullmatch(model)
    if match is None:
        raise CheckpointError(f"{model}: there is no such file or directory, and it is not a Hub id (owner/name)")
    # Imported here: a local model does not need it.
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    repo, file = match.groups()
    try:
        if file:
            return Path(hf_hub_download(repo, file, revision=revision))
        folder = snapshot_download(repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        return Path(folder)
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{model}: its owner asks you to accept conditions: visit its page, then set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{model}: the Hub has no revision {revision!r} of it") from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(f"{model}: not in the local cache, and the Hugging Face Hub cannot be reached") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(f"{model}: the Hub has no such model, or it is private and HF_TOKEN is not set") from None
    except errors.EntryNotFoundError:
        raise CheckpointError(f"{model}: that repository has no such file") from None
    except errors.HFValidationError:
        raise CheckpointError(f"{model}: not a valid Hub id (owner/name)") from None
    except Exception as error:  # noqa: BLE001 (what its network layer raises is no part of its interface)
        raise CheckpointError(f"{model}: the download failed ({type(error).__name__})") from None
