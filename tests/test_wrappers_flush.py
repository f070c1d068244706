"""Flushing the incomplete window of an accumulation: one update by the mean of what it has, whatever is around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adagrad import Adagrad, RowSparse, checkpoint, presets
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    ClipByValue,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    LossScale,
    SkipNonFinite,
)

INNER: dict[str, Callable[[], Any]] = {
    "adagrad": lambda: Adagrad(0.5, weight_decay=0.1, lr_decay=0.1),
    "torch": lambda: presets.torch(0.5, lr_decay=0.1, maximize=True),
    "clip": lambda: ClipByGlobalNorm(Adagrad(0.5), 0.3),
    "skip": lambda: SkipNonFinite(Adagrad(0.5)),
    "stock": lambda: optim.Adam(0.5),
}
AROUND: dict[str, Callable[[Any], Any]] = {
    "bare": lambda o: o,
    "loss scale": lambda o: LossScale(o, 4.0),
    "clips": lambda o: ClipByValue(ClipByGlobalNorm(o, 0.7), 0.6),
    "skip": lambda o: SkipNonFinite(o),
    "constraint": lambda o: Constraint(o, {"b": "non_neg"}),
    "average": lambda o: ExponentialMovingAverage(o, 0.5),
    "all": lambda o: DynamicLossScale(Constraint(ExponentialMovingAverage(o, 0.5), {"b": "non_neg"}), 8.0, 3),
}
SHAPES = {"a": (3,), "b": (2, 2)}


def gradients(t: int) -> dict[str, mx.array]:
    rng = np.random.default_rng(t)
    return {key: mx.array(rng.standard_normal(shape).astype(np.float32)) for key, shape in SHAPES.items()}


class Run:
    def __init__(self, optimizer: Any, compiled: bool = False):
        self.optimizer = optimizer
        self.w = {key: mx.ones(shape) for key, shape in SHAPES.items()}
        optimizer.init(self.w)
        optimizer.scale_loss(mx.array(1.0))
        state = [self.w, optimizer.state]

        def step(g: dict[str, mx.array]) -> None:
            self.w.update(optimizer.apply_gradients(g, self.w))

        def flush() -> None:
            self.w.update(optimizer.flush(self.w))

        functions: list[Any] = [step, flush]
        self.step, self.flush = (mx.compile(f, state, state) if compiled else f for f in functions)

    def steps(self, *numbers: int) -> Run:
        for t in numbers:
            self.step(gradients(t))
        return self

    def flushed(self) -> Run:
        self.flush()
        return self

    def end(self) -> dict[str, np.ndarray]:
        """The weights and the state of the optimizer inside the accumulation."""
        inner = self.optimizer
        while not isinstance(inner, GradientAccumulation):
            inner = inner.optimizer
        arrays = tree_flatten({"w": self.w, "state": inner.optimizer.state})
        return {path: np.array(x, np.float64) for path, x in arrays if isinstance(x, mx.array)}


def assert_same(one: Run, other: Run, exact: bool = False) -> None:
    a, b = one.end(), other.end()
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=0 if exact else 3e-6, atol=0 if exact else 1e-7, err_msg=key)


def with_calls(state: Any, calls: int) -> Any:
    """A state with other counts of calls, so that windows of another length begin with the next call."""
    flat = tree_flatten(state)
    return tree_unflatten([(k, mx.array(calls, mx.uint64) if k.endswith("calls") else x) for k, x in flat])


CASES = [(inner, "bare", False) for inner in INNER] + [("adagrad", around, False) for around in AROUND]
CASES += [("clip", "bare", True), ("adagrad", "all", True)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("inner", "around", "compiled"), CASES)
def test_a_flush_is_the_update_of_a_window_of_that_length(inner: str, around: str, compiled: bool, count: int) -> None:
    def made(steps: int) -> Any:
        return AROUND[around](GradientAccumulation(INNER[inner](), steps))

    run = Run(made(4), compiled).steps(0, 1, 2, 3)  # one whole window before
    whole = Run(made(4)).steps(0, 1, 2, 3)
    short = Run(made(count))
    short.w.update(whole.w)
    short.optimizer.state = with_calls(whole.optimizer.state, 0)
    window = [*range(4, 4 + count)]
    assert_same(run.steps(*window).flushed(), short.steps(*window))
    after = Run(made(4))  # the next window begins with the next call
    after.w.update(short.w)
    after.optimizer.state = with_calls(short.optimizer.state, 0)
    assert_same(run.steps(10, 11, 12, 13), after.steps(10, 11, 12, 13))
    assert run.optimizer.step.item() == 3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("around", AROUND)
def test_nothing_to_flush_changes_nothing(around: str, compiled: bool) -> None:
    run = Run(AROUND[around](GradientAccumulation(Adagrad(0.5, weight_decay=0.1), 2)), compiled)
    for _ in range(2):
        before = [(path, np.array(x)) for path, x in tree_flatten([run.w, run.optimizer.state])]
        same = run.w["a"]
        run.flush()
        for (path, x), (_, y) in zip(tree_flatten([run.w, run.optimizer.state]), before, strict=True):
            assert np.array_equal(x, y), path
        assert compiled or run.w["a"] is same
        run.steps(0, 1)
        run.flush()
        run.steps(2).flushed()


@pytest.mark.parametrize(
    "make", [lambda: Adagrad(0.1), lambda: ClipByGlobalNorm(optim.SGD(0.1), 1.0), lambda: presets.keras()]
)
def test_without_an_accumulation_nothing_waits(make: Callable[[], Any]) -> None:
    optimizer, model = make(), nn.Linear(2, 2)
    before = model.weight
    assert optimizer.flush(model) is not None and model.weight is before
    tree = {"w": mx.ones(2)}
    assert optimizer.flush(tree) is tree and optimizer.step.item() == 0


def test_a_module_is_updated_in_place_and_frozen_parameters_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = presets.keras(0.1, gradient_accumulation_steps=3, weight_decay=0.1)
    loss = nn.value_and_grad(model, lambda model, x: model(x).square().sum())
    optimizer.update(model, loss(model, mx.ones((1, 2)))[1])
    model.layers[0].freeze()
    before = [layer.weight for layer in model.layers]
    new = optimizer.flush(model)
    assert optimizer.iterations.item() == 1 and new["layers"][1]["weight"] is model.layers[1].weight
    assert model.layers[0].weight is before[0] and not mx.array_equal(model.layers[1].weight, before[1]).item()


@pytest.mark.parametrize(("counts", "want"), [("calls", [3, 7, 11]), ("updates", [0, 1, 2])])
def test_the_missing_calls_count_as_made(counts: str, want: list[int]) -> None:
    seen: list[Any] = []

    def rate(step: mx.array) -> mx.array:
        seen.append(step.item())
        return mx.array(0.1)

    run = Run(GradientAccumulation(Adagrad(rate), 4, schedule_counts=counts))
    seen.clear()
    run.steps(0, 1, 2, 3, 4).flushed().steps(5, 6, 7, 8)
    assert seen == want


def test_averages_and_loss_scales() -> None:
    run = Run(DynamicLossScale(ExponentialMovingAverage(GradientAccumulation(Adagrad(0.5), 4), 0.5), 8.0, 100))
    run.steps(0, 1, 2, 3, 4)
    average = run.optimizer.state["inner"]["_mlx_adagrad"]
    before, counted = np.array(average["averages"]["/a"]), run.optimizer.state["_mlx_adagrad"]["step_counter"].item()
    run.flush()
    np.testing.assert_allclose(average["averages"]["/a"], 0.5 * before + 0.5 * np.array(run.w["a"]), rtol=1e-6)
    assert average["calls"].item() == 8
    assert run.optimizer.state["_mlx_adagrad"]["step_counter"].item() == counted  # no loss was scaled for it


def test_constraints_hold_after_a_flush() -> None:
    run = Run(Constraint(GradientAccumulation(optim.SGD(5.0), 4), {"*": "non_neg"})).steps(0, 1).flushed()
    assert all(mx.all(w >= 0).item() for w in run.w.values()) and mx.any(run.w["a"] == 0).item()


def test_a_window_that_is_not_finite_is_skipped_inside() -> None:
    run = Run(GradientAccumulation(SkipNonFinite(Adagrad(0.5)), 4))
    run.step({"a": mx.array([1.0, mx.inf, 0.0]), "b": mx.ones((2, 2))})
    run.flush()
    assert mx.array_equal(run.w["b"], mx.ones((2, 2))) and run.optimizer.optimizer.skipped_steps.item() == 1


def test_only_the_parts_that_accumulate_are_flushed() -> None:
    parts = [GradientAccumulation(Adagrad(0.5), 3), Adagrad(0.5, weight_decay=0.1)]
    optimizer = ClipByGlobalNorm(optim.MultiOptimizer(parts, [lambda path, w: path == "a"]), 1.0)
    w: Any = {key: mx.ones(shape) for key, shape in SHAPES.items()}
    w = w | optimizer.apply_gradients(gradients(0), w)
    new = optimizer.flush(w)
    assert new["b"] is w["b"] and not mx.array_equal(new["a"], w["a"]).item()
    assert [part.step.item() for part in parts] == [1, 1]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_part_in_which_nothing_waits_makes_no_step(compiled: bool) -> None:
    parts = [GradientAccumulation(Adagrad(0.5, weight_decay=0.1), steps) for steps in (2, 3)]
    run = Run(ClipByGlobalNorm(optim.MultiOptimizer(parts, [lambda path, w: path == "a"]), 1.0), compiled)
    run.steps(0, 1).flush()
    assert [part.step.item() for part in parts] == [1, 1]


@pytest.mark.parametrize("compiled", [False, True])
def test_rows(compiled: bool) -> None:
    rows = [RowSparse(mx.array(ids), mx.full((2, 3), float(i + 1)), 6) for i, ids in enumerate([[0, 2], [2, 4]])]

    def run(steps: int, flushes: bool) -> tuple[np.ndarray, np.ndarray]:
        optimizer = GradientAccumulation(Adagrad(0.5, weight_decay=0.1), steps)
        w = {"w": mx.ones((6, 3))}
        optimizer.init(w)
        state = [w, optimizer.state]

        def step(indices: mx.array, values: mx.array) -> None:
            w.update(optimizer.apply_gradients({"w": RowSparse(indices, values, 6)}, w))

        call = mx.compile(step, state, state) if compiled else step
        for g in rows:
            call(g.indices, g.values)
        if flushes:
            w.update(optimizer.flush(w))
        return np.array(w["w"]), np.array(optimizer.state["inner"]["w"]["v"])

    for one, other in zip(run(5, True), run(2, False), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
        assert np.array_equal(one[[1, 3, 5]], other[[1, 3, 5]]) and np.ptp(one) > 0


def test_saved_and_continued_equals_never_stopped(tmp_path: Any) -> None:
    def made() -> Any:
        return ExponentialMovingAverage(GradientAccumulation(Adagrad(0.5), 4), 0.5)

    run = Run(made()).steps(0, 1, 2, 3, 4, 5)
    checkpoint.save(tmp_path / "run.safetensors", run.optimizer, run.w)
    again = Run(made())
    checkpoint.load(tmp_path / "run.safetensors", again.optimizer, again.w)
    flat = Run(made())
    flat.optimizer.state = tree_unflatten(tree_flatten(run.optimizer.state))
    flat.w.update(run.w)
    for other in (again, flat):
        other.flushed().steps(6, 7)
    run.flushed().steps(6, 7)
    assert_same(run, again, exact=True)
    assert_same(run, flat, exact=True)


def test_refusals_change_nothing() -> None:
    nested = GradientAccumulation(ClipByGlobalNorm(GradientAccumulation(Adagrad(0.5), 2), 1.0), 3)
    run = Run(nested).steps(0)
    before = [id(x) for _, x in tree_flatten([run.w, nested.state])]
    with pytest.raises(ValueError, match=r"\[GradientAccumulation\] one GradientAccumulation is inside another"):
        nested.flush(run.w)
    wrong: Any = mx.ones(3)
    for optimizer in (nested, Adagrad(0.1)):
        with pytest.raises(TypeError, match="'parameters' must be a tree of arrays"):
            optimizer.flush(wrong)
    assert [id(x) for _, x in tree_flatten([run.w, nested.state])] == before
