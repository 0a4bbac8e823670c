import argparse
import math

import pytest

from bench import flags
from engine.errors import ConfigError


def test_a_number_below_its_bound_is_refused_by_the_name_of_its_flag() -> None:
    args = argparse.Namespace(batch_size=0, repeats=1, delay=0.0)
    flags.at_least(args, 1, "repeats")
    flags.at_least(args, 0, "delay", "batch_size")
    with pytest.raises(ConfigError, match=r"^--batch-size must be at least 1, not 0$"):
        flags.at_least(args, 1, "repeats", "batch_size")


def test_a_flag_that_is_not_given_is_within_every_bound() -> None:
    flags.at_least(argparse.Namespace(max_num_seqs=None), 8, "max_num_seqs")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(value: float) -> None:
    args = argparse.Namespace(delay=value)
    with pytest.raises(ConfigError, match=f"--delay must be at least 0, not {value}"):
        flags.at_least(args, 0, "delay")
    with pytest.raises(ConfigError, match=f"--delay must be positive, not {value}"):
        flags.positive(args, "delay")


def test_zero_is_not_positive() -> None:
    flags.positive(argparse.Namespace(timeout=0.001), "timeout")
    with pytest.raises(ConfigError, match=r"--timeout must be positive, not 0\.0"):
        flags.positive(argparse.Namespace(timeout=0.0), "timeout")


def test_a_list_keeps_its_order_and_bears_spaces_and_a_last_comma() -> None:
    assert flags.items(" b, a,", "--x") == ["b", "a"]
    assert flags.whole_numbers("512, 64,", "--x") == [512, 64]


@pytest.mark.parametrize("text", ["", " , ", "8,8", "8, 8"])
def test_a_list_has_at_least_one_value_and_none_twice(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--x "):
        flags.items(text, "--x")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "1e3", "x", "²", "08", "1" + 9 * "0", 5000 * "9"])
def test_what_is_no_positive_whole_number_of_sane_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--x takes positive whole numbers, not "):
        flags.whole_numbers(text, "--x")


def test_an_address_is_one_of_http() -> None:
    flags.http_address("http://127.0.0.1:1", "--base-url")
    flags.http_address("https://there", "--base-url")
    with pytest.raises(ConfigError, match="--base-url must begin with http"):
        flags.http_address("localhost:8000", "--base-url")
