"""Where wrappers end: around a MultiOptimizer, in fp16 around other optimizers, and for what does not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_adagrad import Adagrad, presets
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    LossScale,
    MaxNorm,
    SkipNonFinite,
    UnitNorm,
)


def weights(dtype=mx.float32) -> Any:
    return {"a": mx.array([1.0, 2.0, 3.0], dtype), "b": {"c": mx.ones((2, 2), dtype)}}


def gradients(dtype=mx.float32) -> Any:
    return {"a": mx.array([3.0, 0.0, 4.0], dtype), "b": {"c": mx.full((2, 2), 2.0, dtype)}}


def is_a(path, _):
    return path == "a"


def multi(first, last) -> Any:
    return optim.MultiOptimizer([first, last], [is_a])


def arrays(tree):
    return {path: np.array(a).tobytes() for path, a in tree_flatten(tree)}


def dtypes(tree):
    return {path: a.dtype for path, a in dict(tree_flatten(tree)).items()}


# ------------------------------------------------------------------ around a MultiOptimizer
def test_norms_of_each_gradient_inside_and_around_a_multi_optimizer():
    inside = multi(ClipByNorm(optim.SGD(1.0), 1.0), ClipByValue(optim.SGD(1.0), 0.125))
    new = ClipByNorm(inside, 2.0).apply_gradients(gradients(), weights())
    np.testing.assert_allclose(new["a"], np.array([1.0, 2.0, 3.0]) - np.array([0.6, 0.0, 0.8]), rtol=1e-6)
    np.testing.assert_allclose(new["b"]["c"], np.full((2, 2), 1 - 0.125), rtol=1e-6)
    # the inner limit is the smaller one once, the outer one once
    new = ClipByNorm(multi(ClipByNorm(Adagrad(0.1), 1.0), optim.SGD(1.0)), 0.5).apply_gradients(gradients(), weights())
    np.testing.assert_allclose(new["b"]["c"], np.full((2, 2), 1 - 0.25), rtol=1e-6)
    bounds = ClipByValue(ClipByNorm(multi(ClipByNorm(optim.SGD(1.0), 0.25), optim.SGD(1.0)), 0.5), 2.0)
    new = bounds.apply_gradients(gradients(), weights())
    np.testing.assert_allclose(new["a"], np.array([1.0, 2.0, 3.0]) - 0.25 / np.sqrt(2) * np.array([1, 0, 1]), rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: LossScale(o, 128.0),
        DynamicLossScale,
        ExponentialMovingAverage,
        lambda o: ClipByNorm(LossScale(o, 2.0), 1.0),
        lambda o: optim.MultiOptimizer([LossScale(o, 2.0)]),
    ],
    ids=["LossScale", "DynamicLossScale", "ExponentialMovingAverage", "in_a_clip", "in_another_multi"],
)
@pytest.mark.parametrize("around", [SkipNonFinite, lambda o: ClipByNorm(o, 1.0)], ids=["SkipNonFinite", "ClipByNorm"])
def test_what_the_outside_must_reach_is_refused_inside_a_multi_optimizer(make, around, request):
    name = request.node.callspec.id.split("-")[-1]
    name = name if name in ("DynamicLossScale", "ExponentialMovingAverage") else "LossScale"
    for inside in (multi(make(Adagrad(0.1)), optim.Adam(0.1)), multi(optim.Adam(0.1), make(Adagrad(0.1)))):
        message = rf"\] {name} is inside a MultiOptimizer, .*: put it around the MultiOptimizer\."
        with pytest.raises(ValueError, match=message):
            around(inside)
    make(multi(Adagrad(0.1), optim.Adam(0.1)))  # the remedy


def test_a_gradient_is_needed_where_the_preset_inside_says_so():
    for bare in (presets.keras(), SkipNonFinite(presets.keras()), ClipByNorm(SkipNonFinite(presets.keras()), 1.0)):
        with pytest.raises(ValueError, match=r"\[keras\] no parameter has a gradient"):
            bare.apply_gradients({"a": None}, weights())
        assert bare.apply_gradients({}, weights()) == {}
        assert bare.step.item() == 0
    other = SkipNonFinite(Adagrad(0.1))  # no such rule
    other.apply_gradients({"a": None}, weights())
    assert other.step.item() == 1
    inside = multi(presets.keras(), optim.Adam(0.1))
    parts = SkipNonFinite(inside)
    parts.apply_gradients({"b": gradients()["b"]}, weights())
    assert [o.step.item() for o in inside.optimizers] == [0, 1]


# ------------------------------------------------------------------ fp16 around other optimizers
STOCK = {
    "adam": lambda: optim.Adam(1e-3),
    "lion": lambda: optim.Lion(1e-3),
    "sgd": lambda: optim.SGD(1e-3, momentum=0.9, weight_decay=0.1),
    "multi": lambda: multi(ClipByValue(optim.Adam(1e-3), 9.0), optim.SGD(1e-3, momentum=0.9)),
}
AROUND = {
    "loss_scale": lambda o: LossScale(o, 128.0),
    "dynamic": lambda o: DynamicLossScale(o, 16.0),
    "accumulation": lambda o: GradientAccumulation(o, 2),
    "norm": lambda o: ClipByNorm(o, 0.1),
    "global_norm": lambda o: ClipByGlobalNorm(o, 0.1),
    "value": lambda o: ClipByValue(o, 0.1),
    "skip": SkipNonFinite,
    "average": lambda o: ExponentialMovingAverage(o, 0.9),
}


@pytest.mark.parametrize("stock", STOCK)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_after_init_a_half_precision_step_is_traced_once(around, stock, dtype):
    optimizer, w, traces = AROUND[around](STOCK[stock]()), weights(dtype), []
    optimizer.init(w)
    before = dtypes(optimizer.state)

    def step(w, g):
        traces.append(1)
        return optimizer.apply_gradients(g, w)

    compiled: Any = mx.compile(step, inputs=[optimizer.state], outputs=[optimizer.state])
    for _ in range(3):
        w = compiled(w, gradients(dtype))  # never evaluated: a trace needs no values
    assert len(traces) == 1
    assert dtypes(optimizer.state) == before
    late = AROUND[around](STOCK[stock]())
    for _ in range(2):
        late.apply_gradients(gradients(dtype), weights(dtype))
    assert dtypes(late.state) == before  # the same without init


# ------------------------------------------------------------------ what does not fit
@pytest.mark.parametrize("inner", [lambda: Adagrad(0.1), lambda: optim.Adam(0.1)], ids=["adagrad", "adam"])
@pytest.mark.parametrize("wrong", [0.5, np.ones(3, np.float32), "g"], ids=["float", "ndarray", "str"])
@pytest.mark.parametrize("around", AROUND)
def test_a_gradient_that_is_no_array(around, wrong, inner):
    optimizer = AROUND[around](inner())
    optimizer.init(weights())
    before = arrays(optimizer.state)
    looks = around not in ("loss_scale", "value", "average")  # the others leave it to the optimizer inside
    owner = type(optimizer).__name__ if looks else type(inner()).__name__
    message = rf"^\[{owner}\] the gradient of 'a' must be an array but got {type(wrong).__name__}\.$"
    with pytest.raises(TypeError, match=message):
        optimizer.apply_gradients(gradients() | {"a": wrong}, weights())
    assert arrays(optimizer.state) == before


def stack(inner) -> Any:
    return SkipNonFinite(ExponentialMovingAverage(GradientAccumulation(inner, 2)))


def changed(state: Any, path: str, value: Any) -> Any:
    """A copy of ``state`` with ``value`` at ``path``; None takes the entry out."""
    state = tree_map(lambda a: a, state)
    node, (*keys, last) = state, path.split(">")
    for key in keys:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return state


OWN = "_mlx_adagrad"
INSIDE = "inner>inner>inner"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (OWN, [1], r"\[SkipNonFinite\] '_mlx_adagrad' of the state must be a dict but got list"),
        (f"{OWN}>skipped_steps", 3, r"\[SkipNonFinite\] 'skipped_steps' of the state must be an array but got int"),
        (f"{OWN}>skipped_steps", mx.array([1, 2], mx.uint64), r"'skipped_steps' .* shape \(2,\) but must have \(\)"),
        (f"{OWN}>skipped_steps", mx.array(1.5), "'skipped_steps' of the state is .*float32 but must be .*uint64"),
        (f"inner>{OWN}>averages", mx.array(1.0), "'averages' of the state must be a dict but got array"),
        (f"inner>{OWN}>averages>/a", "x", r"\[ExponentialMovingAverage\] 'averages' '/a' .* an array but got str"),
        (f"inner>{OWN}>averages>/a", mx.ones((4,)), r"'averages' '/a' .* shape \(4,\) but must have \(3,\)"),
        (f"inner>inner>{OWN}>gradients>/b/c", mx.ones((2, 2), mx.float16), "'gradients' '/b/c' .* must be .*float32"),
        (f"{INSIDE}>step", None, r"\[Adagrad\] the state has no 'step'"),
        (f"{INSIDE}>learning_rate", None, r"\[Adagrad\] the state has no 'learning_rate'"),
        (f"{INSIDE}>step", 3, r"\[Adagrad\] 'step' of the state must be an array but got int"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(path, value, message):
    optimizer = stack(Adagrad(0.1))
    for _ in range(3):
        optimizer.apply_gradients(gradients(), weights())
    before = arrays(optimizer.state)
    other = changed(optimizer.state, f"{INSIDE}>a>v", mx.full((3,), 7.0))
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.state = changed(other, path, value)
    assert arrays(optimizer.state) == before
    optimizer.state = other
    assert arrays(optimizer.state) == arrays(other) != before


def test_one_part_that_does_not_fit_leaves_the_others_alone():
    optimizer = ClipByNorm(multi(Adagrad(0.1), GradientAccumulation(optim.Adam(0.1), 2)), 1.0)
    optimizer.apply_gradients(gradients(), weights())
    before, state = arrays(optimizer.state), tree_map(lambda a: a, optimizer.state)
    state["inner"]["states"][0]["step"] = mx.array(9, mx.uint64)
    state["inner"]["states"][1]["inner"].pop("step")
    with pytest.raises(ValueError, match=r"\[Adam\] the state has no 'step'"):
        optimizer.state = state
    assert arrays(optimizer.state) == before


# ------------------------------------------------------------------ constraints
@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (lambda w: w[None], ValueError, r"the constraint of 'b.c' made shape \(1, 2, 2\) of \(2, 2\).* pattern 'b.\*'"),
        (lambda w: 3.0, TypeError, r"the constraint of 'b.c' must return an array but got float.* pattern 'b.\*'"),
        (lambda w: w > 0, TypeError, r"the constraint of 'b.c' made .*bool.* of .*float32.* pattern 'b.\*'"),
        (lambda w: w * 1j, TypeError, r"the constraint of 'b.c' made .*complex64 of .*float32.* pattern 'b.\*'"),
        (MaxNorm(axis=2), ValueError, r"of 'b.c', by the pattern 'b.\*': \[MaxNorm\] .*no axis 2 in shape \(2, 2\)"),
        (UnitNorm(axis=(0, -3)), ValueError, r"of 'b.c', by .*: \[UnitNorm\] .*no axis -3 in shape \(2, 2\)"),
    ],
)
@pytest.mark.parametrize("inner", [lambda: Adagrad(0.1), lambda: GradientAccumulation(optim.Adam(0.1), 2)])
def test_what_a_constraint_makes_is_checked_before_the_step(function, kind, message, inner):
    optimizer = SkipNonFinite(Constraint(inner(), {"b.*": function, "a": "non_neg"}))
    optimizer.init(weights())
    before = arrays(optimizer.state)
    with pytest.raises(kind, match=rf"\[Constraint\] .*{message}"):
        optimizer.apply_gradients(gradients(), weights())
    assert arrays(optimizer.state) == before
    optimizer.apply_gradients({"a": gradients()["a"]}, weights())  # what has no gradient is not constrained


def test_a_constraint_is_tried_once_and_again_for_another_shape():
    calls = []

    def function(w):
        calls.append(w.shape)
        return w

    optimizer = Constraint(optim.SGD(0.1), {"a": function})
    for _ in range(3):
        optimizer.apply_gradients({"a": mx.ones((3,))}, weights())
    assert calls == [(3,)] * 4
    optimizer.apply_gradients({"a": mx.ones((5,))}, {"a": mx.ones((5,))})
    assert calls[4:] == [(5,)] * 2


@pytest.mark.parametrize("axis", ["x", 1.5, True, (0, "x"), None])
@pytest.mark.parametrize("norm", [MaxNorm, UnitNorm])
def test_the_axis_of_a_norm_is_an_integer_or_several(norm, axis):
    with pytest.raises(TypeError, match=rf"\[{norm.__name__}\] 'axis' must be an integer or a tuple of integers but"):
        norm(axis=axis)


def test_a_path_with_brackets_is_a_pattern_of_itself():
    w = {"a[0]": mx.array([-1.0]), "a0": mx.array([-1.0])}
    new = Constraint(optim.SGD(0.0), {"a[0]": "non_neg"}).apply_gradients(w, w)
    assert new["a[0]"].item() == 0.0
    assert new["a0"].item() == 0.0  # as a glob it means this too


def test_averaged_refuses_a_tree_when_it_is_called():
    optimizer = SkipNonFinite(ExponentialMovingAverage(Adagrad(0.1)))
    with pytest.raises(TypeError, match="'model' must be a module but got dict; finalize_variable_values takes trees"):
        optimizer.averaged(weights())


# ------------------------------------------------------------------ the page
def test_accumulation_around_skipping_checks_the_sum_of_a_window():
    inner: Any = SkipNonFinite(Adagrad(0.1))
    optimizer, good = GradientAccumulation(inner, 2), gradients()
    bad = good | {"a": mx.array([mx.nan, 0.0, 0.0])}
    for g in (bad, good, good, good):
        optimizer.apply_gradients(g, weights())
    assert inner.skipped_steps.item() == 1 and optimizer.step.item() == 1


def test_the_code_of_the_documentation_runs():
    page = (Path(__file__).parents[1] / "docs" / "wrappers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3 and page.count("```") == 2 * len(blocks)  # nothing is shown that is not run
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    model: Any = names["model"]
    assert isinstance(model, nn.Linear) and mx.isfinite(mx.array(model.weight)).all().item()
    assert names["optimizer"].step.item() == 1
