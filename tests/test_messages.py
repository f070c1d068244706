"""Habits from elsewhere and arguments in the wrong place: refused in our words, briefly, before anything changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_adagrad import Adagrad, Quantized, presets, schedules
from mlx_adagrad.checks import shown
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    ClipByNorm,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    LossScale,
    MaxNorm,
    SkipNonFinite,
)

LONGEST = 420  # of a message


def network() -> nn.Module:
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(20)])


# what stands in the wrong place, and the constructors without their types, which would refuse it too
P: Any = network().parameters()
A: Any = Adagrad
of: Any = presets
rates: Any = schedules

ELSEWHERE = (
    r"parameters are not given to the constructor, as in torch, but to update\(model, gradients\); presets.torch"
)
NUMBER = "must be a real number but got"

MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "parameters first": (lambda: A(P, 0.1), rf"\[Adagrad\] 'learning_rate' must be a number.*{ELSEWHERE}"),
    "parameters and lr": (lambda: A(P, lr=0.1), r"\[Adagrad\] .* 'lr'; here it is called 'learning_rate'"),
    "params=": (lambda: A(params=P, learning_rate=0.1), ELSEWHERE),
    "a generator of them": (lambda: A(iter([P]), 0.1), ELSEWHERE),
    "a list of them": (lambda: of.mlx([P], 0.1), rf"\[mlx\] 'learning_rate'.*{ELSEWHERE}"),
    "torch": (lambda: of.torch(P, lr=0.1), rf"\[presets.torch\] multiple values for argument 'lr': {ELSEWHERE}"),
    "keras": (lambda: of.keras(P), rf"\[keras\] 'learning_rate'.*{ELSEWHERE}"),
    "too many": (lambda: A(P, 0.1, 1e-8), rf"\[Adagrad\] too many positional arguments: {ELSEWHERE}"),
    "lr=": (lambda: A(lr=0.1), r"\[Adagrad\] .*here it is called 'learning_rate'"),
    "epsilon=": (lambda: A(0.1, epsilon=1e-7), "here it is called 'eps'"),
    "learning_rate= in torch's": (lambda: of.torch(learning_rate=0.1), "here it is called 'lr'"),
    "eps= in Keras's": (lambda: of.keras(eps=0.1), "here it is called 'epsilon'"),
    "learning_rate= of a schedule": (lambda: rates.torch_step_lr(learning_rate=0.1, step_size=3), "called 'lr'"),
    "an unknown name": (lambda: A(0.1, momentum=0.9), r"keyword argument 'momentum'\.$"),
    "one group": (
        lambda: A(0.1, groups={"params": "*.bias"}),
        r"\[Adagrad\] 'groups' must be a list of dicts but got \{'params': '\*\.bias'\}: put the dict in a list",
    ),
    "one group in a preset": (lambda: of.torch(groups={"params": "*"}), "put the dict in a list"),
    "a group of arrays": (lambda: A(0.1, groups=[{"params": [P]}]), r"'params' must be globs or a predicate"),
    "a list of lists": (lambda: A(0.1, groups=[[P]]), "a group must be a dict"),
    "eps": (lambda: A(0.1, eps=P), f"'eps' {NUMBER}"),
    "weight_decay": (lambda: A(0.1, weight_decay=P), f"'weight_decay' {NUMBER}"),
    "maximize": (lambda: A(0.1, maximize=P), "'maximize' must be True or False"),
    "accumulator": (lambda: A(0.1, accumulator=P), "'accumulator' must be"),
    "mask": (lambda: A(0.1, weight_decay_mask=P), "'weight_decay_mask' must be callable"),
    "mindspore": (lambda: of.mindspore_nn(accum=P), f"'accum' {NUMBER}"),
    "label": (lambda: of.keras(name=P), "'name' must be a string"),
    "excluded": (lambda: of.keras(exclude_from_weight_decay=P), "'exclude_from_weight_decay' must be a list"),
    "constraints": (lambda: of.keras(constraints=[P]), "'constraints' must map"),
    "config": (lambda: of.from_config([P]), "a config must be a dict"),
    "optimizer": (lambda: ClipByNorm(P, 1.0), "'optimizer' must be an mlx.optimizers.Optimizer"),
    "steps": (lambda: GradientAccumulation(Adagrad(0.1), P), "'steps' must be an integer"),
    "on_skip": (lambda: SkipNonFinite(Adagrad(0.1), P), "'on_skip' must be"),
    "constraint": (lambda: Constraint(Adagrad(0.1), {"*": P}), "a constraint must be a name or a callable"),
    "steps of a schedule": (lambda: rates.torch_step_lr(0.1, P), "'step_size' must be an integer"),
    "milestones": (lambda: rates.torch_multi_step_lr(0.1, P), "'milestones' must be a list"),
    "saved": (lambda: rates.get_config(network()), "can be saved"),
    "of Keras": (lambda: rates.from_keras([P]), "expected a Keras schedule"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_answered_briefly(kind: str) -> None:
    make, message = MISTAKES[kind]
    with pytest.raises(TypeError, match=message) as caught:
        make()
    text = str(caught.value)
    assert text.startswith("[") and text.endswith(".") and len(text) < LONGEST and "\n" not in text


def test_the_signature_is_still_told() -> None:
    assert [*inspect.signature(Adagrad).parameters][:2] == ["learning_rate", "eps"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (mx.ones((4096, 4096)), "an array of shape (4096, 4096)"),
        (np.ones((3, 4)), "an array of shape (3, 4)"),
        (mx.array([0.5]), "array([0.5], dtype=float32)"),
        (nn.Linear(2, 2), "a module Linear"),
        ([nn.Linear(2, 2)], "[a module Linear]"),
        ({"a": {"b": {"c": 1}}}, "{'a': {'b': {...}}}"),
        ("short", "'short'"),
        (0.1, "0.1"),
        (None, "None"),
    ],
)
def test_what_is_shown(value: Any, text: str) -> None:
    assert shown(value) == text


def test_what_is_shown_is_short_and_costs_nothing() -> None:
    class Bad:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    for value in (P, [P] * 100, "x" * 10_000, {i: [mx.ones(3)] for i in range(99)}, {"k" * 500: "v" * 500}, Bad()):
        assert len(shown(value)) <= 120
    before = mx.get_active_memory()
    shown({"w": mx.zeros((1024, 1024))})
    assert mx.get_active_memory() - before < 1024
    mx.compile(lambda x: shown(x) and x)(mx.array(1.0))


# ---- update

WRAPS: dict[str, Callable[[], Any]] = {
    "adagrad": lambda: Adagrad(0.1),
    "preset": lambda: presets.torch(0.1),
    "clip": lambda: ClipByGlobalNorm(Adagrad(0.1), 1.0),
    "stack": lambda: ExponentialMovingAverage(GradientAccumulation(Adagrad(0.1), 2)),
    "stock": lambda: ClipByNorm(optim.Adam(0.1), 1.0),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_updates_that_would_do_nothing_are_refused(wrap: str) -> None:
    optimizer, model = WRAPS[wrap](), nn.Linear(2, 2)
    gradients: Any = {"weight": mx.ones((2, 2)), "bias": mx.ones((2,))}
    values: Any = model.parameters()
    for call, message in (
        (lambda: optimizer.update(gradients, model), r"wrong order: it is update\(model, gradients\)"),
        (lambda: optimizer.update(values, gradients), "'model' must be a module.*parameters = apply_gradients"),
        (lambda: optimizer.update(None, gradients), "'model' must be a module.* but got None"),
        (lambda: optimizer.update(model, None), "'gradients' must be a tree of arrays .* but got None"),
        (lambda: optimizer.update(model, mx.ones(2)), "'gradients' must be a tree .* got an array of shape"),
        (
            lambda: optimizer.update(model, (mx.array(0.5), gradients)),
            "tuple: value_and_grad returns .value, gradients",
        ),
        (lambda: optimizer.apply_gradients(None, values), "'gradients' must be a tree"),
        (lambda: optimizer.apply_gradients(gradients, None), "'parameters' must be a tree"),
    ):
        with pytest.raises(TypeError, match=message) as caught:
            call()
        assert len(str(caught.value)) < LONGEST
    assert optimizer.step.item() == 0 and model.weight is values["weight"]
    optimizer.update(model, gradients)
    assert optimizer.step.item() == (0 if wrap == "stack" else 1)


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_mlx_takes_is_taken(wrap: str) -> None:
    optimizer = WRAPS[wrap]()
    optimizer.update({}, {})
    assert optimizer.apply_gradients({}, {}) == {}
    model, g, w = network(), mx.ones((8, 8)), mx.ones((8, 8))
    for gradients in ({"layers": [{}, {"weight": g}]}, {"layers": [{"bias": mx.ones(8)}] * 20}, {}):
        WRAPS[wrap]().update(model, gradients)
    trees: Any = [({"w": g}, {"w": w}), ({"a": (g, {"b": g})}, {"a": (w, {"b": w, "c": w})})]
    trees += [] if wrap == "stock" else [([g], [w])]  # MLX's Adam fails at it by itself
    for gradients, values in trees:
        assert type(WRAPS[wrap]().apply_gradients(gradients, values)) is type(gradients)


# ---- numbers

NUMBERS: dict[str, Callable[[float], Any]] = {
    "numpy": lambda x: np.float32(x),
    "numpy 64": lambda x: np.float64(x),
    "0-d": lambda x: mx.array(x),
    "one element": lambda x: mx.array([x]),
    "numpy array": lambda x: np.array([[x]]),
}
TAKE: dict[str, Callable[[Any], Any]] = {
    "eps": lambda x: Adagrad(0.1, eps=x).eps,
    "lr_decay": lambda x: Adagrad(0.1, lr_decay=x).rule.lr_decay,
    "weight_decay": lambda x: Adagrad(0.1, weight_decay=x).rule.weight_decay,
    "initial": lambda x: Adagrad(0.1, initial_accumulator_value=x).rule.initial_accumulator_value,
    "group": lambda x: Adagrad(0.1, groups=[{"params": "*", "eps": x}]).groups.groups[0].rule.eps,
    "mlx": lambda x: presets.mlx(0.1, x).eps,
    "torch": lambda x: presets.torch(0.1, eps=x).eps,
    "keras": lambda x: of.keras(epsilon=x).eps,
    "mindspore": lambda x: presets.mindspore_nn(accum=x).rule.initial_accumulator_value,  # type: ignore[union-attr]
    "clip": lambda x: ClipByNorm(Adagrad(0.1), x).max_norm,
    "momentum": lambda x: ExponentialMovingAverage(Adagrad(0.1), x).momentum,
    "factor": lambda x: LossScale(Adagrad(0.1), x).factor,
    "constraint": lambda x: MaxNorm(x).max_value,
    "scale": lambda x: DynamicLossScale(Adagrad(0.1), x).initial_scale,
    "schedule": lambda x: schedules.torch_step_lr(x, 3).config["lr"],
    "gamma": lambda x: schedules.torch_step_lr(0.1, 3, x).config["gamma"],
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("argument", TAKE)
def test_a_number_may_be_an_array_of_one_element(argument: str, kind: str) -> None:
    taken = TAKE[argument](NUMBERS[kind](0.25))
    assert type(taken) is float and taken == 0.25


@pytest.mark.parametrize("argument", TAKE)
def test_other_arrays_are_no_numbers(argument: str) -> None:
    with pytest.raises(ValueError, match=r"must have one element but got an array of shape \(2,\)"):
        TAKE[argument](mx.array([0.25, 0.5]))
    for wrong in (mx.array(True), mx.array(1 + 1j), np.array("0.25"), np.bool_(True)):
        with pytest.raises(TypeError, match="must be a real number but got"):
            TAKE[argument](wrong)
    with pytest.raises(ValueError, match="cannot be read inside a transformation: give a number"):
        mx.compile(lambda x: TAKE[argument](x) and x)(mx.array(0.25))


def test_an_integer_may_be_an_array_of_one_element() -> None:
    for three in (np.int64(3), mx.array(3), np.array([3], np.uint8)):
        number: Any = three
        assert GradientAccumulation(Adagrad(0.1), number).steps == 3
        assert type(ExponentialMovingAverage(Adagrad(0.1), 0.9, number).overwrite_frequency) is int
        assert Quantized(min_size=number) == Quantized(min_size=3)
        seeds = [Adagrad(0.1, rounding="stochastic", rounding_seed=seed) for seed in (number, 3)]
        assert len({optimizer.state["_mlx_adagrad"]["rounding_seed"].item() for optimizer in seeds}) == 1
        assert schedules.torch_step_lr(0.1, number).config["step_size"] == 3
    for wrong in (mx.array(3.0), np.float32(3), mx.array(True)):
        number = wrong
        with pytest.raises(TypeError, match="'steps' must be an integer"):
            GradientAccumulation(Adagrad(0.1), number)


def test_arrays_give_the_steps_of_numbers() -> None:
    w, array = {"w": mx.array([1.0, 2.0])}, np.float32(0.5)
    one = A(mx.array([0.1]), mx.array([0.25]), weight_decay=array).apply_gradients(w, w)
    other = Adagrad(0.1, 0.25, weight_decay=0.5).apply_gradients(w, w)
    assert mx.array_equal(one["w"], other["w"])
