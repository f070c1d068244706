"""Schedules against the real frameworks' values, closed forms in float64, ``mx.compile`` and their own configs."""

from __future__ import annotations

import copy
import functools
import json
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

import recorded
from mlx_adagrad import Adagrad, schedules
from mlx_adagrad.schedules.named import FACTORIES

REAL = json.loads((recorded.GOLDEN / "schedules.json").read_text())["schedules"]


def counted(step: int) -> mx.array:
    """The step as ``mlx.optimizers.Optimizer`` counts it."""
    return mx.array(step, mx.uint64)


def values(schedule: Callable[..., Any], steps: Any) -> np.ndarray:
    rates = [schedule(counted(step)) for step in steps]
    assert all(rate.shape == () and rate.dtype == mx.float32 for rate in rates)
    return np.array(mx.stack(rates), np.float64)


def ours(framework: str, name: str, args: dict[str, Any]) -> schedules.NamedSchedule:
    made = dict(args)
    for key in {"lr_lambda", "scale_fn"} & args.keys():
        made[key] = function(args[key])
    for key in {"schedulers", "schedules"} & args.keys():
        made[key] = [ours(framework, *inner) for inner in args[key]]
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return getattr(schedules, f"{framework}_{snake}")(**made)


@functools.cache  # one function for one expression, so that schedules of it are equal
def function(expression: str) -> Callable[[Any], Any]:
    return eval("lambda epoch: " + expression)


# ---- real values


@pytest.mark.parametrize("entry", REAL, ids=lambda entry: f"{entry['framework']}-{entry['name']}")
def test_equals_the_framework(entry: dict[str, Any]) -> None:
    schedule, want = ours(entry["framework"], entry["name"], entry["args"]), np.array(entry["values"])
    near = {"rtol": 1e-6, "atol": 5e-7 * want.max()}  # a rate near 0 is a difference of large ones in the frameworks
    np.testing.assert_allclose(values(schedule, entry["steps"]), want, **near)
    np.testing.assert_allclose([schedule(step).item() for step in entry["steps"]], want, **near)
    np.testing.assert_allclose(values(mx.compile(schedule), entry["steps"]), want, **near)


SCHEDULED = [case for case in recorded.cases() if case.lr is not None and not np.all(case.lr == case.lr[0])]


def scheduled_rates(case: recorded.Case) -> list[Any]:
    """Our schedule of each group of a recorded run."""
    hp = case.hp
    if "scheduler" in hp:
        name = hp["scheduler"].pop("name")
        rates = [group.get("lr", hp["lr"]) for group in hp.get("groups", [{}])]
        return [ours(case.framework, name, {"lr": rate, **hp["scheduler"]}) for rate in rates]
    if case.framework == "keras":
        return [schedules.from_keras(case.entry["get_config"]["learning_rate"])]
    options = hp["learning_rate"]
    name = options.pop("name")
    if case.framework == "optax":
        return [ours("optax", name, options)]
    if case.framework == "paddle":  # gamma ** step, as MLX's own
        return [optim.exponential_decay(options["learning_rate"], options["gamma"])]
    return [getattr(optim, name)(**options)]


@pytest.mark.parametrize("case", SCHEDULED, ids=str)
def test_equals_the_rates_of_recorded_runs(case: recorded.Case) -> None:
    if case.id in ("keras_callable_lr", "keras_set_lr"):  # no schedules
        return
    assert case.lr is not None
    for schedule, want in zip(scheduled_rates(case), case.lr.reshape(case.steps, -1).T, strict=True):
        np.testing.assert_allclose(values(schedule, range(case.steps)), want, rtol=1e-6, atol=5e-7 * want.max())


# ---- closed forms, far out and in float64

HUGE = 2**24 + 1  # the first whole number that fp32 has not
FAR = [*range(0, 60), *range(60, 3000, 37), HUGE - 1, HUGE, HUGE + 1, 2 * HUGE - 1, 2 * HUGE, 2 * HUGE + 1, 10**9]


def cosine(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


def restarts(step: int, first: int, factor: float, height: float) -> float:
    start, length, level = 0.0, float(first), 1.0
    while step >= start + length - 1e-9 * start:
        start, length, level = start + length, length * factor, level * height
    return level * cosine((step - start) / length)


CLOSED_FORMS: dict[str, tuple[Any, Callable[[int], float]]] = {
    "keras staircase": (
        schedules.keras_inverse_time_decay(0.5, HUGE, 0.7, staircase=True),
        lambda t: 0.5 / (1 + 0.7 * (t // HUGE)),
    ),
    "keras exponential staircase": (
        schedules.keras_exponential_decay(0.5, HUGE, 0.7, staircase=True),
        lambda t: 0.5 * 0.7 ** (t // HUGE),
    ),
    "keras polynomial": (
        schedules.keras_polynomial_decay(0.5, 700, 0.01, power=3.0),
        lambda t: 0.49 * (1 - min(t, 700) / 700) ** 3 + 0.01,
    ),
    "keras polynomial cycle": (
        schedules.keras_polynomial_decay(0.5, 29, 0.01, power=0.5, cycle=True),
        lambda t: 0.49 * (1 - t / (29 * max(1, -(-t // 29)))) ** 0.5 + 0.01,
    ),
    "keras cosine": (
        schedules.keras_cosine_decay(0.1, 500, 0.2, warmup_target=0.5, warmup_steps=40),
        lambda t: 0.1 + 0.4 * t / 40 if t < 40 else 0.5 * (0.8 * cosine(min(t - 40, 500) / 500) + 0.2),
    ),
    "keras restarts": (
        schedules.keras_cosine_decay_restarts(0.5, 10, 1.2, 0.9, 0.1),
        lambda t: 0.5 * (0.9 * restarts(t, 10, 1.2, 0.9) + 0.1),
    ),
    "keras restarts of one length": (
        schedules.keras_cosine_decay_restarts(0.5, 10, 1.0, 0.99, 0.1),
        lambda t: 0.5 * (0.9 * 0.99 ** (t // 10) * cosine(t % 10 / 10) + 0.1),
    ),
    "keras piecewise": (
        schedules.keras_piecewise_constant_decay([3, 50, HUGE], [0.4, 0.3, 0.2, 0.1]),
        lambda t: 0.4 if t <= 3 else 0.3 if t <= 50 else 0.2 if t <= HUGE else 0.1,
    ),
    "torch step": (schedules.torch_step_lr(0.5, HUGE, 0.3), lambda t: 0.5 * 0.3 ** (t // HUGE)),
    "torch milestones": (
        schedules.torch_multi_step_lr(0.5, [HUGE, 2 * HUGE, 70], 0.3),
        lambda t: 0.5 * 0.3 ** sum(t >= milestone for milestone in (70, HUGE, 2 * HUGE)),
    ),
    "torch exponential": (schedules.torch_exponential_lr(0.5, 0.9999), lambda t: 0.5 * 0.9999**t),
    "torch linear": (
        schedules.torch_linear_lr(0.5, 0.1, 0.9, 2500),
        lambda t: 0.5 * (0.1 + 0.8 * min(t, 2500) / 2500),
    ),
    "torch cosine": (
        schedules.torch_cosine_annealing_lr(0.5, 37, 0.01),
        lambda t: 0.01 + 0.49 * cosine(t % 74 / 37),
    ),
    "torch one cycle": (
        schedules.torch_one_cycle_lr(0.5, 1000),
        lambda t: (
            0.02 + 0.48 * (1 - cosine(t / 299)) if t <= 299 else 2e-6 + (0.5 - 2e-6) * cosine(min(1, (t - 299) / 700))
        ),
    ),
    "torch polynomial": (
        schedules.torch_polynomial_lr(0.5, 2500, 1.5),
        lambda t: 0.5 * (1 - min(t, 2500) / 2500) ** 1.5,
    ),
    "torch constant": (schedules.torch_constant_lr(0.5, 0.3, HUGE), lambda t: 0.15 if t < HUGE else 0.5),
    "torch restarts": (
        schedules.torch_cosine_annealing_warm_restarts(0.5, 10, 2, 0.01),
        lambda t: 0.01 + 0.49 * restarts(t, 10, 2, 1),
    ),
    "torch cyclic": (
        schedules.torch_cyclic_lr(0.01, 0.5, 30, 70, "exp_range", 0.9999),
        lambda t: 0.01 + 0.49 * 0.9999**t * (t % 100 / 30 if t % 100 <= 30 else (100 - t % 100) / 70),
    ),
    "torch sequence": (
        schedules.torch_sequential_lr(
            [schedules.torch_constant_lr(0.5, 0.3, 10), schedules.torch_step_lr(0.5, 40, 0.5)], [HUGE - 1]
        ),
        lambda t: 0.5 * 0.5 ** ((t - HUGE + 1) // 40) if t >= HUGE - 1 else 0.15 if t < 10 else 0.5,
    ),
    "torch chain": (
        schedules.torch_chained_scheduler(
            [schedules.torch_linear_lr(0.5, 0.1, 1.0, 50), schedules.torch_exponential_lr(0.5, 0.9999)]
        ),
        lambda t: 0.5 * (0.1 + 0.9 * min(t, 50) / 50) * 0.9999**t,
    ),
    "optax phases": (
        schedules.optax_piecewise_interpolate_schedule("linear", 0.5, {50: 0.1, 1050: 4.0}),
        lambda t: float(np.interp(t, [0, 50, 1050], [0.5, 0.05, 0.2])),
    ),
    "optax staircase": (
        schedules.optax_exponential_decay(0.5, HUGE, 0.3, 5, staircase=True, end_value=0.05),
        lambda t: max(0.05, 0.5 * 0.3 ** (max(0, t - 5) // HUGE)),
    ),
    "optax polynomial": (
        schedules.optax_polynomial_schedule(0.5, 0.01, 2, 700, 20),
        lambda t: 0.49 * (1 - min(max(t - 20, 0), 700) / 700) ** 2 + 0.01,
    ),
    "optax warm-up": (
        schedules.optax_warmup_cosine_decay_schedule(0.1, 0.5, 40, 540, 0.1, 2.0),
        lambda t: 0.1 + 0.4 * t / 40 if t < 40 else 0.5 * (0.8 * cosine(min(t - 40, 500) / 500) ** 2 + 0.2),
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_equals_its_closed_form(name: str) -> None:
    schedule, formula = CLOSED_FORMS[name]
    np.testing.assert_allclose(values(schedule, FAR), [formula(step) for step in FAR], rtol=3e-6, atol=2e-7)


def test_torch_keeps_gamma_in_double() -> None:
    want = 0.1 * 0.9999**100_000
    assert schedules.torch_exponential_lr(0.1, 0.9999)(100_000).item() == pytest.approx(want, rel=2e-6)
    assert abs(optim.exponential_decay(0.1, 0.9999)(counted(100_000)).item() / want - 1) > 1e-3


def test_lambda_of_another_dtype_gives_fp32() -> None:
    schedule = schedules.torch_lambda_lr(0.1, lambda step: (step < 3).astype(mx.float16))
    np.testing.assert_allclose(values(schedule, [2, 3]), [0.1, 0.0], rtol=1e-3)


def test_python_steps_of_any_size() -> None:
    schedule = schedules.keras_inverse_time_decay(1.0, 2**40, 1.0, staircase=True)
    assert schedule(2**40 - 1).item() == 1.0 and schedule(2**40).item() == 0.5


def test_multiplicative_factors_are_multiplied_in_double() -> None:
    schedule = schedules.torch_multiplicative_lr(0.1, lambda step: 0.9999, total_steps=100_000)
    assert schedule(90_000).item() == pytest.approx(0.1 * 0.9999**90_000, rel=1e-6)
    assert schedule(100_001).item() == schedule(100_000).item()  # the end of the run


# ---- schedules made of schedules

MIXED: list[Any] = [
    optim.linear_schedule(0.0, 0.2, 4),
    schedules.optax_join_schedules([schedules.torch_step_lr(0.2, 2, 0.5), optim.step_decay(0.1, 0.5, 3)], [5]),
    lambda step: mx.minimum(step, 3) * 0.01,
]


@pytest.mark.parametrize("make", [schedules.torch_sequential_lr, schedules.optax_join_schedules])
def test_any_schedules_follow_each_other(make: Any) -> None:
    schedule = make(MIXED, [4, 13])
    want = [MIXED[0](t) if t < 4 else MIXED[1](t - 4) if t < 13 else MIXED[2](t - 13) for t in range(20)]
    np.testing.assert_allclose(values(schedule, range(20)), [rate.item() for rate in want], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        values(mx.compile(schedule), range(20)), [rate.item() for rate in want], rtol=1e-6, atol=1e-9
    )
    with pytest.raises(TypeError, match="'schedul.*s' is a function and cannot be saved"):
        schedule.get_config()


def test_the_config_of_a_sequence_holds_those_of_its_schedules() -> None:
    schedule = schedules.torch_sequential_lr(MIXED[:2], [4])
    config = json.loads(json.dumps(schedule.get_config()))
    assert config["config"]["schedulers"][0] == schedules.get_config(MIXED[0])
    again = schedules.from_config(config)
    assert schedules.get_config(again) == config
    assert [again(counted(t)).item() for t in range(20)] == [schedule(t).item() for t in range(20)]


# ---- every schedule

SAMPLES = {schedule.name: schedule for schedule in (ours(e["framework"], e["name"], e["args"]) for e in REAL)}
SAVABLE = [name for name in SAMPLES if name not in ("torch_lambda_lr", "torch_multiplicative_lr")]


def test_samples_and_exports_are_complete() -> None:
    assert set(SAMPLES) == set(FACTORIES)
    assert set(FACTORIES) <= set(schedules.__all__)
    assert all(hasattr(schedules, name) for name in schedules.__all__)


@pytest.mark.parametrize("name", SAMPLES)
def test_schedules_an_optimizer(name: str) -> None:
    """Inside one trace, with the state captured before the first step, the rate is the schedule's."""
    optimizer, parameters = Adagrad(SAMPLES[name]), {"w": mx.ones(3)}
    optimizer.init(parameters)
    traces = []

    def step(gradients: dict[str, mx.array]) -> None:
        traces.append(1)
        optimizer.apply_gradients(gradients, parameters)

    compiled = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    for t in range(12):
        compiled({"w": mx.ones(3)})
        mx.eval(optimizer.state)
        want = SAMPLES[name](t).item()
        assert optimizer.learning_rate.item() == pytest.approx(want, rel=2e-6, abs=1e-7)
    assert len(traces) == 1


@pytest.mark.parametrize("name", SAVABLE)
def test_config_round_trip(name: str) -> None:
    schedule = SAMPLES[name]
    config = json.loads(json.dumps(schedules.get_config(schedule), allow_nan=False))
    again: Any = schedules.from_config(config)
    assert again == schedule and schedules.get_config(again) == config
    assert [again(t).item() for t in range(9)] == [schedule(t).item() for t in range(9)]
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule


def test_config_is_a_copy() -> None:
    schedule = schedules.keras_piecewise_constant_decay([3], [0.2, 0.1])
    schedule.get_config()["config"]["values"][0] = 7.0
    assert schedule(0).item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    "schedule",
    [
        optim.exponential_decay(0.1, 0.9),
        optim.step_decay(np.float32(0.5), 0.5, 3),  # type: ignore[arg-type]
        optim.cosine_decay(0.1, 7, end=0.01),
        optim.linear_schedule(0, 0.1, 5),
        optim.join_schedules([optim.linear_schedule(0, 0.1, 5), optim.cosine_decay(0.1, 9)], [5]),
        optim.join_schedules([schedules.torch_step_lr(0.1, 2), optim.step_decay(0.1, 0.5, 2)], [4]),
    ],
    ids=lambda schedule: schedule.__qualname__.split(".")[0],
)
def test_config_round_trip_of_mlx_schedules(schedule: Callable[..., Any]) -> None:
    config = json.loads(json.dumps(schedules.get_config(schedule)))
    again = schedules.from_config(config)
    assert [again(counted(t)).item() for t in range(20)] == [schedule(counted(t)).item() for t in range(20)]
    assert schedules.get_config(again) == config


def exponential_decay(init: float) -> Callable[[mx.array], mx.array]:
    """A user's function that only shares its name with MLX's."""

    def schedule(step: mx.array) -> mx.array:
        return init * step

    return schedule


OTHERS = [lambda step: 0.1 * step, exponential_decay(0.1), optim.exponential_decay, optim.Adam, 0.1]


@pytest.mark.parametrize("other", OTHERS, ids=["lambda", "own", "maker", "class", "number"])
def test_other_callables_have_no_config(other: Any) -> None:
    with pytest.raises(TypeError, match="can be saved"):
        schedules.get_config(other)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "must have 'name' and 'config'"),
        ({"name": "torch_step_lr"}, "must have 'name' and 'config'"),
        ({"name": "torch_step_lr", "config": {}, "extra": 1}, "must have 'name' and 'config'"),
        ({"name": "torch_step_lrs", "config": {}}, "no schedule 'torch_step_lrs'"),
        ({"name": ["torch_step_lr"], "config": {}}, "no schedule"),
        ({"name": "torch_step_lr", "config": 3}, "must be a mapping"),
        ({"name": "torch_step_lr", "config": {"lr": 0.1}}, "torch_step_lr lacks 'step_size'"),
        ({"name": "torch_step_lr", "config": {"lr": 0.1, "step_size": 2, "x": 1}}, "does not know 'x'"),
        ({"name": "torch_step_lr", "config": {"lr": -0.1, "step_size": 2}}, "'lr' must be non-negative"),
        ({"name": "exponential_decay", "config": {"init": 0.1}}, "exponential_decay lacks 'decay_rate'"),
        ({"name": "exponential_decay", "config": 3}, "must be a mapping"),
        ({"name": "join_schedules", "config": {"schedules": [{}], "boundaries": []}}, "must have 'name'"),
    ],
)
def test_bad_configs_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedules.from_config(config)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exponential_decay", {"init": "0.1", "decay_rate": 0.9}, "'init' must be a real number"),
        ("join_schedules", {"schedules": 3, "boundaries": []}, "'schedules' must be a list"),
        ("torch_step_lr", {"lr": "0.1", "step_size": 2}, "'lr' must be a real number"),
    ],
)
def test_wrong_types_in_configs_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        schedules.from_config({"name": name, "config": options})


# ---- wrong arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.keras_exponential_decay(-0.1, 5, 0.9), "[keras_exponential_decay] 'initial_learning_rate'"),
        (lambda: schedules.keras_exponential_decay(0.1, 0, 0.9), "'decay_steps' must be positive but got 0"),
        (lambda: schedules.keras_exponential_decay(0.1, math.inf, 0.9), "'decay_steps' must be finite"),
        (lambda: schedules.keras_exponential_decay(math.nan, 5, 0.9), "'initial_learning_rate' must be finite"),
        (lambda: schedules.keras_cosine_decay(0.1, 5, warmup_target=-1.0), "'warmup_target' must be non-negative"),
        (lambda: schedules.keras_cosine_decay_restarts(0.1, 5, 0.5), "'t_mul' must be at least 1 but got 0.5"),
        (lambda: schedules.keras_piecewise_constant_decay([1], [0.1]), "one number more than 'boundaries'"),
        (lambda: schedules.keras_piecewise_constant_decay([2, 2], [0.1, 0.2, 0.3]), "'boundaries' must increase"),
        (lambda: schedules.torch_step_lr(0.1, 0), "'step_size' must be positive"),
        (lambda: schedules.torch_multi_step_lr(0.1, [3, -1]), "'milestones' must be non-negative"),
        (lambda: schedules.torch_linear_lr(0.1, 0.0), "'start_factor' must be positive"),
        (lambda: schedules.torch_linear_lr(0.1, 1.5), "'start_factor' must be between 0 and 1"),
        (lambda: schedules.torch_one_cycle_lr(0.1), "'total_steps', or 'epochs' and 'steps_per_epoch'"),
        (lambda: schedules.torch_one_cycle_lr(0.1, epochs=3), "'total_steps', or 'epochs' and 'steps_per_epoch'"),
        (lambda: schedules.torch_one_cycle_lr(0.1, 10, anneal_strategy="sin"), "'cos' or 'linear' but got 'sin'"),
        (lambda: schedules.torch_one_cycle_lr(0.1, 10, pct_start=0.1), "must not be 1"),
        (lambda: schedules.torch_lambda_lr(0.1, lambda step: 1.0 if step < 3 else 0.1), "without reading its value"),
        (lambda: schedules.torch_lambda_lr(0.1, lambda step: min(step / 3, 1.0)), "without reading its value"),
        (lambda: schedules.torch_lambda_lr(0.1, lambda step: [1.0, 0.5][step]), "without reading its value"),
        (lambda: schedules.torch_lambda_lr(0.1, lambda step: mx.ones(2)), "must return one number"),
        (lambda: schedules.torch_constant_lr(0.1, 1.5), "'factor' must be between 0 and 1"),
        (lambda: schedules.torch_polynomial_lr(0.1, 5, -1.0), "'power' must be non-negative"),
        (
            lambda: schedules.torch_multiplicative_lr(0.1, lambda step: 2 - step, 9),
            "'lr_lambda(3)' must be non-negative",
        ),
        (lambda: schedules.torch_cosine_annealing_warm_restarts(0.1, 0), "'T_0' must be positive"),
        (lambda: schedules.torch_cosine_annealing_warm_restarts(0.1, 3, 0), "'T_mult' must be positive"),
        (lambda: schedules.torch_cyclic_lr(0.1, 0.2, mode="square"), "'triangular' or 'triangular2' or 'exp_range'"),
        (lambda: schedules.torch_cyclic_lr(0.1, 0.2, scale_fn=lambda x: 1.0 if x < 3 else 0.1), "without reading its"),
        (lambda: schedules.torch_sequential_lr([], []), "'schedulers' must hold at least one schedule"),
        (lambda: schedules.torch_sequential_lr(MIXED, [3]), "'milestones' must hold one step less than there are"),
        (lambda: schedules.torch_sequential_lr(MIXED, [5, 3]), "'milestones' must be in ascending order"),
        (
            lambda: schedules.optax_join_schedules([lambda step: mx.ones(2)], []),
            "'schedules[0]' must return one number",
        ),
        (lambda: schedules.torch_chained_scheduler(MIXED[:1]), "cannot be chained"),
        (
            lambda: schedules.torch_chained_scheduler([schedules.torch_lambda_lr(0.1, lambda step: 0.9**step)]),
            "torch_lambda_lr cannot be chained: its rate is not 'lr' times a factor",
        ),
        (
            lambda: schedules.torch_chained_scheduler([schedules.torch_cosine_annealing_lr(0.1, 9, 0.01)]),
            "torch_cosine_annealing_lr cannot be chained",
        ),
        (
            lambda: schedules.torch_chained_scheduler(
                [schedules.torch_step_lr(0.1, 2), schedules.torch_exponential_lr(0.2, 0.9)]
            ),
            "must have the same 'lr' but got 0.1 and 0.2",
        ),
        (lambda: schedules.optax_piecewise_interpolate_schedule("cubic", 0.1), "'linear' or 'cosine' but got 'cubic'"),
        (lambda: schedules.optax_sgdr_schedule([]), "'cosine_kwargs' must hold at least one dict"),
        (lambda: schedules.optax_sgdr_schedule([{"init_value": 0.1}]), "lacks 'peak_value'"),
        (lambda: schedules.optax_warmup_cosine_decay_schedule(0.0, 0.1, 9, 9), "must be more than 'warmup_steps'"),
        (lambda: schedules.optax_piecewise_constant_schedule(0.1, {"x": 0.5}), "must be steps"),
        (lambda: schedules.optax_piecewise_constant_schedule(0.1, {3: -0.5}), "must be non-negative"),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.torch_step_lr(0.1, 2.5), "'step_size' must be an integer"),  # type: ignore[arg-type]
        (lambda: schedules.torch_step_lr(0.1, True), "'step_size' must be an integer"),
        (lambda: schedules.torch_step_lr("0.1", 2), "'lr' must be a real number"),  # type: ignore[arg-type]
        (lambda: schedules.torch_step_lr(None, 2), "'lr' must be a real number"),  # type: ignore[arg-type]
        (lambda: schedules.torch_step_lr(0.1), "[torch_step_lr] missing"),  # type: ignore[call-arg]
        (lambda: schedules.torch_step_lr(0.1, 2, step=1), "unexpected keyword argument 'step'"),  # type: ignore[call-arg]
        (lambda: schedules.torch_multi_step_lr(0.1, 3), "'milestones' must be a list"),  # type: ignore[arg-type]
        (lambda: schedules.torch_lambda_lr(0.1, 0.9), "must be a function of the step"),  # type: ignore[arg-type]
        (lambda: schedules.keras_exponential_decay(0.1, 5, 0.9, 1), "'staircase' must be True or False"),  # type: ignore[arg-type]
        (lambda: schedules.torch_lambda_lr(0.1, lambda step: 0.9**step).get_config(), "is a function"),
        (lambda: schedules.torch_multiplicative_lr(0.1, 0.9, 5), "must be a function of the step"),  # type: ignore[arg-type]
        (lambda: schedules.torch_multiplicative_lr(0.1, lambda step: 0.9, 5).get_config(), "is a function"),
        (lambda: schedules.torch_sequential_lr(MIXED[0], []), "'schedulers' must be a list of schedules"),
        (lambda: schedules.torch_sequential_lr([0.1], []), "'schedulers[0]' must be a function of the step"),  # type: ignore[arg-type]
        (lambda: schedules.optax_sgdr_schedule({"init_value": 0.1}), "must be a list of dicts"),  # type: ignore[arg-type]
    ],
)
def test_wrong_types_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


# ---- Keras's objects


class ExponentialDecay:
    """Looks like Keras's to us, who go by the name of the class and by ``get_config``."""

    def __init__(self, **config: Any) -> None:
        self.config = {"name": "ExponentialDecay", **config}

    def get_config(self) -> dict[str, Any]:
        return self.config

    def __call__(self, step: Any) -> Any:
        raise AssertionError("a Keras schedule must never be called")


class MyDecay(ExponentialDecay):
    pass


OPTIONS = {"initial_learning_rate": np.float32(0.5), "decay_steps": 5, "decay_rate": 0.9, "staircase": False}


def test_from_keras_maps_objects_and_configs() -> None:
    want = schedules.keras_exponential_decay(0.5, 5, 0.9)
    serialised = {"class_name": "ExponentialDecay", "config": {"name": None, **OPTIONS}}
    modern = serialised | {"module": "keras.optimizers.schedules", "registered_name": None}
    assert schedules.from_keras(ExponentialDecay(**OPTIONS)) == want
    assert schedules.from_keras(serialised) == schedules.from_keras(modern) == want


@pytest.mark.parametrize("entry", [e for e in REAL if e["framework"] == "keras"], ids=lambda entry: entry["name"])
def test_from_keras_knows_every_class(entry: dict[str, Any]) -> None:
    serialised = {"class_name": entry["name"], "config": entry["args"] | {"name": entry["name"]}}
    assert schedules.from_keras(serialised) == ours("keras", entry["name"], entry["args"])


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (MyDecay(**OPTIONS), ValueError, "no schedule 'MyDecay'"),
        ({"class_name": "MyDecay", "config": {}}, ValueError, "no schedule 'MyDecay'"),
        ({"class_name": "CosineDecay", "registered_name": "mine>CosineDecay", "config": {}}, ValueError, "'mine>Cos"),
        ({"class_name": ["CosineDecay"], "config": {}}, ValueError, "no schedule"),
        ({"class_name": "CosineDecay"}, ValueError, "must be a mapping but got None"),
        (ExponentialDecay(**OPTIONS, beta=1), ValueError, "keras_exponential_decay does not know 'beta'"),
        (ExponentialDecay(decay_steps=5), ValueError, "lacks 'initial_learning_rate', 'decay_rate'"),
        (0.1, TypeError, "expected a Keras schedule"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_from_keras_refuses_others(schedule: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        schedules.from_keras(schedule)
