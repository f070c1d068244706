"""Runs of several processes together, each of which compares with what one process computes alone.

``python distributed_runs.py SCENARIO,SCENARIO [FOLDER]`` in each rank; all of them assert.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from cases import flat
from mlx_adagrad import Adagrad, RowSparse, RowWise, SparseEmbedding, value_and_grad
from mlx_adagrad.distributed import average_gradients, shard_embedding
from mlx_adagrad.wrappers import ClipByGlobalNorm, SkipNonFinite

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
def sharded_table(group: mx.distributed.Group) -> None:
    rank, ranks, steps = group.rank(), group.size(), 4
    for make in (OPTIMIZERS["plain"], OPTIMIZERS["row-wise"]):
        model, optimizer = recommender(), make()
        model.table = shard_embedding(model.table, group)
        here = model.table.weight.shape[0]
        assert here == -(-ROWS // ranks)
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


def main() -> None:
    group = mx.distributed.init(strict=True)
    for name in sys.argv[1].split(","):
        SCENARIOS[name](group, *sys.argv[2:])
        mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group))  # nobody leaves before all have finished
        print(f"{name} held", flush=True)


if __name__ == "__main__":
    main()
