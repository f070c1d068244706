"""A long run on a large table: memory stays flat, and fp32 stays with a replay in float64 up to its rounding.

1,000 steps by default; SOAK_STEPS=20000 is the long run.
"""

import os

import mlx.core as mx
import numpy as np
import pytest

from mlx_adagrad import Adagrad, Dense, RowWise, SparseEmbedding, value_and_grad

STEPS = int(os.environ.get("SOAK_STEPS", "1000"))
ROWS, DIMS, K = 200_000, 32, 512
LEARNING_RATE, EPS = 0.05, 1e-8
ULP = 2.0**-24  # the error of one fp32 operation, relative


class Replay:
    """The same run in float64, on the rows that were named only."""

    def __init__(self, table, row_wise):
        self.w = table.astype(np.float64)
        self.v = np.zeros((ROWS, 1 if row_wise else DIMS))
        self.updates = np.zeros(ROWS, np.int64)
        self.largest = np.abs(self.w).max(axis=1)
        self.row_wise = row_wise

    def step(self, ids, gradients, learning_rate):
        rows, where = np.unique(ids, return_inverse=True)
        g = np.zeros((len(rows), DIMS))
        np.add.at(g, where, gradients.astype(np.float64))
        self.v[rows] += (g * g).mean(axis=1, keepdims=True) if self.row_wise else g * g
        self.w[rows] -= learning_rate * g / (np.sqrt(self.v[rows]) + EPS)
        self.updates[rows] += 1
        self.largest[rows] = np.maximum(self.largest[rows], np.abs(self.w[rows]).max(axis=1))


@pytest.mark.parametrize("accumulator", [Dense(), RowWise()], ids=lambda a: type(a).__name__)
def test_soak(accumulator, cpu):
    row_wise = isinstance(accumulator, RowWise)
    rng = np.random.default_rng(0)
    scattered = rng.permutation(ROWS)  # Zipf's most frequent ids are not neighbours
    model, optimizer = SparseEmbedding(ROWS, DIMS), Adagrad(LEARNING_RATE, EPS, accumulator=accumulator)
    replay = Replay(np.array(model.weight), row_wise)
    vg = value_and_grad(model, lambda x, c: (model(x) * c).sum())
    rate: float = np.float32(LEARNING_RATE).item()
    active = []
    for _ in range(STEPS):
        ids = scattered[(rng.zipf(1.3, size=K) - 1) % ROWS]
        c = rng.normal(size=(K, DIMS)).astype(np.float32)
        loss, gradients = vg(mx.array(ids), mx.array(c))
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)
        replay.step(ids, c, rate)
        del loss, gradients
        active.append(mx.get_active_memory())
    assert max(active[20:]) - min(active[20:]) < 100_000

    w, v = np.array(model.weight), np.array(optimizer.state["weight"]["v"]).reshape(replay.v.shape)
    idle = replay.updates == 0
    assert idle.any() and np.array_equal(w[idle], replay.w[idle]) and not v[idle].any()
    named = ~idle
    n = replay.updates[named]
    assert n.max() > 0.9 * STEPS  # there is a row that nearly every step changes
    # Rounding errors add up like a random walk; a bias would grow with n. Seen: 2.5 and 7 (sums of duplicates cancel).
    for got, want, scale, bound in (
        (w[named], replay.w[named], replay.largest[named][:, None], 5),
        (v[named], replay.v[named], replay.v[named].clip(1e-6), 20),
    ):
        error = (np.abs(got - want) / scale).max(axis=1) / (ULP * np.sqrt(n))
        assert error.max() < bound
