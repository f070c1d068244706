"""Laws of every way to keep weights and v in few bits: near the reference, reproducible, and no bit more changed than
the gradient says.
"""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import reference
from cases import GPU_DTYPES, OPTIONS, SHAPES, bits, options, run, to_numpy
from mlx_adagrad import Adagrad, Dense, Quantized, RowSparse, RowWise, checkpoint
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    SkipNonFinite,
)
from storages import STORAGES, W_UNITS, adagrad, smooth, some_storages, storages, v_of, v_unit

pytestmark = pytest.mark.usefixtures("op_by_op")
dtypes = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=lambda d: str(d)[9:])


def gradients(shape, dtype=mx.float32, steps=5, seed=0):
    return [mx.array(g, mx.float32).astype(dtype) for g in smooth(shape, steps, seed)]


def weights(shape, dtype, seed=1):
    return mx.array(np.random.default_rng(seed).normal(size=shape), mx.float32).astype(dtype)


@options
@some_storages
def test_is_near_the_reference(storage, options):
    check_near_the_reference(storage, mx.bfloat16, options)


@dtypes
@storages
def test_is_near_the_reference_in_every_dtype(storage, dtype):
    check_near_the_reference(storage, dtype, OPTIONS["all"])


def check_near_the_reference(storage, dtype, options):
    shape = (9, 40)
    w, gs = weights(shape, dtype), gradients(shape, dtype)
    optimizer = adagrad(storage, **options)
    new, _ = run(optimizer, w, gs)
    row_wise = isinstance(optimizer.accumulator, RowWise)
    want_w, want_v = reference.adagrad(to_numpy(w), map(to_numpy, gs), row_wise=row_wise, **options)[-1]
    v = v_of(optimizer.state["w"])
    # each step may be off by one unit of v, which is half as much of its root; a decay brings rounded weights into v
    decayed = W_UNITS[dtype] if options.get("weight_decay") else 0
    np.testing.assert_allclose(v, want_v, rtol=6 * v_unit(storage) + decayed)
    moved = 0.1 * len(gs) * 3 * v_unit(storage)
    largest = np.maximum(np.abs(want_w), np.abs(to_numpy(w)))
    assert (np.abs(to_numpy(new) - want_w) <= 6 * W_UNITS[dtype] * largest + moved + 1e-3).all()
    assert new.dtype == dtype and new.shape == shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@some_storages
def test_every_shape(storage, shape):
    dtype = mx.bfloat16
    w, gs = weights(shape, dtype), gradients(shape)
    optimizer = adagrad(storage)
    new, _ = run(optimizer, w, gs)
    assert new.shape == shape and new.dtype == dtype
    row_wise = isinstance(optimizer.accumulator, RowWise)
    _, want = reference.adagrad(to_numpy(w), map(to_numpy, gs), row_wise=row_wise)[-1]
    np.testing.assert_allclose(v_of(optimizer.state["w"]), want, rtol=6 * v_unit(storage))


@storages
def test_equal_runs_are_equal_and_other_seeds_are_not(storage):
    def result(seed):
        optimizer = adagrad(storage, seed=seed)
        w, _ = run(optimizer, weights((40, 40), mx.bfloat16), gradients((40, 40)))
        return bits({"w": w, "state": optimizer.state["w"]})

    assert result(3) == result(3)
    assert (result(3) == result(4)) == ("random" not in kind(storage))


def kind(storage):
    accumulator = storage.get("accumulator", Dense())
    return "random" if accumulator.draws or storage.get("rounding") == "stochastic" else ""


@storages
def test_a_parameter_has_the_same_bits_whatever_is_beside_it(storage):
    w, gs = weights((40, 40), mx.bfloat16), gradients((40, 40))
    alone, both = adagrad(storage), adagrad(storage)
    one, two = {"w": w}, {"a": w, "w": w, "z": w}
    for g in gs:
        one = alone.apply_gradients({"w": g}, one)
        two = both.apply_gradients({"a": g, "w": g, "z": g}, two)
    assert bits(one["w"]) == bits(two["w"]) and bits(alone.state["w"]) == bits(both.state["w"])
    same = bits({"w": two["a"], **both.state["a"]}) == bits({"w": two["w"], **both.state["w"]})
    assert same == (kind(storage) == "")


@storages
def test_compiled_equals_plain(storage, compiling):
    w, gs = {"w": weights((9, 40), mx.bfloat16)}, gradients((9, 40))
    plain, other = adagrad(storage), adagrad(storage)
    other.init(w)
    step = mx.compile(lambda g, w: other.apply_gradients({"w": g}, w), other.state, other.state)
    one, two = w, w
    for g in gs:
        one, two = plain.apply_gradients({"w": g}, one), step(g, two)
        mx.eval(one, two, plain.state, other.state)
    assert bits(one) == bits(two) and bits(plain.state) == bits(other.state)


@storages
def test_goes_on_from_a_checkpoint_bit_for_bit(storage, tmp_path):
    w, gs = {"w": weights((9, 40), mx.bfloat16)}, gradients((9, 40), steps=6)
    first = adagrad(storage, seed=None, lr_decay=0.1)
    for g in gs[:3]:
        w = first.apply_gradients({"w": g}, w)
    checkpoint.save(tmp_path / "run.safetensors", first, w)
    for fresh in (True, False):
        second, w2 = adagrad(storage, seed=None, lr_decay=0.1), {"w": mx.zeros((9, 40), mx.bfloat16)}
        if not fresh:
            second.init(w2)
        checkpoint.load(tmp_path / "run.safetensors", second, w2)
        one, two, copy = w, w2, adagrad(storage, seed=None, lr_decay=0.1)
        copy.state = first.state
        for g in gs[3:]:
            one, two = copy.apply_gradients({"w": g}, one), second.apply_gradients({"w": g}, two)
        assert bits(one) == bits(two) and bits(copy.state) == bits(second.state)


@storages
def test_a_step_that_is_skipped_changes_no_bit(storage):
    w, gs = {"w": weights((9, 40), mx.bfloat16)}, gradients((9, 40))
    optimizer = SkipNonFinite(adagrad(storage))
    for g in gs:
        w = optimizer.apply_gradients({"w": g}, w)
    before = bits(optimizer.optimizer.state)
    after = optimizer.apply_gradients({"w": mx.where(gs[0] > 0, gs[0], np.nan)}, w)
    assert bits(after) == bits(w) and bits(optimizer.optimizer.state) == before


@storages
def test_a_gradient_of_zero_changes_no_bit(storage):
    w = {"w": weights((9, 40), mx.bfloat16)}
    optimizer = adagrad(storage)
    for g in gradients((9, 40)):
        w = optimizer.apply_gradients({"w": g}, w)
    before = bits({"w": w, **optimizer.state["w"]})
    w = optimizer.apply_gradients({"w": mx.zeros((9, 40))}, w)
    assert bits({"w": w, **optimizer.state["w"]}) == before


# ---- Row-sparse.

TABLES = [(50, 40), (50, 6), (300,), (30, 2, 20), (7, 70)]


def rows_of(shape, dtype, steps=4, k=12, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(steps):
        indices = rng.integers(-2, shape[0] + 2, size=k)
        indices[:3] = indices[3:6]
        values = mx.array(rng.normal(size=(k, *shape[1:])), mx.float32).astype(dtype)
        found.append(RowSparse(mx.array(indices), values, shape[0]))
    return found


@pytest.mark.parametrize("shape", TABLES, ids=str)
@storages
def test_row_sparse_equals_dense_bit_for_bit(storage, shape):
    dtype = mx.bfloat16 if "rounding" in storage else mx.float32
    w = weights(shape, dtype)
    sparse, dense = adagrad(storage), adagrad(storage)
    one = two = {"w": w}
    for g in rows_of(shape, dtype):
        one = sparse.apply_gradients({"w": g}, one)
        two = dense.apply_gradients({"w": g.coalesce().to_dense()}, two)  # a gradient of zero changes no bit
        mx.eval(one, two, sparse.state, dense.state)
    if isinstance(storage.get("accumulator"), RowWise) and len(shape) > 1:  # means of rows, added up in another order
        np.testing.assert_allclose(v_of(sparse.state["w"]), v_of(dense.state["w"]), rtol=4 * v_unit(storage))
        np.testing.assert_allclose(to_numpy(one["w"]), to_numpy(two["w"]), atol=0.03)
    else:
        assert bits(one) == bits(two) and bits(sparse.state) == bits(dense.state)


@storages
@pytest.mark.parametrize("shape", [(50, 40), (50, 6)], ids=str)
def test_rows_without_a_gradient_stay(storage, shape):
    w = weights(shape, mx.bfloat16)
    optimizer = adagrad(storage, weight_decay=0.1)
    w, _ = run(optimizer, w, gradients(shape))
    before, kept = np.array(w.view(mx.uint16)), {k: np.array(v_of({"v": v}) if k == "exponents" else to_numpy(v))
                                                 for k, v in optimizer.state["w"].items()}  # fmt: skip
    v = v_of(optimizer.state["w"])
    g = RowSparse(mx.array([3, 7]), mx.full((2, *shape[1:]), 0.01), shape[0])
    new = optimizer.apply_gradients({"w": g}, {"w": w})["w"]
    others = np.ones(shape[0], bool)
    others[[3, 7]] = False
    assert np.array_equal(np.array(new.view(mx.uint16))[others], before[others])
    assert np.array_equal(v_of(optimizer.state["w"])[others], v[others])
    if "compensation" in kept:
        assert np.array_equal(to_numpy(optimizer.state["w"]["compensation"])[others], kept["compensation"][others])
    assert not np.array_equal(np.array(new.view(mx.uint16))[~others], before[~others])


@storages
def test_not_lazy_is_dense(storage):
    w = weights((50, 40), mx.bfloat16)
    one = two = {"w": w}
    sparse, dense = adagrad(storage, lazy=False, weight_decay=0.1), adagrad(storage, weight_decay=0.1)
    for g in rows_of((50, 40), mx.float32):
        one = sparse.apply_gradients({"w": g}, one)
        two = dense.apply_gradients({"w": g.coalesce().to_dense()}, two)
    assert bits(one) == bits(two) and bits(sparse.state) == bits(dense.state)


@storages
def test_rows_that_name_nothing_change_no_bit(storage):
    w = weights((50, 40), mx.bfloat16)
    optimizer = adagrad(storage)
    w, _ = run(optimizer, w, gradients((50, 40)))
    before = bits({"w": w, **optimizer.state["w"]})
    for indices in (mx.array([-1, 50]), mx.zeros((0,), mx.int32)):
        g = RowSparse(indices, mx.ones((len(indices), 40)), 50)
        w = optimizer.apply_gradients({"w": g}, {"w": w})["w"]
        assert bits({"w": w, **optimizer.state["w"]}) == before


# ---- Options and wrappers around it.


@some_storages
@pytest.mark.parametrize(
    "wrap",
    [
        lambda o: ClipByGlobalNorm(o, 0.5),
        lambda o: DynamicLossScale(o, 4.0),
        lambda o: ExponentialMovingAverage(o, 0.9, overwrite_frequency=2),
        lambda o: GradientAccumulation(o, 2),
        SkipNonFinite,
    ],
    ids=["clip", "loss_scale", "ema", "accumulation", "skip"],
)
def test_wrappers(storage, wrap, tmp_path, compiling):
    w, gs = {"w": weights((9, 40), mx.bfloat16), "b": weights((7,), mx.bfloat16)}, gradients((9, 40), steps=4)
    optimizer = wrap(adagrad(storage))
    optimizer.init(w)
    step = mx.compile(lambda g, w: optimizer.apply_gradients(g, w), optimizer.state, optimizer.state)
    plain, new, compiled = wrap(adagrad(storage)), w, w
    for g in gs:
        new = plain.apply_gradients({"w": g, "b": g[0, :7]}, new)
        compiled = step({"w": g, "b": g[0, :7]}, compiled)
        mx.eval(new, compiled, plain.state, optimizer.state)
    assert bits(new) == bits(compiled) and bits(plain.state) == bits(optimizer.state)
    checkpoint.save(tmp_path / "run.safetensors", plain, new)
    other = wrap(adagrad(storage))
    checkpoint.load(tmp_path / "run.safetensors", other, dict(new))
    assert bits(other.state) == bits(plain.state)
    assert not mx.array_equal(new["w"], w["w"])


@storages
def test_groups(storage):
    w, gs = weights((9, 40), mx.bfloat16), gradients((9, 40))
    optimizer = adagrad(storage, groups=[{"params": "b", "lr": 0.0}, {"params": "c", "weight_decay": 0.5}])
    tree = {"a": w, "b": w, "c": w}
    for g in gs:
        tree = optimizer.apply_gradients(dict.fromkeys(tree, g), tree)
    assert mx.array_equal(tree["b"], w) and not mx.array_equal(tree["a"], w)
    alone, a = adagrad(storage), {"a": w}
    for g in gs:
        a = alone.apply_gradients({"a": g}, a)
    assert bits(a["a"]) == bits(tree["a"])


@storages
def test_a_derivative_goes_through(storage):
    if isinstance(storage.get("accumulator"), Quantized):
        steps, g = 1, mx.array(np.linspace(0.1, 1, 40), mx.float32)
    else:
        steps, g = 2, mx.array(np.linspace(0.1, 1, 40), mx.float32)

    def last(g, storage):
        optimizer = adagrad(storage, eps=0.1, differentiable=True, fused=False)
        w = {"w": mx.ones((40,), mx.bfloat16)}
        for _ in range(steps):
            w = optimizer.apply_gradients({"w": g}, w)
        return w["w"].astype(mx.float32).sum()

    got, want = mx.grad(last)(g, storage), mx.grad(last)(g, {})
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=0.15, atol=2e-3)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float64], ids=lambda d: str(d)[9:])
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_wide_weights_are_not_rounded(rounding, dtype, cpu):
    w, gs = mx.array(np.random.default_rng(0).normal(size=(9, 40))).astype(dtype), gradients((9, 40))
    one, two = Adagrad(0.1, rounding=rounding), Adagrad(0.1)
    (a, _), (b, _) = run(one, w, gs), run(two, w, gs)
    assert bits(a) == bits(b) and bits(one.state["w"]) == bits(two.state["w"])


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_complex_weights_are_as_ever(storage):
    if isinstance(storage.get("accumulator"), RowWise):
        pytest.skip("as for real ones")
    w = mx.random.normal((9, 40)) + 1j * mx.random.normal((9, 40))
    gs = [mx.random.normal((9, 40)) * (1 + 2j) for _ in range(3)]
    (a, v), (b, u) = run(adagrad(storage), w, gs), run(Adagrad(0.1), w, gs)
    assert bits(a) == bits(b) and bits(v) == bits(u)


def test_float64_weights_with_a_narrow_v(cpu):
    for accumulator in (Dense("bfloat16"), Quantized(min_size=1)):
        w = mx.array(np.random.default_rng(0).normal(size=(9, 40)), mx.float64)
        gs = gradients((9, 40))
        new, _ = run(Adagrad(0.1, accumulator=accumulator), w, gs)
        assert new.dtype == mx.float64
        want, _ = reference.adagrad(to_numpy(w), map(to_numpy, gs))[-1]
        np.testing.assert_allclose(np.array(new), want, atol=0.1)


@storages
def test_apply_single_of_a_subclass(storage):
    class Same(Adagrad):
        def apply_single(self, gradient, parameter, state):
            return super().apply_single(gradient, parameter, state)

    w, gs = weights((9, 40), mx.bfloat16), gradients((9, 40))
    (a, _), (b, _) = run(Same(0.1, rounding_seed=3, **storage), w, gs), run(adagrad(storage), w, gs)
    assert bits(a) == bits(b)


@storages
def test_state_holds_arrays_only_and_what_it_says(storage):
    optimizer = adagrad(storage)
    optimizer.init({"w": mx.zeros((64, 64), mx.bfloat16)})
    state = optimizer.state["w"]
    assert all(isinstance(x, mx.array) for _, x in tree_flatten(optimizer.state))
    accumulator = optimizer.accumulator
    assert set(state) == {"v"} | ({"exponents"} if isinstance(accumulator, Quantized) else set()) | (
        {"compensation"} if optimizer.rounding == "compensated" else set()
    )
