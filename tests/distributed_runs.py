"""Runs of several processes together, each of which compares with what one process computes alone.

``python distributed_runs.py SCENARIO,SCENARIO [FOLDER]`` in each rank; all of them assert.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.distributed import shard_linear

from cases import flat
from mlx_adagrad import Adagrad, RowSparse, RowWise, SparseEmbedding, checkpoint, value_and_grad
from mlx_adagrad.distributed import average_gradients, shard_embedding
from mlx_adagrad.distributed.sharding import cuts
from mlx_adagrad.trees import present
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    MaxNorm,
    SkipNonFinite,
)

SCENARIOS: dict[str, Callable[..., None]] = {}
ROWS, COLUMNS, BATCH = 23, 4, 6


def scenario(function: Callable[..., None]) -> Callable[..., None]:
    SCENARIOS[function.__name__] = function
    return function


def same_everywhere(tree: Any, group: mx.distributed.Group) -> None:
    """Assert that all ranks have the same bits."""
    for path, array in flat(tree):
        raw = mx.contiguous(array).reshape(-1).view(mx.uint8).astype(mx.int32)
        summed = mx.distributed.all_sum(raw, group=group)
        assert mx.array_equal(summed, raw * group.size()), f"'{path}' differs between ranks"


def near(got: Any, want: Any, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=tolerance, atol=tolerance)


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table: Any = SparseEmbedding(ROWS, COLUMNS)
        self.inner: Any = nn.Linear(COLUMNS, 4)
        self.outer: Any = nn.Linear(4, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.outer(mx.tanh(self.inner(self.table(x))))


def recommender() -> Recommender:
    mx.random.seed(5)
    model = Recommender()
    mx.eval(model.parameters())
    return model


def data(steps: int, ranks: int) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, ROWS + 1, (steps, ranks * BATCH))  # some name no row
    return mx.array(ids, mx.int32), mx.array(rng.normal(size=(steps, ranks * BATCH, 1)), mx.float32)


def loss_of(model: nn.Module) -> Callable[[mx.array, mx.array], mx.array]:
    return lambda x, y: nn.losses.mse_loss(model(x), y)


def train_alone(make: Callable[[], Any], steps: int, ranks: int) -> Recommender:
    """One process on the whole batch."""
    model, optimizer = recommender(), make()
    grad = value_and_grad(model, loss_of(model))
    for x, y in zip(*data(steps, ranks), strict=True):
        _, gradients = grad(x, y)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    return model


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: Adagrad(0.1),
    "row-wise": lambda: Adagrad(0.1, accumulator=RowWise()),
    "decay": lambda: Adagrad(0.1, weight_decay=0.1, lazy=False),
    "clipped": lambda: ClipByGlobalNorm(Adagrad(0.1), 0.05),
    "skipped": lambda: SkipNonFinite(ClipByGlobalNorm(Adagrad(0.1), 0.05)),
}


@scenario
def data_parallel(group: mx.distributed.Group) -> None:
    rank, ranks, steps = group.rank(), group.size(), 4
    for name, make in OPTIMIZERS.items():
        model, optimizer = recommender(), make()
        grad = value_and_grad(model, loss_of(model))
        for x, y in zip(*data(steps, ranks), strict=True):
            part = slice(rank * BATCH, (rank + 1) * BATCH)
            _, gradients = grad(x[part], y[part])
            gradients = average_gradients(gradients, group)
            assert isinstance(gradients["table"]["weight"], RowSparse)
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
        same_everywhere([model.parameters(), optimizer.state], group)
        want = train_alone(make, steps, ranks)
        for (path, got), (_, expected) in zip(
            flat(model.parameters()), flat(want.parameters()), strict=True
        ):
            assert mx.allclose(got, expected, rtol=2e-5, atol=2e-6), (name, path)


@scenario
def other_numbers_of_rows(group: mx.distributed.Group) -> None:
    rank, ranks = group.rank(), group.size()
    trees = []
    for r in range(ranks):
        rng = np.random.default_rng(r)
        count = 3 * r  # the first rank names none
        indices = mx.array(rng.integers(0, 7, count), mx.int32)
        values = mx.array(rng.normal(size=(count, 2)), mx.float32)
        trees.append(
            {
                "a.b": {"0": RowSparse(indices, values, 7), "1": mx.full((2,), float(r))},
                "list": [mx.full((3,), 2.0 * r).astype(mx.float16), {}, None, (mx.array(float(r)),)],
                "none": RowSparse(mx.zeros((0,), mx.int32), mx.zeros((0, 3)), 5),
            }
        )
    got = average_gradients(trees[rank], group)
    want = sum(t["a.b"]["0"].to_dense() for t in trees) / ranks
    near(got["a.b"]["0"].to_dense(), want)
    mean = (ranks - 1) / 2
    assert got["a.b"]["1"].tolist() == [mean, mean]
    assert got["list"][0].dtype == mx.float16 and got["list"][0].tolist() == [2 * mean] * 3
    assert got["list"][1:3] == [{}, None] and got["list"][3][0].item() == mean
    assert isinstance(got["list"][3], tuple) and len(got["none"].indices) == 0
    same_everywhere([got["a.b"]["0"].indices, got["a.b"]["0"].values], group)


@scenario
def compiled(group: mx.distributed.Group) -> None:
    rank, ranks, steps = group.rank(), group.size(), 3
    model, optimizer = recommender(), Adagrad(0.1)
    optimizer.init(model.trainable_parameters())
    grad = value_and_grad(model, loss_of(model))
    state = [model.state, optimizer.state]

    def step(x: mx.array, y: mx.array) -> mx.array:
        loss, gradients = grad(x, y)
        optimizer.update(model, average_gradients(gradients, group))
        return loss

    run = mx.compile(step, inputs=state, outputs=state)
    for x, y in zip(*data(steps, ranks), strict=True):
        part = slice(rank * BATCH, (rank + 1) * BATCH)
        mx.eval(run(x[part], y[part]), state)
    same_everywhere(state, group)
    want = train_alone(OPTIMIZERS["plain"], steps, ranks)
    near(model.table.weight, want.table.weight, 2e-5)


@scenario
def a_table_with_max_norm(group: mx.distributed.Group) -> None:
    """The rows that any rank has looked up are stored scaled down in all."""
    rank, ranks, steps = group.rank(), group.size(), 3

    def train(part: slice, average: Callable[[Any], Any]) -> Recommender:
        model, optimizer = recommender(), Adagrad(0.1)
        model.table = SparseEmbedding(ROWS, COLUMNS, padding_idx=2, max_norm=0.3)
        model.table.weight = mx.random.normal((ROWS, COLUMNS), key=mx.random.key(1))
        grad = value_and_grad(model, loss_of(model))
        for x, y in zip(*data(steps, ranks), strict=True):
            optimizer.update(model, average(grad(x[part], y[part])[1]))
            mx.eval(model.parameters(), optimizer.state)
        return model

    model = train(slice(rank * BATCH, (rank + 1) * BATCH), partial(average_gradients, group=group))
    same_everywhere(model.parameters(), group)
    near(model.table.weight, train(slice(None), lambda g: g).table.weight, 2e-5)


@scenario
def sharded_table(group: mx.distributed.Group) -> None:
    rank, ranks, steps = group.rank(), group.size(), 4
    for make in (OPTIMIZERS["plain"], OPTIMIZERS["row-wise"]):
        model, optimizer = recommender(), make()
        model.table = shard_embedding(model.table, group)
        here = model.table.weight.shape[0]
        assert here == -(-ROWS // ranks)
        assert model.table(mx.zeros((2, 0), mx.int32)).shape == (2, 0, COLUMNS)
        grad = value_and_grad(model, loss_of(model))
        for x, y in zip(*data(steps, ranks), strict=True):
            part = slice(rank * BATCH, (rank + 1) * BATCH)
            _, gradients = grad(x[part], y[part])
            assert gradients["table"]["weight"].num_rows == here
            optimizer.update(model, average_gradients(gradients, group, sharded=model))
            mx.eval(model.parameters(), optimizer.state)
        want = train_alone(make, steps, ranks)
        table = mx.distributed.all_gather(model.table.weight, group=group)
        near(table[:ROWS], want.table.weight, 2e-5)
        assert mx.all(table[ROWS:] == 0)
        near(model.inner.weight, want.inner.weight, 2e-5)
        same_everywhere(model.inner.parameters(), group)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first: Any = nn.Linear(8, 16)
        self.second: Any = nn.Linear(16, 8)
        self.last: Any = nn.Linear(8, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.last(self.second(mx.tanh(self.first(x))))


def layers() -> Layers:
    mx.random.seed(6)
    model = Layers()
    mx.eval(model.parameters())
    return model


def tensor_parallel(model: Layers, group: mx.distributed.Group) -> None:
    model.first = shard_linear(model.first, "all-to-sharded", group=group)
    model.second = shard_linear(model.second, "sharded-to-all", group=group)


def emulate_sum_scatter(group: mx.distributed.Group) -> None:
    """What fully_shard needs and ring and MPI lack."""

    def sum_scatter(x: mx.array, *, group: mx.distributed.Group = group, stream: Any = None) -> mx.array:
        rows = len(x) // group.size()
        return mx.distributed.all_sum(x, group=group)[group.rank() * rows : (group.rank() + 1) * rows]

    mx.distributed.sum_scatter = sum_scatter  # type: ignore[assignment]


def fully_sharded(model: Layers, group: mx.distributed.Group) -> None:
    emulate_sum_scatter(group)
    model.first, model.second = (nn.fully_shard(layer, group=group) for layer in (model.first, model.second))


def regression(steps: int, ranks: int, bad: bool = False) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(steps, ranks * 4, 8)), 5 * rng.normal(size=(steps, ranks * 4, 1))
    if bad:
        x[1, -1, 0] = np.nan  # in the last rank's part of the second batch
    return mx.array(x, mx.float32), mx.array(y, mx.float32)


def sharded_stack(group: Any, sharded: Any = None) -> dict[str, Callable[[], Any]]:
    told = {"group": group, "sharded": sharded}
    return {
        "global": lambda: ClipByGlobalNorm(Adagrad(0.1), 0.5, **told),
        "torch": lambda: ClipByGlobalNorm(Adagrad(0.1), 0.5, "torch", **told),
        "each": lambda: ClipByNorm(Adagrad(0.1), 0.2, **told),
        "all": lambda: DynamicLossScale(
            ClipByNorm(ClipByGlobalNorm(Adagrad(0.1), 0.5, **told), 0.2, **told), 4.0, 2, **told
        ),
        "clipped elements": lambda: SkipNonFinite(
            ClipByValue(ClipByGlobalNorm(Adagrad(0.1), 0.5, **told), 0.3), **told
        ),
    }


def whole_weights(model: Layers, group: mx.distributed.Group) -> dict[str, mx.array]:
    """The parameters, those that are sharded put together again, by their names in the whole model."""
    found = cuts(model)
    whole = {}
    for keys, w in present(model.parameters()):
        if keys in found:
            axis = found[keys].axis
            w = mx.moveaxis(mx.distributed.all_gather(mx.contiguous(mx.moveaxis(w, axis, 0)), group=group), 0, axis)
        whole[".".join(str(k) for k in keys if k != "module")] = w
    return whole


def train_layers(model: Layers, optimizer: Any, batches: Any, part: slice, average: Callable[[Any], Any]) -> None:
    for x, y in zip(*batches, strict=True):
        grad = nn.value_and_grad(model, lambda x, y: optimizer.scale_loss(nn.losses.mse_loss(model(x), y)))
        _, gradients = grad(x[part], y[part])
        optimizer.update(model, average(gradients))
        mx.eval(model.parameters(), optimizer.state)


@scenario
def sharded_parameters(group: mx.distributed.Group) -> None:
    rank, ranks, steps = group.rank(), group.size(), 4
    batches = regression(steps, ranks)
    own = slice(rank * 4, rank * 4 + 4)
    for shard, part in ((tensor_parallel, slice(None)), (fully_sharded, own)):
        for name, make in sharded_stack(group).items():
            model, optimizer = layers(), make()
            shard(model, group)
            average = partial(average_gradients, group=group, sharded=model) if part == own else lambda g: g
            train_layers(model, optimizer, batches, part, average)
            want, alone = layers(), sharded_stack(None)[name]()
            train_layers(want, alone, batches, slice(None), lambda g: g)
            for path, w in whole_weights(model, group).items():
                expected = dict(flat(want.parameters()))[path]
                assert mx.allclose(w, expected, rtol=1e-5, atol=2e-6), (shard.__name__, name, path)
            same_everywhere(model.last.parameters(), group)


@scenario
def a_nan_in_one_rank(group: mx.distributed.Group) -> None:
    rank, ranks = group.rank(), group.size()
    batches = regression(3, ranks, bad=True)
    for make in (
        lambda: SkipNonFinite(Adagrad(0.1), group=group),
        lambda: DynamicLossScale(ClipByGlobalNorm(Adagrad(0.1), 0.5, group=group), 8.0, group=group),
    ):
        model, optimizer = layers(), make()
        # not averaged: each rank goes its own way, but all leave out the same step
        train_layers(model, optimizer, batches, slice(rank * 4, rank * 4 + 4), lambda g: g)
        assert optimizer.step.item() == 2
        if isinstance(optimizer, DynamicLossScale):
            assert optimizer.dynamic_scale.item() == 4.0


@scenario
def one_exchange_for_all(group: mx.distributed.Group) -> None:
    model = layers()
    tensor_parallel(model, group)
    optimizer = sharded_stack(group)["all"]()
    gather, calls = mx.distributed.all_gather, []

    def counted(*args: Any, **kwargs: Any) -> mx.array:
        calls.append(args)
        return gather(*args, **kwargs)

    mx.distributed.all_gather = counted  # type: ignore[assignment]
    try:
        optimizer.update(model, model.trainable_parameters())
    finally:
        mx.distributed.all_gather = gather  # type: ignore[assignment]
    assert len(calls) == 1
    mx.eval(model.parameters(), optimizer.state)


@scenario
def what_cannot_be_right_on_a_part(group: mx.distributed.Group) -> None:
    refused = [
        (lambda: ClipByGlobalNorm(Adagrad(0.1), 1.0), "[ClipByGlobalNorm] 'first.weight' is sharded"),
        (lambda: ClipByNorm(Adagrad(0.1), 1.0), "[ClipByNorm] 'first.weight' is sharded"),
        (lambda: SkipNonFinite(Adagrad(0.1)), "[SkipNonFinite] 'first.weight' is sharded"),
        (lambda: DynamicLossScale(Adagrad(0.1)), "[DynamicLossScale] 'first.weight' is sharded"),
        (lambda: Constraint(Adagrad(0.1), {"first.*": MaxNorm(1.0, axis=0)}), "'first.weight' is sharded along axis 0"),
        (lambda: Constraint(Adagrad(0.1), {"*.weight": "unit_norm"}), "UnitNorm(axis=0) cannot be right"),
        (lambda: Adagrad(0.1, accumulator=RowWise()), "[RowWise] 'second.weight' is sharded along axis 1"),
    ]
    for make, message in refused:
        model, optimizer = layers(), make()
        tensor_parallel(model, group)
        try:
            optimizer.update(model, model.trainable_parameters())
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"not refused: {message}")
        assert optimizer.step.item() == 0
    model, optimizer = layers(), ClipByGlobalNorm(Adagrad(0.1), 1.0)
    optimizer.update(model, model.trainable_parameters())
    tensor_parallel(model, group)  # after a step that was right
    try:
        ClipByGlobalNorm(Adagrad(0.1), 1.0).update(model, model.trainable_parameters())
    except ValueError as error:
        assert "[ClipByGlobalNorm] 'first.weight' is sharded" in str(error), error
    else:
        raise AssertionError("not refused: a model that was sharded after its first step")
    model, optimizer = layers(), Constraint(Adagrad(0.1), {"first.weight": MaxNorm(1.0, axis=1), "*.bias": "non_neg"})
    tensor_parallel(model, group)
    optimizer.update(model, model.trainable_parameters())


@scenario
def a_fully_sharded_sparse_table(group: mx.distributed.Group) -> None:
    rank, ranks, steps = group.rank(), group.size(), 3
    emulate_sum_scatter(group)
    rows = 4 * ranks
    rng = np.random.default_rng(0)
    ids = mx.array(rng.integers(0, rows, (steps, ranks * BATCH)), mx.int32)
    y = mx.array(rng.normal(size=(steps, ranks * BATCH, 1)), mx.float32)

    def make() -> Recommender:
        mx.random.seed(5)
        model = Recommender()
        model.table = SparseEmbedding(rows, COLUMNS)
        mx.eval(model.parameters())
        return model

    model, want = make(), make()
    model.table = nn.fully_shard(model.table, group=group)
    for one, part in ((model, slice(rank * BATCH, (rank + 1) * BATCH)), (want, slice(None))):
        optimizer = Adagrad(0.1)
        grad = value_and_grad(one, loss_of(one))
        for t in range(steps):
            _, gradients = grad(ids[t, part], y[t, part])
            if one is model:
                gradients = average_gradients(gradients, group, sharded=one)
            optimizer.update(one, gradients)
            mx.eval(one.parameters(), optimizer.state)
    table = mx.distributed.all_gather(model.table.module.weight, group=group)
    near(table, want.table.weight, 2e-5)


def averaged_stack(group: Any) -> Any:
    return SkipNonFinite(ExponentialMovingAverage(ClipByGlobalNorm(Adagrad(0.1), 0.5, group=group), 0.9), group=group)


class Both(nn.Module):
    """Layers that are sharded in one way or another, and a table."""

    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(7)
        self.table: Any = SparseEmbedding(ROWS, 8)
        self.fused, self.joined = nn.Linear(8, 24), nn.Linear(8, 8)
        self.tensor: Any = {"0": layers(), "a.b": layers()}  # names that a flat file must not take apart
        mx.eval(self.parameters())

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.table(ids)
        q, k, v = mx.split(self.fused(x), 3, axis=-1)
        x = x + self.joined(mx.tanh(q) * k + v)
        return self.tensor["0"](x) + self.tensor["a.b"](x)


def both(group: Any) -> Both:
    model = Both()
    if group is not None:
        model.table = shard_embedding(model.table, group)
        model.fused = shard_linear(model.fused, "all-to-sharded", segments=3, group=group)
        model.joined = shard_linear(model.joined, "sharded-to-all", group=group)
        tensor_parallel(model.tensor["0"], group)
        fully_sharded(model.tensor["a.b"], group)
    return model


def train_both(model: Both, optimizer: Any, steps: range, group: Any) -> None:
    """The same batch in every rank, so that the number of ranks changes nothing."""
    ids, y = data(8, 1)
    grad = value_and_grad(model, lambda x, y: nn.losses.mse_loss(model(x), y))
    for t in steps:
        _, gradients = grad(ids[t], y[t])
        optimizer.update(model, gradients if group is None else average_gradients(gradients, group, sharded=model))
        mx.eval(model.parameters(), optimizer.state)


@scenario
def saved_and_resumed(group: mx.distributed.Group, folder: str) -> None:
    path = f"{folder}/run.safetensors"
    model, optimizer = both(group), averaged_stack(group)
    train_both(model, optimizer, range(3), group)
    checkpoint.save(path, optimizer, model, group=group)
    train_both(model, optimizer, range(3, 6), group)
    again, twin = both(group), averaged_stack(group)
    again.table.weight = again.table.weight + 1
    checkpoint.load(path, twin, again, group=group)
    train_both(again, twin, range(3, 6), group)
    want = dict(flat([model.parameters(), optimizer.state]))
    got = dict(flat([again.parameters(), twin.state]))
    assert got.keys() == want.keys()
    for name, array in got.items():
        assert mx.array_equal(array, want[name]), name


@scenario
def resumed_by_others(group: mx.distributed.Group, folder: str) -> None:
    """What another number of ranks has saved."""
    model, optimizer = both(group), averaged_stack(group)
    checkpoint.load(f"{folder}/run.safetensors", optimizer, model, group=group)
    train_both(model, optimizer, range(3, 6), group)
    alone, inner = both(None), averaged_stack(None)
    checkpoint.load(f"{folder}/run.safetensors", inner, alone)
    train_both(alone, inner, range(3, 6), None)
    table = mx.distributed.all_gather(model.table.weight, group=group)[:ROWS]
    near(table, alone.table.weight, 2e-5)
    near(model.tensor["0"].last.weight, alone.tensor["0"].last.weight, 2e-5)
    near(model.tensor["a.b"].last.weight, alone.tensor["a.b"].last.weight, 2e-5)


@scenario
def refused_by_all(group: mx.distributed.Group, folder: str) -> None:
    """An error of one rank is an error of all, and nobody is left waiting."""
    model, optimizer = both(group), averaged_stack(group)
    path = f"{folder}/of_rank_{group.rank()}.safetensors"
    if group.rank() == 0:
        checkpoint.save(path, averaged_stack(None), both(None))
    alone, other = both(None), averaged_stack(None)
    train_both(alone, other, range(group.rank() + 1), None)
    stale = f"{folder}/stale_of_rank_{group.rank()}.safetensors"
    checkpoint.save(stale, other, alone)  # of the same structure everywhere, but of another step
    before = flat(model.parameters())
    for bad in (f"{folder}/none/run.safetensors", path, stale):
        try:
            checkpoint.load(bad, optimizer, model, group=group)
        except (OSError, ValueError, RuntimeError):
            pass
        else:
            raise AssertionError(f"the ranks have not the same file: {bad}")
    try:
        checkpoint.save(f"{folder}/none/run.safetensors", optimizer, model, group=group)
    except (OSError, RuntimeError) as error:
        assert isinstance(error, OSError) is (group.rank() == 0), error
    else:
        raise AssertionError("there is no such folder")
    assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(before, flat(model.parameters()), strict=True))
    for act in (
        lambda: checkpoint.save(path, optimizer, model),
        lambda: checkpoint.load(path, optimizer, model),
        lambda: checkpoint.snapshot(optimizer, model),
    ):
        try:
            act()
        except ValueError as error:
            assert "'table.weight' is sharded" in str(error) and "'group'" in str(error), error
        else:
            raise AssertionError("a part was taken for the whole")


@scenario
def until_killed(group: mx.distributed.Group, folder: str) -> None:
    model, optimizer = both(group), averaged_stack(group)
    for t in range(10_000):
        train_both(model, optimizer, range(1), group)
        checkpoint.save(f"{folder}/run.safetensors", optimizer, model, group=group)
        print(f"rank {group.rank()} of process {os.getpid()} made step {t}", flush=True)


def main() -> None:
    group = mx.distributed.init(strict=True, backend=os.environ.get("MLX_TEST_BACKEND", "ring"))
    for name in sys.argv[1].split(","):
        SCENARIOS[name](group, *sys.argv[2:])
        mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group))  # nobody leaves before all have finished
        print(f"{name} held", flush=True)


if __name__ == "__main__":
    main()
