"""How keys are called changes nothing: dots, slashes, digits and the like are for people, not for the code."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adagrad import Adagrad, SparseEmbedding, checkpoint, value_and_grad
from mlx_adagrad.checkpoint import export_mlx, import_mlx
from mlx_adagrad.sparse.gradient import RowSparse
from mlx_adagrad.trees import find, mapped, name, present
from mlx_adagrad.wrappers import ClipByNorm, Constraint, ExponentialMovingAverage, GradientAccumulation
from tree_cases import AMBIGUOUS, EVERY, OPTIMIZERS, PLAIN, STEPS, drawn, gradients, leaves, same, train

# the optimizers of MLX itself take no tuple at the root
PAIRS = [(kind, tree) for kind in OPTIMIZERS for tree in EVERY if tree != "root" or kind not in ("adam", "multi")]
keys = st.lists(st.one_of(st.text("a01~/.-'٣", max_size=4), st.integers(-3, 12)), min_size=1, max_size=4)


@pytest.mark.parametrize(("kind", "tree"), PAIRS)
def test_keys_change_nothing(kind, tree):
    place = EVERY[tree]
    got = train(OPTIMIZERS[kind](), place(*drawn(0)), place, range(STEPS))
    want = train(OPTIMIZERS[kind](), PLAIN(*drawn(0)), PLAIN, range(STEPS))
    assert all(same(leaves(place, got), leaves(PLAIN, want)))


# ------------------------------------------------------------------ state that goes elsewhere
def strings(state):
    return tree_unflatten(dict(tree_flatten(state)))  # a dict, as from a file: MLX's own recursion has no end otherwise


def initialised(optimizer, place):
    optimizer.init(place(*drawn(0)))
    return optimizer


WAYS = {
    "assigned": lambda source, fresh, place, path: setattr(fresh, "state", source.state),
    "strings": lambda source, fresh, place, path: setattr(fresh, "state", strings(source.state)),
    "strings, initialised": lambda source, fresh, place, path: setattr(
        initialised(fresh, place), "state", strings(source.state)
    ),
    "checkpoint": lambda source, fresh, place, path: (
        checkpoint.save(path, source),
        checkpoint.load(path, fresh),
    ),
    "checkpoint, initialised": lambda source, fresh, place, path: (
        checkpoint.save(path, source),
        checkpoint.load(path, initialised(fresh, place)),
    ),
}
INTEGER_KEYS = ("integers", "integer and string", "root")  # which no checkpoint holds


def middle(kind, place):
    """An optimizer in the middle of a run (and of a window of 2 calls), its parameters, and where they end."""
    optimizer = OPTIMIZERS[kind]()
    half = train(optimizer, place(*drawn(0)), place, range(3))
    whole = OPTIMIZERS[kind]()
    return optimizer, half, train(whole, place(*drawn(0)), place, range(STEPS)), whole


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "tree"), [pair for pair in PAIRS if pair[0] in ("torch", "all", "adam", "multi")])
def test_continued_elsewhere_equals_never_stopped(kind, tree, way, tmp_path):
    if way.startswith("checkpoint") and tree in INTEGER_KEYS or way.startswith("strings") and tree in AMBIGUOUS:
        return
    place = EVERY[tree]
    source, half, want, whole = middle(kind, place)
    fresh = OPTIMIZERS[kind]()
    WAYS[way](source, fresh, place, tmp_path / "run")
    got = train(fresh, half, place, range(3, STEPS))
    assert all(same(leaves(place, got), leaves(place, want)))
    assert {k for k, _ in present(fresh.state)} == {k for k, _ in present(whole.state)}


@pytest.mark.parametrize("tree", AMBIGUOUS)
@pytest.mark.parametrize("kind", ["adagrad", "all", "adam", "multi"])
def test_strings_that_mean_two_arrays_are_refused(kind, tree):
    place = AMBIGUOUS[tree]
    source, half, _, _ = middle(kind, place)
    fresh = OPTIMIZERS[kind]()
    fresh.state = strings(source.state)
    before = [(k, id(a)) for k, a in present(fresh.state)]
    with pytest.raises(ValueError, match="MLX's strings call 2 parameters|belongs to no parameter"):
        fresh.apply_gradients(gradients(place, 3), half)
    assert [(k, id(a)) for k, a in present(fresh.state)] == before


hard_keys = st.sampled_from(
    ["0", "1", "2", "01", "-1", "a", "a.b", "b", "v", "", "0.a", "a.0", "/", "٣", " 1", "step_"]
)
nodes = st.recursive(
    st.booleans(),  # a leaf: whether it is trained
    lambda below: st.one_of(
        st.dictionaries(st.one_of(hard_keys, st.integers(0, 2)), below, min_size=1, max_size=3),
        st.lists(below, min_size=1, max_size=3),
        st.tuples(below, below),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(hard_keys, nodes, min_size=1, max_size=3), st.booleans(), st.booleans())
def test_state_of_any_tree_goes_on_or_is_refused_and_never_changes_places(tree, through_strings, initialised):
    flags = list(present(tree))
    numbers = {keys: i for i, (keys, _) in enumerate(flags)}
    trained = {keys for keys, flag in flags if flag}
    w = mapped(lambda keys, _: mx.full((2,), 1.0 + numbers[keys]), tree)
    g = mapped(lambda keys, _: mx.full((2,), 0.1 * (1 + numbers[keys])) if keys in trained else None, tree)

    def make() -> Any:
        return ClipByNorm(ExponentialMovingAverage(GradientAccumulation(Adagrad(0.1), 1), 0.5), 0.3)

    source, fresh = make(), make()
    half = source.apply_gradients(g, w)
    if initialised:
        fresh.init(w)
    try:
        state = strings(source.state) if through_strings else source.state
    except RecursionError:  # MLX's own, for what its strings name twice
        return
    fresh.state = state
    try:
        got = fresh.apply_gradients(g, half)
    except ValueError:
        paths = [".".join(map(str, keys)) for keys in numbers]
        assert through_strings and any(c in path for path in paths for c in "0123456789.٣-")
        assert fresh.step.item() == 1
        return
    want = source.apply_gradients(g, half)
    assert all(mx.array_equal(a, find(want, keys)) for keys, a in present(got))
    trees = [{keys: a for keys, a in present(optimizer.state)} for optimizer in (fresh, source)]
    if not initialised:
        assert trees[0].keys() == trees[1].keys()
    assert all(mx.array_equal(trees[0][keys], a) for keys, a in trees[1].items())


STOCK_TREES = [tree for tree in EVERY if tree != "root"]  # MLX's own init takes no tuple at the root


@pytest.mark.parametrize("initialised", [False, True])
@pytest.mark.parametrize("form", ["state", "strings", "flat", "file"])
@pytest.mark.parametrize("tree", STOCK_TREES)
def test_an_import_of_stock_state_goes_on_as_stock_does(tree, form, initialised, tmp_path):
    place = EVERY[tree]
    stock = optim.Adagrad(0.1)
    half = train(stock, place(*drawn(0)), place, range(3))
    flat: Any = dict(tree_flatten(stock.state))
    source = {"state": stock.state, "strings": strings(stock.state), "flat": flat}.get(form, "")
    if form == "file":
        mx.save_safetensors(str(tmp_path / "s.safetensors"), flat)
        source = tmp_path / "s.safetensors"
    ours = Adagrad(0.3)
    if initialised:
        ours.init(half)
    try:
        import_mlx(source, ours)
        got = train(ours, half, place, range(3, STEPS))
    except ValueError:  # MLX's strings name two parameters alike, or take a key for a number
        assert form != "state" and (
            tree in AMBIGUOUS or form == "strings" and tree in ("padded", "prefixes", "unicode")
        )
        assert ours.step.item() in (0, 3)
        return
    want = train(stock, half, place, range(3, STEPS))
    assert all(mx.allclose(a, b, rtol=1e-5) for a, b in zip(leaves(place, got), leaves(place, want), strict=True))


@pytest.mark.parametrize("tree", STOCK_TREES)
def test_an_export_leads_stock_to_the_same_weights_or_is_refused(tree):
    place = EVERY[tree]
    ours = Adagrad(0.1)
    half = train(ours, place(*drawn(0)), place, range(3))
    if tree == "dotted twice" or tree == "integer and string":
        with pytest.raises(ValueError, match="MLX's strings cannot tell"):
            export_mlx(ours)
        return
    fresh = Adagrad(0.3)
    import_mlx(export_mlx(ours), fresh)
    if tree not in AMBIGUOUS:
        got, want = (train(o, half, place, range(3, STEPS)) for o in (fresh, ours))
        assert all(same(leaves(place, got), leaves(place, want)))


# ------------------------------------------------------------------ names
@settings(deadline=None, max_examples=300)
@given(st.lists(keys.map(tuple), unique_by=lambda k: tuple((type(x), x) for x in k), min_size=2, max_size=6))
def test_no_two_paths_share_a_name_and_names_survive_mlx(paths):
    names = [name(path) for path in paths]
    assert len(set(names)) == len(names)
    state = {"step": mx.array(1), "averages": {n: mx.array(i) for i, n in enumerate(names)}}
    again: Any = tree_unflatten(tree_flatten(state))
    assert list(again["averages"]) == names


def test_names_of_plain_paths_are_those_of_version_0_1():
    assert name(("layers", 0, "weight")) == "/layers/0/weight"


# ------------------------------------------------------------------ value_and_grad
class Towers(nn.Module):
    def __init__(self, keys: list[Any]):
        super().__init__()
        mx.random.seed(1)
        self.table = SparseEmbedding(5, 2)
        self.tower: Any = {key: nn.Linear(2, 2) for key in keys}
        self.tables: Any = {key: [nn.ReLU(), SparseEmbedding(5, 2)] for key in keys}

    def __call__(self, x):
        y = self.table(x)
        for key in self.tower:
            y = self.tower[key](y) + self.tables[key][1](x)
        return y


HARD_KEYS = [["0", "7"], ["user.id", "user"], ["a/b", "~"], ["0", "x"], ["größe", "'"], ["01", "1"], ["", " "]]


def loss_of(model, x):
    return (model(x) ** 2).sum()


@pytest.mark.parametrize("exportable", [False, True])
@pytest.mark.parametrize("names", HARD_KEYS, ids=str)
def test_value_and_grad_takes_every_model_that_mlx_takes(names, exportable):
    model, x = Towers(names), mx.array([1, 3, 3])
    value, grads = value_and_grad(model, lambda x: loss_of(model, x), exportable=exportable)(x)
    want, dense = nn.value_and_grad(model, lambda x: loss_of(model, x))(x)
    assert mx.array_equal(value, want)
    found = list(present(grads))
    assert [k for k, _ in found] == [k for k, _ in present(dense)]
    assert sum(isinstance(g, RowSparse) for _, g in found) == 3
    for k, g in found:
        assert mx.allclose(g.to_dense() if isinstance(g, RowSparse) else g, find(dense, k), rtol=1e-5), k
    Adagrad(0.1).update(model, grads)


@pytest.mark.parametrize("names", HARD_KEYS, ids=str)
def test_an_error_of_the_user_is_the_users_and_the_model_is_as_it_was(names):
    model = Towers(names)
    before = [id(w) for _, w in present(model.parameters())]

    def fails(x):
        loss_of(model, x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        value_and_grad(model, fails)(mx.array([1]))
    assert [id(w) for _, w in present(model.parameters())] == before


# ------------------------------------------------------------------ patterns
def test_a_path_that_means_two_parameters_is_asked_for_each():
    w = {"a.b": mx.full((2,), 9.0), "a": {"b": mx.full((3,), 9.0)}}
    groups = [{"params": lambda path, p: path == "a.b" and p.size == 2, "lr": 5.0}]
    new: Any = Adagrad(1.0, groups=groups).apply_gradients(w, w)
    assert new["a.b"][0].item() == pytest.approx(4.0) and new["a"]["b"][0].item() == pytest.approx(8.0)
    limit = {lambda path, p: path == "a.b" and p.size == 3: lambda p: p * 0}
    new = Constraint(Adagrad(1.0), limit).apply_gradients(w, w)
    assert new["a.b"][0].item() == pytest.approx(8.0) and new["a"]["b"][0].item() == 0.0


def test_each_gradient_is_clipped_by_its_own_norm():
    g = {"a.b": mx.array([3.0, 4.0]), "a": {"b": mx.array([0.3, 0.4])}}
    optimizer = ClipByNorm(Adagrad(0.1), 1.0)
    optimizer.apply_gradients(g, g)
    v: Any = optimizer.state["inner"]
    assert mx.allclose(v["a.b"]["v"], mx.array([0.36, 0.64]))
    assert mx.allclose(v["a"]["b"]["v"], mx.array([0.09, 0.16]))


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)
        self.body.freeze()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constraint(Adagrad(0.1), {"body.weight": lambda w: w * 0}),
        lambda: Adagrad(0.1, groups=[{"params": "body.weight", "lr": 1e-30}]),
    ],
    ids=["constraint", "group"],
)
def test_a_pattern_of_a_frozen_layer_acts_once_it_is_trained(make):
    model, optimizer = Frozen(), make()
    loss = nn.value_and_grad(model, lambda x: model.head(model.body(x)).sum())
    before = mx.array(model.body.weight)
    optimizer.update(model, loss(mx.ones((1, 3)))[1])
    assert mx.array_equal(model.body.weight, before)
    model.body.unfreeze()
    optimizer.update(model, loss(mx.ones((1, 3)))[1])
    constrained = isinstance(optimizer, Constraint)
    assert mx.array_equal(model.body.weight, mx.zeros_like(before) if constrained else before)


def test_a_pattern_of_a_quantised_layer_matches():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    nn.quantize(model, class_predicate=lambda path, _: path.endswith("0"))
    model.freeze()
    model.layers[1].unfreeze()
    grads = nn.value_and_grad(model, lambda m: m(mx.ones((1, 64))).sum())(model)[1]
    Constraint(Adagrad(0.1, groups=[{"params": "layers.0.*", "lr": 0.2}]), {"layers.0.weight": "non_neg"}).update(
        model, grads
    )


def test_a_pattern_that_matches_nothing_at_all_is_still_refused():
    model = Frozen()
    grads = nn.value_and_grad(model, lambda x: model.head(model.body(x)).sum())(mx.ones((1, 3)))[1]
    for optimizer in (
        Constraint(Adagrad(0.1), {"bodi.*": "non_neg"}),
        Adagrad(0.1, groups=[{"params": "bodi.*", "lr": 0.2}]),
    ):
        with pytest.raises(ValueError, match=r"'bodi.\*' matches no parameter"):
            optimizer.update(model, grads)
