"""GradientAccumulation of row-sparse gradients: the sum is the dense one, in memory that the named rows bound."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

import row_cases
from cases import assert_near, bits, to_numpy
from mlx_adagrad import Adagrad, RowSparse, RowWise, SparseEmbedding, checkpoint, value_and_grad
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    GradientAccumulation,
    LossScale,
    SkipNonFinite,
)

ROWS, STEPS = 30, 3

compiled_too = pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])

WRAPPED: dict[str, Any] = {
    "alone": lambda o: GradientAccumulation(o, STEPS),
    "clip_inside": lambda o: GradientAccumulation(ClipByNorm(ClipByValue(o, 0.5), 1.0), STEPS),
    "clip_around": lambda o: ClipByValue(ClipByGlobalNorm(GradientAccumulation(o, STEPS), 1.0), 0.3),
    "loss_scale": lambda o: LossScale(GradientAccumulation(o, STEPS), 8.0),
    "skip_around": lambda o: SkipNonFinite(GradientAccumulation(o, STEPS)),
    "skip_inside": lambda o: GradientAccumulation(SkipNonFinite(o), STEPS),
    "twice": lambda o: GradientAccumulation(GradientAccumulation(o, 2), STEPS),
}


def case(calls=13, columns=(4,), dtype=mx.float32, sizes=(12,)):
    """A table and the row-sparse gradients of some calls: duplicates, rows out of range, another K in each call."""
    table, drawn = row_cases.draw(ROWS, columns, k=max(sizes), steps=calls, dtype=dtype)
    ks = [sizes[t % len(sizes)] for t in range(calls)]
    return table, [RowSparse(i[:k], v[:k], ROWS) for (i, v), k in zip(drawn, ks, strict=True)]


def train(optimizer, table, gradients, compiled=False, dense=False):
    state = optimizer.state

    def step(w, indices, values):
        g = RowSparse(indices, values, ROWS)
        optimizer.scale_loss(mx.array(1.0))  # a loss scale warns where nobody did
        return optimizer.apply_gradients({"w": g.to_dense() if dense else g}, {"w": w})["w"]

    run: Any = mx.compile(step, inputs=state, outputs=state) if compiled else step
    for g in gradients:
        table = run(table, g.indices, g.values)
        mx.eval(table, state)
    return table


@compiled_too
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_equals_the_dense_sum(wrapped, compiled):
    table, gradients = case()
    sparse, dense = (WRAPPED[wrapped](Adagrad(0.1, accumulator=RowWise())) for _ in range(2))
    got = train(sparse, table, gradients, compiled)
    want = train(dense, table, gradients, dense=True)
    assert not mx.array_equal(want, table) and sparse.step.item() == dense.step.item()
    assert_near(got, to_numpy(want))


@pytest.mark.parametrize(
    "columns, dtype, compiled",
    [((4,), mx.float32, False), ((), mx.bfloat16, False), ((2, 3), mx.float16, False), ((4,), mx.bfloat16, True)],
    ids=str,
)
def test_equals_float64(columns, dtype, compiled):
    """Rows named by no call of a window do not decay: an update is that of the rows of all its calls together."""
    table, gradients = case(6, columns, dtype, sizes=(12, 5, 0))
    got = train(GradientAccumulation(Adagrad(0.1, weight_decay=0.2), 3), table, gradients, compiled)
    windows = [gradients[:3], gradients[3:]]
    summed = [
        (np.concatenate([g.indices for g in gs]), np.concatenate([to_numpy(g.values) for g in gs])) for gs in windows
    ]
    joined = [(mx.array(i), mx.array(v / 3, mx.float32)) for i, v in summed]
    want, _ = row_cases.adagrad(table, joined, weight_decay=0.2)
    assert got.dtype == dtype
    assert_near(got, want, dtype)


@pytest.mark.parametrize("steps, sizes", [(1, (2,)), (2, (0, 5)), (20, (12, 3)), (50, (1, 30, 7))], ids=str)
def test_any_number_of_rows_and_calls(steps, sizes):
    """Also where parts are merged, where there are more rows than in the table, and where K grows in mid-window."""
    table, gradients = case(2 * steps + 1, sizes=sizes)
    want = train(GradientAccumulation(Adagrad(0.1), steps), table, gradients, dense=True)
    for compiled in (False, True):
        got = train(GradientAccumulation(Adagrad(0.1), steps), table, gradients, compiled)
        assert_near(got, to_numpy(want), steps=steps)


def test_plain_and_compiled_calls_may_alternate():
    table, gradients = case(24, sizes=(12, 3))
    want = train(GradientAccumulation(Adagrad(0.1), 6), table, gradients, dense=True)
    for pattern in ([True, False], [False, False, True], [False] * 5 + [True] * 2, [True] * 7 + [False]):
        optimizer, got = GradientAccumulation(Adagrad(0.1), 6), table
        for t, g in enumerate(gradients):
            got = train(optimizer, got, [g], compiled=pattern[t % len(pattern)])
        assert_near(got, to_numpy(want))


def test_compiled_calls_have_room_for_all_that_plain_ones_named():
    rows, optimizer, want = 1000, GradientAccumulation(Adagrad(0.1), 6), GradientAccumulation(Adagrad(0.1), 6)
    table = reference = mx.zeros((rows, 2))
    ids = np.random.default_rng(0).permutation(rows)
    sizes, start = [20, 20, 20, 2, 2, 7], 0
    for t, k in enumerate(sizes):
        g = RowSparse(mx.array(ids[start : start + k]), mx.ones((k, 2)), rows)
        start += k

        def step(w, indices, values):
            return optimizer.apply_gradients({"w": RowSparse(indices, values, rows)}, {"w": w})["w"]

        run: Any = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state) if t > 2 else step
        table = run(table, g.indices, g.values)
        reference = want.apply_gradients({"w": g.to_dense()}, {"w": reference})["w"]
        mx.eval(table, optimizer.state, reference)
    assert (table != 0).any(axis=1).sum().item() == sum(sizes)
    assert_near(table, to_numpy(reference))


@compiled_too
def test_dense_and_row_sparse_calls_may_alternate(compiled):
    table, gradients = case(12)
    want = train(GradientAccumulation(Adagrad(0.1), 4), table, gradients, dense=True)
    for dense in ([0, 1], [1, 0], [0, 0, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]):
        optimizer, got = GradientAccumulation(Adagrad(0.1), 4), table
        for t, g in enumerate(gradients):
            got = train(optimizer, got, [g], compiled, dense=bool(dense[t % len(dense)]))
        assert_near(got, to_numpy(want))


@compiled_too
def test_after_init_rows_that_were_not_named_do_not_decay(compiled):
    table, gradients = case(4, sizes=(3,))
    optimizers = [GradientAccumulation(Adagrad(0.1, weight_decay=0.3), 2) for _ in range(2)]
    optimizers[0].init({"w": table})
    first, second = (train(optimizer, table, gradients, compiled) for optimizer in optimizers)
    assert bits(first) == bits(second)
    named = np.any([row_cases.named(g.indices, ROWS) for g in gradients], axis=0)
    assert bits(first[mx.array(np.flatnonzero(~named))]) == bits(table[mx.array(np.flatnonzero(~named))])


def test_a_skipped_call_adds_nothing():
    table, gradients = case(8)
    gradients[4].values[0] = mx.nan
    for compiled in (False, True):
        got = train(SkipNonFinite(GradientAccumulation(Adagrad(0.1), 2)), table, gradients, compiled)
        want = train(GradientAccumulation(Adagrad(0.1), 2), table, gradients[:4] + gradients[5:])
        assert_near(got, to_numpy(want))


def test_a_sum_that_is_absent_at_the_update_is_discarded():
    table, gradients = case(4)
    for compiled in (False, True):
        optimizer = GradientAccumulation(Adagrad(0.1), 2)
        assert mx.array_equal(train(optimizer, table, gradients[:1], compiled), table)
        optimizer.apply_gradients({"b": mx.ones((2,)), "w": None}, {"w": table, "b": mx.ones((2,))})
        got = train(optimizer, table, gradients[2:], compiled)
        want = train(GradientAccumulation(Adagrad(0.1), 2), table, gradients[2:])
        assert_near(got, to_numpy(want))


def test_nothing_is_left_of_a_window():
    table, gradients = case(4)
    for compiled in (False, True):
        optimizer = GradientAccumulation(Adagrad(0.1), 2)
        train(optimizer, table, gradients[:2], compiled)
        optimizer.apply_gradients({"w": None, "b": mx.ones((2,))}, {"w": table, "b": mx.ones((2,))})
        got = train(optimizer, table, gradients[3:], compiled)
        want = GradientAccumulation(Adagrad(0.1), 2)
        train(want, table, gradients[:2], dense=True)
        want.apply_gradients({"w": mx.zeros_like(table)}, {"w": table})
        assert_near(got, to_numpy(train(want, table, gradients[3:], dense=True)))


# --- memory -----------------------------------------------------------------------------------------------------------


def state_bytes(optimizer):
    leaves: Any = tree_flatten(optimizer.state["_mlx_adagrad"])
    return sum(a.nbytes for _, a in leaves)


def test_memory_is_bounded_by_the_rows_named():
    rows, columns, k = 100_000, 8, 20
    table = mx.zeros((rows, columns))
    rng = np.random.default_rng(0)
    few = rng.choice(rows, 50)
    optimizer = GradientAccumulation(Adagrad(0.1), 200)
    most = 0
    for _ in range(199):
        g = RowSparse(mx.array(rng.choice(few, k)), mx.ones((k, columns)), rows)
        optimizer.apply_gradients({"w": g}, {"w": table})
        mx.eval(optimizer.state)
        most = max(most, state_bytes(optimizer))
    assert most <= (2 * 50 + 8 * k) * (columns + 1) * 4 + 8  # 199 calls named 3,980 rows, 50 of them different
    compiled = GradientAccumulation(Adagrad(0.1), 4)
    step: Any = mx.compile(
        lambda i, v: compiled.apply_gradients({"w": RowSparse(i, v, rows)}, {"w": table}),
        inputs=compiled.state,
        outputs=compiled.state,
    )
    for _ in range(6):
        mx.eval(step(mx.array(rng.choice(rows, k)), mx.ones((k, columns))), compiled.state)
        assert state_bytes(compiled) <= 4 * k * (columns + 1) * 4 + 8


def test_never_more_than_the_table():
    table, gradients = case(30, sizes=(12,))
    for compiled in (False, True):
        optimizer = GradientAccumulation(Adagrad(0.1), 25)
        for g in gradients[:24]:
            train(optimizer, table, [g], compiled)
        assert state_bytes(optimizer) <= (25 * -(-ROWS // 25) + 8 * 12 * (not compiled)) * 5 * 4 + 8


# --- a run that stops and goes on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["file", "state", "init_and_file"])
@compiled_too
def test_stopped_in_the_middle_of_a_window(compiled, how, tmp_path):
    table, gradients = case(15)
    for stop in (1, 5, 10, 12):
        optimizer, resumed = (GradientAccumulation(Adagrad(0.1), 10) for _ in range(2))
        if how == "init_and_file":
            optimizer.init({"w": table})
            resumed.init({"w": table})
        first = train(optimizer, table, gradients[:stop], compiled)
        if how == "state":
            resumed.state = tree_unflatten(tree_flatten(optimizer.state))
        else:
            checkpoint.save(tmp_path / "run.safetensors", optimizer, {"w": first})
            weights = {"w": mx.zeros_like(table)}
            checkpoint.load(tmp_path / "run.safetensors", resumed, weights)
            first = weights["w"]
        got = train(resumed, first, gradients[stop:], compiled)
        assert bits(got) == bits(train(optimizer, first, gradients[stop:], compiled))


def test_bad_states_are_refused(tmp_path):
    table, gradients = case(2)
    optimizer = GradientAccumulation(Adagrad(0.1), 4)
    train(optimizer, table, gradients)
    before = bits(optimizer.state)
    good = {"indices": mx.zeros((2,), mx.int32), "values": mx.zeros((2, 4))}
    own = optimizer.state["_mlx_adagrad"]
    for wrong in (
        good | {"indices": mx.zeros((3,), mx.int32)},
        good | {"indices": mx.zeros((2,))},
        good | {"values": 3.0},
    ):
        with pytest.raises((TypeError, ValueError), match=r"^\[GradientAccumulation\] 'gradients' '/w' of the state"):
            optimizer.state = optimizer.state | {"_mlx_adagrad": own | {"gradients": {"/w": wrong}}}
    assert bits(optimizer.state) == before
    wide = GradientAccumulation(Adagrad(0.1), 4)
    wide_table, wide_gradients = case(2, columns=(5,))
    train(wide, wide_table, wide_gradients)
    checkpoint.save(tmp_path / "run.safetensors", wide)
    with pytest.raises(ValueError, match="sums of rows of other shapes"):
        checkpoint.load(tmp_path / "run.safetensors", optimizer)
    assert bits(optimizer.state) == before


def test_what_is_no_sum_is_refused_before_the_step():
    table, gradients = case(2)
    for wrong in ({"indices": mx.zeros((2,), mx.int32)}, [{"rows": mx.zeros((2, 4))}]):
        optimizer = GradientAccumulation(Adagrad(0.1), 4)
        train(optimizer, table, gradients)
        own = optimizer.state["_mlx_adagrad"]
        optimizer.state = optimizer.state | {"_mlx_adagrad": own | {"gradients": {"/w": wrong}}}
        with pytest.raises(ValueError, match="/w"):
            train(optimizer, table, gradients)
        assert optimizer.state["_mlx_adagrad"]["calls"].item() == 2


def test_sums_of_other_rows_are_refused_before_the_step():
    table, gradients = case(2, columns=(5,))
    optimizer = GradientAccumulation(Adagrad(0.1), 4)
    train(optimizer, table, gradients[:1])
    other, (g, _) = case(2)
    with pytest.raises(ValueError, match=r"the sum of the gradients of 'w' has rows of shape \(5,\)"):
        optimizer.apply_gradients({"w": g}, {"w": other})
    assert optimizer.state["_mlx_adagrad"]["calls"].item() == 1


# --- around other optimizers, and in a model --------------------------------------------------------------------------


def test_optimizers_that_take_no_rows_refuse_them_at_the_first_call():
    table, (g, _) = case(2)
    parts = optim.MultiOptimizer([Adagrad(0.1), optim.SGD(0.1)], [lambda path, _: path == "v"])
    for inner in (optim.Adagrad(0.1), parts, ClipByNorm(optim.SGD(0.1), 1.0)):
        optimizer = GradientAccumulation(inner, 2)
        with pytest.raises(TypeError, match="gradient of 'w' is a RowSparse, which only mlx_adagrad.Adagrad takes"):
            optimizer.apply_gradients({"w": g}, {"w": table})
        assert optimizer.state["_mlx_adagrad"]["calls"].item() == 0


@compiled_too
def test_a_model_trains_as_with_dense_gradients(compiled):
    def run(differentiate, compiled):
        mx.random.seed(3)
        model = nn.Sequential(SparseEmbedding(ROWS, 4), nn.Linear(4, 1))
        optimizer = GradientAccumulation(ClipByGlobalNorm(Adagrad(0.1), 1.0), 3)
        state = [model.state, optimizer.state]
        gradient = differentiate(model, lambda x: mx.square(model(x) - 1.0).mean())

        def step(x):
            loss, g = gradient(x)
            optimizer.update(model, g)
            return loss

        step = mx.compile(step, inputs=state, outputs=state) if compiled else step
        for _ in range(7):
            mx.eval(step(mx.random.randint(0, ROWS, (3, 4))), state)
        return model.parameters()

    got, want = run(value_and_grad, compiled), run(nn.value_and_grad, False)
    for (_, a), (_, b) in zip(tree_flatten(got), tree_flatten(want), strict=True):  # type: ignore[arg-type]
        assert_near(a, to_numpy(b))
