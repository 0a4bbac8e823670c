import argparse
import importlib.util
import shlex
import subprocess
import sys

import pytest

from bench import cli, serve
from bench.arrivals import ClosedLoop, OpenLoop
from bench.prompts import RandomIds, RandomWords
from engine.errors import ConfigError


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(list(flags))


def test_the_defaults_make_a_plan() -> None:
    plan = serve.make_plan(parse())
    assert plan.levels == (ClosedLoop(1), ClosedLoop(8), ClosedLoop(32))
    assert isinstance(plan.source, RandomIds)
    assert plan.ignore_eos
    assert [plan.requests(level, parse()) for level in plan.levels] == [8, 32, 128]
    assert plan.requests(plan.levels[0], parse("--num-requests", "5")) == 5


def test_rates_make_open_loops() -> None:
    assert serve.make_plan(parse("--rate", "2", "--burstiness", "0.5")).levels == (OpenLoop(2, 0.5),)


def test_rate_and_concurrency_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--rate", "2", "--concurrency", "8")
    assert "not allowed with" in capsys.readouterr().err


def test_chat_prompts_are_text() -> None:
    assert isinstance(serve.make_plan(parse("--endpoint", "chat")).source, RandomWords)


@pytest.mark.parametrize(
    "flags",
    [
        ["--num-requests", "0"],
        ["--repeats", "0"],
        ["--warmup", "-1"],
        ["--timeout", "0"],
        ["--concurrency", "0"],
        ["--rate", "-2"],
        ["--base-url", "localhost:8000"],
        ["--endpoint", "chat", "--prompt-format", "ids"],
        ["--extra-body", "[]"],
        ["--extra-body", "{"],
        ["--goodput", "itl=3"],
        ["--goodput", "ttft"],
        ["--goodput", "ttft=-1"],
        ["--input-len", "0"],
        ["--random-range-ratio", "1"],
        ["--vocab-size", "1"],
        ["--prompts", "no/such/file.txt"],
    ],
)
def test_a_setting_that_cannot_work_is_one_line_naming_its_flag(flags: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        serve.make_plan(parse(*flags))
    message = str(caught.value)
    assert "\n" not in message
    assert flags[-2] in message


def test_goodput_objectives_are_parsed() -> None:
    assert serve.parse_objective("ttft=200, tpot=50") == {"ttft": 200, "tpot": 50}
    assert serve.parse_objective(None) == {}


def test_the_recorded_command_does_the_same_and_hides_the_key() -> None:
    given = ["--rate", "2", "--extra-body", '{"top_k": 5}', "--no-ignore-eos", "--details", "--no-stream-usage"]
    args = parse(*given, "--api-key", "s")
    words = shlex.split(serve.command_line(args))
    assert words[:3] == ["octavo", "bench", "serve"]
    again = parse(*words[3:])
    assert again.api_key == "***"
    assert {**vars(again), "api_key": "s"} == vars(args)


def test_the_recorded_command_names_files_without_their_folders() -> None:
    words = serve.command_line(parse("--json", "/some/where/out.json", "--prompts", "/home/me/questions.jsonl"))
    assert words == "octavo bench serve --prompts questions.jsonl --json out.json"


def group() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="octavo bench")
    cli.add_arguments(parser)
    return parser


def test_the_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        group().parse_args(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown and command.help in shown for name, command in cli.COMMANDS.items())


def test_a_commands_help_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(group().parse_args(["serve", "--help"]))
    shown = capsys.readouterr().out
    assert shown.startswith("usage: octavo bench serve ")
    assert "--concurrency" in shown


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        group().parse_args(["nonsense"])
    assert stopped.value.code == 2
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("serve", "repeats"),
        ("batching", "batch-size"),
        ("chat", "turns"),
        ("stall", "streams"),
        ("scheduler", "steps"),
        ("step", "steps"),
    ],
)
def test_a_setting_that_cannot_work_exits_with_2_and_one_line(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(group().parse_args([command, f"--{flag}", "0"])) == 2
    assert capsys.readouterr().err == f"octavo bench {command}: error: --{flag} must be at least 1, not 0\n"


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import argparse, sys; from bench import cli; p = argparse.ArgumentParser(); cli.add_arguments(p)\n"
        "for command in cli.COMMANDS:\n"
        "    try: cli.run(p.parse_args([command, '--help']))\n"
        "    except SystemExit: pass\n"
        "print(*({'aiohttp', 'matplotlib', 'numpy', 'torch', 'tqdm'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert done.stdout.count("usage: ") == len(cli.COMMANDS)


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("aiohttp", ["serve"]),
        ("aiohttp", ["ceiling"]),
        ("aiohttp", ["batching"]),
        ("aiohttp", ["chat"]),
        ("aiohttp", ["stall"]),
        ("matplotlib", ["serve", "--plot", "x.svg"]),
        ("matplotlib", ["scheduler", "--plot", "x.svg"]),
    ],
)
def test_a_package_that_only_measuring_needs_is_asked_for_in_one_line(
    missing: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    assert cli.run(group().parse_args(command)) == 2
    expected = f"octavo bench {command[0]}: error: this needs {missing}: pip install 'octavo[bench]'\n"
    assert capsys.readouterr().err == expected
