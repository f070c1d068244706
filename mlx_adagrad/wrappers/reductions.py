"""What wrappers ask of a whole gradient: its norm, and whether it is finite. In fp32 or wider, in one pass.

Row-sparse gradients come :func:`coalesced`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..leaves import is_row_sparse
from ..sparse.gradient import RowSparse
from ..trees import Keys, mapped, present
from ..update.batches import KnownSets, pick, split
from ..update.compiled import compiled
from ..update.modifiers import Modifiers, at
from ..update.rule import SMALLEST_NORMAL

# A sum in one go stops growing in fp32 once it is 2^24 times its terms, which MLX's CPU reduction of a large tensor
# reaches (2.8 % off at 4096²); sums of blocks, summed again, do not.
BLOCK = 4096


def global_norm(gradients: Any, modifiers: Modifiers) -> mx.array:
    """The 2-norm of all gradients together as the update will see them, 0-d fp32."""
    sums = [_square_sum(keys, g, modifiers).astype(mx.float32) for keys, g in present(gradients)]
    return _root(mx.sum(mx.stack(sums))) if sums else mx.array(0.0)


def norms(gradients: Any, modifiers: Modifiers) -> dict[Keys, mx.array]:
    """The 2-norm of each gradient as the update will see it, 0-d fp32."""
    return {keys: _root(_square_sum(keys, g, modifiers)).astype(mx.float32) for keys, g in present(gradients)}


def factors_to(limit: float, gradients: Any, modifiers: Modifiers) -> dict[Keys, mx.array]:
    """What scales the 2-norm of each gradient, as the update will see it, down to ``limit``, 0-d fp32."""
    leaves = [*present(gradients)]
    keys, values = [keys for keys, _ in leaves], [_values(g) for _, g in leaves]
    scalars = modifiers.scale, modifiers.low, modifiers.high
    columns = [[s[path] for path in keys] if isinstance(s, dict) else s for s in scalars]
    factors: dict[Keys, mx.array] = {}
    for places in split([(x.shape, x.dtype) for x in values], _SETS):
        batch = _factors(limit, pick(values, places), *(pick(column, places) for column in columns))
        factors.update(zip(pick(keys, places), batch, strict=True))
    return factors


def down_to(limit: float, norm: mx.array) -> mx.array:
    """What scales a norm down to ``limit``; 1 for one that is below."""
    return limit / mx.maximum(norm, limit)


def all_finite(gradients: Any, modifiers: Modifiers) -> mx.array:
    """Whether no gradient, as the update will see it, holds an Inf or a NaN: a 0-d bool."""
    flags = [_finite(_values(g), *_scalars(keys, modifiers)) for keys, g in present(gradients)]
    return mx.all(mx.stack(flags)) if flags else mx.array(True)


def _root(square_sum: mx.array) -> mx.array:
    # never exactly 0, where the derivative of the root would turn a differentiated update into NaN
    return mx.sqrt(mx.maximum(square_sum, SMALLEST_NORMAL[mx.float32]))


def coalesced(owner: str, gradients: Any) -> Any:
    """The gradients with the duplicate rows of row-sparse ones summed: once, for norms and for the update.

    Raises:
        TypeError: For a gradient that is no array, in the name of ``owner``.
    """
    if not any([is_row_sparse(owner, keys, g) for keys, g in present(gradients)]):
        return gradients
    summed = mapped(lambda _, g: g.coalesce() if isinstance(g, RowSparse) else g, gradients)
    same = all(new is old for (_, new), (_, old) in zip(present(summed), present(gradients), strict=True))
    return gradients if same else summed  # the same tree where there was nothing to sum


def _values(g: mx.array | RowSparse) -> mx.array:
    return g.values if isinstance(g, RowSparse) else g


def _square_sum(keys: Keys, g: mx.array | RowSparse, modifiers: Modifiers) -> mx.array:
    return _sum_of_squares(_values(g), *_scalars(keys, modifiers))


def _scalars(keys: Keys, modifiers: Modifiers) -> tuple[mx.array | None, ...]:
    return at(modifiers.scale, keys), at(modifiers.low, keys), at(modifiers.high, keys)


# compiled: one pass that scales, clips and squares or tests, and one that reduces what it wrote
@compiled
def _sum_of_squares(g: mx.array, scale: Any, low: Any, high: Any) -> mx.array:
    g = Modifiers(scale, low, high).modified((), g)
    return _total(mx.square(mx.abs(g) if g.dtype == mx.complex64 else g))


_SETS = KnownSets()


@compiled
def _factors(limit: float, gs: list[mx.array], scale: Any, low: Any, high: Any) -> list[mx.array]:
    own = [[s] * len(gs) if not isinstance(s, list | tuple) else s for s in (scale, low, high)]
    sums = [_sum_of_squares(g, *scalars) for g, *scalars in zip(gs, *own, strict=True)]
    return [down_to(limit, _root(x).astype(mx.float32)) for x in sums]


@compiled
def _finite(g: mx.array, scale: Any, low: Any, high: Any) -> mx.array:
    return mx.all(mx.isfinite(Modifiers(scale, low, high).modified((), g)))


def _total(x: mx.array) -> mx.array:
    x = x.reshape(-1)
    while x.size > BLOCK:
        whole = x.size - x.size % BLOCK
        sums = x[:whole].reshape(-1, BLOCK).sum(axis=-1)
        x = sums if whole == x.size else mx.concatenate([sums, x[whole:]])
    return x.sum()
