"""Each wrapper against Keras's or torch's rule in numpy float64, around Adagrad, stock Adam and a MultiOptimizer."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

from cases import to_numpy
from mlx_adagrad import Adagrad
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    LossScale,
    SkipNonFinite,
)

SHAPES = {"layers.0.weight": (4, 3), "layers.0.bias": (3,), "layers.1.weight": (2, 3, 2), "scale": ()}
CALLS = 14


def rate(n):
    """A schedule; wrappers show it the number of calls."""
    return 0.3 / (1 + 0.2 * n)


class AdagradRule:
    def __init__(self):
        self.v = 0.0

    def __call__(self, w, g, lr):
        self.v = self.v + g * g
        return w - lr * g / (np.sqrt(self.v) + 1e-8)


class AdamRule:
    """MLX's: no bias correction."""

    def __init__(self):
        self.m = self.v = 0.0

    def __call__(self, w, g, lr):
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        return w - lr * self.m / (np.sqrt(self.v) + 1e-8)


class Reference:
    """A Keras optimizer in float64, call by call: unscale, accumulate, clip, update, average, constrain."""

    def __init__(self, rules, loss_scale=1, steps=1, value=0, norm=0, global_norm=0, torch=False, momentum=None,
                 overwrite=0, constrain=None):  # fmt: skip
        self.rules, self.loss_scale, self.steps = rules, loss_scale, steps
        self.value, self.norm, self.global_norm, self.torch = value, norm, global_norm, torch
        self.momentum, self.overwrite, self.constrain = momentum, overwrite, constrain or {}
        self.calls, self.updates = 0, 0
        self.sums = {name: 0.0 for name in rules}
        self.averages = {name: 0.0 for name in rules}

    def __call__(self, weights, gradients):
        weights = dict(weights)
        gradients = {name: g / self.loss_scale for name, g in gradients.items()}
        if (self.calls + 1) % self.steps:
            for name, g in gradients.items():
                self.sums[name] = self.sums[name] + g
        else:
            mean = {name: (self.sums[name] + g) / self.steps for name, g in gradients.items()}
            self.sums = {name: 0.0 for name in self.rules}
            for name, g in self.clipped(mean).items():
                weights[name] = self.rules[name](weights[name], g, rate(self.calls))
            self.updates += 1
        if self.momentum is not None:
            window = self.calls // self.steps
            m = self.momentum if window else 0.0
            self.averages = {name: m * a + (1 - m) * weights[name] for name, a in self.averages.items()}
            if self.overwrite and (window + 1) % self.overwrite == 0:
                weights = dict(self.averages)
        for name in gradients:
            weights[name] = self.constrain.get(name, lambda w: w)(weights[name])
        self.calls += 1
        return weights

    def clipped(self, gradients):
        if self.value:
            gradients = {name: np.clip(g, -self.value, self.value) for name, g in gradients.items()}
        if self.norm:
            gradients = {n: g * self.norm / max(np.sqrt((g * g).sum()), self.norm) for n, g in gradients.items()}
        if self.global_norm:
            total = np.sqrt(sum((g * g).sum() for g in gradients.values()))
            factor = min(1, self.global_norm / (total + 1e-6 * self.torch))
            gradients = {name: g * factor for name, g in gradients.items()}
        return gradients


def is_bias(path, _):
    return path.endswith("bias")


KINDS = {
    "adagrad": (lambda: Adagrad(rate), lambda name: AdagradRule()),
    "adam": (lambda: optim.Adam(rate), lambda name: AdamRule()),
    "multi": (
        lambda: optim.MultiOptimizer([optim.Adam(rate), Adagrad(rate)], [is_bias]),
        lambda name: AdamRule() if is_bias(name, None) else AdagradRule(),
    ),
}
OPTIONS = {
    "nothing": {},
    "value": {"value": 0.5},
    "norm": {"norm": 0.8},
    "global_norm": {"global_norm": 1.5},
    "global_norm_torch": {"global_norm": 1.5, "torch": True},
    "value_then_global_norm": {"value": 0.6, "global_norm": 1.0},
    "loss_scale": {"loss_scale": 24.0, "global_norm": 0.1},
    "steps": {"steps": 3},
    "steps_clipped": {"steps": 4, "norm": 0.3},
    "average": {"momentum": 0.8},
    "average_0": {"momentum": 0.0},
    "average_1": {"momentum": 1.0},
    "overwrite": {"momentum": 0.8, "overwrite": 4},
    "steps_overwrite": {"momentum": 0.7, "overwrite": 2, "steps": 3},
    "constraint": {"constrain": {"layers.0.weight": lambda w: np.maximum(w, 0)}, "momentum": 0.5},
    "all": {
        "loss_scale": 8.0,
        "steps": 2,
        "global_norm": 0.5,
        "momentum": 0.8,
        "overwrite": 3,
        "constrain": {"layers.0.weight": lambda w: np.maximum(w, 0)},
    },
}


def wrapped(optimizer, loss_scale=1, steps=1, value=0, norm=0, global_norm=0, torch=False, momentum=None, overwrite=0,
            constrain=None):  # fmt: skip
    """The same options as wrappers, in the order LossScale(Constraint(Average(Accumulate(Clip(...)))))."""
    optimizer = ClipByGlobalNorm(optimizer, global_norm, rule="torch" if torch else "keras")
    optimizer = ClipByValue(ClipByNorm(optimizer, norm), value)
    if steps > 1:
        optimizer = GradientAccumulation(optimizer, steps)
    if momentum is not None:
        optimizer = ExponentialMovingAverage(optimizer, momentum, overwrite or None)
    if constrain:
        optimizer = Constraint(optimizer, {name: "non_neg" for name in constrain})
    return LossScale(optimizer, loss_scale)


def tree(arrays):
    """A tree of the shape of SHAPES; what is missing is absent in each of the ways that there are."""
    got = {name: arrays.get(name) for name in SHAPES}
    layers = [
        {"weight": got["layers.0.weight"], "bias": got["layers.0.bias"]},
        {} if got["layers.1.weight"] is None else {"weight": got["layers.1.weight"]},
    ]
    return {"layers": layers} | ({} if got["scale"] is None else {"scale": got["scale"]})


def drawn(seed, absent=False):
    """Weights and the gradients of each call, float64 with fp32 values; some absent, the scale's at first always."""
    rng = np.random.default_rng(seed)

    def draw():
        return {name: rng.normal(size=shape).astype(np.float32).astype(np.float64) for name, shape in SHAPES.items()}

    weights, calls = draw(), [draw() for _ in range(CALLS)]
    if absent:
        for t, gradients in enumerate(calls):
            for name in list(gradients):
                late = name == "scale" and t < 5
                if late or (name != "layers.0.weight" and rng.random() < 0.4):
                    del gradients[name]
    return weights, calls


def to_mx(arrays):
    return {name: mx.array(a, mx.float32) for name, a in arrays.items()}


def flat(parameters):
    return {name: to_numpy(w) for name, w in tree_flatten(parameters)}


def merge(parameters, new):
    got = dict(tree_flatten(new))
    return tree_map_with_path(lambda path, w: got.get(path, w), parameters)


def assert_same(got, want, rtol=3e-5, atol=2e-6):
    assert got.keys() == want.keys()
    for name in got:
        np.testing.assert_allclose(got[name], want[name], rtol=rtol, atol=atol, err_msg=name)


def own(optimizer, key):
    """The entry of the wrapper that has it."""
    while key not in optimizer.state["_mlx_adagrad"]:
        optimizer = optimizer.optimizer
    return optimizer.state["_mlx_adagrad"][key]


@pytest.mark.parametrize("absent", [False, True], ids=["all", "absent"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_rule(options, kind, absent):
    make, rule = KINDS[kind]
    weights, calls = drawn(1, absent)
    reference = Reference({name: rule(name) for name in SHAPES}, **OPTIONS[options])
    optimizer = wrapped(make(), **OPTIONS[options])
    parameters = tree(to_mx(weights))
    for gradients in calls:
        weights = reference(weights, gradients)
        parameters = merge(parameters, optimizer.apply_gradients(tree(to_mx(gradients)), parameters))
        mx.eval(parameters, optimizer.state)
        assert_same(flat(parameters), weights)
        assert optimizer.step.item() == reference.updates
        if "momentum" in OPTIONS[options]:
            averages = {name: to_numpy(own(optimizer, "averages")["/" + name.replace(".", "/")]) for name in SHAPES}
            assert_same(averages, reference.averages)
    if "momentum" in OPTIONS[options]:
        assert_same(flat(optimizer.finalize_variable_values(parameters)), reference.averages)
    else:
        assert_same(flat(optimizer.finalize_variable_values(parameters)), weights)


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_loss_scale_follows_keras(kind):
    make, rule = KINDS[kind]
    weights, calls = drawn(2)
    for t in (0, 5, 6):
        calls[t]["layers.0.bias"][1] = np.inf if t % 2 else np.nan
    reference = Reference({name: rule(name) for name in SHAPES}, steps=2, momentum=0.8)
    optimizer = DynamicLossScale(ExponentialMovingAverage(GradientAccumulation(make(), 2), 0.8), 8.0, 3)
    parameters, scale, count = tree(to_mx(weights)), 8.0, 0
    for gradients in calls:
        assert optimizer.dynamic_scale.item() == scale
        assert optimizer.scale_loss(mx.array(1.5)).item() == 1.5 * scale
        if all(np.isfinite(g).all() for g in gradients.values()):
            weights = reference(weights, {name: g / scale for name, g in gradients.items()})
            scale, count = (scale * 2, 0) if count == 2 else (scale, count + 1)
        else:
            scale, count = scale / 2, 0
        parameters = merge(parameters, optimizer.apply_gradients(tree(to_mx(gradients)), parameters))
        assert_same(flat(parameters), weights)
    assert optimizer.state["_mlx_adagrad"]["step_counter"].item() == count
    assert own(optimizer, "calls").item() == reference.calls == CALLS - 3


def gradient_seen(wrap, gradients):
    """What the optimizer inside gets: SGD of rate 1 from 0 shows it, negated."""
    parameters = {name: mx.zeros_like(g) for name, g in gradients.items()}
    new = wrap(optim.SGD(1.0)).apply_gradients(gradients, parameters)
    return {name: -w for name, w in new.items()}


def test_torchs_rule_adds_1e_6_to_the_norm_and_keras_does_not():
    g = {"w": mx.array([3e-6, 4e-6])}
    torch = gradient_seen(lambda o: ClipByGlobalNorm(o, 1e-6, rule="torch"), g)["w"]
    keras = gradient_seen(lambda o: ClipByGlobalNorm(o, 1e-6), g)["w"]
    np.testing.assert_allclose(torch, np.array([3e-6, 4e-6]) / 6, rtol=1e-6)
    np.testing.assert_allclose(keras, np.array([3e-6, 4e-6]) / 5, rtol=1e-6)
    ours = gradient_seen(lambda o: ClipByGlobalNorm(o, 0.3, rule="torch"), {"w": mx.array([1.0, 2.0])})
    np.testing.assert_array_equal(ours["w"], optim.clip_grad_norm({"w": mx.array([1.0, 2.0])}, 0.3)[0]["w"])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_global_norm_that_is_not_finite(bad):
    g = {"a": mx.array([1.0, bad]), "b": mx.array([2.0])}
    keras = gradient_seen(lambda o: ClipByGlobalNorm(o, 1.0), g)
    assert np.isnan(np.array(keras["a"])).all() and np.isnan(np.array(keras["b"])).all()
    torch = gradient_seen(lambda o: ClipByGlobalNorm(o, 1.0, rule="torch"), g)
    assert np.isnan(np.array(torch["a"])[1])
    np.testing.assert_array_equal(torch["b"], [np.nan if np.isnan(bad) else 0.0])  # coefficient c / inf = 0
    each = gradient_seen(lambda o: ClipByNorm(o, 1.0), g)
    np.testing.assert_array_equal(each["b"], [1.0])  # its own norm is fine


@pytest.mark.parametrize(
    "wrap", [ClipByValue, ClipByNorm, ClipByGlobalNorm, lambda o, limit: ClipByGlobalNorm(o, limit, rule="torch")]
)
def test_what_is_within_the_limit_stays_bit_for_bit_and_0_and_none_are_off(wrap):
    g = {"w": mx.array([0.1, -0.7, 1e-30, 0.3]), "zero": mx.zeros((3,))}
    for limit in (0, None, 3.7):
        seen = gradient_seen(lambda o, limit=limit: wrap(o, limit), g)
        assert mx.array_equal(seen["w"], g["w"]) and mx.array_equal(seen["zero"], g["zero"])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_norms_are_taken_in_fp32(dtype):
    g = {"w": mx.full((1000,), 300.0, dtype)}  # its squares overflow fp16, their sum stalls in bf16
    seen = gradient_seen(lambda o: ClipByGlobalNorm(o, 1.0), g)["w"]
    np.testing.assert_allclose(
        to_numpy(seen), 300 / np.sqrt(300.0**2 * 1000), rtol=1e-2 if dtype == mx.bfloat16 else 1e-3
    )
    each = gradient_seen(lambda o: ClipByNorm(o, 1.0), g)["w"]
    np.testing.assert_array_equal(to_numpy(each), to_numpy(seen))


def test_the_norm_of_a_large_gradient_does_not_stall():
    size = 2**25 + 4096 * 3 + 5  # a sum of ones in one go stops at 2**24
    g = {"w": mx.ones((size,), mx.bfloat16)}
    factor: Any = ClipByGlobalNorm(CountsScale(), 1.0).apply_gradients(g, {"w": mx.zeros((size,), mx.bfloat16)})
    np.testing.assert_allclose(factor.item(), size**-0.5, rtol=1e-6)


class CountsScale(optim.Optimizer):
    """Returns the scale that it was given."""

    def apply_modified(self, gradients, parameters, modifiers):
        return modifiers.scale


def test_complex_gradients_are_pairs_of_reals():
    g = {"w": mx.array([3 + 4j, -0.1 + 0.2j])}
    each = gradient_seen(lambda o: ClipByNorm(o, 2.5), g)["w"]
    np.testing.assert_allclose(each, np.array(g["w"]) * 2.5 / np.sqrt(25.05), rtol=1e-6)
    value = gradient_seen(lambda o: ClipByValue(o, 0.15), g)["w"]
    np.testing.assert_allclose(value, [0.15 + 0.15j, -0.1 + 0.15j], rtol=1e-6)


def test_a_loss_scale_brings_back_what_fp16_cannot_hold():
    w = mx.array([1.0, 2.0], mx.float16)

    def loss(w):
        return (w * mx.array([1e-9, 3e-9])).sum().astype(mx.float16)

    optimizer = LossScale(Adagrad(0.1, eps=1e-12), 2.0**15)
    scaled = mx.grad(lambda w: optimizer.scale_loss(loss(w)))(w)
    assert scaled.dtype == mx.float16 and scaled.min().item() > 0
    new = optimizer.apply_gradients({"w": scaled}, {"w": w})["w"]
    assert new.dtype == mx.float16
    np.testing.assert_allclose(new, [0.9, 1.9], rtol=2e-3)  # the first step is one of lr, however small the gradient
    stock = LossScale(optim.SGD(1e7), 2.0**15)  # fp16 would flush the unscaled gradient to 0
    np.testing.assert_allclose(stock.apply_gradients({"w": scaled}, {"w": w})["w"], [1 - 1e-2, 2 - 3e-2], rtol=2e-3)


def test_loss_scales_multiply_and_reach_through_other_wrappers():
    optimizer = SkipNonFinite(LossScale(ClipByNorm(LossScale(optim.SGD(1.0), 4.0), 0), 8.0))
    assert optimizer.scale_loss(mx.array(2.0)).item() == 64.0
    assert optimizer.scale_loss(mx.array(60000.0, mx.float16)).item() == 60000.0 * 32  # not infinite
    new = optimizer.apply_gradients({"w": mx.array([64.0])}, {"w": mx.array([0.0])})
    assert new["w"].item() == -2.0


def test_a_dynamic_scale_can_come_back_from_both_ends():
    for start, bad in ((2.0**-126, True), (2.0**126, False)):
        optimizer = DynamicLossScale(optim.SGD(1.0), start, dynamic_growth_steps=1)
        for _ in range(3):
            optimizer.apply_gradients({"w": mx.array([np.nan if bad else 0.0])}, {"w": mx.array([1.0])})
        assert optimizer.dynamic_scale.item() == start
        assert np.isfinite((1 / optimizer.dynamic_scale).item())
