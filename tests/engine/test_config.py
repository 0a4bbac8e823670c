"""Settings: one mechanism for flags, variables, files and Python."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from engine.config import EngineConfig, add_flags, load, load_all, read_file
from engine.errors import ConfigError
from engine.kv_policies.window import SlidingWindow
from engine.setting_values import memory
from server.config import ServerConfig


def flags(*argv: str) -> dict[str, object]:
    """What a command line gives."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    add_flags(parser, EngineConfig)
    add_flags(parser, ServerConfig)
    return vars(parser.parse_args(argv))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "octavo.yaml"
    path.write_text("block_size: 8\nmax-num-seqs: 5\nport: 9000\nseed: 1\nprefix_caching: no\n")
    return path


def test_the_order_is_flag_then_variable_then_file_then_default(file: Path) -> None:
    environ = {"OCTAVO_BLOCK_SIZE": "32", "OCTAVO_SEED": "2"}
    config, server = load_all((EngineConfig, ServerConfig), flags("--config", str(file), "--block-size", "64"), environ)
    assert config.block_size == 64
    assert config.seed == 2
    assert config.max_num_seqs == 5
    assert config.max_num_batched_tokens == 2048
    assert config.prefix_caching is False
    assert server.port == 9000


def test_a_variable_can_name_the_file(file: Path) -> None:
    (config,) = load_all((EngineConfig,), {}, {"OCTAVO_CONFIG": ""})
    assert config.block_size == 16
    config, _ = load_all((EngineConfig, ServerConfig), {}, {"OCTAVO_CONFIG": str(file)})
    assert config.block_size == 8


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_every_setting_has_a_flag_a_variable_and_a_key(cls: type, tmp_path: Path) -> None:
    samples = {"bool": ("false", False), "int": ("7", 7), "float": ("7", 7.0), "str": ("word", "word")}
    special: dict[str, tuple[str, object]] = {
        "dtype": ("float16", "float16"),
        "kv_cache_dtype": ("int8", "int8"),
        "quantization": ("none", "none"),
        "device": ("cpu", "cpu"),
        "log_level": ("debug", "debug"),
        "log_format": ("json", "json"),
        "preemption": ("swap", "swap"),
        "scheduling": ("fair", "fair"),
        "batching": ("static", "static"),
        "cache_dir": ("word", Path("word")),
        "trace": ("word", Path("word")),
        "tenant": ("user", "user"),
        "tool_parser": ("llama3", "llama3"),
        "chat_template": ("word", Path("word")),
        "api_key": ("word", ("word",)),
        "served_model_name": ("word", ("word",)),
        "cors_origins": ("http://localhost", ("http://localhost",)),
        "kv_policy": ("window", SlidingWindow()),
        "kv_policy_allow": ("window", ("window",)),
    }
    for field in dataclasses.fields(cls):
        kind = str(getattr(field.type, "__name__", field.type)).removesuffix(" | None")
        given, expected = special.get(field.name) or samples[kind]
        flag = "--" + field.name.replace("_", "-")
        argv = [given] if field.name == "model" else ["--no-" + flag[2:]] if kind == "bool" else [flag, given]
        path = tmp_path / "one.yaml"
        path.write_text(f"{field.name}: {given}\n")
        for config in (
            load(cls, flags(*argv), {}),
            load(cls, {}, {f"OCTAVO_{field.name.upper()}": given}),
            load(cls, {}, {}, read_file(path, cls)),
        ):
            assert getattr(config, field.name) == expected, field.name


def test_the_model_is_the_one_positional_argument() -> None:
    assert load(EngineConfig, flags(), {}).model == "embedded"
    assert load(EngineConfig, flags("folder"), {}).model == "folder"


@pytest.mark.parametrize(
    ("given", "environ", "message"),
    [
        (["--block-size", "0"], {}, "--block-size: expected a whole number, 1 to 4096, not '0'"),
        (["--dtype", "int3"], {}, "--dtype: expected one of auto, bfloat16, float16, float32, not 'int3'"),
        ([""], {}, "MODEL: expected some text, not ''"),
        ([], {"OCTAVO_SEED": "1.5"}, "OCTAVO_SEED: expected a whole number, 0 to"),
        ([], {"OCTAVO_KV_CACHE_MEMORY": "much"}, "OCTAVO_KV_CACHE_MEMORY: expected an amount of memory"),
        ([], {"OCTAVO_PREFIX_CACHING": "maybe"}, "OCTAVO_PREFIX_CACHING: expected true or false"),
    ],
)
def test_a_bad_value_is_told_with_its_source(given: list[str], environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(EngineConfig, flags(*given), environ)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("blok_size: 8", "unknown key 'blok_size' (did you mean 'block_size'?)"),
        ("1: 8", "unknown key '1'"),
        ("- 8", "must be a mapping"),
        ("a: [", "is not valid YAML"),
        ("!!python/object:os.system {}", "is not valid YAML"),
    ],
)
def test_a_file_is_checked(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_file(path, EngineConfig)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["block_size: true", "block_size: 1.0", "block_size: [1]", "block_size: null"])
def test_a_files_values_have_their_types(tmp_path: Path, content: str) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"octavo\.yaml: block_size: expected"):
        load(EngineConfig, {}, {}, read_file(path, EngineConfig))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_file(tmp_path / "none.yaml", EngineConfig)


def test_an_empty_file_and_an_empty_variable_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert load(EngineConfig, {}, {"OCTAVO_SEED": ""}, read_file(path, EngineConfig)).seed == 0


def test_null_in_a_file_leaves_the_choice_to_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text("threads: null\n")
    assert load(EngineConfig, {}, {}, read_file(path, EngineConfig)).threads is None


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (1024, 1024),
        ("1024", 1024),
        ("2GiB", 2 * 2**30),
        ("2G", 2 * 2**30),
        ("2 gb", 2 * 10**9),
        ("1.5MiB", 3 * 2**19),
        ("512k", 2**19),
        ("3TB", 3 * 10**12),
        ("7B", 7),
    ],
)
def test_memory_has_units(given: object, size: int) -> None:
    assert memory(given) == size


@pytest.mark.parametrize("given", [0, -1, True, 1.5, None, "", "GiB", "1XiB", "nanG", "infG", "-1G", "1 G i B", "B"])
def test_what_is_no_memory(given: object) -> None:
    with pytest.raises(ValueError, match="expected an amount of memory"):
        memory(given)


def test_values_from_python_are_checked_and_normalised() -> None:
    assert EngineConfig(kv_cache_memory="1MiB", cache_dir="~/x").cache_dir == Path.home() / "x"
    with pytest.raises(ConfigError, match=r"EngineConfig.block_size: expected a whole number"):
        EngineConfig(block_size=0)


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().seed = 3


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OCTAVO_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert EngineConfig().cache_dir == Path.home() / ".cache" / "octavo"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert EngineConfig().cache_dir == Path("/xdg/octavo")
    monkeypatch.setenv("OCTAVO_CACHE_DIR", "/own")
    assert EngineConfig().cache_dir == Path("/own")


def test_lists_come_by_repetition_commas_and_yaml(tmp_path: Path) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text("api_key: [a, 'b,c']\n")
    assert load(ServerConfig, {}, {}, read_file(path, ServerConfig)).api_key == ("a", "b", "c")
    assert load(ServerConfig, flags("--api-key", "a", "--api-key", "b, c"), {}).api_key == ("a", "b", "c")


def test_a_secret_is_not_in_an_error(tmp_path: Path) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text("api_key: [123456]\n")
    with pytest.raises(ConfigError) as caught:
        load(ServerConfig, {}, {}, read_file(path, ServerConfig))
    assert "123456" not in str(caught.value)
