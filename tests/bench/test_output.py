import argparse
import json
import re
import shlex
from pathlib import Path

import pytest

from bench import output
from engine.errors import ConfigError, OctavoError


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--serve-args", default="")
    output.add_arguments(parser, plot="a curve")


def parse(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    declare(parser)
    return parser.parse_args(list(given))


def test_columns_are_aligned_the_first_to_the_left_and_heads_at_the_bottom() -> None:
    shown = output.table(["mode", "output\ntok/s", "ms"], [["none", "1.00", "7"], ["continuous", "12.50", "1,234"]])
    assert shown.split("\n") == [
        "            output       ",
        "mode         tok/s     ms",
        "none          1.00      7",
        "continuous   12.50  1,234",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.0, "0.00"), (9.876, "9.88"), (100.0, "100.0"), (999.94, "999.9"), (12345.6, "12,346")],
)
def test_figures_have_three_digits_or_so(value: float | None, shown: str) -> None:
    assert output.figure(value) == shown


def test_a_document_tells_the_command_that_does_the_same_and_no_folders() -> None:
    args = parse("--size", "16", "--shared", "--json", "/some/where/out.json")
    contents = output.document("chat", declare, args, {"turns": [1]})
    assert contents["command"] == "octavo bench chat --size 16 --shared --json out.json"
    assert vars(parse(*shlex.split(contents["command"])[3:])) == {**vars(args), "json": "out.json"}
    assert contents["arguments"] == {"size": 16, "shared": True, "serve_args": "", "json": "out.json", "plot": None}
    assert contents["turns"] == [1]
    assert contents["machine"]["cpus"] >= 1
    assert contents["versions"].keys() == {"octavo", "aiohttp", "python"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", contents["timestamp"])


@pytest.mark.parametrize("value", ["--compat", "--threads 2", "-x", "plain", "it's"])
def test_a_value_that_looks_like_a_flag_is_told_so_that_it_can_be_read_again(value: str) -> None:
    args = parse(f"--serve-args={value}")
    words = shlex.split(output.document("chat", declare, args, {})["command"])
    assert parse(*words[3:]) == args


def test_what_is_asked_for_is_written_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn: list[str] = []
    output.save(parse(), {}, drawn.append)
    assert (drawn, capsys.readouterr().out) == ([], "")
    report = tmp_path / "out.json"
    output.save(parse("--json", str(report), "--plot", "out.png"), {"a": 1.5}, drawn.append)
    assert json.loads(report.read_text()) == {"a": 1.5}
    assert drawn == ["out.png"]
    assert capsys.readouterr().out == f"wrote {report}\nwrote out.png\n"


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match=r"^cannot write .*: Is a directory$"):
        output.save(parse("--json", str(tmp_path)), {}, print)


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_a_folder_that_is_not_there_is_noticed_before_measuring(tmp_path: Path, flag: str) -> None:
    output.check(parse(flag, str(tmp_path / "out.png")))
    output.check(parse(flag, "out.png"))
    with pytest.raises(ConfigError, match=f"^{flag} .*: there is no folder "):
        output.check(parse(flag, str(tmp_path / "absent" / "out.png")))


@pytest.mark.parametrize("name", ["plot.xyz", "plot", ".png"])
def test_a_plot_of_no_known_format_is_noticed_before_measuring(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--plot .*{name}: the name must end in one of .*png.*svg"):
        output.check(parse("--plot", str(tmp_path / name)))


def test_the_ending_of_a_plot_may_be_in_capitals(tmp_path: Path) -> None:
    output.check(parse("--plot", str(tmp_path / "plot.PNG")))
