"""The memory example, run as a user runs it."""

import re

import pytest

from memory_report import MEMORIES, Cost
from test_examples import assert_picture, run

WAYS = {  # bytes of weights, gradients and state
    "fp32": (4, 4, 4),
    "fp32, v in 8 bits": (4, 4, 1.004),
    "bf16, stock MLX": (2, 2, 2),
    "bf16, nearest": (2, 2, 4),
    "bf16, compensated": (2, 2, 6),
    "bf16, stochastic": (2, 2, 4),
    "bf16, v in bf16": (2, 2, 2),
    "bf16, v in 8 bits": (2, 2, 1.004),
    "bf16, v by row": (2, 2, 0.004),
}


def test_memory(tmp_path):
    output = run("memory.py", "--seeds", 1, "--epochs", 8, "--out", tmp_path)
    lines = output.splitlines()
    losses = {}
    for name, costs in WAYS.items():
        (line,) = (line for line in lines if re.match(rf"{name}  ", line))
        *numbers, loss, _ = [float(x) for x in line[len(name) :].split()[:6]]
        assert tuple(numbers[:3]) == costs and numbers[3] == pytest.approx(sum(costs), abs=0.01)
        losses[name] = loss
    exact = losses["fp32"]
    for name in ("bf16, stochastic", "bf16, compensated", "bf16, v in bf16", "bf16, v in 8 bits", "fp32, v in 8 bits"):
        assert losses[name] == pytest.approx(exact, rel=0.15)
    assert_picture(tmp_path / "memory.png")


def test_what_fits():
    assert [Cost(2, 2, 1).billions(memory) for memory in MEMORIES] == [1.2, 2.4, 4.8, 9.6]


@pytest.mark.parametrize("argument", ["--seeds", "--epochs"])
def test_wrong_arguments(argument):
    assert "must be positive" in run("memory.py", argument, 0, code=2)
