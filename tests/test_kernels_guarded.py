"""Steps that may be skipped, in kernels: no finite element becomes infinite, and operations do the same."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from cases import HALF, to_numpy
from mlx_adagrad import Adagrad, Dense, Quantized, RowSparse, RowWise
from mlx_adagrad.update.rule import LARGEST
from mlx_adagrad.wrappers import SkipNonFinite

ACCUMULATORS = [Dense(), Dense("parameter"), RowWise()]


def stepped(fused, accumulator, w, gradients, lr, v):
    optimizer = SkipNonFinite(Adagrad(lr, accumulator=accumulator, fused=fused, initial_accumulator_value=v))
    for g in gradients:
        w = optimizer.apply_gradients({"w": g}, {"w": w})["w"]
    mx.eval(w, optimizer.state)
    return w, optimizer.optimizer.state["w"]["v"], optimizer.skipped_steps.item()


@pytest.mark.parametrize("accumulator", ACCUMULATORS, ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, *HALF], ids=str)
def test_a_guarded_kernel_makes_nothing_infinite(accumulator, dtype, host):
    largest = LARGEST[dtype]
    rng = np.random.default_rng(0)
    w = mx.array(rng.choice([largest, -largest, 1.0], size=(6, 40)), mx.float32).astype(dtype)
    g = mx.array(rng.uniform(-1, 1, size=(6, 40)) * min(largest, 1.5e19), mx.float32).astype(dtype)
    g = mx.where(mx.isfinite(g), g, 1.0)
    v = 0.9 * (largest if accumulator == Dense("parameter") else 3e38)
    got = stepped(True, accumulator, w, [g, g], 0.5 * min(largest, 1e38), v)
    assert host.launches  # kernels did run
    want = stepped(False, accumulator, w, [g, g], 0.5 * min(largest, 1e38), v)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert mx.all(mx.isfinite(a))
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-5 if dtype == mx.float32 else 1e-2)
    assert got[2] == want[2] == 0


@pytest.mark.parametrize("accumulator", [Dense(), RowWise(), Quantized(min_size=1)], ids=str)
def test_rows_and_narrow_state_are_guarded_by_operations(accumulator, host):
    w, rows = mx.full((6, 32), 3e38), mx.full((2, 32), -1e19)
    g = RowSparse(mx.array([1, 4]), rows, 6) if type(accumulator) is not Quantized else mx.full((6, 32), -1e19)
    w, v, _ = stepped(True, accumulator, w, [g], 3e38, 1.0)
    assert mx.all(mx.isfinite(w)) and (v.dtype == mx.uint8 or mx.all(mx.isfinite(v)))


def test_the_mean_of_a_row_does_not_overflow_in_its_sum(host):
    g = mx.full((2, 64), 1.5e19)  # the squares add up to 1.4e40, their mean is 2.25e38
    optimizer = Adagrad(0.1, accumulator=RowWise(), fused=True)
    optimizer.apply_gradients({"w": g}, {"w": mx.zeros((2, 64))})
    assert optimizer.state["w"]["v"].tolist() == pytest.approx([2.25e38] * 2, rel=1e-6)


@pytest.mark.parametrize("accumulator", [Dense("bfloat16"), RowWise("bfloat16")], ids=str)
def test_a_v_in_two_bytes_stops_at_its_largest_number(accumulator):
    w, v, skipped = stepped(False, accumulator, mx.ones((8, 64)), [mx.full((8, 64), 1.5e19)] * 3, 0.1, 3.38e38)
    assert skipped == 0 and mx.all(mx.isfinite(v)) and mx.all(mx.isfinite(w))
