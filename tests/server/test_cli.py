"""The command line: quick to answer, clear about mistakes."""

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.errors import CheckpointError, ConfigError
from server import cli
from server.commands import chat
from server.commands.serve import _url
from server.config import ServerConfig
from server.listener import bind
from tests.server.fakes import FakeEngine, byte_tokenizer

HEAVY = {"torch", "numpy", "fastapi", "pydantic", "transformers", "tokenizers", "uvicorn", "jinja2", "asyncio"}


def octavo(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "server.cli", *argv], capture_output=True, text=True, check=False)


def test_help_answers_within_three_tenths_of_a_second() -> None:
    fastest = 9.0
    for _ in range(3):  # the machine may be busy with something else
        began = time.perf_counter()
        result = octavo("--help")
        fastest = min(fastest, time.perf_counter() - began)
        assert result.returncode == 0
        assert all(command in result.stdout for command in cli.COMMANDS)
    assert fastest < 0.3


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"], ["generate", "--help"], ["version"]])
def test_nothing_heavy_is_imported_to_answer(argv: list[str]) -> None:
    allowed = {"asyncio"} if argv[0] in ("serve", "generate") else set()
    code = (
        "import sys; from server.cli import main\n"
        f"try: main({argv!r})\n"
        "except SystemExit: pass\n"
        "print(sorted(set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not (HEAVY - allowed) & set(result.stderr.replace("'", "").strip("[]\n").split(", "))


def test_every_command_of_the_table_can_be_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        assert f"octavo {command}" in capsys.readouterr().out


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


def test_the_version_can_be_asked_for_either_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == cli.main(["--version"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith("octavo ")


def test_a_wrong_setting_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--block-size", "none"]) == 2
    assert capsys.readouterr().err == ("octavo: error: --block-size: expected a whole number, 1 to 4096, not 'none'\n")


def test_a_failure_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("the model\nis torn")

    monkeypatch.setattr("server.commands.version.run", fail)
    assert cli.main(["version"]) == 1
    assert capsys.readouterr().err == "octavo: error: the model is torn\n"


def test_a_taken_port_is_known_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with bind(ServerConfig(port=0)) as sock:
        port = sock.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_an_address_that_is_not_ours_cannot_be_listened_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--host", "203.0.113.7"]) == 2
    assert "cannot listen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("example.org", "http://example.org:80"),
    ],
)
def test_the_url_shown_is_one_that_works_here(host: str, url: str) -> None:
    assert _url(host, 80) == url


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """What `load_engine` gives, for the commands in the terminal; and no torch is imported."""
    engine = FakeEngine()
    launch = type(sys)("engine.launch")
    launch.load_engine = lambda config, observer=None: engine
    monkeypatch.setitem(sys.modules, "engine.launch", launch)
    return engine


def run(monkeypatch: pytest.MonkeyPatch, stdin: str, *argv: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    return cli.main(argv)


def test_generate_streams_the_continuation(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "", "generate", "--prompt", "Hi", "--max-tokens", "10", "--temperature", "0") == 0
    assert capsys.readouterr().out == "The café'\n"
    params = fake.submitted[0].params
    assert (params.max_tokens, params.temperature) == (10, 0)


def test_generate_reads_standard_input(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "From a pipe", "generate", "--max-tokens", "3") == 0
    assert fake.tokenizer.decode(fake.submitted[0].prompt) == "From a pipe"
    assert capsys.readouterr().out == "The\n"


def test_generate_shows_what_the_engine_has_to_say(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.healthy = False
    assert run(monkeypatch, "x", "generate") == 1
    assert capsys.readouterr().err.startswith("octavo: error: ")


def test_chat_keeps_the_conversation_until_it_is_reset(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "One\n\nTwo\n/reset\nThree\n/quit\nnever\n"
    assert run(monkeypatch, lines, "chat", "--system", "Be brief.", "--max-tokens", "3") == 0
    seen = [fake.tokenizer.decode(stream.prompt) for stream in fake.submitted]
    system = "<|system|>Be brief.\n"
    assert seen == [
        f"{system}<|user|>One\n<|assistant|>",
        f"{system}<|user|>One\n<|assistant|>The\n<|user|>Two\n<|assistant|>",
        f"{system}<|user|>Three\n<|assistant|>",
    ]
    assert capsys.readouterr().out.count("The\n") == 3


def test_control_c_stops_an_answer_and_not_the_chat(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    def interrupted(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "show", interrupted)
    assert run(monkeypatch, "One\nTwo\n", "chat", "--max-tokens", "6") == 0
    assert "".join(shown) == "The " + "The ca"
    assert len(fake.aborted) == 1
    assert "The \n<|user|>Two" in fake.tokenizer.decode(fake.submitted[1].prompt)
    assert " …" in capsys.readouterr().out


def test_a_message_that_the_template_refuses_ends_nothing(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.tokenizer = byte_tokenizer("{% if messages[0].content == 'bad' %}{{ raise_exception('No!') }}{% endif %}x")
    assert run(monkeypatch, "bad\ngood\n", "chat", "--max-tokens", "3") == 0
    captured = capsys.readouterr()
    assert "No!" in captured.err
    assert "The\n" in captured.out


def test_chat_needs_a_template(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.tokenizer = byte_tokenizer(None)
    assert run(monkeypatch, "", "chat") == 2
    assert "chat template" in capsys.readouterr().err


def test_one_file_serves_all_commands(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text("port: 9000\ntemperature: 0.5\nmax_tokens: 3\n")
    assert run(monkeypatch, "x", "generate", "--config", str(file)) == 0
    assert fake.submitted[0].params.temperature == 0.5
    assert fake.submitted[0].params.max_tokens == 3
    capsys.readouterr()
    with bind(ServerConfig(port=0)) as sock:
        port = sock.getsockname()[1]
        assert cli.main(["serve", "--config", str(file), "--port", str(port)]) == 2
    assert "cannot listen" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["flag", "file"])
def test_chat_takes_another_template(
    how: str, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    template, file = tmp_path / "chat.jinja", tmp_path / "octavo.yaml"
    template.write_text("It said: {{ messages[-1].content }}")
    file.write_text(f"chat_template: {template}")
    given = ["--chat-template", str(template)] if how == "flag" else ["--config", str(file)]
    assert run(monkeypatch, "Hi\n", "chat", "--max-tokens", "1", *given) == 0
    assert fake.tokenizer.decode(fake.submitted[0].prompt) == "It said: Hi"


def test_chat_greets_only_on_a_terminal(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "", "chat") == 0
    assert capsys.readouterr().out == ""


def test_bytes_that_are_no_text_are_replaced(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "", "generate", "--max-tokens", "1", "--prompt", "a\udcff") == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    assert cli.main(["generate", "--max-tokens", "1"]) == 0
    assert [fake.tokenizer.decode(stream.prompt) for stream in fake.submitted] == ["a\ufffd"] * 2


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_closed_standard_input_is_one_line(
    command: str, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert cli.main([command]) == 2
    assert capsys.readouterr().err == "octavo: error: standard input is closed\n"


def test_a_top_p_of_zero_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--top-p", "0"]) == 2
    assert "--top-p: expected a number above 0, up to 1, not '0'" in capsys.readouterr().err


def test_flags_cannot_be_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "--prom", "x"])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_debugging_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError):
        cli.main(["serve", "--log-level", "debug", "--port", "x"])
    monkeypatch.setenv("OCTAVO_LOG_LEVEL", "debug")
    with pytest.raises(ConfigError):
        cli.main(["generate", "--top-p", "0"])
