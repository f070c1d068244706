"""The kernels where arithmetic is not that of Linux: denormals flushed to 0, multiplications and additions fused."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import row_cases
from cases import GPU_DTYPES, assert_near, bits, options, run, tensors, to_numpy
from mlx_adagrad import Adagrad, Dense, RowSparse, RowWise
from mlx_adagrad.update.modifiers import Modifiers
from reference import adagrad

ARITHMETIC = ("plain", "flush", "contract")
dtypes = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
TINY = {mx.float32: 1e-40, mx.float16: 1e-7, mx.bfloat16: 1e-40}  # denormal


@pytest.fixture(params=ARITHMETIC)
def arithmetic(request, host):
    """The host with one of the ways to compute."""
    host.flush, host.contract = request.param == "flush", request.param == "contract"
    return request.param


@options
def test_the_laws_hold(arithmetic, options):
    w, gradients = tensors((6, 5), steps=3)
    for accumulator in (Dense(), RowWise()):
        got_w, got_v = run(Adagrad(0.1, **options, accumulator=accumulator, fused=True), w, gradients)
        row_wise = accumulator == RowWise()
        want_w, want_v = adagrad(to_numpy(w), [to_numpy(g) for g in gradients], row_wise=row_wise, **options)[-1]
        assert_near(got_w, want_w)
        assert_near(got_v, want_v)


@options
def test_the_laws_hold_for_rows(arithmetic, options):
    table, gradients = row_cases.draw(30, steps=2)
    for accumulator in (Dense(), RowWise()):
        optimizer = Adagrad(0.1, **options, accumulator=accumulator, fused=True)
        new = table
        for indices, values in gradients:
            new = optimizer.apply_gradients({"w": RowSparse(indices, values, 30)}, {"w": new})["w"]
        want_w, want_v = row_cases.adagrad(table, gradients, row_wise=accumulator == RowWise(), **options)
        assert_near(new, want_w)
        assert_near(optimizer.state["w"]["v"], want_v)


@dtypes
@pytest.mark.parametrize("accumulator", [Dense(), Dense("parameter"), RowWise("parameter")], ids=str)
def test_a_step_that_is_held_back_returns_every_bit(arithmetic, accumulator, dtype):
    odd = mx.array([TINY[dtype], -TINY[dtype], -0.0, 1.0, float("inf"), 3e-5], dtype)
    w = mx.broadcast_to(odd, (4, 6))
    g: Any = mx.ones((4, 6), dtype)
    for gradient in (g, RowSparse(mx.array([0, 2, 0]), g[:3], 4)):
        optimizer = Adagrad(0.1, weight_decay=0.1, accumulator=accumulator, fused=True)
        optimizer.init({"w": w})
        state: Any = optimizer.state["w"]
        if accumulator != RowWise("parameter"):
            state["v"] = mx.abs(w).astype(state["v"].dtype)
        before = bits(state["v"])
        new = optimizer.apply_modified({"w": gradient}, {"w": w}, Modifiers(apply=mx.array(False)))["w"]
        assert bits(new) == bits(w)
        if isinstance(gradient, mx.array) or accumulator == Dense("parameter"):  # else -0.0 is added on this CPU
            assert bits(state["v"]) == before


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_a_denormal_v_counts_as_0_on_both_paths(arithmetic, eps, inside):
    """Whether or not comparisons see it: 0 / 0 is 0, and a gradient whose square vanishes moves nothing far."""
    g = mx.array([0.0, 1e-21, 1e-19, 1.0])
    for v in (0.0, 1e-45, 1e-39):
        results = []
        for fused in (True, False):
            optimizer = Adagrad(0.1, 1e-8, fused=fused, initial_accumulator_value=1.0, eps_inside_sqrt=inside)
            if eps == 0:
                optimizer = Adagrad(0.1, 0.0, fused=fused, initial_accumulator_value=1.0, eps_inside_sqrt=inside)
            state: Any = optimizer.state
            state["w"] = {"v": mx.full((4,), v)}
            results.append(to_numpy(optimizer.apply_gradients({"w": g}, {"w": mx.ones((4,))})["w"]))
        np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
        assert results[0][0] == 1.0 and np.isfinite(results[0]).all()


@dtypes
def test_rows_that_are_not_named_keep_every_bit(arithmetic, dtype):
    table = mx.full((8, 3), TINY[dtype], dtype)
    for indices in ([5, 2, 2], [-1, 3, 77]):
        g = RowSparse(mx.array(indices), mx.ones((3, 3), dtype), 8)
        new = Adagrad(0.1, fused=True).apply_gradients({"w": g}, {"w": table})["w"]
        idle = mx.array(np.flatnonzero(~row_cases.named(indices, 8)))
        assert bits(new[idle]) == bits(table[idle])


def test_the_modes_of_the_harness_do_what_they_say(host):
    kernel: Any = mx.fast.metal_kernel(
        name="arithmetic",
        input_names=["x", "y", "z"],
        output_names=["out"],
        source="uint i = thread_position_in_grid.x; out[i] = x[i] * y[i] + z[i];",
    )

    def compute(*values):
        arrays = [mx.full((8,), value) for value in values]
        where: Any = {"grid": (8, 1, 1), "threadgroup": (8, 1, 1)}
        return kernel(inputs=arrays, output_shapes=[(8,)], output_dtypes=[mx.float32], **where)[0][0].item()

    step = 1 + 2.0**-12
    host.flush, host.contract = False, False
    assert compute(1e-40, 1.0, 0.0) > 0 and compute(step, step, -step * step) != compute(1.0, 1.0, 0.5)
    rounded = compute(step, step, -1.0)
    host.flush = True
    assert compute(1e-40, 1.0, 0.0) == 0 and compute(1e-30, 1e-10, 0.0) == 0
    host.flush, host.contract = False, True
    assert compute(step, step, -1.0) == np.float32(step * step - 1) != rounded
