"""The range of numbers: norms of all sizes, and guarded steps that leave nothing that is not finite."""

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from cases import bits, flat, to_numpy
from mlx_adagrad import Adagrad, Dense, RowSparse, RowWise
from mlx_adagrad.update.modifiers import UNMODIFIED, Modifiers
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
    UnitNorm,
    reductions,
)

SIZES = [1e-37, 1e-30, 1e-20, 1e-8, 1.0, 1e8, 1.8e19, 1e20, 1e30, 1e37]
sizes = pytest.mark.parametrize("size", SIZES)
SHAPES = {"scalar": (), "small": (5, 3), "like it": (15,), "empty": (0, 3), "large": (259, 257), "odd": (40_001,)}


def tree(size, dtype=mx.float32):
    rng = np.random.default_rng(0)
    arrays = {name: size * rng.normal(size=shape) / 300 for name, shape in SHAPES.items()}
    return {name: mx.array(x, dtype) for name, x in arrays.items()} | {"hole": {}}


def norm_of(*arrays):
    return np.sqrt(sum((np.abs(to_numpy(x)) ** 2).sum() for x in arrays))


@sizes
def test_norms_of_any_size(size):
    gradients = {**tree(size), "complex": mx.array([3 + 4j, 1 + 1j]) * size}
    del gradients["hole"]
    want = {key: norm_of(g) for key, g in gradients.items()}
    got = reductions.norms(gradients, UNMODIFIED)
    for (key,), norm in got.items():
        assert norm.item() == pytest.approx(want[key], rel=2e-6, abs=1e-37), key
    assert reductions.global_norm(gradients, UNMODIFIED).item() == pytest.approx(norm_of(*gradients.values()), rel=2e-6)


def test_norms_under_modifiers():
    gradients = tree(1e30)
    halves = Modifiers(scale=mx.array(0.5), low=mx.array(-1e27), high=mx.array(1e27))
    want = {key: np.clip(to_numpy(g) * 0.5, -1e27, 1e27) for key, g in gradients.items() if key != "hole"}
    named: Any = {name: {(key,): getattr(halves, name) for key in want} for name in ("scale", "low", "high")}
    by_path = Modifiers(**named)
    for modifiers in (halves, by_path):
        norm = reductions.global_norm(gradients, modifiers).item()
        assert norm == pytest.approx(np.sqrt(sum((x**2).sum() for x in want.values())), rel=2e-6)
        for (key,), norm in reductions.norms(gradients, modifiers).items():
            assert norm.item() == pytest.approx(np.sqrt((want[key] ** 2).sum()), rel=2e-6), key


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("shape", [(3,), (40_001,)])
def test_norms_of_what_is_not_finite(bad, shape):
    g = np.ones(shape)
    g[-1] = bad
    gradients = {"a": mx.array(g), "b": mx.ones((2,))}
    want = np.nan if np.isnan(bad) else np.inf
    assert np.array_equal(reductions.global_norm(gradients, UNMODIFIED).item(), want, equal_nan=True)
    assert np.array_equal(reductions.norms(gradients, UNMODIFIED)[("a",)].item(), want, equal_nan=True)
    assert not reductions.all_finite(gradients, UNMODIFIED).item()


@sizes
def test_derivatives_of_norms(size):
    def loss(a, b):
        return reductions.global_norm({"a": a, "b": b}, UNMODIFIED) + reductions.norms({"a": a}, UNMODIFIED)[("a",)]

    a, b = mx.array([3.0, -4.0, 0.0]) * size, mx.array([12.0]) * size
    by_a, by_b = mx.grad(loss, argnums=(0, 1))(a, b)
    np.testing.assert_allclose(by_a, np.array([3, -4, 0]) * (1 / 13 + 1 / 5), rtol=1e-5)
    np.testing.assert_allclose(by_b, [12 / 13], rtol=1e-5)
    by_zeros = mx.grad(loss, argnums=(0, 1))(mx.zeros((3,)), mx.zeros((1,)))
    assert all(np.isfinite(x).all() for x in map(np.array, by_zeros))


@pytest.mark.parametrize("size", SIZES[1:])  # a limit that is a normal number
@pytest.mark.parametrize("wrap", [ClipByGlobalNorm, ClipByNorm])
def test_clips_gradients_of_any_size(wrap, size):
    w, g = {"w": mx.zeros((3,))}, {"w": mx.array([3.0, 0.0, -4.0]) * size}
    new = wrap(optim.SGD(1.0), 1e-3 * size).apply_gradients(g, w)["w"]
    np.testing.assert_allclose(new, np.array([-0.6, 0.0, 0.8]) * 1e-3 * size, rtol=2e-6)


@sizes
def test_constraints_on_weights_of_any_size(size):
    w = mx.array([[3.0], [4.0]]) * size
    norm = 5.0 * size
    np.testing.assert_allclose(UnitNorm()(w), np.array([[3.0], [4.0]]) * size / (1e-7 + norm), rtol=2e-6, atol=1e-37)
    want = np.array([[3.0], [4.0]]) * size * (min(norm, 2.0) / (1e-7 + norm))
    np.testing.assert_allclose(MaxNorm()(w), want, rtol=2e-6, atol=1e-37)


def test_a_constraint_on_zeros_has_a_derivative():
    for constraint in (UnitNorm(), MaxNorm()):
        slope = mx.grad(lambda w, function=constraint: function(w).sum())(mx.zeros((2, 2)))
        assert np.isfinite(np.array(slope)).all()


# ------------------------------------------------------------------ guarded steps
GUARDS = {"skip": SkipNonFinite, "scale": lambda optimizer: DynamicLossScale(optimizer, 1.0)}
guards = pytest.mark.parametrize("guard", GUARDS.values(), ids=GUARDS)
INSIDE = {
    "adagrad": lambda: Adagrad(0.1),
    "in half precision": lambda: Adagrad(0.1, accumulator=Dense("parameter")),
    "row-wise": lambda: Adagrad(0.1, accumulator=RowWise()),
    "coupled decay": lambda: Adagrad(0.1, weight_decay=0.9),
    "decoupled decay": lambda: Adagrad(3e38, weight_decay=0.9, decoupled_weight_decay=True),
    "clip": lambda: ClipByGlobalNorm(Adagrad(0.1), 1.0),
    "clip each": lambda: ClipByNorm(Adagrad(0.1), 1.0),
    "accumulation": lambda: GradientAccumulation(Adagrad(0.1), 2),
    "average": lambda: ExponentialMovingAverage(Adagrad(0.1), overwrite_frequency=2),
    "constraint": lambda: Constraint(Adagrad(0.1), {"*": "unit_norm"}),
    "tiny loss scale": lambda: LossScale(Adagrad(0.1), 1e-15),
    "SGD": lambda: optim.SGD(0.1, momentum=0.9, weight_decay=0.9),
    "Adam": lambda: optim.Adam(0.1),
    "around Adam": lambda: ClipByGlobalNorm(GradientAccumulation(optim.Adam(3e38), 2), 1e30),
}


def assert_finite(tree, note):
    for path, x in flat(tree):
        assert x.dtype not in (mx.float16, mx.float32) or mx.isfinite(x).all().item(), (note, path)


@pytest.mark.filterwarnings("ignore:.*nobody has scaled the loss")
@guards
@pytest.mark.parametrize("make", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_a_guarded_step_leaves_nothing_infinite(guard, make, compiled):
    optimizer = guard(make())
    w = {"a": mx.array([[1.0, -2.0, 1e19], [3e38, -3e38, 0.0]]), "h": mx.array([1.0, 65504.0, -300.0], mx.float16)}

    def step(g, w):
        return optimizer.apply_gradients(g, w)

    optimizer.init(w)
    if compiled:
        step = mx.compile(step, inputs=[optimizer.state], outputs=[optimizer.state])
    for large, half in [
        (1.0, 1.0),
        (1e20, 1.0),
        (1.8e19, 300.0),
        (1.5e19, -65504.0),
        (-1.8e19, 60000.0),
        (1e-30, 1e-7),
    ]:
        for g in (mx.full((2, 3), large), mx.array([[large, 0.0, 1.0], [0.0, -large, large]])):
            w = step({"a": g, "h": mx.array([half, -half, half], mx.float16)}, w)
            mx.eval(w, optimizer.state)
            assert_finite([w, optimizer.state], (large, half))


@guards
def test_a_guarded_step_on_rows_leaves_nothing_infinite(guard):
    for accumulator in (Dense(), RowWise(), Dense("parameter")):
        for rows, dtype in ((8, mx.float32), (8, mx.float16), (3000, mx.float32)):
            optimizer = guard(Adagrad(0.1, accumulator=accumulator))
            w = mx.full((rows + 1, 16), 3.0, dtype)
            for large in (1.0, 1.5e19, 1.5e19, -1.8e19, 1e20, 300.0):
                values = mx.full((rows, 16), large).astype(dtype)
                gradient = RowSparse(mx.arange(rows), values, rows + 1)
                w = optimizer.apply_gradients({"w": gradient}, {"w": w})["w"]
                mx.eval(w, optimizer.state)
                assert_finite([w, optimizer.state], (accumulator, rows, large))


@guards
def test_a_gradient_without_a_finite_square_changes_nothing(guard):
    optimizer = guard(ClipByGlobalNorm(Adagrad(0.1), 1.0))
    w = optimizer.apply_gradients({"w": mx.ones((3,))}, {"w": mx.ones((3,))})
    before = bits([w, optimizer.state["inner"]])
    w = optimizer.apply_gradients({"w": mx.array([1.0, 1e20, 1.0])}, w)
    assert bits([w, optimizer.state["inner"]]) == before


def test_without_a_guard_what_is_not_finite_shows():
    optimizer = GradientAccumulation(Adagrad(0.1), 1)
    step = mx.compile(lambda g, w: optimizer.apply_gradients(g, w), inputs=[optimizer.state], outputs=[optimizer.state])
    assert not mx.isfinite(step({"w": mx.array([mx.nan])}, {"w": mx.ones((1,))})["w"]).any().item()


def test_the_mean_of_a_row_does_not_overflow():
    g = mx.full((1, 1000), 1e18)
    optimizer = Adagrad(0.1, accumulator=RowWise())
    w = optimizer.apply_gradients({"w": g}, {"w": mx.ones((1, 1000))})["w"]
    np.testing.assert_allclose(optimizer.state["w"]["v"], [1e36], rtol=1e-5)
    np.testing.assert_allclose(w, np.full((1, 1000), 0.9), rtol=1e-5)
