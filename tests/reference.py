"""Adagrad in numpy float64: the judge of every law. Imports nothing of the library."""

from __future__ import annotations

from typing import Any

import numpy as np


def adagrad(
    w,
    gradients,
    *,
    learning_rate: Any = 0.1,
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
    """The weights and accumulators after every step, as a list of (w, v)."""
    w = np.array(w, np.float64)
    rows = row_wise and w.ndim > 1
    v = np.full(w.shape[:1] + (1,) * (w.ndim - 1) if rows else w.shape, initial_accumulator_value, np.float64)
    history = []
    for t, gradient in enumerate(gradients):
        g = np.clip(np.array(gradient, np.float64) * scale, low, high)
        rate: Any = learning_rate(t) if callable(learning_rate) else learning_rate
        lr = rate / (1 + t * lr_decay)
        if maximize:
            g = -g
        if weight_decay and decoupled_weight_decay:
            w = w - lr * weight_decay * w
        elif weight_decay:
            g = g + weight_decay * w
        v = v + (np.mean(g * g, axis=tuple(range(1, w.ndim)), keepdims=True) if rows else g * g)
        root = np.sqrt(v + eps) if eps_inside_sqrt else np.sqrt(v) + eps
        w = w - lr * np.divide(g, root, out=np.zeros_like(w), where=np.broadcast_to(root, w.shape) != 0)
        history.append((w, v.reshape(w.shape[:1]) if rows else v))
    return history
