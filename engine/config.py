"""Settings, and the one way they are given: by flag, else variable, else key of a YAML file, else default.

A setting is a dataclass field made by `setting()`: its metadata holds the help line and a parser. The flag
`--block-size`, the variable `OCTAVO_BLOCK_SIZE`, the key `block_size` and the check of values given from
Python all follow from it. This is the only module that reads the environment.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from engine.errors import ConfigError
from engine.kv_policies.full import Full
from engine.kv_policies.policy import KVPolicy
from engine.kv_policies.registry import policy_setting
from engine.setting_values import Parser, boolean, choice, integer, memory, number, path, text, texts

if TYPE_CHECKING:
    import argparse

T = TypeVar("T")

_PREFIX = "OCTAVO_"


# --- settings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """A field's metadata: all that its flag, its variable and its file key need."""

    help: str
    parse: Parser
    metavar: str
    positional: bool
    secret: bool


def setting(
    default: Any,
    parse: Parser,
    help: str,  # noqa: A002 — argparse's own word
    *,
    metavar: str = "VALUE",
    positional: bool = False,
    secret: bool = False,
) -> Any:
    """Declare a field of a config class.

    A ``default`` of None makes None a legal value; a callable one is called with the environment.
    A ``secret`` is shown in no ``repr`` and no error.
    """
    metadata = {"setting": Setting(help, parse, metavar, positional, secret)}
    if callable(default):
        return dataclasses.field(default_factory=lambda: default(os.environ), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def check(config: Any) -> None:
    """Check and normalise every setting of a config: called from ``__post_init__``, so that none escapes it.

    Raises:
        ConfigError: naming the class and the field.
    """
    for field in dataclasses.fields(config):
        value = _parse(field, getattr(config, field.name), f"{type(config).__name__}.{field.name}")
        object.__setattr__(config, field.name, value)


def add_flags(parser: "argparse.ArgumentParser | argparse._ArgumentGroup", cls: type) -> None:
    """Add one flag per setting of ``cls``. A flag that is not given leaves no trace in the namespace."""
    import argparse

    for field in dataclasses.fields(cls):
        meta = _meta(field)
        default = "" if field.default in (None, (), dataclasses.MISSING) else f"; default: {_shown(field.default)}"
        common: dict[str, Any] = {
            "help": f"{meta.help} ({_PREFIX}{field.name.upper()}{default})".replace("%", "%%"),
            "default": argparse.SUPPRESS,
        }
        flag = "--" + field.name.replace("_", "-")
        if meta.positional:
            parser.add_argument(field.name, nargs="?", metavar=meta.metavar, **common)
        elif meta.parse is boolean:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif meta.parse is texts:
            parser.add_argument(flag, action="append", metavar=meta.metavar, **common)
        else:
            parser.add_argument(flag, metavar=meta.metavar, **common)


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A YAML file's values by field name."""

    name: str
    values: Mapping[str, object]


def read_file(file: Path, *classes: type) -> ConfigFile:
    """Read a YAML file of settings (keys as fields, or with dashes as flags), shared by all ``classes``.

    Raises:
        ConfigError: it cannot be read, is no YAML mapping, or has a key that none of the classes knows.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: is not valid YAML: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must be a mapping of settings to values")
    known = [field.name for cls in classes for field in dataclasses.fields(cls)]
    values: dict[str, object] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{file}: unknown key {str(key)!r}{_suggestion(name, known)}")
        values[name] = value
    return ConfigFile(str(file), values)


def load(
    cls: type[T],
    flags: Mapping[str, object],
    environ: Mapping[str, str] | None = None,
    file: ConfigFile | None = None,
) -> T:
    """Make a config from the flags, the variables (the process's by default), the file and the defaults.

    ``flags`` may hold names of other classes' settings, such as ``vars(namespace)``; so may the file. A
    variable that is empty counts as unset, for compose files pass those on.

    Raises:
        ConfigError: a value cannot work; the message names where it came from.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        variable = _PREFIX + field.name.upper()
        if field.name in flags:
            source = _meta(field).metavar if _meta(field).positional else "--" + field.name.replace("_", "-")
            values[field.name] = _parse(field, flags[field.name], source)
        elif environ.get(variable):
            values[field.name] = _parse(field, environ[variable], variable)
        elif file is not None and field.name in file.values:
            values[field.name] = _parse(field, file.values[field.name], f"{file.name}: {field.name}")
    return cls(**values)


def load_all(
    classes: Sequence[type],
    flags: Mapping[str, object],
    environ: Mapping[str, str] | None = None,
) -> tuple[Any, ...]:
    """Load configs that share flags, variables and one file, which ``--config`` or OCTAVO_CONFIG names."""
    environ = os.environ if environ is None else environ
    name = flags.get("config") or environ.get(_PREFIX + "CONFIG")
    file = read_file(path(name), *classes) if name else None
    return tuple(load(cls, flags, environ, file) for cls in classes)


def _meta(field: "dataclasses.Field[Any]") -> Setting:
    meta = field.metadata["setting"]
    assert isinstance(meta, Setting)
    return meta


def _parse(field: "dataclasses.Field[Any]", value: object, source: str) -> Any:
    if value is None and field.default is None:
        return None
    try:
        return _meta(field).parse(value)
    except ValueError as error:
        given = "" if _meta(field).secret else f", not {value!r}"
        raise ConfigError(f"{source}: {error}{given}") from None


def _shown(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _suggestion(name: str, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


# --- the engine's own -------------------------------------------------------------------------------------


def _cache_dir(environ: Mapping[str, str]) -> Path:
    if own := environ.get(_PREFIX + "CACHE_DIR"):
        return Path(own).expanduser()
    if shared := environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "octavo"
    return Path.home() / ".cache" / "octavo"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the model is run. None means: decided by the engine from the checkpoint and the machine."""

    model: str = setting(
        "embedded",
        text,
        "'embedded', a folder in Hugging Face's layout, a .gguf file, or a Hub id",
        metavar="MODEL",
        positional=True,
    )
    revision: str | None = setting(
        None, text, "branch, tag or commit, where the model comes from the Hub", metavar="REV"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto",
        choice("auto", "bfloat16", "float16", "float32"),
        "type of weights and activations; auto takes the fastest that the device computes in",
        metavar="TYPE",
    )
    quantization: Literal["auto", "none"] = setting(
        "auto",
        choice("auto", "none"),
        "weights that a file holds in 4 or 8 bits (GGUF's Q4_0, Q4_1, Q8_0): auto multiplies them as they are on CPUs, "
        "with activations rounded to 8 bits, unless --dtype float32 is given; none turns them into --dtype",
        metavar="HOW",
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", choice("auto", "cpu", "cuda"), "where the model runs", metavar="DEVICE"
    )
    max_model_len: int | None = setting(
        None,
        integer(1),
        "longest prompt and output together, in tokens; the model's own by default",
        metavar="N",
    )
    max_num_seqs: int = setting(64, integer(1), "sequences that run at the same time, at most", metavar="N")
    max_num_batched_tokens: int = setting(2048, integer(1), "tokens computed in one step, at most", metavar="N")
    block_size: int = setting(16, integer(1, 4096), "tokens in a block of the KV cache", metavar="N")
    kv_cache_memory: int | None = setting(
        None, memory, "size of the KV cache, such as 2GiB; fitted to the machine by default", metavar="SIZE"
    )
    kv_cache_dtype: Literal["auto", "bf16", "fp16", "fp8", "int8", "int4"] = setting(
        "auto",
        choice("auto", "bf16", "fp16", "fp8", "int8", "int4"),
        "how keys and values are stored; auto takes the model's type, and the last three are quantized per token and "
        "head; see docs/kv-storage.md",
        metavar="TYPE",
    )
    prefix_caching: bool = setting(True, boolean, "share the KV blocks of equal prompt beginnings")
    swap_memory: int | None = setting(
        None,
        memory,
        "memory of the host for swapped-out requests and for cached prefixes that the KV cache has no room for, "
        "such as 4GiB; none by default",
        metavar="SIZE",
    )
    preemption: Literal["auto", "recompute", "swap"] = setting(
        "auto",
        choice("auto", "recompute", "swap"),
        "what becomes of a request that has to make room; auto swaps it out where --swap-memory has room",
        metavar="MODE",
    )
    scheduling: Literal["fcfs", "priority", "fair"] = setting(
        "fcfs",
        choice("fcfs", "priority", "fair"),
        "who runs first: first come, the lowest 'priority', or the tenant that was given the fewest tokens",
        metavar="ORDER",
    )
    ageing: float = setting(
        10.0,
        number(0.001, 86400),
        "seconds of waiting that make up for one level of priority, or for 1,000 tokens of a fair share",
        metavar="S",
    )
    batching: Literal["none", "static", "dynamic", "continuous"] = setting(
        "continuous",
        choice("none", "static", "dynamic", "continuous"),
        "when requests may begin: as soon as there is room, or the older ways, for comparison",
        metavar="MODE",
    )
    batch_size: int = setting(8, integer(1), "requests of a static or dynamic batch", metavar="N")
    batch_delay: float = setting(
        0.05, number(0, 3600), "seconds that a dynamic batch waits to fill, at most", metavar="S"
    )
    queue_timeout: float | None = setting(
        None, number(0.001, 86400), "seconds that a request waits to begin, at most; no limit by default", metavar="S"
    )
    kv_policy: KVPolicy = setting(  # noqa: RUF009 — immutable
        Full(),
        policy_setting,
        "which tokens keep their KV where a request does not say: a policy's name, or its fields as JSON, such as "
        '{"type": "streaming", "sinks": 4, "window": 1020}; see docs/kv-policies.md',
        metavar="POLICY",
    )
    trace: Path | None = setting(  # noqa: RUF009 — immutable
        None,
        path,
        "write every scheduling decision to this file, token ids included, for `octavo trace replay`",
        metavar="FILE",
    )
    seed: int = setting(0, integer(0, 2**63 - 1), "seed of requests that bring none", metavar="N")
    threads: int | None = setting(
        None, integer(1, 4096), "CPU threads of the model; the machine's cores by default", metavar="N"
    )
    cache_dir: Path = setting(  # noqa: RUF009 — makes a default_factory
        _cache_dir, path, "folder for what is worth keeping between starts", metavar="DIR"
    )

    def __post_init__(self) -> None:
        check(self)
