"""The range of numbers: norms of all sizes, and guarded steps that leave nothing that is not finite."""

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from cases import to_numpy
from mlx_adagrad.update.modifiers import UNMODIFIED, Modifiers
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    ClipByNorm,
    MaxNorm,
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
