"""A limit on the norm of the rows that were looked up: torch's ``max_norm``."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from .. import checks
from ..update.tracing import evaluate
from .gradient import assign_rows, canonical

EPSILON = 1e-7  # torch's, in embedding_renorm_


def check_norm(owner: str, max_norm: Any, norm_type: Any) -> None:
    """Raise ValueError or TypeError for a limit or an order of norm that is none."""
    if max_norm is not None:
        checks.positive(owner, "max_norm", max_norm)
    if checks.real(owner, "norm_type", norm_type) != math.inf:
        checks.positive(owner, "norm_type", norm_type)


def limits(rows: mx.array, max_norm: float, norm_type: float) -> mx.array:
    """The factor, at most 1, that scales each row (the last axis) down to ``max_norm``; in fp32, or fp64 for fp64."""
    wide = mx.abs(rows if rows.dtype == mx.float64 else rows.astype(mx.float32))
    if norm_type == math.inf:
        norm = mx.max(wide, axis=-1)
    elif norm_type == 2:
        norm = mx.sqrt(mx.sum(mx.square(wide), axis=-1))
    else:
        norm = mx.power(mx.sum(mx.power(wide, norm_type), axis=-1), 1 / norm_type)
    return mx.where(norm > max_norm, max_norm / (norm + EPSILON), 1.0)


def limited(rows: mx.array, max_norm: float, norm_type: float) -> mx.array:
    """The rows scaled down to ``max_norm``; their gradient passes through as if they had been so before, as torch's."""
    scaled = rows * mx.expand_dims(limits(rows, max_norm, norm_type), -1)
    return rows + mx.stop_gradient(scaled.astype(rows.dtype) - rows)


def renormed(table: mx.array, x: mx.array, max_norm: float, norm_type: float) -> mx.array:
    """``table`` with the rows that ``x`` names scaled down to ``max_norm``; itself if it is known that none is longer.

    In place where nothing else reads the table, unless something is tracing.
    """
    x = canonical(x.reshape(-1), len(table))
    named = x < len(table)
    if not x.size or table.size == 0:
        return table
    x = mx.where(named, x, x[mx.argmax(named)])  # one row must not be written in two ways
    targets = mx.minimum(x, len(table) - 1)  # beyond it if none is named
    rows = table[targets]
    factors = mx.where(x < len(table), limits(rows, max_norm, norm_type), 1.0)
    rows, longer = (rows * factors[:, None]).astype(table.dtype), mx.any(factors < 1)
    if evaluate([rows, longer]) and not longer.item():
        return table
    return assign_rows(table, targets, rows)
