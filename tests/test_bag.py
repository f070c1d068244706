"""SparseEmbeddingBag: torch's EmbeddingBag as numpy float64 has it, without a row in memory for every index."""

import gc
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from cases import assert_near, bits, to_numpy
from mlx_adagrad import Adagrad, RowSparse, SparseEmbedding, SparseEmbeddingBag, value_and_grad
from mlx_adagrad.sparse import pooling

ROWS, DIMS = 11, 5


MODES = ["sum", "mean", "max"]
X = np.array([[1, 7, 1, 3], [0, 10, 7, 3], [3, 3, 3, 3], [-1, 11, 2, 100]])
# one after another: of 3, 0, 1, 0, 5 indices, an empty one at the end too
FLAT, OFFSETS = np.array([1, 7, 1, 3, 0, 10, 3, 3, -4]), [0, 3, 3, 4, 4, 9]


@pytest.fixture(params=[2**17, 7], ids=["one_block", "blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(pooling, "BLOCK", request.param)


blocks = pytest.mark.usefixtures("block")


def bags_of(x, offsets):
    return list(x) if offsets is None else np.split(np.array(x), offsets[1:])


def pooled(w, x, offsets, mode, padding=None, weights=None):
    """The rows of the bags, and a function from their gradient to those of the table and of the weights."""
    parts = [p if weights is None else p for p in bags_of(np.arange(x.size).reshape(x.shape), offsets)]
    x, factors = x.reshape(-1), np.ones(x.size) if weights is None else weights.reshape(-1)
    out, choices = np.zeros((len(parts), w.shape[1])), []
    for b, places in enumerate(parts):
        places = [i for i in np.array(places).reshape(-1) if 0 <= x[i] < len(w) and x[i] != padding]
        share = np.zeros((len(places), w.shape[1]))
        if places and mode == "max":
            share[np.argmax(w[x[places]], axis=0), np.arange(w.shape[1])] = 1
        elif places:
            share += factors[places][:, None] / (len(places) if mode == "mean" else 1)
        out[b] = (share * w[x[places]]).sum(axis=0)
        choices.append((places, share))

    def backward(g):
        g_w, g_factors = np.zeros_like(w), np.zeros(x.size)
        for b, (places, share) in enumerate(choices):
            np.add.at(g_w, x[places], share * g[b])
            g_factors[places] = (w[x[places]] * g[b]).sum(axis=1)
        return g_w, g_factors

    return out, backward


CASES = {
    "two_axes": (X, None, None),
    "offsets": (FLAT, OFFSETS, None),
    "padding": (X, None, 3),
    "padding_offsets": (FLAT, OFFSETS, 3),
    "nothing": (np.zeros((3, 0), int), None, None),
    "no_index": (np.zeros((0,), int), [0, 0], None),
    "no_bag": (np.zeros((0, 4), int), None, None),
}
cases = pytest.mark.parametrize("case", CASES)


def make(mode, padding=None, dtype=mx.float32, **options):
    mx.random.seed(4)
    bag = SparseEmbeddingBag(ROWS, DIMS, mode, padding, **options)
    bag.weight = mx.random.normal((ROWS, DIMS)).astype(dtype)  # the padding row too: it must not count
    return bag


def arrays(case):
    x, offsets, padding = CASES[case]
    return x, offsets, padding, (mx.array(x, mx.int32), None if offsets is None else mx.array(offsets))


def densified(g):
    return g.to_dense() if isinstance(g, RowSparse) else g


def objective(out: mx.array, seed=3) -> tuple[mx.array, Any]:
    """A loss with another gradient for each element."""
    wanted = mx.array(np.random.default_rng(seed).normal(size=out.shape), mx.float32)
    return (out.astype(mx.float32) * wanted).sum(), to_numpy(wanted)


@blocks
@cases
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_equals_float64(case, mode, dtype):
    x, offsets, padding, given = arrays(case)
    bag = make(mode, padding, dtype)
    want, backward = pooled(to_numpy(bag.weight), x, offsets, mode, padding)
    _, g = objective(bag(*given))
    for training in (True, False):
        bag.train(training)
        got = bag(*given)
        assert got.shape == want.shape and got.dtype == dtype
        assert_near(got, want, dtype)
        for differentiate in (value_and_grad, nn.value_and_grad):
            _, grad = differentiate(bag, lambda *given: objective(bag(*given))[0])(*given)
            assert isinstance(grad["weight"], RowSparse) == (differentiate is value_and_grad)
            assert_near(densified(grad["weight"]), backward(g)[0], dtype)
    if padding is not None:
        assert not backward(g)[0][padding].any()


@blocks
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("case", ["two_axes", "offsets", "nothing"])
def test_per_sample_weights(case, padding):
    x, offsets, _, given = arrays(case)
    bag = make("sum", padding)
    weights = np.random.default_rng(2).normal(size=x.shape)
    factors = mx.array(weights, mx.float32)
    want, backward = pooled(to_numpy(bag.weight), x, offsets, "sum", padding, weights)
    assert_near(bag(*given, factors), want)
    _, g = objective(bag(*given, factors))
    g_w, g_factors = backward(g)

    def loss(model, factors):
        return objective(model(*given, per_sample_weights=factors))[0]

    for differentiate in (value_and_grad, nn.value_and_grad):
        _, grad = differentiate(bag, loss)(bag, factors)
        assert_near(densified(grad["weight"]), g_w)
    for training in (True, False):
        bag.train(training)
        got = mx.grad(lambda factors: loss(bag, factors))(factors)
        assert got.shape == factors.shape
        assert_near(got.reshape(-1), g_factors)

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.factors, self.bag = factors, bag.train()

        def __call__(self):
            return loss(self.bag, self.factors)

    model = Weighted()
    for options in ({}, {"exportable": True}):
        _, grads = value_and_grad(model, lambda: model(), **options)()
        assert_near(grads["factors"].reshape(-1), g_factors)
        assert_near(grads["bag"]["weight"].to_dense(), g_w)


@pytest.mark.parametrize("mode", MODES)
def test_include_last_offset(mode):
    given = mx.array(FLAT), mx.array(OFFSETS[:-1])
    ends = mx.array([*OFFSETS[:-1], len(FLAT)], mx.uint32)
    assert mx.array_equal(make(mode)(*given), make(mode, include_last_offset=True)(given[0], ends))
    early = make(mode, include_last_offset=True)(given[0], mx.array([0, 3, 7]))  # what comes after it is in no bag
    assert mx.array_equal(early, make(mode)(given[0][:7], mx.array([0, 3])))
    assert make(mode, include_last_offset=True)(given[0], mx.array([0])).shape == (0, DIMS)


def test_padding_row():
    for given in (4, -7):
        for module in (SparseEmbedding(ROWS, DIMS, padding_idx=given), SparseEmbeddingBag(ROWS, DIMS, "sum", given)):
            assert module.padding_idx == 4
            assert not module.weight[4].any().item() and module.weight[3].all().item()
            assert repr(module).startswith(f"{type(module).__name__}({ROWS}, {DIMS}, padding_idx=4")


def test_padding_of_an_embedding():
    """Its row is read as it is, as in torch, and has no gradient, dense or row-sparse, whatever else is looked up."""
    module = SparseEmbedding(ROWS, DIMS, padding_idx=-8)
    module.weight = mx.random.normal((ROWS, DIMS))
    x = mx.array([[1, 3, 1], [3, 0, 10]], mx.uint8)
    assert bits(module(x)) == bits(nn.Embedding.__call__(module, x))
    plain = SparseEmbedding(ROWS, DIMS)
    plain.weight = module.weight

    def loss(model, x):
        return mx.square(model(x)).sum() + model.as_linear(mx.ones((1, DIMS))).sum() * model.tied

    for tied in (0.0, 1.0):
        nn.Module.__setattr__(module, "tied", tied)
        nn.Module.__setattr__(plain, "tied", tied)
        _, want = nn.value_and_grad(plain, loss)(plain, x)
        want = to_numpy(want["weight"])
        want[3] = tied
        for differentiate in (value_and_grad, nn.value_and_grad):
            _, g = differentiate(module, loss)(module, x)
            assert_near(densified(g["weight"]), want)
    _, g = value_and_grad(module, lambda x: module(x).sum())(x)
    assert 3 not in g["weight"].indices.tolist()
    optimizer, before = Adagrad(0.1, weight_decay=0.1), mx.array(module.weight[3])
    optimizer.update(module, g)
    assert mx.array_equal(module.weight[3], before)


def test_from_embedding_with_padding():
    embedding = nn.Embedding(ROWS, DIMS)
    before = bits(embedding.parameters())
    module = SparseEmbedding.from_embedding(embedding, padding_idx=-1)
    assert module.padding_idx == ROWS - 1 and bits(module.parameters()) == before
    untouched = nn.Embedding(ROWS, DIMS)
    with pytest.raises(ValueError, match="'padding_idx' must be a row of a table of 11 but got 11"):
        SparseEmbedding.from_embedding(untouched, padding_idx=ROWS)
    assert type(untouched) is nn.Embedding
    with pytest.raises(TypeError, match="only an nn.Embedding can be converted, not SparseEmbeddingBag"):
        SparseEmbedding.from_embedding(SparseEmbeddingBag(ROWS, DIMS))


# --- with the rest of MLX ---------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, mode):
        super().__init__()
        mx.random.seed(5)
        self.bag = SparseEmbeddingBag(ROWS, DIMS, mode, padding_idx=0)
        self.words = SparseEmbedding(ROWS, DIMS, padding_idx=0)
        self.out = nn.Linear(DIMS, 1)

    def __call__(self, x):
        return self.out(mx.tanh(self.bag(x)) + self.bag(x[:, :2]) * self.words(x[:, 0])).mean()


@pytest.mark.parametrize("mode, compiled", [*((mode, False) for mode in MODES), ("sum", True), ("max", True)])
def test_training_equals_stock_gradients(mode, compiled):
    results = []
    for differentiate, traced in ((value_and_grad, compiled), (nn.value_and_grad, False)):
        model, optimizer = Model(mode), Adagrad(0.1)
        state = [model.state, optimizer.state]
        gradient = differentiate(model, model)

        def step(x):
            loss, g = gradient(x)  # noqa: B023
            optimizer.update(model, g)  # noqa: B023
            return loss

        run: Any = mx.compile(step, inputs=state, outputs=state) if traced else step
        for seed in range(3):
            mx.eval(run(mx.random.randint(0, ROWS, (3, 4), key=mx.random.key(seed))), state)
        results.append(model.parameters())
    pairs: Any = zip(*(tree_flatten(r) for r in results), strict=True)
    for (_, got), (_, want) in pairs:
        assert_near(got, to_numpy(want))


def test_a_look_up_and_a_bag_of_one_table_add_up():
    bag = make("sum")
    x = mx.array([[1, 2], [2, 3]])

    def loss(x):
        return objective(bag(x))[0] + objective(bag.as_linear(bag(x)), 7)[0] + SparseEmbedding.__call__(bag, x).sum()

    _, ours = value_and_grad(bag, loss)(x)
    _, stock = nn.value_and_grad(bag, loss)(x)
    assert_near(ours["weight"], to_numpy(stock["weight"]))


@blocks
@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_and_vmap(mode):
    bag, x = make(mode), mx.array(X, mx.int32)

    def norm(w, differentiate):
        bag.update({"weight": w})
        _, g = differentiate(bag, lambda x: mx.square(bag(x)).sum())(x)
        return mx.square(densified(g["weight"])).sum()

    w = bag.weight
    want = mx.grad(lambda w: norm(w, nn.value_and_grad))(w)
    got = mx.grad(lambda w: norm(w, lambda m, f: value_and_grad(m, f, exportable=True)))(w)
    assert_near(got, to_numpy(want))
    factor = want / w  # sums are linear: the loss is quadratic, and so is the norm of its gradient
    assert mode == "max" or factor.shape == w.shape
    bag.update({"weight": w})
    both = mx.stack([x, x[::-1]])
    for training in (True, False):
        bag.train(training)
        assert_near(mx.vmap(lambda x: bag(x))(both), to_numpy(mx.stack([bag(x), bag(x[::-1])])))


imported: Any = mx.import_function


@blocks
def test_exports(tmp_path):
    bag, x = make("sum", 3), mx.array(X, mx.int32)
    want = bag(x)
    bag.eval()
    mx.export_function(str(tmp_path / "forward.mlxfn"), lambda x: bag(x), x)
    (got,) = imported(str(tmp_path / "forward.mlxfn"))(x)
    assert_near(got, to_numpy(want))
    bag.train()

    def step(x: Any, w: Any) -> Any:
        bag.update({"weight": w})
        loss, g = value_and_grad(bag, lambda x: objective(bag(x))[0], exportable=True)(x)
        return loss, Adagrad(0.1, fused=False).apply_gradients(g, {"weight": w})["weight"]

    weight = mx.array(bag.weight)
    loss, new = step(x, weight)
    mx.eval(loss, new)
    mx.export_function(str(tmp_path / "step.mlxfn"), step, x, weight)
    got_loss, got_new = imported(str(tmp_path / "step.mlxfn"))(x, weight)
    assert_near(got_loss, to_numpy(loss))
    assert_near(got_new, to_numpy(new))


def test_nn_quantize_leaves_it_alone():
    model: Any = nn.Sequential(SparseEmbeddingBag(8, 64), nn.Linear(64, 64))
    nn.quantize(model)
    assert type(model.layers[0]) is SparseEmbeddingBag and type(model.layers[1]) is nn.QuantizedLinear


def test_saves_and_loads_as_an_embedding(tmp_path):
    bag, stock = make("sum"), nn.Embedding(ROWS, DIMS)
    bag.save_weights(str(tmp_path / "w.safetensors"))
    stock.load_weights(str(tmp_path / "w.safetensors"))
    assert bits(stock.parameters()) == bits(bag.parameters())


# --- memory -----------------------------------------------------------------------------------------------------------


def peak(function):
    mx.synchronize()
    gc.collect()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    held = function()
    mx.eval([densified(g) if isinstance(g, RowSparse) else g for _, g in flat(held)])
    return mx.get_peak_memory() - before


def flat(tree):
    pairs: Any = tree_flatten(tree)
    return pairs


@pytest.mark.parametrize("ragged", [False, True], ids=["two_axes", "offsets"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_no_array_has_a_row_for_every_index(mode, ragged, cpu):
    rows, dims, bags, length = 2000, 64, 128, 1600
    every = bags * length * dims * 4  # 52 MB
    mx.random.seed(1)
    bag = SparseEmbeddingBag(rows, dims, mode)
    x = mx.random.randint(0, rows, (bags, length))
    factors = mx.random.normal(x.shape) if mode == "sum" else None
    given: Any = (x, None, factors)
    if ragged:
        flat_factors = None if factors is None else factors.reshape(-1)
        given = (x.reshape(-1), mx.arange(bags) * length, flat_factors)
    mx.eval(bag.parameters(), [a for a in given if a is not None])

    def loss(model, x, offsets, factors):
        return mx.square(model(x, offsets, factors)).mean()

    def weighted(factors):
        return loss(bag, given[0], given[1], factors)

    assert peak(lambda: {"out": bag(*given)}) < 0.2 * every
    assert peak(lambda: value_and_grad(bag, loss)(bag, *given)[1]) < 0.25 * every
    assert peak(lambda: nn.value_and_grad(bag, loss)(bag, *given)[1]) < 0.25 * every
    if factors is not None:
        gradient: Any = mx.grad(weighted)
        assert peak(lambda: {"g": gradient(given[2])}) < 0.2 * every
    embedding = SparseEmbedding(rows, dims)
    mx.eval(embedding.parameters())
    assert peak(lambda: {"out": embedding(x).sum(axis=1)}) > every  # what the measure is for


def test_a_gradient_has_as_many_rows_as_were_named():
    bag = SparseEmbeddingBag(100_000, DIMS, "sum")
    x = mx.random.randint(0, 6, (50, 40))
    _, g = value_and_grad(bag, lambda x: bag(x).sum())(x)
    assert g["weight"].indices.tolist() == list(range(6)) and g["weight"].values.shape == (6, DIMS)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((ROWS, DIMS, "median"), {}, ValueError, "'mode' must be 'sum' or 'mean' or 'max' but got 'median'"),
        ((ROWS, DIMS, "sum", 11), {}, ValueError, "'padding_idx' must be a row of a table of 11 but got 11"),
        ((ROWS, DIMS, "sum", -12), {}, ValueError, ".* but got -12"),
        ((ROWS, DIMS, "sum", 1.0), {}, TypeError, "'padding_idx' must be an integer or None but got 1.0"),
        ((ROWS, DIMS), {"include_last_offset": 1}, TypeError, "'include_last_offset' must be True or False"),
        ((ROWS, DIMS), {"max_norm": 0.0}, ValueError, "'max_norm' must be positive"),
        ((ROWS, DIMS), {"max_norm": 1.0, "norm_type": -2}, ValueError, "'norm_type' must be non-negative"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=r"^\[SparseEmbeddingBag\] " + message):
        SparseEmbeddingBag(*arguments, **options)


@pytest.mark.parametrize(
    "mode, given, error, message",
    [
        ("sum", (mx.array([0.5]), mx.array([0])), TypeError, "'x' must hold integers, .*float32"),
        ("sum", (mx.array([1]), mx.array([0.0])), TypeError, "'offsets' must hold integers"),
        ("sum", (mx.array([1]),), ValueError, r"'x' must be of shape .* but got \(1,\) without 'offsets'"),
        ("sum", (mx.array([[1]]), mx.array([0])), ValueError, r".* but got \(1, 1\) with 'offsets'"),
        ("sum", (mx.array([[[1]]]),), ValueError, r".* but got \(1, 1, 1\) without"),
        ("sum", (mx.array([1]), mx.array([[0]])), ValueError, r"'offsets' must have shape \(B,\) but got \(1, 1\)"),
        ("sum", (mx.array([1, 2]), mx.array([1])), ValueError, "'offsets' must ascend from 0 to at most 2"),
        ("sum", (mx.array([1, 2]), mx.array([0, 2, 1])), ValueError, "'offsets' must ascend from 0 to at most 2"),
        ("sum", (mx.array([1, 2]), mx.array([0, 3])), ValueError, "'offsets' must ascend from 0 to at most 2"),
        ("mean", (mx.array([[1]]), None, mx.ones((1, 1))), ValueError, "'per_sample_weights' are for mode='sum'"),
        ("sum", (mx.array([[1]]), None, mx.ones((1, 2))), ValueError, "'per_sample_weights' must have the shape of"),
        ("sum", (mx.array([[1]]), None, mx.array([[1]])), TypeError, "'per_sample_weights' must be an array of floats"),
        ("sum", (mx.array([[1]]), None, [[1.0]]), TypeError, "'per_sample_weights' must be an array of floats"),
    ],
)
def test_bad_calls(mode, given, error, message):
    with pytest.raises(error, match=r"^\[SparseEmbeddingBag\] " + message):
        make(mode)(*given)


# --- the norm of rows -------------------------------------------------------------------------------------------------


def limited(w, x, max_norm, p):
    w = w.copy()
    for row in np.unique(x[(x >= 0) & (x < len(w))]):
        norm = np.linalg.norm(w[row], p)
        if norm > max_norm:
            w[row] *= max_norm / (norm + 1e-7)
    return w


norms = pytest.mark.parametrize("max_norm, p", [(1.0, 2.0), (0.7, 1.0), (0.5, 3.0), (0.4, np.inf), (100.0, 2.0)])


@blocks
@norms
@pytest.mark.parametrize("differentiate", [value_and_grad, nn.value_and_grad], ids=["sparse", "dense"])
@pytest.mark.parametrize("mode", ["embedding", *MODES])
def test_max_norm(mode, differentiate, max_norm, p):
    """Rows are looked up with at most that norm, their gradient is as if they had had it, and they are stored so."""
    padding = None if mode == "max" else 3
    if mode == "embedding":
        module: Any = SparseEmbedding(ROWS, DIMS, padding, max_norm=max_norm, norm_type=p)
    else:
        module = SparseEmbeddingBag(ROWS, DIMS, mode, padding, max_norm=max_norm, norm_type=p)
    module.weight = mx.random.normal((ROWS, DIMS), key=mx.random.key(2))
    if padding is not None:
        module.weight[padding] = 0
    before = to_numpy(module.weight)
    x = np.array([[1, 7, 1], [3, 10, 11], [-1, 7, 2]])
    stored = limited(before, x, max_norm, p)
    plain: Any = type(module)(ROWS, DIMS, *(() if mode == "embedding" else (mode,)), padding)
    plain.weight = mx.array(stored, mx.float32)
    given = mx.array(x)
    assert_near(module(given), to_numpy(plain(given)))
    loss, g = differentiate(module, lambda x: objective(module(x))[0])(given)
    want_loss, want = nn.value_and_grad(plain, lambda x: objective(plain(x))[0])(given)
    assert_near(loss, to_numpy(want_loss))
    assert_near(densified(g["weight"]), to_numpy(want["weight"]))
    if differentiate is nn.value_and_grad:  # it does not say which rows were looked up
        assert mx.array_equal(module.weight, mx.array(before, mx.float32))
        module.renorm(given)
    assert_near(module.weight, stored)


@blocks
def test_max_norm_of_per_sample_weights():
    bag = SparseEmbeddingBag(ROWS, DIMS, "sum", max_norm=0.5)
    bag.weight = mx.random.normal((ROWS, DIMS), key=mx.random.key(2))
    plain, x = SparseEmbeddingBag(ROWS, DIMS, "sum"), mx.array([[1, 7], [2, 3]])
    plain.weight = mx.array(limited(to_numpy(bag.weight), np.array(x), 0.5, 2), mx.float32)
    factors = mx.array([[0.5, -2.0], [1.0, 3.0]])
    got, want = (mx.grad(lambda f: objective(m(x, None, f))[0])(factors) for m in (bag, plain))  # noqa: B023
    assert_near(got, to_numpy(want))
    (_, got), (_, want) = (value_and_grad(m, lambda: objective(m(x, None, factors))[0])() for m in (bag, plain))  # noqa: B023
    assert_near(got["weight"].to_dense(), to_numpy(want["weight"].to_dense()))


def test_renorm():
    module = SparseEmbedding(ROWS, DIMS, max_norm=0.5)
    module.weight = mx.random.normal((ROWS, DIMS), key=mx.random.key(2)) * 5
    before = to_numpy(module.weight)
    module.renorm(mx.array([-1, ROWS, 100]))
    module.renorm(mx.zeros((0,), mx.int32))
    assert_near(module.weight, before, steps=0)
    same = module.weight
    for x in ([[2, 10, 2], [-1, 10, 50]], [2], [10, 2]):
        module.renorm(mx.array(x))
        assert_near(module.weight, limited(before, np.array([2, 10]), 0.5, 2))
    assert same is not module.weight
    same = module.weight
    module.renorm(mx.array([2, 10]))
    assert module.weight is same  # nothing was written
    half = SparseEmbedding(ROWS, DIMS, max_norm=0.5)
    half.weight = mx.array(before, mx.float16)
    half.renorm(mx.arange(ROWS))
    assert half.weight.dtype == mx.float16
    assert_near(half.weight, limited(to_numpy(mx.array(before, mx.float16)), np.arange(ROWS), 0.5, 2), mx.float16)
    with pytest.raises(ValueError, match=r"^\[SparseEmbedding\] there is no 'max_norm'"):
        SparseEmbedding(ROWS, DIMS).renorm(mx.array([1]))
    with pytest.raises(TypeError, match=r"^\[SparseEmbedding\] 'x' must hold integers"):
        module.renorm(mx.array([1.0]))


@pytest.mark.parametrize("way", ["plain", "before", "after"])
def test_training_with_max_norm(way):
    """Stored in each forward pass (torch), before it or after the update (FBGEMM): the same where rows are read."""
    rng = np.random.default_rng(0)
    mx.random.seed(8)
    module, optimizer = SparseEmbedding(ROWS, DIMS, max_norm=0.5), Adagrad(0.3)
    module.renorm(mx.arange(ROWS))
    w = to_numpy(module.weight)
    v = np.zeros_like(w)
    differentiate = nn.value_and_grad if way == "after" else value_and_grad
    gradient = differentiate(module, lambda x: objective(module(x))[0])
    state = [module.state, optimizer.state]

    def step(x):
        if way == "before":
            module.renorm(x)
        loss, g = gradient(x)
        optimizer.update(module, g)
        if way == "after":
            module.renorm(x)
        return loss

    run: Any = mx.compile(step, inputs=state, outputs=state) if way == "before" else step
    for _ in range(6):
        x = rng.integers(0, ROWS, (4, 3))
        mx.eval(run(mx.array(x)), state)
        w = limited(w, x, 0.5, 2)
        g = np.zeros_like(w)
        np.add.at(g, x, objective(mx.zeros((4, 3, DIMS)))[1])
        v += g * g
        w = w - 0.3 * np.divide(g, np.sqrt(v) + 1e-8)
    everywhere = np.arange(ROWS)
    assert_near(limited(to_numpy(module.weight), everywhere, 0.5, 2), limited(w, everywhere, 0.5, 2))
