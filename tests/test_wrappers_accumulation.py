"""Accumulated gradients with a schedule, against optax and torch, and what a schedule is called with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

import recorded
from mlx_adagrad import Adagrad, checkpoint, presets, schedules
from mlx_adagrad.wrappers import GradientAccumulation, LossScale, SkipNonFinite

REAL = json.loads((recorded.GOLDEN / "accumulated_updates.json").read_text())
PRESETS = {"optax": presets.optax, "torch": presets.torch}
W = {"w": mx.ones((2,))}


def weights_of(optimizer: Any, compiled: bool) -> np.ndarray:
    w = {"w": mx.array(REAL["init"], mx.float32)}
    optimizer.init(w)
    state = [w, optimizer.state]

    def step(g: mx.array) -> None:
        w.update(optimizer.apply_gradients({"w": g}, w))

    run = mx.compile(step, inputs=state, outputs=state) if compiled else step
    weights = []
    for g in REAL["gradients"]:
        run(mx.array(g, mx.float32))
        weights.append(w["w"].tolist())
    return np.array(weights)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("framework", PRESETS)
def test_a_schedule_that_counts_updates_equals_the_framework(framework: str, compiled: bool) -> None:
    name, arguments = REAL[framework]["schedule"]
    inner = PRESETS[framework](getattr(schedules, name)(**arguments))
    optimizer = GradientAccumulation(inner, REAL["steps"], schedule_counts="updates")
    np.testing.assert_allclose(weights_of(optimizer, compiled), REAL[framework]["weights"], rtol=2e-6, atol=2e-7)


class Recording:
    """A schedule that keeps what it was called with."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, step: mx.array) -> mx.array:
        self.steps.append(int(step))
        return mx.array(0.1)


INNER: dict[str, Callable[[Any], Any]] = {
    "ours": lambda rate: Adagrad(rate),
    "group": lambda rate: Adagrad(0.1, groups=[{"params": "w", "lr": rate}]),
    "stock": lambda rate: optim.SGD(rate),
    "wrapped": lambda rate: SkipNonFinite(optim.Adam(rate)),
}
COUNTED = {"calls": [2, 5, 8], "updates": [0, 1, 2]}


@pytest.mark.parametrize("around", [lambda o: o, lambda o: LossScale(o, 2.0)])
@pytest.mark.parametrize("counts", COUNTED)
@pytest.mark.parametrize("kind", INNER)
def test_what_a_schedule_is_called_with(kind: str, counts: str, around: Callable[[Any], Any]) -> None:
    rate = Recording()
    optimizer = around(GradientAccumulation(INNER[kind](rate), 3, schedule_counts=counts))
    rate.steps.clear()  # the constructor asks for the first rate
    for _ in range(9):
        optimizer.apply_gradients(W, W)
    assert rate.steps == COUNTED[counts]


def test_the_default_and_the_keras_preset_count_calls() -> None:
    for make in (
        lambda rate: GradientAccumulation(Adagrad(rate), 3),
        lambda rate: presets.keras(rate, gradient_accumulation_steps=3),
    ):
        rate = Recording()
        optimizer = make(rate)
        rate.steps.clear()
        for _ in range(6):
            optimizer.apply_gradients(W, W)
        assert rate.steps == [2, 5]


def test_another_word_is_refused() -> None:
    for word in ("steps", None, True):
        wrong: Any = word
        with pytest.raises(
            ValueError, match=r"\[GradientAccumulation\] 'schedule_counts' must be 'calls' or 'updates'"
        ):
            GradientAccumulation(Adagrad(0.1), 2, schedule_counts=wrong)


def test_a_checkpoint_of_the_other_count_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "run.safetensors"
    for saved, live in (("updates", "calls"), ("calls", "updates")):
        checkpoint.save(path, GradientAccumulation(Adagrad(0.1), 2, schedule_counts=saved))
        with pytest.raises(ValueError, match="schedule_counts"):
            checkpoint.load(path, GradientAccumulation(Adagrad(0.1), 2, schedule_counts=live))
        checkpoint.load(path, GradientAccumulation(Adagrad(0.1), 2, schedule_counts=saved))
