"""The Metal kernels of weights and accumulators in few bits: bit for bit the operations, in one launch."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from cases import DTYPE_PAIRS, GPU_DTYPES, bits, options, to_numpy
from mlx_adagrad import Adagrad, Dense, Quantized, RowSparse, RowWise
from mlx_adagrad.update.modifiers import Modifiers
from storages import STORAGES, adagrad, smooth, storages, v_of

pytestmark = pytest.mark.usefixtures("kernel_device", "op_by_op")
dtypes = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=lambda d: str(d)[9:])
SHAPES = [(), (1,), (7,), (0,), (5, 3), (9, 40), (2, 3, 4), (3, 70), (1023,), (0, 3), (300, 300)]


def weights(shape, dtype, seed=1):
    return mx.array(np.random.default_rng(seed).normal(size=shape), mx.float32).astype(dtype)


def gradients(shape, dtype=mx.float32, steps=3):
    return [mx.array(g, mx.float32).astype(dtype) for g in smooth(shape, steps)]


def by_row(storage, shape):
    return isinstance(storage.get("accumulator"), RowWise) and len(shape) > 1


def assert_equal(storage, fused, plain, shape):
    """(tree of weights, state) of both; a mean over a row may be added up in another order, all else is exact."""
    if not by_row(storage, shape):
        assert bits(fused[0]) == bits(plain[0]) and bits(fused[1]) == bits(plain[1])
        return
    np.testing.assert_allclose(v_of(fused[1]), v_of(plain[1]), rtol=2.0**-6)
    np.testing.assert_allclose(to_numpy(fused[0]["w"]), to_numpy(plain[0]["w"]), atol=0.04)


def both(storage, w, gs, use_kernels: bool | None = True, **options: Any):
    fused, plain = (adagrad(storage, fused=f, **options) for f in (use_kernels, False))
    one = two = {"w": w}
    for g in gs:
        one, two = fused.apply_gradients({"w": g}, one), plain.apply_gradients({"w": g}, two)
        mx.eval(one, two, fused.state, plain.state)
    return (one, fused.state["w"]), (two, plain.state["w"])


EACH_BODY = ["compensated", "row_wise", "stochastic_8bit"]
each_body = pytest.mark.parametrize("storage", [pytest.param(STORAGES[name], id=name) for name in EACH_BODY])


@storages
def test_several_parameters(storage):
    shapes = {"a": (9, 40), "b": (40,), "c": (9, 40), "d": (3, 2)}
    groups = [{"params": "c", "lr": 0.2}]
    for more in (None, groups):
        fused, plain = (adagrad(storage, fused=f, groups=more) for f in (True, False))
        one = two = {name: weights(shape, mx.bfloat16) for name, shape in shapes.items()}
        g = {name: gradients(shape, mx.bfloat16, steps=1)[0] for name, shape in shapes.items()}
        for _ in range(2):
            one, two = fused.apply_gradients(g, one), plain.apply_gradients(g, two)
        for name, shape in shapes.items():
            assert_equal(storage, ({"w": one[name]}, fused.state[name]), ({"w": two[name]}, plain.state[name]), shape)


@options
@each_body
def test_equals_the_operations(storage, options):
    w, gs = weights((9, 40), mx.bfloat16), gradients((9, 40))
    assert_equal(storage, *both(storage, w, gs, **options), w.shape)


@dtypes
@storages
def test_every_dtype(storage, dtype):
    w, gs = weights((9, 40), dtype), gradients((9, 40))
    assert_equal(storage, *both(storage, w, gs), w.shape)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=lambda pair: "-".join(str(d)[9:] for d in pair))
@each_body
def test_every_pair_of_dtypes(storage, pair):
    w, gs = weights((9, 40), pair[0]), gradients((9, 40), pair[1])
    assert_equal(storage, *both(storage, w, gs), w.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_body
def test_every_shape(storage, shape):
    w, gs = weights(shape, mx.bfloat16), gradients(shape, steps=2)
    assert_equal(storage, *both(storage, w, gs), shape)


@pytest.mark.parametrize("block", [16, 31, 32, 33, 200, 256, 1024])
def test_every_size_of_blocks(block):
    storage = {"accumulator": Quantized(block=block, min_size=1), "rounding": "stochastic"}
    for shape in [(3, 1030), (40, 33), (2100,)]:
        assert_equal(storage, *both(storage, weights(shape, mx.bfloat16), gradients(shape)), shape)


@storages
def test_a_transposed_gradient(storage):
    w, gs = weights((9, 40), mx.bfloat16), [g.T for g in gradients((40, 9))]
    assert_equal(storage, *both(storage, w, gs), w.shape)


@pytest.mark.parametrize("shape", [(50, 40), (50, 6), (30, 2, 20), (300,)], ids=str)
@storages
def test_row_sparse_equals_the_operations(storage, shape):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(3):
        indices = rng.integers(-2, shape[0] + 2, size=12)
        found.append(RowSparse(mx.array(indices), mx.array(rng.normal(size=(12, *shape[1:])), mx.float32), shape[0]))
    fused = None if isinstance(storage.get("accumulator"), Quantized) and shape in [(50, 6), (300,)] else True
    assert_equal(storage, *both(storage, weights(shape, mx.bfloat16), found, fused), shape)


@storages
def test_modifiers(storage):
    w, gs = weights((9, 40), mx.bfloat16), gradients((9, 40))
    fused, plain = (adagrad(storage, fused=fused) for fused in (True, False))
    one = two = {"w": w}
    for g, apply in zip(gs, (True, False, True), strict=True):
        modifiers = Modifiers(mx.array(0.5), mx.array(-0.3), mx.array(0.3), mx.array(apply))
        before = bits(one), bits(fused.state.get("w", {}))
        one, two = (o.apply_modified({"w": g}, t, modifiers) for o, t in ((fused, one), (plain, two)))
        mx.eval(one, two, fused.state, plain.state)
        assert apply or before == (bits(one), bits(fused.state["w"]))
    assert_equal(storage, (one, fused.state["w"]), (two, plain.state["w"]), w.shape)


def test_numbers_that_are_not_finite(host):
    for storage in STORAGES.values():
        w = weights((9, 40), mx.bfloat16)
        g = np.array(smooth((9, 40), 1)[0], np.float32)
        g[0, 0], g[1, 1], g[2, 2] = np.inf, 1e25, np.nan
        fused, plain = both(storage, w, [mx.array(g), *gradients((9, 40), steps=2)])
        nan = np.isnan(to_numpy(plain[0]["w"]))
        assert np.array_equal(np.isnan(to_numpy(fused[0]["w"])), nan) and nan.any()


# ---- What a launch costs; counted on the host.


def launches(host, storage, shape, dtype):
    w, g = weights(shape, dtype), gradients(shape, dtype, steps=1)[0]
    optimizer = adagrad(storage, fused=True)
    optimizer.init({"w": w})
    mx.eval(w, g, optimizer.state)
    host.clear()
    mx.eval(optimizer.apply_gradients({"w": g}, {"w": w}), optimizer.state)
    return host.launches


@pytest.mark.parametrize(
    "name, storage, bytes_per_element",
    [
        ("narrow", {"rounding": "stochastic"}, 2 + 2 + 4 + 2 + 4),
        ("narrow", {"rounding": "compensated"}, 2 + 2 + 2 + 4 + 2 + 2 + 4),
        ("narrow", {"accumulator": Dense("bfloat16")}, 2 + 2 + 2 + 2 + 2),
        ("narrow_quantized", {"accumulator": Quantized()}, 2 + 2 + 1 + 2 + 1),
        ("narrow_quantized", {"accumulator": Quantized(), "rounding": "stochastic"}, 2 + 2 + 1 + 2 + 1),
    ],
)
def test_one_launch_moves_each_byte_once(host, name, storage, bytes_per_element):
    shape = (64, 256)
    (launch,) = launches(host, storage, shape, mx.bfloat16)
    assert launch.name == f"mlx_adagrad_{name}"
    tensors = [b for b in ("w", "g", "v", "rest") if b in launch.bytes_read]
    moved = sum(launch.bytes_read[b] for b in tensors)
    moved += sum(n for b, n in launch.bytes_written.items() if b != "new_exponents")
    assert moved == bytes_per_element * 64 * 256
    if name == "narrow_quantized":
        assert launch.bytes_written["new_exponents"] == 64
        assert launch.elements["new_exponents"] == 64


def test_fused_true_says_what_no_kernel_takes():
    w = {"w": mx.zeros((4096,), mx.bfloat16)}
    with pytest.raises(RuntimeError, match="no kernel takes 'w'.*Quantized"):
        Adagrad(0.1, accumulator=Quantized(block=4096), fused=True).apply_gradients({"w": mx.ones((4096,))}, w)
    Adagrad(0.1, accumulator=Quantized(block=4096)).apply_gradients({"w": mx.ones((4096,))}, w)
