"""SparseEmbedding and value_and_grad: MLX's own results, with a row-sparse gradient for each table."""

import gc
import re
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.nn.utils import checkpoint
from mlx.utils import tree_flatten, tree_map

from cases import assert_near, bits, memory_before, to_numpy
from mlx_adagrad import Adagrad, RowSparse, SparseEmbedding, value_and_grad
from mlx_adagrad.sparse.look_ups import Table

ROWS, DIMS = 12, 4


class Two(nn.Module):
    """Two tables, of which one is looked up twice, and a dense layer."""

    def __init__(self):
        super().__init__()
        self.words = SparseEmbedding(ROWS, DIMS)
        self.parts = [SparseEmbedding(5, DIMS), nn.Linear(DIMS, 3)]

    def __call__(self, x, y):
        h = self.words(x) * self.parts[0](y) + mx.sin(self.words(y))
        return self.parts[1](h)


X, Y = mx.array([[1, 7, 1], [0, 11, 7]]), mx.array([[0, 4, 4], [1, 1, 1]], mx.uint8)


def squares(model, x=X, y=Y, target=0.5):
    return mx.square(model(x, y) - target).mean()


def densified(gradients):
    return tree_map(lambda g: g.to_dense() if isinstance(g, RowSparse) else g, gradients)


def assert_same(got, want):
    got, want = dict(tree_flatten(densified(got))), dict(tree_flatten(want))
    assert got.keys() == want.keys()
    for path, g in want.items():
        assert got[path].shape == g.shape, path
        assert_near(got[path], to_numpy(g), None if g.dtype == mx.uint64 else g.dtype, steps=1)


def both(model, fn, *args, **kwargs):
    """The results of our value_and_grad and of MLX's."""
    return value_and_grad(model, fn)(*args, **kwargs), nn.value_and_grad(model, fn)(*args, **kwargs)


def flat(tree) -> list[tuple[str, Any]]:
    pairs: Any = tree_flatten(tree)
    return pairs


def sparse_paths(gradients):
    return {path for path, g in tree_flatten(gradients) if isinstance(g, RowSparse)}


# --- the module -------------------------------------------------------------------------------------------------------


def test_is_an_embedding():
    mx.random.seed(1)
    ours = SparseEmbedding(ROWS, DIMS)
    mx.random.seed(1)
    stock = nn.Embedding(ROWS, DIMS)
    assert bits(ours.parameters()) == bits(stock.parameters()) and isinstance(ours, nn.Embedding)
    assert repr(ours) == f"SparseEmbedding({ROWS}, {DIMS})"
    kinds: Any = (X, mx.array(3), mx.zeros((0, 2), mx.int32), Y, 5)
    for x in kinds:
        assert mx.array_equal(ours(x), stock(x))
    h = mx.random.normal((2, DIMS))
    assert mx.array_equal(ours.as_linear(h), stock.as_linear(h))


def test_loads_and_saves_as_an_embedding(tmp_path):
    ours, stock = nn.Sequential(SparseEmbedding(ROWS, DIMS)), nn.Sequential(nn.Embedding(ROWS, DIMS))
    for source, target in ((ours, stock), (stock, nn.Sequential(SparseEmbedding(ROWS, DIMS)))):
        source.save_weights(str(tmp_path / "w.safetensors"))
        target.load_weights(str(tmp_path / "w.safetensors"))
        assert bits(target.parameters()) == bits(source.parameters())


def test_from_embedding_converts_in_place():
    model: Any = nn.Sequential(nn.Embedding(ROWS, DIMS), nn.Linear(DIMS, 2))
    model.layers[0].freeze()
    before = bits(model.parameters())
    converted = SparseEmbedding.from_embedding(model.layers[0])
    assert converted is model.layers[0] and type(converted) is SparseEmbedding
    assert bits(model.parameters()) == before and "layers" in model and not model.layers[0].trainable_parameters()
    assert SparseEmbedding.from_embedding(converted) is converted
    for wrong in (nn.Linear(2, 2), nn.Embedding(8, 64).to_quantized(group_size=64)):
        with pytest.raises(TypeError, match=f"only an nn.Embedding can be converted, not {type(wrong).__name__}"):
            SparseEmbedding.from_embedding(wrong)  # type: ignore[arg-type]


def test_indices_without_a_row_are_zero_and_have_no_gradient():
    model = SparseEmbedding(3, 2)
    x = mx.array([0, -1, 3, 2, 100, -100])
    assert mx.array_equal(model(x)[mx.array([1, 2, 4, 5])], mx.zeros((4, 2)))
    (_, ours), (_, stock) = both(model, lambda x: (model(x) + 1).square().sum(), x)
    assert_same(ours, stock)
    assert ours["weight"].indices.tolist() == [0, 2, 3]  # 3 rows at most, the last of them none
    assert not stock["weight"][1].any().item()


# --- a drop-in --------------------------------------------------------------------------------------------------------


def test_several_look_ups_and_tables():
    model = Two()
    (loss, ours), (want, stock) = both(model, partial(squares, model))
    assert loss.item() == want.item()
    assert sparse_paths(ours) == {"words.weight", "parts.0.weight"}
    assert_same(ours, stock)
    words = ours["words"]["weight"]
    assert words.indices.tolist() == [0, 1, 4, 7, 11] + [ROWS] * 7 and words.shape == (ROWS, DIMS)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 4), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [mx.int32, mx.int64, mx.uint8, mx.uint32], ids=str)
def test_every_shape_of_indices(shape, dtype):
    model = SparseEmbedding(ROWS, DIMS)
    x = mx.random.randint(0, ROWS, shape).astype(dtype)
    (loss, ours), (want, stock) = both(model, lambda x: mx.sin(model(x)).sum(), x)
    assert loss.item() == want.item()
    assert_same(ours, stock)
    assert ours["weight"].values.shape == (min(x.size, ROWS), DIMS)


def test_auxiliary_outputs_and_keywords():
    model = Two()

    def fn(scale, *, x, y=Y):
        out = model(x, y)
        return (out * scale).sum(), {"out": out, "name": "aux"}, [out.shape]

    ((loss, aux, shapes), ours), ((want, wanted, _), stock) = both(model, fn, 2.0, x=X)
    assert loss.item() == want.item() and aux["name"] == "aux" and shapes == [(2, 3, 3)]
    assert mx.array_equal(aux["out"], wanted["out"])
    assert_same(ours, stock)


def test_looks_like_the_function():
    def fn():
        """Doc."""
        return mx.zeros(())

    wrapped = value_and_grad(Two(), fn)
    assert wrapped.__name__ == "fn" and wrapped.__doc__ == "Doc."


def test_without_tables_it_is_mlx():
    model = nn.Linear(2, 2)
    (loss, ours), (want, stock) = both(model, lambda: model(mx.ones((3, 2))).square().sum())
    assert loss.item() == want.item() and bits(ours) == bits(stock)


def test_everything_comes_evaluated():
    model = Two()
    vg = value_and_grad(model, lambda: (squares(model), model(X, Y)))
    (loss, out), gradients = vg()
    arrays = [loss, out] + [a for _, g in tree_flatten(gradients) for a in _arrays(g)]
    before = memory_before()
    mx.eval(arrays)
    assert mx.get_peak_memory() <= before


def _arrays(g):
    if not isinstance(g, RowSparse):
        return (g,)
    g = g.unsummed  # what the kernels of a GPU take is the gradient of the look-ups
    return g.indices, g.values


def test_frozen_tables_have_no_gradient():
    model = Two()
    model.words.freeze()
    (loss, ours), (want, stock) = both(model, partial(squares, model))
    assert loss.item() == want.item() and sparse_paths(ours) == {"parts.0.weight"}
    assert_same(ours, stock)


def test_a_table_that_the_loss_does_not_reach_has_no_rows():
    model = Two()

    def fn():
        model.parts[0](Y)
        return model.words(X).sum()

    _, gradients = value_and_grad(model, fn)()
    g = gradients["parts"][0]["weight"]
    assert g.values.shape == (0, DIMS) and g.indices.shape == (0,) and g.shape == (5, DIMS)
    assert_same(gradients, nn.value_and_grad(model, fn)()[1])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision(dtype):
    model = Two()
    model.set_dtype(dtype)
    (loss, ours), (want, stock) = both(model, partial(squares, model))
    assert loss.item() == want.item() and loss.dtype == dtype
    assert ours["words"]["weight"].dtype == mx.float32  # summed in it
    assert_same(ours, tree_map(lambda g: g, stock))


def test_float64(cpu):
    model = SparseEmbedding(ROWS, DIMS)
    model.set_dtype(mx.float64)
    (_, ours), (_, stock) = both(model, lambda: model(X).square().sum())
    assert ours["weight"].dtype == mx.float64
    assert_same(ours, stock)


def test_a_model_that_is_an_embedding_and_models_in_lists():
    layers: Any = [SparseEmbedding(ROWS, DIMS), {"a": SparseEmbedding(5, DIMS)}]
    model = nn.Module()
    model.layers = layers
    (_, ours), (_, stock) = both(model, lambda: (layers[0](X) * layers[1]["a"](Y)).sum())
    assert sparse_paths(ours) == {"layers.0.weight", "layers.1.a.weight"}
    assert_same(ours, stock)


def test_a_module_in_two_places():
    model: Any = nn.Module()
    model.b = model.a = SparseEmbedding(ROWS, DIMS)
    (_, ours), (_, stock) = both(model, lambda: (model.a(X) * mx.sin(model.b(X))).sum())
    assert sparse_paths(ours) == {"a.weight", "b.weight"}
    assert_same(ours, stock)


# --- tables that are used in other ways too ---------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = SparseEmbedding(ROWS, DIMS)
        self.hidden = nn.Linear(DIMS, DIMS)

    def __call__(self, x):
        return self.words.as_linear(self.hidden(self.words(x)))


def test_tied_weights_have_the_dense_total():
    model = Tied()
    (_, ours), (_, stock) = both(model, lambda: nn.losses.cross_entropy(model(X), X).mean())
    assert sparse_paths(ours) == set()
    assert_same(ours, stock)


def test_other_uses_of_the_table_count():
    model = Two()

    def penalised():
        return squares(model) + model.words.weight.square().sum()

    def penalised_tree():
        return squares(model) + sum(mx.square(w).sum() for _, w in flat(model.parameters()))

    for fn, sparse in ((penalised, {"parts.0.weight"}), (penalised_tree, set())):
        (_, ours), (_, stock) = both(model, fn)
        assert sparse_paths(ours) == sparse
        assert_same(ours, stock)
    (_, ours), (_, stock) = both(model, lambda: model.words.weight.square().sum())
    assert_same(ours, stock)


def test_a_table_that_is_replaced_in_the_forward_pass():
    model, scale = Two(), mx.arange(ROWS).reshape(-1, 1) / ROWS
    weight = model.words.weight

    def fn():
        first = model.words(X)
        model.words.weight = model.words.weight * scale
        return (first * mx.sin(model.words(Y))).sum() + squares(model)

    for differentiate in (value_and_grad, nn.value_and_grad):
        model.words.weight = weight
        _, g = differentiate(model, fn)()
        if differentiate is value_and_grad:
            ours = g
    assert_same(ours, g)


def test_reading_the_shape_of_a_table_is_free():
    model = Two()
    _, ours = value_and_grad(model, lambda: squares(model) * model.words.weight.shape[1])()
    assert "words.weight" in sparse_paths(ours)


def test_vmap_is_right():
    model = SparseEmbedding(ROWS, DIMS)
    (_, ours), (_, stock) = both(model, lambda: mx.vmap(lambda x: mx.sin(model(x)))(X).sum())
    assert_same(ours, stock)


def test_loss_and_gradients_can_be_differentiated_again():
    model = SparseEmbedding(ROWS, DIMS)
    table = model.weight

    def outer(table, differentiate):
        model.weight = table
        loss, gradients = differentiate(model, lambda: mx.sin(model(X)).sum())()
        return loss * loss + (densified(gradients)["weight"] ** 2).sum()

    want = to_numpy(mx.grad(outer)(table, nn.value_and_grad))
    assert_near(mx.grad(outer)(table, partial(value_and_grad, exportable=True)), want)

    def outer_loss(table, differentiate):
        model.weight = table
        return mx.sin(differentiate(model, lambda: mx.sin(model(X)).sum())()[0])

    want = to_numpy(mx.grad(outer_loss)(table, nn.value_and_grad))
    compiled = mx.compile(mx.grad(lambda table: outer_loss(table, value_and_grad)))  # there nothing is evaluated
    assert_near(compiled(table), want)


# --- compile, checkpoint, export --------------------------------------------------------------------------------------


class Deep(nn.Module):
    """What a plain forward pass changes: random state by dropout, running averages by BatchNorm."""

    def __init__(self):
        super().__init__()
        self.words = SparseEmbedding(ROWS, DIMS)
        self.norm = nn.BatchNorm(DIMS)
        self.dropout = nn.Dropout(0.4)
        self.out = nn.Linear(DIMS, 2)

    def __call__(self, x):
        return self.out(self.dropout(self.norm(self.words(x.reshape(-1)))))


def train(differentiate, compiled=False, steps=4, **kwargs):
    mx.random.seed(7)
    model, optimizer = Deep(), Adagrad(0.1)
    optimizer.init(model.trainable_parameters())
    calls = []

    def fn(x):
        calls.append(1)
        return model(x).square().sum()

    state = [model.state, optimizer.state, mx.random.state]

    def step(x):
        loss, gradients = differentiate(model, fn, **kwargs)(x)
        optimizer.update(model, gradients)
        return loss

    step = partial(mx.compile, inputs=state, outputs=state)(step) if compiled else step
    losses = []
    for s in range(steps):
        losses.append(step(X + s % 2))
        mx.eval(losses, model.parameters(), optimizer.state)
    return model, optimizer, losses, mx.random.uniform(), len(calls)


@pytest.mark.parametrize("compiled", [False, True])
def test_everything_runs_and_advances_once(compiled):
    model, optimizer, losses, random, calls = train(value_and_grad, compiled)
    stock, stock_optimizer, stock_losses, stock_random, _ = train(nn.value_and_grad)
    assert calls == (1 if compiled else 4)
    assert random.item() == stock_random.item()
    assert_near(mx.stack(losses), to_numpy(mx.stack(stock_losses)))
    assert_same(model.parameters(), stock.parameters())
    assert_same(optimizer.state, stock_optimizer.state)


def test_a_gradient_made_in_a_compiled_function_can_be_returned_in_parts():
    model, optimizer = Two(), Adagrad(0.1)
    vg = value_and_grad(model, partial(squares, model))
    state = [model.state]

    @partial(mx.compile, inputs=state)
    def parts(x, y):
        loss, gradients = vg(x, y)
        return loss, tree_map(lambda g: list(_arrays(g)), gradients)

    for _ in range(2):
        loss, gradients = parts(X, Y)
        want, wanted = vg(X, Y)
        assert_near(loss, to_numpy(want))
        indices, values = gradients["words"]["weight"]
        assert_near(RowSparse(indices, values, ROWS).to_dense(), to_numpy(wanted["words"]["weight"].to_dense()))
        optimizer.update(model, wanted)


def test_nn_checkpoint():
    model = Two()
    words = checkpoint(model.words)
    whole = checkpoint(model)

    def some():
        return (words(X) * model.parts[0](Y)).sum()

    def all_of_it():
        return mx.square(whole(X, Y) - 0.5).mean()

    for fn, plain in ((some, lambda: (model.words(X) * model.parts[0](Y)).sum()), (all_of_it, partial(squares, model))):
        loss, ours = value_and_grad(model, fn)()
        want, stock = nn.value_and_grad(model, plain)()
        assert_near(loss, to_numpy(want))
        assert sparse_paths(ours) == {"words.weight", "parts.0.weight"}
        assert_same(ours, stock)


def test_mx_checkpoint_of_the_parameters():
    model = Two()

    def forward(parameters, x, y):
        model.update(parameters)
        return mx.square(model(x, y) - 0.5).mean()

    loss, ours = value_and_grad(model, lambda: mx.checkpoint(forward)(model.trainable_parameters(), X, Y))()
    want, stock = nn.value_and_grad(model, partial(squares, model))()
    assert_near(loss, to_numpy(want))
    assert sparse_paths(ours) == {"words.weight", "parts.0.weight"}
    assert_same(ours, stock)


def test_checkpoint_of_tied_weights():
    model = Tied()
    whole = checkpoint(model)
    _, ours = value_and_grad(model, lambda: whole(X).square().sum())()
    _, stock = nn.value_and_grad(model, lambda: model(X).square().sum())()
    assert_same(ours, stock)


@pytest.mark.parametrize("make", [Two, Tied])
def test_a_training_step_exports(make, tmp_path):
    model, optimizer = make(), Adagrad(0.1)
    optimizer.init(model.trainable_parameters())
    fn = partial(squares, model) if make is Two else lambda: mx.square(model(X)).mean()
    names = [path for path, _ in tree_flatten(model.trainable_parameters())]
    start = [mx.array(w) for _, w in flat(model.trainable_parameters())]

    def step(*weights):
        model.load_weights(list(zip(names, weights, strict=True)))
        loss, gradients = value_and_grad(model, fn, exportable=True)()
        optimizer.update(model, gradients)
        return [loss, *(w for _, w in tree_flatten(model.trainable_parameters()))]

    state = tree_map(mx.array, optimizer.state)
    mx.export_function(str(tmp_path / "step.mlxfn"), step, *start)
    optimizer.state = state
    want = step(*start)
    imported: Any = mx.import_function(str(tmp_path / "step.mlxfn"))
    got = imported(*start)
    for a, b in zip(got, want, strict=True):
        assert_near(a, to_numpy(b))


def test_exportable_is_the_same():
    model = Two()
    model.words.weight = model.words.weight * 2
    loss, plain = value_and_grad(model, partial(squares, model))()
    again, exportable = value_and_grad(model, partial(squares, model), exportable=True)()
    assert loss.item() == again.item() and sparse_paths(plain) == sparse_paths(exportable)
    assert_same(exportable, densified(plain))
    model, _, losses, random, calls = train(value_and_grad, exportable=True)
    stock, _, stock_losses, stock_random, _ = train(nn.value_and_grad)
    assert calls == 8 and random.item() == stock_random.item()
    assert_near(mx.stack(losses), to_numpy(mx.stack(stock_losses)))
    assert_same(model.parameters(), stock.parameters())


def test_exportable_tables_without_a_gradient():
    model = Two()
    _, ours = value_and_grad(model, lambda: model.words(X).sum(), exportable=True)()
    assert ours["parts"][0]["weight"].values.shape == (0, DIMS)
    _, ours = value_and_grad(model, lambda: model.parts[1](mx.ones((1, DIMS))).sum(), exportable=True)()
    assert ours["words"]["weight"].values.shape == (0, DIMS)


# --- errors, threads, nesting, memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("exportable", [False, True])
def test_an_exception_leaves_nothing_behind(exportable):
    model = Two()
    before = tree_flatten(model.parameters())

    def fails():
        model(X, Y)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        value_and_grad(model, fails, exportable=exportable)()
    for (path, got), (_, want) in zip(tree_flatten(model.parameters()), before, strict=True):
        assert got is want, path
    (_, ours), (_, stock) = both(model, partial(squares, model))
    assert_same(ours, stock)
    _, dense = nn.value_and_grad(model, partial(squares, model))()
    assert sparse_paths(dense) == set()  # nothing is watched any more


@pytest.mark.parametrize("exportable", [False, True])
def test_the_model_keeps_its_arrays(exportable):
    model = Two()
    before = tree_flatten(model.parameters())
    value_and_grad(model, partial(squares, model), exportable=exportable)()
    for (path, got), (_, want) in zip(tree_flatten(model.parameters()), before, strict=True):
        assert got is want, path


def test_threads_do_not_see_each_other():
    results: dict[int, Any] = {}
    barrier = threading.Barrier(3)

    def work(n):
        mx.random.seed(n)
        model = Two()
        for _ in range(5):
            barrier.wait()
            results[n] = both(model, partial(squares, model))
            mx.eval(results[n][1])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for (loss, ours), (want, stock) in results.values():
        assert loss.item() == want.item()
        assert_same(ours, tree_map(lambda g: g, stock))


def test_nested_calls_of_different_models():
    outer, inner = SparseEmbedding(ROWS, DIMS), SparseEmbedding(ROWS, DIMS)
    inner_gradients = []

    def fn(differentiate):
        loss, gradients = differentiate(inner, lambda: (inner(X) * outer(X)).sum())()
        inner_gradients.append(gradients)
        return loss * outer(Y).sum()

    _, ours = value_and_grad(outer, fn)(value_and_grad)
    _, stock = nn.value_and_grad(outer, fn)(nn.value_and_grad)
    assert isinstance(ours["weight"], RowSparse)
    assert_same(ours, stock)
    assert_same(*inner_gradients)


def test_another_thread_may_not_differentiate_the_same_table():
    model, failures = Two(), []
    weight = model.words.weight
    other_model = Two()
    mx.eval(other_model.parameters(), X, Y)

    def other(model):
        try:
            with mx.stream(mx.new_stream(mx.default_device())):
                value_and_grad(model, lambda: squares(model))()
        except Exception as error:  # noqa: BLE001 - reported below
            failures.append(str(error))

    def fn():
        for shared in (model, other_model):
            thread = threading.Thread(target=other, args=(shared,))
            thread.start()
            thread.join()
        value_and_grad(model.words, lambda: model.words(X).sum())()  # the same thread may
        return squares(model)

    value_and_grad(model, fn)()
    assert failures == ["[value_and_grad] another thread is differentiating the same SparseEmbedding."]
    assert model.words.weight is weight
    value_and_grad(model, lambda: squares(model))()


def test_nothing_is_kept_after_the_call():
    class Sentinel:
        pass

    def tables():
        gc.collect()
        return [o for o in gc.get_objects() if isinstance(o, Table)]

    before = tables()  # a test that failed on purpose may have left a traceback
    model, sentinel = Two(), Sentinel()
    alive = weakref.ref(sentinel)

    def fn(keep=sentinel):
        return squares(model) if keep else None

    value_and_grad(model, fn)()
    value_and_grad(model, fn, exportable=True)()
    mx.compile(lambda x, fn=fn: value_and_grad(model, fn)()[0] + x)(mx.ones(()))
    value_and_grad(model, lambda: model.words(X).sum())()  # the other table's graph is never evaluated
    del fn, sentinel
    after = tables()
    assert alive() is None
    assert not [table for table in after if not any(table is old for old in before)]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}])
def test_a_step_needs_no_more_than_five_buffers_of_the_rows_looked_up(options, cpu):
    rows, dims, k = 100_000, 64, 4096
    model, optimizer = SparseEmbedding(rows, dims), Adagrad(0.1, **options)
    optimizer.init(model.trainable_parameters())
    wanted = mx.random.normal((k, dims))
    mx.eval(model.parameters(), optimizer.state, wanted)
    vg = value_and_grad(model, lambda x: mx.square(model(x) - wanted).mean())
    for _ in range(4):
        x = mx.random.randint(0, rows, (k,))
        mx.eval(x)
        mx.synchronize()
        gc.collect()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        _held = vg(x)
        optimizer.update(model, _held[1])
        mx.eval(model.parameters(), optimizer.state)
        assert mx.get_peak_memory() - before < 4.9 * wanted.nbytes  # 2 % of a million rows
        del _held


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_plain_loop_runs_in_place(dtype, cpu):
    rows, dims, k = 200_000, 64, 512
    model, optimizer = SparseEmbedding(rows, dims), Adagrad(0.1)
    model.set_dtype(dtype)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)
    vg = value_and_grad(model, lambda x: mx.square(model(x)).sum())
    for step in range(4):
        x = mx.random.randint(0, rows, (k,))
        mx.eval(x)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        _, gradients = vg(x)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        extra = mx.get_peak_memory() - before
        assert extra < 10 * 4 * k * dims < 0.03 * 4 * rows * dims, step
        del gradients
        assert mx.get_active_memory() - before < 100_000  # and nothing stays


def test_training_equals_stock():
    mx.random.seed(3)
    ours: Any = Two()
    stock: Any = Two()
    stock.update(ours.parameters())
    optimizers = Adagrad(0.1), Adagrad(0.1)
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = mx.array(rng.integers(0, ROWS, (3, 4))), mx.array(rng.integers(0, 5, (3, 4)))
        pairs = (ours, value_and_grad), (stock, nn.value_and_grad)
        for optimizer, (model, differentiate) in zip(optimizers, pairs, strict=True):
            loss, gradients = differentiate(model, partial(squares, model))(x, y)
            optimizer.update(model, gradients)
            mx.eval(loss, model.parameters(), optimizer.state)
    assert_same(ours.parameters(), stock.parameters())
    assert_same(optimizers[0].state, optimizers[1].state)


def test_the_code_in_the_docs_runs():
    text = (Path(__file__).parent.parent / "docs" / "sparse.md").read_text()
    loop, bags, gradient, trainer = re.findall(r"```python\n(.*?)```", text, re.S)
    x, y = mx.array([3, 5, 3]), mx.zeros((3, 1))
    scope: dict[str, Any] = {"batches": [(x, y)] * 2, "partial": partial, "RowSparse": RowSparse}
    exec(loop.replace("1_000_000", "1000"), scope)
    model, optimizer = scope["model"], scope["optimizer"]
    exec(gradient.replace("1_000_000", "1000"), scope)
    assert optimizer.step.item() == 3
    assert not mx.array_equal(scope["rows"].to_dense()[3], mx.zeros((64,)))
    assert (optimizer.state["layers"][0]["weight"]["v"].max(axis=1) > 0).sum().item() == 2
    mx.eval(model.parameters())
    scope["train"] = lambda model, *_: scope.update(kind=nn.value_and_grad(model, lambda x: model(x).sum())(x)[1])
    exec(trainer, scope)
    exec("import mlx.core as mx\n" + bags.replace("1_000_000", "1000"), scope)
    assert scope["sums"].shape == (3, 64) and scope["same_length"].shape == (2, 64)
    assert isinstance(scope["kind"]["layers"][0]["weight"], RowSparse)


class InPlaceOfTheTable(nn.Module):
    """Puts a function of the table in its place while it is looked up in, as a fully sharded module does."""

    def __init__(self, function):
        super().__init__()
        mx.random.seed(3)
        self.inner = SparseEmbedding(5, 3)
        self.function = function

    def __call__(self, x):
        table = self.inner.weight
        self.inner.update({"weight": self.function(table)})
        try:
            return self.inner(x)
        finally:
            self.inner.update({"weight": table})


FUNCTIONS = {
    "same": lambda w: w,
    "twice": lambda w: 2 * w,
    "negative": lambda w: -w,
    "reversed": lambda w: w[::-1],
    "constant": mx.stop_gradient,
    "longer": lambda w: mx.concatenate([w, w]),
}


@pytest.mark.parametrize("exportable", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, mx.compile], ids=["eager", "compiled"])
@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_in_the_place_of_a_table_has_its_own_gradient(name, evaluated, wrap, exportable):
    def gradient(value_and_grad, **options):
        model = InPlaceOfTheTable(FUNCTIONS[name])
        if evaluated or wrap is mx.compile:
            mx.eval(model.parameters())

        def run(x):
            value, gradients = value_and_grad(model, lambda: (model(x) ** 3).sum(), **options)()
            g = gradients["inner"]["weight"]
            return value, g.to_dense() if isinstance(g, RowSparse) else g

        return wrap(run)(mx.array([1, 1, 2]))

    got, want = gradient(value_and_grad, exportable=exportable), gradient(nn.value_and_grad)
    assert all(mx.allclose(a, b, rtol=1e-6).item() for a, b in zip(got, want, strict=True))
