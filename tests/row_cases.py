"""Row-sparse gradients for tests, and what Adagrad makes of them in numpy float64. Imports nothing of the library."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from cases import to_numpy


def draw(rows, columns=(6,), k=12, steps=4, dtype=mx.float32, seed=0):
    """A table, and for each step K indices, some twice and some that name no row, and K rows of values."""
    rng = np.random.default_rng(seed)
    table = mx.array(rng.normal(size=(rows, *columns)), mx.float32).astype(dtype)
    gradients = []
    for _ in range(steps):
        indices = rng.integers(-2, rows + 2, size=k)
        indices[: k // 3] = rng.integers(0, max(rows // 4, 1), size=k // 3)
        values = rng.normal(size=(k, *columns)) * 10.0 ** rng.integers(-2, 2, size=(k, *(1,) * len(columns)))
        gradients.append((mx.array(indices), mx.array(values, mx.float32).astype(dtype)))
    return table, gradients


def named(indices, rows):
    """Which rows of a table the indices name."""
    indices = np.array(indices).astype(np.int64)
    mask = np.zeros(rows, bool)
    mask[indices[(indices >= 0) & (indices < rows)]] = True
    return mask


def dense(indices, values, rows):
    """The gradient of the whole table, in float64."""
    indices, values = np.array(indices).astype(np.int64), to_numpy(values)
    table = np.zeros((rows, *values.shape[1:]))
    exists = (indices >= 0) & (indices < rows)
    np.add.at(table, indices[exists], values[exists])
    return table


def adagrad(
    w,
    gradients,
    *,
    learning_rate=0.1,
    eps=1e-8,
    lr_decay=0.0,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    initial_accumulator_value=0.0,
    maximize=False,
    eps_inside_sqrt=False,
    row_wise=False,
    scale=1.0,
    low=-np.inf,
    high=np.inf,
):
    """The table and its accumulator after the last step; rows that a step does not name sleep through it."""
    w = to_numpy(w)
    v = np.full((len(w), *(1,) * (w.ndim - 1)) if row_wise else w.shape, initial_accumulator_value)
    for t, (indices, values) in enumerate(gradients):
        touched = named(indices, len(w)).reshape(-1, *(1,) * (w.ndim - 1))
        g = np.clip(dense(indices, values, len(w)) * scale, low, high) * (-1 if maximize else 1)
        lr = learning_rate / (1 + t * lr_decay)
        new = w
        if decoupled_weight_decay:
            new = w - lr * weight_decay * w
        else:
            g = g + weight_decay * w
        square = np.mean(g * g, axis=tuple(range(1, w.ndim)), keepdims=True) if row_wise else g * g
        v = np.where(touched, v + square, v)
        root = np.sqrt(v + eps) if eps_inside_sqrt else np.sqrt(v) + eps
        w = np.where(touched, new - lr * np.divide(g, root, out=np.zeros_like(w), where=root != 0), w)
    return w, v.reshape(len(w)) if row_wise else v
