"""What each wrapper of a whole run does beside its rule: averages, accumulation, skipped steps, constraints."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from cases import memory_before, to_numpy
from mlx_adagrad import Adagrad
from mlx_adagrad.update import ops
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    ClipByNorm,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    LossScale,
    MaxNorm,
    NonNeg,
    SkipNonFinite,
    UnitNorm,
)


class Counting(optim.SGD):
    """Counts its calls."""

    calls = 0

    def apply_gradients(self, gradients, parameters):
        self.calls += 1
        return super().apply_gradients(gradients, parameters)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(3, 2), nn.Linear(2, 2)]
        self.frozen = nn.Linear(2, 2)
        self.frozen.freeze()
        self.steps = mx.array([1, 2])
        self.sizes = [3, 2]
        self._hidden = mx.ones((2,))


def ones_like(model):
    return {"layers": tree_map(mx.ones_like, model.trainable_parameters()["layers"])}


# ------------------------------------------------------------------ averages
def test_an_average_moves_weights_that_have_no_gradient():
    optimizer = ExponentialMovingAverage(optim.SGD(0.5), 0.5, overwrite_frequency=2)
    parameters = {"a": mx.array([1.0]), "b": [mx.array([1.0]), mx.array([3])], "c": {"d": mx.array([8.0])}}
    first = optimizer.apply_gradients({"a": mx.array([1.0])}, parameters)
    assert first["a"].item() == 0.5 and first["b"][0].item() == 1.0 and first["c"]["d"].item() == 8.0
    parameters = {"a": first["a"], "b": [mx.array([5.0]), mx.array([3])], "c": {"d": mx.array([16.0])}}
    second = optimizer.apply_gradients({"a": mx.array([1.0])}, parameters)
    assert second["a"].item() == 0.25  # (0.5 + 0.0) / 2
    assert second["b"][0].item() == 3.0 and second["c"]["d"].item() == 12.0
    assert second["b"][1].item() == 3  # an integer stays; a list comes back whole


def test_update_moves_a_models_weights_without_gradient_and_nothing_else():
    model = Model()
    before = dict(tree_flatten(model.parameters()))
    optimizer = ExponentialMovingAverage(Adagrad(0.1), 0.5, overwrite_frequency=1)
    gradients = {"layers": [{"weight": mx.ones((2, 3))}, {}]}
    optimizer.update(model, gradients)
    model.layers[1].weight = model.layers[1].weight + 2.0
    optimizer.update(model, gradients)
    after = dict(tree_flatten(model.parameters()))
    np.testing.assert_allclose(after["layers.1.weight"], before["layers.1.weight"] + 1.0, rtol=1e-6)
    for path in ("frozen.weight", "frozen.bias", "steps"):
        assert mx.array_equal(after[path], before[path]), path
    averages = optimizer.state["_mlx_adagrad"]["averages"]
    assert set(averages) == {f"/layers/{i}/{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert mx.array_equal(model._hidden, mx.ones((2,)))


def test_an_average_of_bf16_weights_is_fp32():
    optimizer = ExponentialMovingAverage(optim.SGD(1.0), 0.999)
    w, exact = mx.array([1.0], mx.bfloat16), 1.0
    optimizer.apply_gradients({"w": mx.array([0.0], mx.bfloat16)}, {"w": w})
    w = mx.array([2.0], mx.bfloat16)
    for _ in range(100):
        optimizer.apply_gradients({"w": mx.array([0.0], mx.bfloat16)}, {"w": w})
        exact = 0.999 * exact + 0.001 * 2.0
    average = optimizer.state["_mlx_adagrad"]["averages"]["/w"]
    assert average.dtype == mx.float32
    np.testing.assert_allclose(average.item(), exact, rtol=1e-5)  # in bf16 it would never leave 1.0
    final = optimizer.finalize_variable_values({"w": w})["w"]
    assert final.dtype == mx.bfloat16 and abs(final.item() - exact) < 0.005


def test_momentum_0_is_the_weight_itself_and_1_the_first_one():
    for momentum, want in ((0.0, [-1.0, -2.0, -3.0]), (1.0, [-1.0, -1.0, -1.0])):
        optimizer, w = ExponentialMovingAverage(optim.SGD(1.0), momentum), {"w": mx.array([0.0])}
        for value in want:
            w = optimizer.apply_gradients({"w": mx.array([1.0])}, w)
            assert optimizer.state["_mlx_adagrad"]["averages"]["/w"].item() == value


def test_the_average_of_a_parameter_that_comes_late_starts_from_it():
    optimizer = ExponentialMovingAverage(optim.SGD(1.0), 0.5)
    parameters = {"a": mx.array([0.0])}
    for _ in range(2):
        optimizer.apply_gradients({"a": mx.array([0.0])}, parameters)
    parameters["b"] = mx.array([10.0])
    optimizer.apply_gradients({"b": mx.array([2.0])}, parameters)
    assert optimizer.state["_mlx_adagrad"]["averages"]["/b"].item() == 9.0  # of 10 and 8; from 0 it would be 4


def test_averaged_swaps_and_gives_back_whatever_happens():
    model = Model()
    optimizer = ClipByNorm(ExponentialMovingAverage(Adagrad(0.5), 0.9), 1.0)
    for _ in range(3):
        optimizer.update(model, ones_like(model))
    own = dict(tree_flatten(model.parameters()))
    averages = optimizer.state["inner"]["_mlx_adagrad"]["averages"]
    with optimizer.averaged(model) as same:
        assert same is model
        seen = dict(tree_flatten(model.parameters()))
        for path in ("layers.0.weight", "layers.1.bias"):
            np.testing.assert_array_equal(seen[path], averages["/" + path.replace(".", "/")])
            assert not np.array_equal(seen[path], own[path])
        assert np.array_equal(seen["frozen.weight"], own["frozen.weight"])
    assert all(np.array_equal(np.array(a), own[path]) for path, a in tree_flatten(model.parameters()))
    with pytest.raises(KeyError), optimizer.averaged(model):
        raise KeyError
    assert all(np.array_equal(np.array(a), own[path]) for path, a in tree_flatten(model.parameters()))
    tree: Any = {}
    with pytest.raises(TypeError, match="'model' must be a module but got dict; finalize_variable_values takes trees"):
        optimizer.averaged(tree).__enter__()


def test_finalize_updates_a_module_and_training_goes_on_compiled():
    model = Model()
    optimizer = ExponentialMovingAverage(Adagrad(0.5), 0.5)
    optimizer.update(model, ones_like(model))
    optimizer.update(model, ones_like(model))
    averages = {path: np.array(a) for path, a in tree_flatten(optimizer.state["_mlx_adagrad"]["averages"])}
    tree = optimizer.finalize_variable_values(model)
    assert [path for path, _ in tree_flatten(tree)] == [path for path, _ in tree_flatten(model.parameters())]
    np.testing.assert_array_equal(model.layers[0].weight, averages["/layers/0/weight"])
    np.testing.assert_array_equal(tree["layers"][1]["bias"], averages["/layers/1/bias"])
    # weights and averages may be the same arrays now: a trace must tell them apart
    state = [model.state, optimizer.state]
    step = mx.compile(lambda g: optimizer.update(model, g), inputs=state, outputs=state)
    w, average = averages["/layers/0/weight"], averages["/layers/0/weight"]
    v = to_numpy(optimizer.state["inner"]["layers"][0]["weight"]["v"])
    for _ in range(3):
        step(ones_like(model))
        v = v + 1
        w = w - 0.5 / (np.sqrt(v) + 1e-8)
        average = 0.5 * average + 0.5 * w
    np.testing.assert_allclose(model.layers[0].weight, w, rtol=1e-5)
    np.testing.assert_allclose(optimizer.state["_mlx_adagrad"]["averages"]["/layers/0/weight"], average, rtol=1e-5)


# ------------------------------------------------------------------ accumulation
def test_an_eager_call_that_only_accumulates_does_not_update(monkeypatch):
    stock = Counting(1.0)
    optimizer = GradientAccumulation(stock, 4)
    w = {"w": mx.ones((3,))}
    for t in range(8):
        new = optimizer.apply_gradients({"w": mx.ones((3,))}, w)
        assert stock.calls == (t + 1) // 4
        assert (new["w"] is w["w"]) == ((t + 1) % 4 != 0)
        w = new
    updates = []
    update = ops.Functions.update
    monkeypatch.setattr(ops.Functions, "update", lambda self, *args: updates.append(1) or update(self, *args))
    norms = []
    monkeypatch.setattr("mlx_adagrad.wrappers.reductions._total", lambda x: norms.append(1) or x.sum())
    optimizer = LossScale(GradientAccumulation(ClipByNorm(Adagrad(0.1, fused=False), 1.0), 4), 2.0)
    w, size = {"w": mx.ones((2**17,))}, []
    for _ in range(8):
        mx.eval(w, optimizer.state)
        before = memory_before()
        new = optimizer.apply_gradients({"w": w["w"]}, w)
        size.append(new["w"] is not w["w"])
        w = new
        mx.eval(w, optimizer.state)
        assert mx.get_peak_memory() - before < 6 * w["w"].nbytes
    assert size == [False, False, False, True] * 2
    assert len(updates) == 2


def test_what_is_due_is_known_from_the_own_counter_alone():
    """Reading the counter evaluates nothing else; where the gradients decide about the count, it is not read."""
    size = 2**16
    for wrap, evaluates in ((lambda o: o, False), (SkipNonFinite, False)):
        optimizer = wrap(GradientAccumulation(Adagrad(0.1), 2))
        w = {"w": mx.random.normal((size,))}
        g = {"w": mx.random.normal((size,))}
        before = memory_before()
        for _ in range(3):
            w = optimizer.apply_gradients(g, w)
        assert (mx.get_peak_memory() - before > size) == evaluates


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sums_are_fp32(dtype):
    optimizer = GradientAccumulation(optim.SGD(1.0), 256)
    w = {"w": mx.array([0.0, 0.0], dtype)}
    for t in range(256):
        g = mx.array([1.0 if t else 60000.0 if dtype == mx.float16 else 512.0, 2.0**-10], dtype)
        w = optimizer.apply_gradients({"w": g}, w)
        if t == 254:
            assert optimizer.state["_mlx_adagrad"]["gradients"]["/w"].dtype == mx.float32
    first = 60000.0 if dtype == mx.float16 else 512.0
    np.testing.assert_allclose(to_numpy(w["w"]), [-(first + 255) / 256, -(2.0**-10)], rtol=4e-3)


def test_a_nan_in_one_window_does_not_reach_the_next():
    for compiled in (False, True):
        optimizer = GradientAccumulation(Adagrad(0.1), 2)
        w = {"a": mx.ones((2,)), "b": mx.ones((2,))}
        state = [w, optimizer.state]

        def step(g, w=w, optimizer=optimizer):
            w.update(optimizer.apply_gradients(g, w))

        step = mx.compile(step, inputs=state, outputs=state) if compiled else step
        step({"a": mx.array([1.0, mx.nan]), "b": mx.ones((2,))})
        step({"a": mx.ones((2,)), "b": mx.ones((2,))})
        assert mx.isnan(w["a"]).tolist() == [False, True] and mx.isfinite(w["b"]).all().item()
        sums = optimizer.state["_mlx_adagrad"]["gradients"]
        assert all(mx.array_equal(total, mx.zeros((2,))).item() for total in sums.values())
        step({"a": mx.array([mx.nan, 0.0]), "b": mx.ones((2,))})  # accumulates only: NaN * 0 would reach the weight
        assert mx.isnan(w["a"]).tolist() == [False, True]


def test_a_window_whose_last_gradient_is_absent_is_dropped():
    optimizer = GradientAccumulation(optim.SGD(1.0), 2)
    w = {"a": mx.array([0.0]), "b": mx.array([0.0])}
    for gradients in ({"a": 1.0, "b": 1.0}, {"a": 3.0}, {"b": 2.0}, {"a": 6.0, "b": 4.0}):
        w = w | optimizer.apply_gradients({k: mx.array([g]) for k, g in gradients.items()}, w)
    assert w["a"].item() == -2.0 - 3.0  # (1 + 3) / 2 and (absent + 6) / 2
    assert w["b"].item() == -3.0  # (2 + 4) / 2; the 1 is gone


def test_accumulation_in_accumulation_and_around_an_average():
    optimizer = GradientAccumulation(ExponentialMovingAverage(GradientAccumulation(optim.SGD(1.0), 2), 0.5), 3)
    assert optimizer.calls_per_update == 6
    w = {"w": mx.array([0.0])}
    for t in range(12):
        w = optimizer.apply_gradients({"w": mx.array([float(t)])}, w)
    assert w["w"].item() == -(2.5 + 8.5)
    assert optimizer.state["inner"]["_mlx_adagrad"]["calls"].item() == 4


# ------------------------------------------------------------------ skipped steps and loss scales
def test_gradients_with_a_finite_square_pass_and_every_bad_one_is_found():
    optimizer = SkipNonFinite(Adagrad(0.1))
    w = {"a": mx.ones((5000,)), "b": {"c": mx.array(1.0)}, "h": mx.ones((3,), mx.float16), "z": mx.zeros((0,))}

    def skipped(change):
        g = {"a": mx.full((5000,), 1.8e19), "b": {"c": mx.array(-1.8e19)}, "h": mx.full((3,), 65504.0, mx.float16)}
        g |= {"z": mx.zeros((0,))}
        change(g)
        before = optimizer.skipped_steps.item()
        optimizer.apply_gradients(g, w)
        return optimizer.skipped_steps.item() - before

    def spoil(key, at, value):
        def change(g):
            g[key][at] = value

        return change

    assert skipped(lambda g: None) == 0
    for value in (mx.nan, mx.inf, -mx.inf, 1.9e19, -3e38):  # fp16 reads the last two as infinite
        assert skipped(spoil("a", 0, value)) == skipped(spoil("a", 4999, value)) == 1
        assert skipped(spoil("h", 1, value)) == 1
        assert skipped(lambda g, value=value: g.update(b={"c": mx.array(value)})) == 1
    assert skipped(lambda g: g.update(a=None)) == 0
    assert optimizer.step.item() == 2


def test_on_skip_is_called_with_the_count_and_only_outside_traces():
    counts = []
    optimizer = SkipNonFinite(Adagrad(0.1), on_skip=counts.append)
    w = {"w": mx.ones((2,))}
    good, bad = {"w": mx.ones((2,))}, {"w": mx.array([1.0, mx.nan])}
    for g in (good, bad, bad, good, bad):
        w = optimizer.apply_gradients(g, w)
    assert counts == [1, 2, 3] and all(type(count) is int for count in counts)
    step = mx.compile(lambda g, w: optimizer.apply_gradients(g, w), inputs=optimizer.state, outputs=optimizer.state)
    step(bad, w)
    assert counts == [1, 2, 3] and optimizer.skipped_steps.item() == 4


def test_on_skip_may_stop_the_run_and_leaves_a_sound_state():
    def stop(count):
        if count > 1:
            raise RuntimeError("two bad batches")

    optimizer = SkipNonFinite(optim.Adam(0.1), on_skip=stop)
    model = nn.Linear(2, 2)
    good = {"weight": mx.ones((2, 2)), "bias": mx.ones((2,))}
    optimizer.update(model, good)
    optimizer.update(model, good | {"bias": mx.array([mx.inf, 0.0])})
    before = [np.array(a) for _, a in tree_flatten([model.parameters(), optimizer.state["inner"]])]
    with pytest.raises(RuntimeError, match="two bad batches"):
        optimizer.update(model, good | {"bias": mx.array([mx.inf, 0.0])})
    after = [np.array(a) for _, a in tree_flatten([model.parameters(), optimizer.state["inner"]])]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.skipped_steps.item() == 2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_nan_at_step_20_is_survived_where_stock_is_lost(compiled):
    def train(optimizer):
        mx.random.seed(0)
        model = nn.Linear(4, 1)
        target = mx.array([[1.0, -2.0, 0.5, 3.0]])
        x = mx.random.normal((64, 4))
        state = [model.state, optimizer.state]

        def step(x):
            def loss(m):
                return ((m(x) - mx.nan_to_num(x) @ target.T) ** 2).mean()

            optimizer.update(model, nn.value_and_grad(model, loss)(model)[1])

        step = mx.compile(step, inputs=state, outputs=state) if compiled else step
        for t in range(200):
            step(mx.where(t == 20, mx.nan, x))
            mx.eval(state)
        return to_numpy(mx.abs(model.weight - target).max())

    assert np.isnan(train(optim.Adagrad(0.5)))
    assert np.isnan(train(Adagrad(0.5)))
    assert train(SkipNonFinite(Adagrad(0.5))) < 0.01
    assert train(SkipNonFinite(optim.Adam(0.1))) < 0.02


def test_a_whole_fp16_run_with_a_dynamic_scale():
    mx.random.seed(0)
    model = nn.Linear(4, 1)
    model.set_dtype(mx.float16)
    target = mx.array([[1.0, -2.0, 0.5, 3.0]])
    x = mx.random.normal((64, 4))
    optimizer = DynamicLossScale(Adagrad(0.5), 2.0**24, dynamic_growth_steps=50)  # too large: it has to come down first
    state = [model.state, optimizer.state]

    def loss(m):
        return optimizer.scale_loss(((m(x.astype(mx.float16)) - (x @ target.T).astype(mx.float16)) ** 2).mean())

    def step():
        optimizer.update(model, nn.value_and_grad(model, loss)(model)[1])

    step = mx.compile(step, inputs=state, outputs=state)
    for _ in range(300):
        step()
        mx.eval(state)
    assert to_numpy(optimizer.dynamic_scale) < 2.0**24 and to_numpy(optimizer.step) < 300
    assert to_numpy(mx.abs(model.weight - target).max()) < 0.02 and model.weight.dtype == mx.float16


# ------------------------------------------------------------------ constraints
def keras_max_norm(w, limit, axis):
    norms = np.sqrt(np.sum(np.square(w), axis=axis, keepdims=True))
    return w * (np.clip(norms, 0, limit) / (1e-7 + norms))


@pytest.mark.parametrize(
    ("constraint", "rule"),
    [
        ("non_neg", lambda w: w * (w >= 0)),
        (NonNeg(), lambda w: w * (w >= 0)),
        ("max_norm", lambda w: keras_max_norm(w, 2.0, 0)),
        (MaxNorm(0.5, axis=-1), lambda w: keras_max_norm(w, 0.5, -1)),
        (MaxNorm(0.5, axis=(0, 1)), lambda w: keras_max_norm(w, 0.5, (0, 1))),
        ("unit_norm", lambda w: w / (1e-7 + np.sqrt(np.sum(np.square(w), axis=0, keepdims=True)))),
        (UnitNorm(axis=1), lambda w: w / (1e-7 + np.sqrt(np.sum(np.square(w), axis=1, keepdims=True)))),
        (lambda w: mx.clip(w, -0.3, 0.3), lambda w: np.clip(w, -0.3, 0.3)),
    ],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_constraints(constraint, rule, dtype):
    start = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32) * 3
    start[:, 1] *= 0.01  # within the limit
    start[2] *= 0.01
    start[0, 0] = 400.0  # its square overflows fp16
    w = mx.array(start).astype(dtype)
    optimizer = Constraint(optim.SGD(0.0), {"w": constraint})
    got = optimizer.apply_gradients({"w": mx.zeros_like(w)}, {"w": w})["w"]
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype == mx.float32 else 1e-3
    np.testing.assert_allclose(to_numpy(got), rule(to_numpy(w)), rtol=tolerance, atol=tolerance)


def test_a_weight_within_the_limit_keeps_its_norm_and_zeros_stay_zeros():
    w = mx.array([[0.3, 0.0], [0.4, 0.0]])
    got = Constraint(optim.SGD(0.0), {"*": MaxNorm(1.0)}).apply_gradients({"w": w}, {"w": w})["w"]
    np.testing.assert_allclose(got, w, rtol=1e-6)


def test_scalars_have_a_norm_too():
    got = Constraint(optim.SGD(0.0), {"*": "max_norm"}).apply_gradients({"w": mx.array(0.0)}, {"w": mx.array(-5.0)})
    np.testing.assert_allclose(got["w"].item(), -2.0, rtol=1e-6)


def test_a_constraint_acts_after_the_average_on_what_has_a_gradient_and_at_every_call():
    average = ExponentialMovingAverage(GradientAccumulation(optim.SGD(1.0), 2), 0.5)
    optimizer = Constraint(average, {"a": "non_neg", "b*": "non_neg"})
    parameters = {"a": mx.array([-1.0]), "b1": mx.array([-1.0])}
    new = optimizer.apply_gradients({"a": mx.array([4.0])}, parameters)  # accumulates only
    assert new["a"].item() == 0.0
    assert average.state["_mlx_adagrad"]["averages"]["/a"].item() == -1.0  # it has not seen the constrained weight
    assert "b1" not in new  # no gradient, no constraint
    new = optimizer.apply_gradients({"a": mx.array([4.0]), "b1": None}, parameters | new)
    assert new["a"].item() == 0.0 and new["b1"].item() == -1.0
    assert average.state["_mlx_adagrad"]["averages"]["/a"].item() == -4.0  # still the first window


def test_the_first_pattern_that_matches_counts_and_predicates_are_patterns():
    optimizer = Constraint(
        optim.SGD(0.0), {"layers.0.*": "non_neg", lambda path, w: w.ndim == 1: lambda w: w * 0 + 7, "*": lambda w: w}
    )
    parameters = {"layers": [{"w": mx.array([-1.0])}, {"w": mx.array([-1.0])}], "s": mx.array(-1.0)}
    new = optimizer.apply_gradients(parameters, parameters)
    assert [layer["w"].item() for layer in new["layers"]] == [0.0, 7.0] and new["s"].item() == -1.0


def test_a_pattern_that_matches_nothing_and_a_constraint_that_changes_the_shape():
    w = {"w": mx.ones((2,))}
    optimizer = Constraint(optim.SGD(0.1), {"kernel": "non_neg"})
    with pytest.raises(ValueError, match=r"\[Constraint\] the pattern 'kernel' matches no parameter."):
        optimizer.apply_gradients(w, w)
    assert optimizer.step.item() == 0
    with pytest.raises(ValueError, match=r"\[Constraint\] the constraint of 'w' made shape \(1, 2\) of \(2,\)."):
        Constraint(optim.SGD(0.1), {"w": lambda w: w[None]}).apply_gradients(w, w)


def test_a_held_back_step_constrains_nothing():
    optimizer = SkipNonFinite(Constraint(optim.SGD(0.1), {"w": "non_neg"}))
    new = optimizer.apply_gradients({"w": mx.array([mx.nan])}, {"w": mx.array([-1.0])})
    assert new["w"].item() == -1.0


# ------------------------------------------------------------------ order
def test_the_order_of_the_wrappers_is_the_order_of_the_rules():
    """Unscaled before clipping, the mean clipped and not each gradient, the average after the update."""
    g = {"w": mx.array([3.0, 4.0])}
    w = {"w": mx.zeros((2,))}
    seen = LossScale(ClipByGlobalNorm(optim.SGD(1.0), 1.0), 10.0).apply_gradients(g, w)
    np.testing.assert_allclose(seen["w"], [-0.3, -0.4], rtol=1e-6)  # its norm is 0.5
    seen = ClipByGlobalNorm(LossScale(optim.SGD(1.0), 10.0), 1.0).apply_gradients(g, w)
    np.testing.assert_allclose(seen["w"], [-0.06, -0.08], rtol=1e-6)
    outside = ClipByNorm(GradientAccumulation(optim.SGD(1.0), 2), 1.0)
    inside = GradientAccumulation(ClipByNorm(optim.SGD(1.0), 1.0), 2)
    for optimizer, want in (
        (outside, [-0.3, -0.4 + 0.5]),
        (inside, [-0.6 / np.hypot(0.6, 1.2), 1.2 / np.hypot(0.6, 1.2)]),
    ):
        new = optimizer.apply_gradients(g, w)
        new = optimizer.apply_gradients({"w": mx.array([0.0, -10.0])}, new)
        np.testing.assert_allclose(new["w"], want, rtol=1e-5)
