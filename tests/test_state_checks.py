"""State from outside is compared with the parameters before the first step: all that does not fit is named."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_adagrad import Adagrad, RowWise, checkpoint, matching
from mlx_adagrad.checkpoint import import_mlx
from mlx_adagrad.trees import copied, present
from mlx_adagrad.wrappers import (
    ClipByNorm,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    LossScale,
    SkipNonFinite,
)

OWN = "_mlx_adagrad"


def weights(dtype=mx.float32):
    return {"layers": [{"w": mx.ones((2, 3), dtype), "b": mx.ones((3,), dtype)}], "scale": mx.ones((4,), dtype)}


def gradients():
    return tree_map(lambda w: mx.full(w.shape, 0.5), weights())


def trained(optimizer, steps=3):
    w = weights()
    for _ in range(steps):
        w = optimizer.apply_gradients(gradients(), w)
    mx.eval(w, optimizer.state)
    return optimizer


def identities(optimizer):
    return [(keys, id(a)) for keys, a in present(optimizer.state)]


def refused(optimizer, parameters, *messages, kind: Any = ValueError, step=None):
    """A step is refused with all these messages, and nothing has changed; returns the error's text."""
    before = identities(optimizer)
    with pytest.raises(kind) as error:
        step() if step else optimizer.apply_gradients(gradients(), parameters)
    text = str(error.value)
    for message in messages:
        assert message in text, text
    assert identities(optimizer) == before
    return text


STACKS = {
    "adagrad": lambda: Adagrad(0.1),
    "clipped": lambda: ClipByNorm(Adagrad(0.1), 1.0),
    "every": lambda: DynamicLossScale(
        Constraint(ExponentialMovingAverage(GradientAccumulation(ClipByNorm(Adagrad(0.1), 1.0), 2), 0.9), {}), 4.0
    ),
    "skip": lambda: SkipNonFinite(LossScale(GradientAccumulation(Adagrad(0.1), 2), 2.0)),
    "adam": lambda: ExponentialMovingAverage(GradientAccumulation(optim.Adam(0.1), 2), 0.9),
    "sgd": lambda: ClipByNorm(optim.SGD(0.1, momentum=0.9), 1.0),
    "adafactor": lambda: ClipByNorm(optim.Adafactor(0.1), 1.0),
    "multi": lambda: LossScale(
        optim.MultiOptimizer([GradientAccumulation(Adagrad(0.1), 2), optim.Adam(0.1)], [lambda _, w: w.ndim > 1]), 2.0
    ),
}
stacks = pytest.mark.parametrize("stack", STACKS)


def innermost(optimizer) -> list[Any]:
    """The optimizers that make updates."""
    if isinstance(optimizer, optim.MultiOptimizer):
        return [found for part in optimizer.optimizers for found in innermost(part)]
    return innermost(optimizer.optimizer) if hasattr(optimizer, "optimizer") else [optimizer]


# ------------------------------------------------------------------ what fits goes on
@stacks
def test_state_that_fits_goes_on_and_is_compared_once(stack, monkeypatch):
    source, optimizer = trained(STACKS[stack]()), STACKS[stack]()
    optimizer.state = tree_unflatten(tree_flatten(source.state))
    compared = []
    original = matching.Slots.__init__
    monkeypatch.setattr(matching.Slots, "__init__", lambda self, *args: (compared.append(1), original(self, *args))[-1])
    optimizer.apply_gradients(gradients(), weights())
    assert compared
    for _ in range(2):
        optimizer.apply_gradients(gradients(), weights())
    compared.clear()
    optimizer.apply_gradients(gradients(), weights())
    assert not compared


@stacks
def test_half_precision_parameters_take_the_state_of_float32_ones_and_back(stack):
    for first, second in ((mx.float32, mx.bfloat16), (mx.bfloat16, mx.float32), (mx.float32, mx.float16)):
        source, optimizer = STACKS[stack](), STACKS[stack]()
        source.init(weights(first))
        optimizer.state = source.state
        optimizer.apply_gradients(gradients(), weights(second))


@stacks
def test_the_state_of_frozen_parameters_is_no_leftover(stack):
    source, optimizer = trained(STACKS[stack]()), STACKS[stack]()
    optimizer.state = source.state
    optimizer.apply_gradients({"scale": gradients()["scale"]}, weights())
    optimizer.apply_gradients(gradients(), weights())


def test_the_state_of_a_frozen_layer_of_a_model_is_no_leftover():
    def build():
        mx.random.seed(0)
        model: Any = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        return model, nn.value_and_grad(model, lambda x: model(x).sum())

    model, loss = build()
    source, optimizer = Adagrad(0.1), ExponentialMovingAverage(Adagrad(0.1))
    source.update(model, loss(mx.ones((1, 2)))[1])
    model.layers[0].freeze()
    optimizer.optimizer.state = source.state
    optimizer.update(model, loss(mx.ones((1, 2)))[1])
    fresh = Adagrad(0.1)
    fresh.state = source.state
    fresh.init(model.trainable_parameters())  # which does not know of the frozen layer
    fresh.update(model, loss(mx.ones((1, 2)))[1])
    assert fresh.step.item() == 2


@stacks
def test_an_empty_state_starts_anew(stack):
    optimizer = trained(STACKS[stack]())
    optimizer.state = STACKS[stack]().state
    optimizer.apply_gradients(gradients(), weights())


def test_stock_state_with_integers_and_a_rate_of_one_element_goes_on():
    w = {"w": mx.ones((2,)), "ids": mx.arange(3), "scalar": mx.array(1.0)}
    rate: Any = mx.array([0.1])
    stock = optim.Adagrad(rate)
    stock.init(w)
    ours = Adagrad(0.5)
    ours.state = stock.state
    new = ours.apply_gradients({"w": w["w"], "scalar": w["scalar"]}, w)
    assert new["scalar"].shape == ours.learning_rate.shape == () and new["scalar"].item() == pytest.approx(0.9)


# ------------------------------------------------------------------ what does not fit
@stacks
@pytest.mark.parametrize("way", ["assigned", "checkpoint"])
def test_names_that_do_not_occur_are_listed_and_nothing_advances(stack, way, tmp_path):
    source, optimizer = trained(STACKS[stack]()), STACKS[stack]()
    if way == "assigned":
        optimizer.state = source.state
    else:
        checkpoint.save(tmp_path / "run", source)
        checkpoint.load(tmp_path / "run", optimizer)
    other = {"blocks": weights()["layers"], "scale": mx.ones((4,))}
    before = identities(optimizer)
    with pytest.raises(ValueError, match="does not fit the parameters") as error:
        optimizer.apply_gradients({"blocks": gradients()["layers"]}, other)
    text = str(error.value)
    assert "'layers.0.w" in text and "'layers.0.b" in text and "scale" not in text
    assert text.count("averages/layers/0") == (2 if "averages" in str(tree_flatten(source.state)) else 0)
    assert identities(optimizer) == before


@pytest.mark.parametrize("width", [1, 5])
@stacks
def test_another_width_is_named_in_every_entry_before_anything_advances(stack, width):
    optimizer = STACKS[stack]()
    other = weights() | {"scale": mx.ones((width,))}
    optimizer.init(other)
    fresh = STACKS[stack]()
    fresh.state = optimizer.state
    text = refused(fresh, weights(), f"({width},) but must have (4,)", "scale")
    arrays = sum(a.ndim > 0 and "scale" in str(keys) for keys, a in present(optimizer.state))
    assert arrays and text.count("must have (4,)") == arrays


@stacks
@pytest.mark.parametrize("key", ["step", "learning_rate"])
def test_a_missing_count_or_rate_is_named(stack, key):
    for place in range(len(innermost(STACKS[stack]()))):
        optimizer = trained(STACKS[stack]())
        inner = innermost(optimizer)[place]
        if key == "learning_rate" and isinstance(inner, optim.Adafactor):
            continue
        inner.state = {k: v for k, v in tree_map(lambda a: a, inner.state).items() if k != key}
        refused(optimizer, weights(), f"[{type(inner).__name__}] the state has no '{key}'")


BAD = {
    "no array": (("w", "v"), 3.0, TypeError, "the state 'v' of 'w' must be an array but got float"),
    "integers": (
        ("w", "v"),
        mx.zeros((2,), mx.int32),
        ValueError,
        "'v' of 'w' is mlx.core.int32 but must be",
    ),
    "complex": (("w", "v"), mx.zeros((2,), mx.complex64), ValueError, "is mlx.core.complex64 but must be"),
    "of Adam": (("w", "m"), mx.zeros((2,)), ValueError, "the state 'm' of 'w' is none of an Adagrad"),
    "no dict": (("w",), mx.zeros((2,)), ValueError, "the state of 'w' must be a dict but got array"),
    "a list": (("w",), [mx.zeros((2,))], ValueError, "the state of 'w' must be a dict but got list"),
    "a stranger": (("x",), {"v": mx.zeros((2,))}, ValueError, "the state has 'x.v', which belongs to no parameter"),
    "a word": (("hello",), "world", ValueError, "the state has 'hello', which belongs to no parameter"),
    "inner": (("inner",), {"w": {"v": mx.zeros((2,))}}, ValueError, "the state has 'inner.w.v', which belongs to no"),
    "step of two": (("step",), mx.zeros((2,), mx.uint64), ValueError, "'step' of the state has shape (2,) but must"),
    "step float": (("step",), mx.array(1.0), ValueError, "'step' of the state is mlx.core.float32 but must be uint64"),
    "step int": (("step",), 1, TypeError, "'step' of the state must be an array but got int"),
    "own step": (("w", "step"), mx.zeros((2,), mx.int32), ValueError, "the state 'step' of 'w' must be one integer"),
    "rate of two": (("learning_rate",), mx.ones((2,)), ValueError, "'learning_rate' of the state has shape (2,)"),
    "rate bool": (("learning_rate",), mx.array(True), ValueError, "'learning_rate' of the state is mlx.core.bool"),
    "groups": ((OWN,), {"groups": [{"learning_rate": mx.array(0.1)}]}, ValueError, "that of 1 groups, but there are 0"),
    "own": ((OWN,), [1], TypeError, "'_mlx_adagrad' of the state must be"),
}


@pytest.mark.parametrize(("keys", "value", "kind", "message"), BAD.values(), ids=BAD)
def test_an_entry_of_a_wrong_kind_is_refused(keys, value, kind, message):
    w = {"w": mx.ones((2,))}
    optimizer = Adagrad(0.1)
    optimizer.init(w)
    state: Any = tree_map(lambda a: a, optimizer.state)
    node = state
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    optimizer.state = state
    before = [(k, id(a)) for k, a in present(optimizer.state)]
    with pytest.raises(kind, match="Adagrad") as error:
        optimizer.apply_gradients(w, w)
    assert message in str(error.value)
    assert [(k, id(a)) for k, a in present(optimizer.state)] == before


def test_every_problem_is_listed_with_its_path():
    optimizer = STACKS["every"]()
    optimizer.init({"layers": [{"w": mx.ones((2, 4)), "b": mx.ones((3,))}], "scale": mx.ones((4,)), "x": mx.ones((1,))})
    fresh = STACKS["every"]()
    fresh.state = optimizer.state
    text = refused(fresh, weights())
    assert text.count("\n") == 6 and text.count("layers.0.w") == 3 and text.count("[Adagrad]") == 2
    for line in ("'averages' of 'layers.0.w'", "'gradients' of 'layers.0.w'", "averages/x", "gradients/x", "'x.v'"):
        assert line in text


def test_averages_of_another_width_no_longer_break_a_step_in_the_middle():
    optimizer, narrow = ExponentialMovingAverage(Adagrad(0.1)), ExponentialMovingAverage(Adagrad(0.1))
    narrow.init({"w": mx.ones((1,))})
    w = {"w": mx.ones((4,))}
    optimizer.state = {"inner": Adagrad(0.1).state, OWN: narrow.state[OWN]}
    with pytest.raises(ValueError, match=r"'averages' of 'w' of the state has shape \(1,\) but must have \(4,\)"):
        optimizer.apply_gradients(w, w)
    assert optimizer.step.item() == 0 and "w" not in optimizer.optimizer.state


def test_the_state_of_adam_for_an_sgd_inside_a_wrapper_lacks_nothing_silently():
    source, optimizer = trained(ClipByNorm(optim.SGD(0.1, momentum=0.9), 1.0)), ClipByNorm(optim.Adam(0.1), 1.0)
    optimizer.state = source.state
    refused(optimizer, weights(), "[Adam] the state of 'layers.0.w' has no 'm'", "of 'scale' has no 'm'")


@pytest.mark.parametrize(
    ("entry", "value", "kind", "message"),
    [
        ("u", mx.ones((4,)), ValueError, "[Adam] the state 'u' of 'scale' is none of this optimizer"),
        ("m", mx.ones((4,), mx.int32), ValueError, "[Adam] the state 'm' of 'scale' is mlx.core.int32 but must be"),
        ("m", 3.0, TypeError, "[Adam] the state 'm' of 'scale' must be an array but got float"),
        ("v", {"x": mx.ones((4,))}, TypeError, "[Adam] the state 'v' of 'scale' must be an array but got dict"),
    ],
)
def test_an_entry_of_a_stock_optimizer_is_compared_too(entry, value, kind, message):
    optimizer = trained(GradientAccumulation(optim.Adam(0.1), 2))
    state: Any = tree_map(lambda a: a, optimizer.state)
    state["inner"]["scale"][entry] = value
    optimizer.state = state
    refused(optimizer, weights(), message, kind=kind)


def test_an_optimizer_of_the_users_may_keep_its_state_as_it_likes():
    class Deep(optim.Optimizer):
        def init_single(self, parameter, state):
            state["moments"] = {"first": mx.zeros_like(parameter), "more": [mx.zeros_like(parameter)]}

        def apply_single(self, gradient, parameter, state):
            state["moments"]["first"] = state["moments"]["first"] + gradient
            return parameter - state["moments"]["first"]

    source, fresh = trained(ClipByNorm(Deep(), 1.0), 2), ClipByNorm(Deep(), 1.0)
    fresh.state = tree_unflatten(tree_flatten(source.state))
    got, want = (optimizer.apply_gradients(gradients(), weights()) for optimizer in (fresh, source))
    assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(present(got), present(want), strict=True))


def test_row_wise_state_and_dense_state_are_told_apart():
    dense, row_wise = trained(Adagrad(0.1)), Adagrad(0.1, accumulator=RowWise())
    row_wise.state = dense.state
    refused(row_wise, weights(), "'layers.0.w' has shape (2, 3) but must have (2,)")


def test_a_part_knows_the_parameters_of_all():
    multi = optim.MultiOptimizer([Adagrad(0.1), Adagrad(0.2)], [lambda _, w: w.ndim > 1])
    source = trained(multi)
    fresh = optim.MultiOptimizer([Adagrad(0.1), Adagrad(0.2)], [lambda _, w: w.ndim > 1])
    fresh.init(weights())
    fresh.state = tree_unflatten(tree_flatten(source.state))
    fresh.apply_gradients(gradients(), weights())
    assert fresh.optimizers[1].step.item() == 4


# ------------------------------------------------------------------ any damage
ROWS = {"indices": mx.zeros((2,), mx.int32), "values": mx.ones((2, 5))}
DAMAGES: list[Any] = [
    None, 3.0, 5, "x", [], {}, {"a": {"b": {}}}, [mx.ones((2,))], {"v": mx.ones((2,))}, (mx.ones((4,)),), ROWS, [ROWS],
    mx.ones((1,)), mx.ones((7, 2)), mx.ones((4,), mx.int32), mx.ones((4,), mx.float16), mx.ones((4,), mx.complex64),
    mx.array(1.0), mx.array(True), mx.array(3, mx.uint64), mx.array(-3, mx.int32),
]  # fmt: skip


def places(tree):
    """Every (container, key) of a tree."""
    for key, node in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(node, dict | list):
            yield from places(node)


def damaged(state, random):
    """A copy of a state with one or two entries taken out, put in, renamed or replaced."""
    state = copied(state)
    for _ in range(random.choice([1, 1, 2])):
        node, key = random.choice(list(places(state)))
        what = random.choice(["take out", "replace", "replace", "rename", "put in"])
        if what == "take out":
            del node[key]
        elif what == "rename" and isinstance(node, dict):
            node[random.choice(["z", "0", 0, "v", "m", "step", "a.b"])] = node.pop(key)
        elif what == "put in" and isinstance(node, dict):
            node[random.choice(["z", "0", "inner", OWN, "w", "", 3])] = copied(random.choice(DAMAGES))
        else:
            node[key] = copied(random.choice(DAMAGES))
    return state


@pytest.mark.filterwarnings("ignore:.*nobody has scaled the loss")
@stacks
def test_damaged_state_goes_on_or_is_refused_and_nothing_has_changed(stack):
    state, outcomes = trained(STACKS[stack]()).state, {"goes on": 0, "refused": 0}
    for seed in range(60):
        random, optimizer = Random(seed), STACKS[stack]()
        if stack == "multi" or seed % 2:
            optimizer.init(weights())
        before = identities(optimizer)
        try:
            optimizer.state = damaged(state, random)
            before = identities(optimizer)
            new = optimizer.apply_gradients(gradients(), weights())
            mx.eval([w for _, w in present(new)], [a for _, a in present(optimizer.state)])
        except (ValueError, TypeError) as error:
            assert str(error).startswith("[") and identities(optimizer) == before, (seed, str(error))
            outcomes["refused"] += 1
        else:
            assert [(k, w.shape, w.dtype) for k, w in present(new)] == [
                (k, w.shape, w.dtype) for k, w in present(weights())
            ]
            outcomes["goes on"] += 1
    assert min(outcomes.values()) > 3, outcomes


# ------------------------------------------------------------------ traces
@pytest.mark.parametrize("initialised", [False, True])
@pytest.mark.parametrize("stack", ["adagrad", "every", "multi"])
def test_a_compiled_step_refuses_and_then_goes_on(stack, initialised):
    source, optimizer = trained(STACKS[stack](), 4), STACKS[stack]()
    if initialised:
        optimizer.init(weights())
    w = weights()
    state = [w, optimizer.state]

    def step(g):
        w.update(optimizer.apply_gradients(g, w))

    compiled = mx.compile(step, inputs=state, outputs=state)
    good = tree_unflatten(tree_flatten(source.state))
    if stack != "multi":  # whose setter wants every state
        bad = tree_map(lambda a: a, source.state)
        innermost_state = bad
        while "inner" in innermost_state:
            innermost_state = innermost_state["inner"]
        innermost_state["stranger"] = {"v": mx.ones((2,))}
        optimizer.state = bad
        with pytest.raises(ValueError, match="'stranger.v', which belongs to no parameter"):
            compiled(gradients())
    if stack == "multi" and not initialised:
        optimizer.init(weights())
    optimizer.state = good
    w.update(weights())
    compiled(gradients())
    compiled(gradients())
    mx.eval(state)
    eager = STACKS[stack]()
    eager.init(weights())
    eager.state = good
    want: Any = weights()
    for _ in range(2):
        want = eager.apply_gradients(gradients(), want)
    for (_, a), (_, b) in zip(present(w), present(want), strict=True):
        assert mx.allclose(a, b, rtol=1e-5)


def experts(value):
    return {"experts": {k: {"w": mx.full((2,), value * int(k))} for k in ("7", "0", "11")}, "user.id": mx.ones((2,))}


@pytest.mark.parametrize("initialised", [False, True])
def test_a_compiled_step_takes_state_in_the_shape_of_strings(initialised):
    source = Adagrad(0.1)
    source.apply_gradients(experts(1.0), experts(1.0))
    optimizer, w = Adagrad(0.1), experts(1.0)
    if initialised:
        optimizer.init(w)
    state = [w, optimizer.state]
    compiled = mx.compile(lambda g: w.update(optimizer.apply_gradients(g, w)), inputs=state, outputs=state)
    if initialised:
        compiled(experts(3.0))
    optimizer.state = tree_unflatten(tree_flatten(source.state))
    for _ in range(3):
        compiled(experts(1.0))
    for key, number in (("7", 7), ("0", 0), ("11", 11)):
        assert optimizer.state["experts"][key]["w"]["v"][0].item() == pytest.approx(4 * number**2)


# ------------------------------------------------------------------ files
def test_an_import_into_an_optimizer_that_was_not_initialised_is_compared_too(tmp_path: Path):
    stock, ours = optim.Adagrad(0.1), Adagrad(0.1)
    stock.apply_gradients(gradients(), weights())
    import_mlx(stock.state, ours)
    refused(
        ours,
        {"blocks": weights()["layers"]},
        "'layers.0.w.v'",
        "'scale.v'",
        step=lambda: ours.apply_gradients({"blocks": gradients()["layers"]}, {"blocks": weights()["layers"]}),
    )


@pytest.mark.parametrize("flat", [False, True])
def test_import_mlx_finds_dicts_with_keys_like_lists(flat):
    w: Any = dict(tree_flatten(experts(1.0))) if flat else experts(1.0)
    stock = optim.Adagrad(0.1)
    new = stock.apply_gradients(w, w)
    for source in (stock.state, dict(tree_flatten(stock.state))):
        ours = Adagrad(0.1)
        import_mlx(source, ours)
        got, want = ours.apply_gradients(w, new), optim.Adagrad(0.1)
        want.state = tree_map(lambda a: a, stock.state)
        for (_, a), (_, b) in zip(present(got), present(want.apply_gradients(w, new)), strict=True):
            assert mx.allclose(a, b, rtol=1e-6)
        assert {k for k, _ in present(ours.state)} == {k for k, _ in present(stock.state)}


@pytest.mark.parametrize("stack", ["adagrad", "every"])
def test_entries_that_a_compiled_step_makes_again_keep_their_places(stack):
    def full(factor):
        a, b, c, d = (mx.full((3,), factor * i) for i in range(1, 5))
        return {"a": a, "b": b, "c": [c], "d": {"e": d}}

    part = STACKS[stack]()
    part.init({key: full(1.0)[key] for key in ("b", "d")})
    results = []
    for compiles in (False, True):
        optimizer, w = STACKS[stack](), full(1.0)
        optimizer.init(w)
        state = [w, optimizer.state]

        def update(g, optimizer=optimizer, w=w):
            w.update(optimizer.apply_gradients(g, w))

        step = mx.compile(update, inputs=state, outputs=state) if compiles else update
        for t in range(6):
            if t == 3:
                optimizer.state = part.state
            step(full(0.5))
            mx.eval(state)
        results.append([w, tree_map(lambda a: a, optimizer.state)])
    eager, compiled = ({k: a for k, a in present(tree)} for tree in results)
    assert eager.keys() == compiled.keys()
    assert all(mx.allclose(eager[k], compiled[k], rtol=1e-5) for k in eager)
