"""Ways of keeping weights and v that lose nothing on average: the cases that their law tests share."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlx_adagrad
from cases import to_numpy
from mlx_adagrad import Dense, Quantized, RowWise
from mlx_adagrad.update.accumulators import dense_v

STORAGES = {
    "stochastic": {"rounding": "stochastic"},
    "compensated": {"rounding": "compensated"},
    "bf16": {"accumulator": Dense("bfloat16")},
    "8bit": {"accumulator": Quantized(block=32, min_size=1)},
    "row_wise": {"accumulator": RowWise(), "rounding": "stochastic"},
    "row_wise_bf16": {"accumulator": RowWise("bfloat16"), "rounding": "compensated"},
    "stochastic_bf16": {"accumulator": Dense("bfloat16"), "rounding": "stochastic"},
    "compensated_8bit": {"accumulator": Quantized(block=32, min_size=1), "rounding": "compensated"},
    "stochastic_8bit": {"accumulator": Quantized(block=32, min_size=1), "rounding": "stochastic"},
}
storages = pytest.mark.parametrize("storage", [pytest.param(s, id=name) for name, s in STORAGES.items()])

# for laws with many cases: each way of storing once
SOME = ("stochastic_bf16", "row_wise", "compensated_8bit")
some_storages = pytest.mark.parametrize("storage", [pytest.param(STORAGES[name], id=name) for name in SOME])

# How far neighbours are apart, relative: of w some steps of it, since a stochastic one may take either; of v one.
W_UNITS = {mx.float32: 2.0**-20, mx.float16: 2.0**-9, mx.bfloat16: 2.0**-6}
V_UNIT = {"float32": 2.0**-20, "bfloat16": 2.0**-7, "8bit": 2.0**-4}


def adagrad(storage, learning_rate=0.1, seed: int | None = 3, **options):
    """An optimizer with this storage, its seed set."""
    return mlx_adagrad.Adagrad(learning_rate, **{"rounding_seed": seed, **storage, **options})


def v_unit(storage):
    """How far two neighbours of a stored v are apart, relative."""
    accumulator = storage.get("accumulator", Dense())
    return V_UNIT["8bit" if isinstance(accumulator, Quantized) else accumulator.dtype]


def v_of(state):
    """The v of one parameter, in float64."""
    return to_numpy(dense_v(state))


def smooth(shape, steps=5, seed=0):
    """Gradients within two decades, so that no block of v underflows."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-1, 1, size=shape)
    return [rng.normal(size=shape) * scale for _ in range(steps)]
