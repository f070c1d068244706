"""The cases that every law test shares: options, dtypes, shapes, and how close is close."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

OPTIONS = {
    "defaults": {},
    "eps": {"eps": 0.25},
    "eps_inside_sqrt": {"eps": 0.25, "eps_inside_sqrt": True},
    "lr_decay": {"lr_decay": 0.3},
    "weight_decay": {"weight_decay": 0.2},
    "decoupled": {"weight_decay": 0.2, "decoupled_weight_decay": True},
    "accumulator": {"initial_accumulator_value": 0.5},
    "eps_zero": {"eps": 0.0, "initial_accumulator_value": 0.5},
    "eps_zero_inside": {"eps": 0.0, "initial_accumulator_value": 0.5, "eps_inside_sqrt": True},
    "maximize": {"maximize": True},
    "all": {
        "eps": 1e-3,
        "lr_decay": 0.1,
        "weight_decay": 0.05,
        "initial_accumulator_value": 0.1,
        "maximize": True,
    },
    "all_decoupled": {
        "eps": 1e-3,
        "lr_decay": 0.1,
        "weight_decay": 0.05,
        "decoupled_weight_decay": True,
        "initial_accumulator_value": 0.1,
        "maximize": True,
        "eps_inside_sqrt": True,
    },
}
options = pytest.mark.parametrize("options", [pytest.param(o, id=name) for name, o in OPTIONS.items()])

HALF = [mx.float16, mx.bfloat16]
GPU_DTYPES = [mx.float32, *HALF]
DTYPE_PAIRS = [(w, g) for w in GPU_DTYPES for g in GPU_DTYPES]
dtype_pairs = pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=lambda pair: "-".join(str(d)[9:] for d in pair))

SHAPES = [(), (1,), (7,), (8,), (0,), (0, 3), (5, 3), (2, 3, 4), (1023,)]

# fp32: a few roundings a step; half precision: one rounding of w a step, half a unit in the last place each
RELATIVE = {mx.float64: 1e-12, mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2, mx.complex64: 2e-6}


def tensors(shape, dtypes=(mx.float32, mx.float32), steps=5, seed=0):
    """A parameter and the gradients of some steps, with zeros and large and small values among them."""
    rng = np.random.default_rng(seed)

    def draw(dtype):
        x = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 2, size=shape)
        return mx.array(np.where(rng.random(shape) < 0.1, 0.0, x), mx.float32).astype(dtype)

    return draw(dtypes[0]), [draw(dtypes[1]) for _ in range(steps)]


def to_numpy(array):
    """``array`` in float64 (complex128 for complex)."""
    if array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    return np.array(array).astype(np.complex128 if array.dtype == mx.complex64 else np.float64)


def run(optimizer, w, gradients):
    """Train one tensor and return the last weights and its accumulator."""
    for g in gradients:
        w = optimizer.apply_gradients({"w": g}, {"w": w})["w"]
        mx.eval(w, optimizer.state)
    return w, optimizer.state["w"]["v"]


def assert_near(got, want, dtype=None, steps=5):
    """``got`` (an array) equals ``want`` (numpy) within what ``dtype`` can tell apart after some steps."""
    got = to_numpy(got) if isinstance(got, mx.array) else got
    dtype = dtype or mx.float32
    np.testing.assert_allclose(got, want, rtol=RELATIVE[dtype] * steps, atol=RELATIVE[dtype] * steps)


def memory_before() -> int:
    """The bytes that MLX holds before what a test measures; the peak starts from there.

    A GPU frees what it has used when it has finished, behind the back of the host: so that is waited for.
    """
    mx.synchronize()
    mx.reset_peak_memory()
    return mx.get_active_memory()


def flat(tree) -> Any:
    """The (path, array) pairs of a tree."""
    return tree_flatten(tree)


def bits(tree):
    """Every bit of a tree of arrays, for comparisons that allow no difference."""
    return {path: (str(a.dtype), a.shape, _bytes(a)) for path, a in flat(tree)}


def _bytes(array):
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes()
