"""The Metal kernels for row-sparse gradients and for one accumulator a row: equal to the operations and to float64."""

import pickle
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import row_cases
from cases import DTYPE_PAIRS, GPU_DTYPES, assert_near, bits, memory_before, options, run, tensors, to_numpy
from mlx_adagrad import Adagrad, Dense, RowSparse, RowWise, SparseEmbedding, value_and_grad
from mlx_adagrad.sparse import ops as row_ops
from mlx_adagrad.update.modifiers import Modifiers
from mlx_adagrad.update.rule import Rule
from mlx_adagrad.update.tracing import evaluate
from reference import adagrad

pytestmark = pytest.mark.usefixtures("kernel_device")
accumulators = pytest.mark.parametrize("accumulator", [Dense(), RowWise()], ids=lambda a: type(a).__name__)
dtypes = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)


def run_rows(optimizer, table, gradients):
    for indices, values in gradients:
        table = optimizer.apply_gradients({"w": RowSparse(indices, values, len(table))}, {"w": table})["w"]
        mx.eval(table, optimizer.state)
    return table, optimizer.state["w"]["v"]


# --- rows -------------------------------------------------------------------------------------------------------------


@options
@accumulators
@dtypes
def test_kernels_equal_operations_and_float64(options, accumulator, dtype):
    table, gradients = row_cases.draw(30, steps=3, dtype=dtype)
    fused, plain = (Adagrad(0.1, **options, accumulator=accumulator, fused=f) for f in (True, False))
    fused_w, fused_v = run_rows(fused, table, gradients)
    plain_w, plain_v = run_rows(plain, table, gradients)
    want_w, want_v = row_cases.adagrad(table, gradients, row_wise=isinstance(accumulator, RowWise), **options)
    v_dtype = dtype if options.get("weight_decay") else mx.float32
    assert fused_w.dtype == dtype and fused_v.dtype == mx.float32 and fused_v.shape == plain_v.shape
    assert_near(fused_w, to_numpy(plain_w), dtype, steps=1)
    assert_near(fused_w, want_w, dtype)
    assert_near(fused_v, to_numpy(plain_v), v_dtype, steps=1)
    assert_near(fused_v, want_v, v_dtype)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_every_pair_of_dtypes(pair):
    table, gradients = row_cases.draw(30, steps=2)
    gradients = [(indices, values.astype(pair[1])) for indices, values in gradients]
    table = table.astype(pair[0])
    got, _ = run_rows(Adagrad(0.1, fused=True), table, gradients)
    assert_near(got, row_cases.adagrad(table, gradients)[0], pair[0])


@pytest.mark.parametrize("columns", [(), (1,), (2,), (31,), (32,), (33,), (300,), (2, 3)], ids=str)
@pytest.mark.parametrize("rows, k", [(1, 1), (1, 9), (5, 40), (300, 7)])
@accumulators
def test_every_shape(rows, k, columns, accumulator):
    table, gradients = row_cases.draw(rows, columns, k=k, steps=2)
    got_w, got_v = run_rows(Adagrad(0.1, accumulator=accumulator, fused=True), table, gradients)
    want_w, want_v = row_cases.adagrad(table, gradients, row_wise=isinstance(accumulator, RowWise))
    assert_near(got_w, want_w)
    assert_near(got_v, want_v)


@dtypes
@pytest.mark.parametrize("seed", range(3))
def test_threads_in_any_order(dtype, seed, request):
    if not mx.metal.is_available():
        request.getfixturevalue("host").seed = seed
    table, gradients = row_cases.draw(9, (40,), k=50, dtype=dtype)
    for accumulator in (Dense(), RowWise()):
        got, _ = run_rows(Adagrad(0.1, accumulator=accumulator, fused=True), table, gradients)
        want, _ = row_cases.adagrad(table, gradients, row_wise=isinstance(accumulator, RowWise))
        assert_near(got, want, dtype)


@dtypes
def test_coalesce_sums_in_fp32(dtype):
    indices, values = mx.array([4, 1, 4, 9, -1] * 300), mx.ones((1500, 3), dtype)
    g = RowSparse(indices, values, 5).coalesce()
    assert g.indices.tolist() == [1, 4, 5, 5, 5]
    assert g.values.tolist() == [[300] * 3, [600] * 3, [0] * 3, [0] * 3, [0] * 3]


@accumulators
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@dtypes
def test_rows_that_are_not_named_keep_every_bit(accumulator, weight_decay, dtype):
    odd = mx.array([-0.0, float("nan"), float("inf"), 1e-30, 0.0], dtype)
    table = mx.concatenate([mx.ones((3, 5), dtype), mx.broadcast_to(odd, (3, 5))])
    for indices in ([0, 2, 2, 0], [-1, 6, 77, -6], [6] * 4, [1, -1, 6, 1]):
        optimizer = Adagrad(0.1, weight_decay=weight_decay, accumulator=accumulator, fused=True)
        optimizer.init({"w": table})
        g = RowSparse(mx.array(indices), mx.ones((4, 5), dtype), 6)
        new = optimizer.apply_gradients({"w": g}, {"w": table})["w"]
        idle = mx.array(np.flatnonzero(~row_cases.named(indices, 6)))
        assert bits(new[idle]) == bits(table[idle])
        assert not optimizer.state["w"]["v"][idle].any().item()


@pytest.mark.parametrize("accumulator", [Dense("parameter"), RowWise("parameter")], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@dtypes
def test_v_in_half_precision_is_rounded_after_the_update(accumulator, sparse, dtype):
    table, g = mx.zeros((5, 4), dtype), mx.full((5, 4), 1e-4, dtype)  # g² is 0 in fp16
    gradient = RowSparse(mx.arange(5), g, 5) if sparse else g
    new = Adagrad(0.1, accumulator=accumulator, fused=True).apply_gradients({"w": gradient}, {"w": table})["w"]
    assert_near(new, np.full((5, 4), -0.1), dtype)


@pytest.mark.parametrize("accumulator", [Dense("parameter"), RowWise("parameter")], ids=str)
def test_accumulators_in_half_precision(accumulator):
    table, gradients = row_cases.draw(30, dtype=mx.bfloat16)
    fused, plain = (Adagrad(0.1, accumulator=accumulator, fused=f) for f in (True, False))
    (fused_w, fused_v), (plain_w, plain_v) = (run_rows(o, table, gradients) for o in (fused, plain))
    assert fused_v.dtype == mx.bfloat16
    assert_near(fused_v, to_numpy(plain_v), mx.bfloat16, steps=1)
    assert_near(fused_w, to_numpy(plain_w), mx.bfloat16, steps=1)


@accumulators
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@dtypes
def test_modifiers_enter_as_scalars(accumulator, weight_decay, dtype):
    table, ((indices, values),) = row_cases.draw(9, steps=1, dtype=dtype)
    modifiers = Modifiers(scale=mx.array(0.5)).clipped(mx.array(-0.2), mx.array(0.3)).scaled(mx.array(2.0))
    for apply in (True, False):
        results = []
        for fused in (True, False):
            optimizer = Adagrad(0.1, weight_decay=weight_decay, accumulator=accumulator, fused=fused)
            optimizer.init({"w": table})
            g = RowSparse(indices, values, 9)
            new = optimizer.apply_modified({"w": g}, {"w": table}, modifiers.gated(mx.array(apply)))
            results.append((new["w"], optimizer.state["w"]["v"]))
        (fused_w, fused_v), (plain_w, plain_v) = results
        assert_near(fused_w, to_numpy(plain_w), dtype, steps=1)
        assert_near(fused_v, to_numpy(plain_v), steps=1)
        assert apply or bits(fused_w) == bits(table)


def test_not_lazy_uses_the_dense_kernel():
    table, gradients = row_cases.draw(9)
    fused, plain = (Adagrad(0.1, weight_decay=0.1, lazy=False, fused=f) for f in (True, False))
    assert_near(run_rows(fused, table, gradients)[0], to_numpy(run_rows(plain, table, gradients)[0]), steps=1)


def test_embedding_trains_the_same():
    model = SparseEmbedding(20, 6)
    results = []
    start = model.weight
    for fused in (True, False):
        model.weight, optimizer = start, Adagrad(0.1, fused=fused)
        for step in range(3):
            x = mx.array([[1, 2, 1], [19, step, 2]])
            _, gradients = value_and_grad(model, lambda x: mx.square(model(x) - 1).sum())(x)
            optimizer.update(model, gradients)
        results.append(to_numpy(model.weight))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


def test_look_ups_by_indices_of_several_dtypes():
    model, dense = SparseEmbedding(20, 6), nn.Embedding(20, 6)
    dense.weight = model.weight
    x, y = mx.array([3, 1, 3], mx.int8), mx.array([2, 19], mx.uint64)

    def loss(model):
        return mx.square(model(x)).sum() + mx.sin(model(y)).sum()

    got = value_and_grad(model, loss)(model)[1]["weight"]
    assert_near(got.to_dense(), to_numpy(nn.value_and_grad(dense, loss)(dense)[1]["weight"]))


def test_launches_of_a_step(host):
    table, ((indices, values),) = row_cases.draw(30, steps=1)
    optimizer = Adagrad(0.1, fused=True)
    optimizer.init({"w": table})
    for g in (RowSparse(indices, values, 30), RowSparse(indices, values, 30).coalesce()):
        host.clear()
        optimizer.apply_gradients({"w": g}, {"w": table})
        names = [launch.name for launch in host.launches]
        assert names == ["mlx_adagrad_rows_accumulate_v1", "mlx_adagrad_rows_descend"]
    host.clear()
    optimizer.apply_gradients({"w": RowSparse(indices[:0], values[:0], 30)}, {"w": table})
    assert not host.launches


def test_no_kernel_reads_the_weights(host):
    """A table with a reader in flight would be copied whole; and no more of v is read than the rows that are named."""
    rows, columns, k = 1000, 8, 20
    table, ((indices, values),) = row_cases.draw(rows, (columns,), k=k, steps=1)
    Adagrad(0.1, fused=True).apply_gradients({"w": RowSparse(indices, values, rows)}, {"w": table})
    read = [size for launch in host.launches for size in launch.elements.values()]
    assert sum(size == rows * columns for size in read) == 1  # v
    descend, heads = host.launches[-1], row_cases.named(indices, rows).sum()
    assert descend.bytes_read["v"] == 4 * heads * columns and descend.bytes_written["new_w"] == 4 * k * columns


@accumulators
@pytest.mark.parametrize("columns", [1, 5, 40])
def test_no_thread_reads_more_than_its_share(host, accumulator, columns):
    """An index that comes 4,000 times, as a padding id does, is summed up by all threads of a column together."""
    k, rows = 4000, 30
    rng = np.random.default_rng(0)
    values = mx.array(rng.normal(size=(k, columns)), mx.float32)
    for name in (7, 0, 29):
        indices = mx.array(np.where(rng.random(k) < 0.01, rng.integers(0, rows, k), name))
        host.clear()
        new_w, new_v = run_rows(
            Adagrad(0.1, accumulator=accumulator, fused=True), mx.ones((rows, columns)), [(indices, values)]
        )
        want_w, want_v = row_cases.adagrad(
            mx.ones((rows, columns)), [(indices, values)], row_wise=accumulator != Dense()
        )
        assert_near(new_w, want_w)
        assert_near(new_v, want_v, steps=20)
        depth = host.launches[0].most_loads
        per_column = -(-columns // 16) if accumulator != Dense() else 1
        assert depth < 5 * per_column * (k / (32 if columns < 16 else 16) + 64) + 200  # value, index, order, strides


def test_sums_do_not_depend_on_the_order_of_threads(host):
    values = mx.array(np.random.default_rng(0).normal(size=(500, 3)), mx.float32)
    indices = mx.array([3] * 400 + [1] * 100)
    sums = []
    for host.seed in range(3):
        sums.append(RowSparse(indices, values, 5).coalesce().values.tolist())
    assert sums[0] == sums[1] == sums[2]


@accumulators
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}], ids=str
)
def test_only_rows_that_are_named_are_written(host, monkeypatch, accumulator, options):
    """Even adding -0.0 changes a row where denormals are flushed."""
    seen = []

    def add(table, targets, rows, differentiable):
        seen.extend(targets.tolist())
        return table.at[targets].add(rows)

    monkeypatch.setattr(row_ops, "add_rows", add)
    for indices in ([5, 2, 2, 5], [-1, 3, 77, -6], [8, 3, 8, 8], [2**40, 4, -(2**40), 4]):
        optimizer = Adagrad(0.1, accumulator=accumulator, fused=True, **options)
        g = RowSparse(mx.array(indices), mx.ones((4, 5)), 8)
        optimizer.apply_gradients({"w": g}, {"w": mx.ones((8, 5))})
        assert {*seen} == {i for i in indices if 0 <= i < 8}, indices
        seen.clear()


def test_the_host_waits_once_for_all_tables(host, monkeypatch):
    waits = []
    monkeypatch.setattr(row_ops, "evaluate", lambda tree: waits.append(len(tree)) or evaluate(tree))
    tables = {name: mx.ones((8, 3), dtype) for name, dtype in zip("abc", GPU_DTYPES, strict=True)}
    tables["d"] = mx.ones((4, 4))
    g = {name: RowSparse(mx.array([1, 5]), mx.ones((2, 3)), 8) for name in "abc"} | {"d": mx.ones((4, 4))}
    new = Adagrad(0.1, fused=True).apply_gradients(g, tables)
    assert waits == [2]  # the rows of the tables in half precision
    Adagrad(0.1, weight_decay=0.1, fused=True).apply_gradients(g, tables)
    assert waits == [2, 3]
    for w in new.values():
        assert_near(w[1], np.full(w.shape[1], 0.9), w.dtype)


def test_a_v_that_stays_is_not_written(host):
    w, g = mx.ones((6, 40)), mx.full((6, 40), 2.0)
    sparse = RowSparse(mx.array([2, 0]), g[:2], 6)
    rule = Rule(initial_accumulator_value=4.0, update_accumulator=False)
    for accumulator in (Dense(), RowWise()):
        for gradient, rows in ((g, [0, 1, 2, 3, 4, 5]), (sparse, [0, 2])):
            optimizer = Adagrad.from_rule(0.1, rule, accumulator=accumulator)
            optimizer.init({"w": w})
            v = optimizer.state["w"]["v"]
            host.clear()
            new = optimizer.apply_gradients({"w": gradient}, {"w": w})["w"]
            assert_near(new[mx.array(rows)], np.full((len(rows), 40), 0.9))
            assert optimizer.state["w"]["v"] is v or bits(optimizer.state["w"]["v"]) == bits(v)
            assert not any("accumulator" in name or "_v" in name for x in host.launches for name in x.bytes_written)


def test_what_value_and_grad_returns_is_summed_by_the_update(host):
    """Coalescing costs more kernels than the whole update; it is made only where somebody reads it."""
    model = SparseEmbedding(20, 6)
    _, gradients = value_and_grad(model, lambda x: mx.square(model(x)).sum())(mx.array([3, 1, 3]))
    gradient = gradients["weight"]
    assert (gradient.shape, gradient.dtype, gradient.places) == ((20, 6), mx.float32, 3)
    Adagrad(0.1, fused=True).update(model, gradients)
    assert [launch.name for launch in host.launches] == ["mlx_adagrad_rows_accumulate_v1", "mlx_adagrad_rows_descend"]
    assert gradient.indices.tolist() == [1, 3, 20] and gradient.unsummed is gradient
    assert bits(pickle.loads(pickle.dumps(gradient)).values) == bits(gradient.values)


def test_one_source_for_all_shapes(host):
    for rows, columns, k in ((30, (16,), 12), (50, (40,), 20), (9, (3, 4), 9)):
        table, ((indices, values),) = row_cases.draw(rows, columns, k=k, steps=1)
        Adagrad(0.1, fused=True).apply_gradients({"w": RowSparse(indices, values, rows)}, {"w": table})
    assert len(host.sources) == 2


def test_refused_where_no_kernel_runs():
    g: Any = RowSparse(mx.array([1]), mx.ones((1, 2)), 3)
    for optimizer in (Adagrad(0.1, fused=True, differentiable=True), Adagrad(0.1, fused=True, accumulator=_Other())):
        with pytest.raises(RuntimeError, match="no kernel takes 'w': .*float32 row-sparse gradients"):
            optimizer.apply_gradients({"w": g}, {"w": mx.ones((3, 2))})
        assert list(optimizer.state) == ["step", "learning_rate"]


class _Other(Dense):
    """An accumulator of somebody else's."""


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal is here")
def test_a_training_step_with_the_kernels_exports(tmp_path, no_host):
    model = SparseEmbedding(20, 6)
    optimizer = Adagrad(0.1, fused=True)
    optimizer.init(model.trainable_parameters())
    vg = value_and_grad(model, lambda x: mx.square(model(x)).sum(), exportable=True)

    def step(weight, x):
        model.weight = weight
        loss, gradients = vg(x)
        optimizer.update(model, gradients)
        return [loss, model.weight, optimizer.state["weight"]["v"]]

    mx.export_function(str(tmp_path / "step.mlxfn"), step, model.weight, mx.array([1, 2, 1]))
    recorded = (tmp_path / "step.mlxfn").read_bytes()
    assert b"rows_accumulate" in recorded and b"rows_descend" in recorded


@pytest.mark.skipif(not mx.metal.is_available(), reason="what MLX copies on a GPU shows only there")
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@accumulators
def test_tables_are_updated_in_place_on_a_gpu(accumulator, dtype):
    """A table that something else reads when it is written would be copied whole."""
    rows, k = 200_000, 1000
    table = mx.zeros((rows, 64), dtype)
    optimizer = Adagrad(0.1, accumulator=accumulator)
    optimizer.init({"w": table})
    mx.eval(table, optimizer.state)
    for step in range(4):
        g = RowSparse(mx.random.randint(0, rows, (k,)), mx.random.normal((k, 64)), rows)
        mx.eval(g.indices, g.values)
        before = memory_before()
        table = optimizer.apply_gradients({"w": g}, {"w": table})["w"]
        mx.eval(table, optimizer.state)
        assert mx.get_peak_memory() - before < 0.2 * table.nbytes, step


# --- one accumulator a row, dense gradients ---------------------------------------------------------------------------


@options
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_row_wise_equals_operations_and_float64(options, pair):
    w, gradients = tensors((6, 5), pair, steps=3)
    fused, plain = (Adagrad(0.1, **options, accumulator=RowWise(), fused=f) for f in (True, False))
    (fused_w, fused_v), (plain_w, plain_v) = run(fused, w, gradients), run(plain, w, gradients)
    want_w, want_v = adagrad(to_numpy(w), [to_numpy(g) for g in gradients], row_wise=True, **options)[-1]
    v_dtype = pair[0] if options.get("weight_decay") else mx.float32
    assert fused_w.dtype == pair[0] and fused_v.dtype == mx.float32 and fused_v.shape == (6,)
    assert_near(fused_w, to_numpy(plain_w), pair[0], steps=1)
    assert_near(fused_w, want_w, pair[0])
    assert_near(fused_v, to_numpy(plain_v), v_dtype, steps=1)
    assert_near(fused_v, want_v, v_dtype)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (7, 1), (3, 31), (9, 32), (8, 33), (5, 300), (4, 3, 2), (0, 3), (5,), ()], ids=str
)
@dtypes
def test_row_wise_for_every_shape(shape, dtype):
    w, gradients = tensors(shape, (dtype, dtype), steps=2)
    got_w, got_v = run(Adagrad(0.1, accumulator=RowWise(), fused=True), w, gradients)
    want_w, want_v = adagrad(to_numpy(w), [to_numpy(g) for g in gradients], row_wise=True)[-1]
    assert got_w.shape == shape and got_v.shape == (shape[:1] if len(shape) > 1 else shape)
    assert_near(got_w, want_w, dtype)
    assert_near(got_v, want_v)


def test_row_wise_layouts():
    w, (g, *_) = tensors((6, 8))
    for view in (w[:, ::2], w.T, w[1:], mx.broadcast_to(w[:1], w.shape)):
        got, _ = run(Adagrad(0.1, accumulator=RowWise(), fused=True), view, [mx.sin(view)])
        assert_near(got, adagrad(to_numpy(view), [to_numpy(mx.sin(view))], row_wise=True)[-1][0])


def test_row_wise_held_back():
    w, (g, *_) = tensors((6, 5))
    optimizer = Adagrad(0.1, accumulator=RowWise(), fused=True, weight_decay=0.1)
    optimizer.init({"w": w})
    held = Modifiers(scale=mx.array(float("nan")), apply=mx.array(False))
    assert bits(optimizer.apply_modified({"w": g}, {"w": w}, held)["w"]) == bits(w)
    assert not optimizer.state["w"]["v"].any().item()


def test_row_wise_is_one_launch_that_reads_and_writes_what_it_must(host):
    w, (g, *_) = tensors((50, 64))
    optimizer = Adagrad(0.1, accumulator=RowWise(), fused=True)
    optimizer.apply_gradients({"w": g}, {"w": w})
    (launch,) = host.launches
    assert launch.bytes_written == {"new_weights": 4 * 50 * 64, "new_accumulator": 4 * 50}
    # the gradient twice, the second time from the cache; w once without decay
    assert launch.bytes_read["g"] == 2 * 4 * 50 * 64 and launch.bytes_read["w"] == 4 * 50 * 64


@pytest.mark.parametrize("columns", [1023, 1024, 5000])
def test_a_few_long_rows_take_a_threadgroup_each(host, columns):
    w, (g, *_) = tensors((3, columns))
    got_w, got_v = run(Adagrad(0.1, accumulator=RowWise(), fused=True), w, [g])
    want_w, want_v = adagrad(to_numpy(w), [to_numpy(g)], row_wise=True)[-1]
    assert_near(got_w, want_w)
    assert_near(got_v, want_v)
    assert host.launches[-1].threadgroup == ((32, 8, 1) if columns < 1024 else (256, 1, 1))
