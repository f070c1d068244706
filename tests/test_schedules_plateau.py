"""ReduceLROnPlateau against torch's own rates and counters, through wrappers, groups and compiled steps."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

import recorded
from mlx_adagrad import Adagrad, presets, schedules
from mlx_adagrad.schedules import ReduceLROnPlateau
from mlx_adagrad.wrappers import ClipByGlobalNorm, ExponentialMovingAverage

REAL = json.loads((recorded.GOLDEN / "plateau.json").read_text())["runs"]
COUNTERS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


def grouped() -> Adagrad:
    return presets.torch(0.4, groups=[{"params": "b", "lr": 0.1}, {"params": "c", "weight_decay": 0.1}])


def rates_of(optimizer: Any) -> list[float]:
    return [optimizer.learning_rate.item(), optimizer.groups.states(optimizer.state)[0]["learning_rate"].item()]


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: ExponentialMovingAverage(ClipByGlobalNorm(o, 1.0))])
@pytest.mark.parametrize("run", REAL, ids=lambda run: "-".join(run["options"]))
def test_equals_torch(run: dict[str, Any], wrap: Callable[[Any], Any]) -> None:
    adagrad = grouped()
    scheduler = ReduceLROnPlateau(wrap(adagrad), **run["options"])
    for metric, rates, state in zip(run["metrics"], run["rates"], run["states"], strict=True):
        scheduler.step(metric)
        np.testing.assert_allclose(rates_of(adagrad), rates, rtol=1e-6)
        assert [scheduler.state_dict()[key] for key in COUNTERS] == state


@pytest.mark.parametrize("run", REAL, ids=lambda run: "-".join(run["options"]))
def test_saved_and_continued_equals_never_stopped(run: dict[str, Any]) -> None:
    whole, first = (ReduceLROnPlateau(grouped(), **run["options"]) for _ in range(2))
    for metric in run["metrics"][:9]:
        whole.step(metric)
        first.step(metric)
    again = ReduceLROnPlateau(copy.deepcopy(first.optimizer), **run["options"])
    saved = json.loads(json.dumps(first.state_dict()))
    again.load_state_dict(saved | {"mode_worse": math.inf, "_last_lr": [0.4]})  # torch's dict holds these too
    for metric in run["metrics"][9:]:
        whole.step(metric)
        again.step(np.float64(metric))
    assert again.state_dict() == whole.state_dict() and rates_of(again.optimizer) == rates_of(whole.optimizer)


def test_a_compiled_step_takes_up_the_rate() -> None:
    optimizer, w = Adagrad(0.5), {"w": mx.ones(2)}
    optimizer.init(w)
    state = [w, optimizer.state]

    def step(g: mx.array) -> None:
        w.update(optimizer.apply_gradients({"w": g}, w))

    run = mx.compile(step, inputs=state, outputs=state)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    moved = []
    for metric in (1.0, 2.0):
        before = w["w"]
        optimizer.state["w"]["v"] = mx.zeros(2)
        run(mx.ones(2))
        moved.append((before - w["w"])[0].item())
        scheduler.step(mx.array([metric]))
    optimizer.state["w"]["v"] = mx.zeros(2)
    before = w["w"]
    run(mx.ones(2))
    assert moved == pytest.approx([0.5, 0.5]) and (before - w["w"])[0].item() == pytest.approx(0.05)


def test_any_optimizer_of_mlx_and_its_parts() -> None:
    parts = [optim.SGD(0.4), presets.torch(0.2)]
    scheduler = ReduceLROnPlateau(optim.MultiOptimizer(parts, [lambda path, w: path == "a"]), patience=0, factor=0.5)
    scheduler.step(1.0)
    scheduler.step(1.0)
    assert [part.learning_rate.item() for part in parts] == pytest.approx([0.2, 0.1])


@pytest.mark.parametrize(
    "optimizer", [Adagrad, optim.SGD, lambda rate: Adagrad(0.1, groups=[{"params": "b", "lr": rate}])]
)
def test_a_schedule_is_refused(optimizer: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"\[ReduceLROnPlateau\] the learning rate of the optimizer is a schedule"):
        ReduceLROnPlateau(ClipByGlobalNorm(optimizer(schedules.torch_step_lr(0.1, 3)), 1.0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"factor": 1.0}, ValueError, "'factor' must be below 1 but got 1.0"),
        ({"factor": -0.1}, ValueError, "'factor' must be non-negative"),
        ({"mode": "low"}, ValueError, "'mode' must be 'min' or 'max' but got 'low'"),
        ({"threshold_mode": "log"}, ValueError, "'threshold_mode' must be 'rel' or 'abs'"),
        ({"patience": -1}, ValueError, "'patience' must be non-negative"),
        ({"patience": 1.5}, TypeError, "'patience' must be an integer"),
        ({"cooldown": True}, TypeError, "'cooldown' must be an integer"),
        ({"min_lr": [0.1]}, ValueError, "'min_lr' must be a number or a list of 2 but got 1"),
        ({"min_lr": -1.0}, ValueError, "'min_lr' must be non-negative"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ReduceLROnPlateau(grouped(), **options)


def test_bad_calls_change_nothing() -> None:
    scheduler = ReduceLROnPlateau(grouped(), patience=0)
    scheduler.step(1.0)
    before = scheduler.state_dict()
    for call, error in (
        (lambda: scheduler.step("1.0"), TypeError),
        (lambda: scheduler.load_state_dict({"best": 1.0}), ValueError),
        (lambda: scheduler.load_state_dict(before | {"last_epoch": -3}), ValueError),
        (lambda: scheduler.load_state_dict(before | {"best": "low"}), TypeError),
    ):
        with pytest.raises(error):
            call()
        assert scheduler.state_dict() == before
    wrong: Any = "adagrad"
    with pytest.raises(TypeError, match="must be an mlx.optimizers.Optimizer but got 'adagrad'"):
        ReduceLROnPlateau(wrong)
