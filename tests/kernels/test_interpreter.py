"""The interpreter's guards find what they are there for."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.interpreter import Interpreter

FAULTY = "tests.kernels.faulty_kernels"


@pytest.fixture
def mortal() -> Iterator[Interpreter]:
    """One that may be killed."""
    process = Interpreter()
    yield process
    process.close()


def test_a_kernel_without_a_fault_copies(interpreter: Interpreter) -> None:
    x = torch.randn(40)
    assert torch.equal(interpreter.call(FAULTY, "shifted", x, 0, 40), x)


def test_what_a_kernel_does_not_write_is_poison(interpreter: Interpreter) -> None:
    assert interpreter.call(FAULTY, "shifted", torch.randn(40), 0, 39)[39].isnan()


def test_a_write_before_a_tensor_is_found(interpreter: Interpreter) -> None:
    with pytest.raises(AssertionError, match="wrote before a tensor"):
        interpreter.call(FAULTY, "shifted", torch.randn(40), -1, 2)


def test_a_step_past_a_tensor_kills(mortal: Interpreter) -> None:
    with pytest.raises(AssertionError, match="SIGSEGV: it left its tensors"):
        mortal.call(FAULTY, "shifted", torch.randn(40), 0, 41)


def test_bfloat16_is_multiplied_and_rounded_as_torch_does(interpreter: Interpreter) -> None:
    a, b = torch.randn(2, 16, 16).to(torch.bfloat16)
    expected = (a.float() @ b.float()).to(torch.bfloat16)
    torch.testing.assert_close(interpreter.call(FAULTY, "multiplied", a, b), expected, rtol=2**-8, atol=1e-3)
