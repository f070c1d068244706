"""What wrappers ask of a whole gradient: its norm, and whether the update can square it. In fp32 or wider.

A norm neither overflows nor vanishes where it can be represented: what is squared are quotients by a power of two close
to the largest element.

Row-sparse gradients come :func:`coalesced`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
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
# Below this an array is reduced whole, with others where it can be; from here on it is folded into this many slices.
SMALL = 32_768
SLICES = 8
# A unit and its inverse are normal numbers, and the squares of all quotients by it.
LARGEST_UNIT = 2.0**100
# From here on a square is infinite: v would be, and its weight would stand still for ever.
LIMIT = {mx.float32: 2.0**64, mx.float64: 2.0**512}


def global_norm(gradients: Any, modifiers: Modifiers) -> mx.array:
    """The 2-norm of all gradients together as the update will see them, 0-d fp32."""
    leaves = _joined(gradients, modifiers)
    if not leaves:
        return mx.array(0.0)
    unit = unit_of(mx.max(mx.stack([_largest(g, *scalars) for g, scalars in leaves])))
    sums = [_sum_of_squares(g, unit, *scalars) for g, scalars in leaves]
    return unit * root(mx.sum(mx.stack(sums)))


def norms(gradients: Any, modifiers: Modifiers) -> dict[Keys, mx.array]:
    """The 2-norm of each gradient as the update will see it, 0-d fp32."""
    return {keys: norm[i] for of, norm in _norms(gradients, modifiers) for i, keys in enumerate(of)}


def factors_to(limit: float, gradients: Any, modifiers: Modifiers) -> dict[Keys, mx.array]:
    """What scales the 2-norm of each gradient, as the update will see it, down to ``limit``, 0-d fp32."""
    factors = ((of, down_to(limit, norm)) for of, norm in _norms(gradients, modifiers))
    return {keys: factor[i] for of, factor in factors for i, keys in enumerate(of)}


def down_to(limit: float, norm: mx.array) -> mx.array:
    """What scales a norm down to ``limit``; 1 for one that is below."""
    return limit / mx.maximum(norm, limit)


def all_finite(gradients: Any, modifiers: Modifiers) -> mx.array:
    """Whether every gradient, as the update will see it, has a finite square (:data:`LIMIT`), which an Inf or a NaN has
    not: a 0-d bool.
    """
    flags = [_finite(_values(g), *_scalars(keys, modifiers)) for keys, g in present(gradients)]
    return mx.all(mx.stack(flags)) if flags else mx.array(True)


def root(square_sum: mx.array) -> mx.array:
    """The square root, with a derivative of 0 at 0, where the true one would turn a differentiated update into NaN."""
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


def _scalars(keys: Keys, modifiers: Modifiers) -> tuple[mx.array | None, ...]:
    return at(modifiers.scale, keys), at(modifiers.low, keys), at(modifiers.high, keys)


def _joined(gradients: Any, modifiers: Modifiers) -> list[tuple[mx.array, tuple[mx.array | None, ...]]]:
    """The gradients with the scalars that hold for each, small ones of a dtype in one array: fewer launches."""
    leaves = [(_values(g), _scalars(keys, modifiers)) for keys, g in present(gradients)]
    if any(isinstance(scalar, dict) for scalar in (modifiers.scale, modifiers.low, modifiers.high)):
        return leaves
    small: dict[mx.Dtype, list[mx.array]] = {}
    for g, _ in leaves:
        if g.size < SMALL:
            small.setdefault(g.dtype, []).append(g.reshape(-1))
    large = [leaf for leaf in leaves if leaf[0].size >= SMALL]
    return large + [(mx.concatenate(gs), leaves[0][1]) for gs in small.values()]


def _modified(g: mx.array, *scalars: Any) -> list[mx.array]:
    """The elements as the update will see them, at least 0: slices of a large array, to be reduced element by element
    before anything is written to memory.
    """
    flat = g.reshape(-1)
    length = flat.size // SLICES if flat.size >= SMALL else 0
    ends = [i * length for i in range(SLICES + 1)] if length else [0]
    parts = [flat[start:end] for start, end in pairwise([*ends, flat.size]) if end > start]
    if g.dtype == mx.complex64:  # two independent reals
        parts = [part for whole in parts for part in (mx.real(whole), mx.imag(whole))]
    return [mx.abs(Modifiers(*scalars).modified((), part)) for part in parts]


@compiled
def _largest(g: mx.array, scale: Any, low: Any, high: Any) -> mx.array:
    parts = _modified(g, scale, low, high)
    if not parts:
        return mx.array(0.0)
    return mx.max(mx.stack([mx.max(x) for x in _folded(mx.maximum, parts)]))


@compiled
def _sum_of_squares(g: mx.array, unit: mx.array, scale: Any, low: Any, high: Any) -> mx.array:
    squares = [mx.square(x * (1.0 / unit).astype(x.dtype)) for x in _modified(g, scale, low, high)]
    totals = [_total(x) for x in _folded(mx.add, squares)]
    return mx.sum(mx.stack(totals)) if totals else mx.array(0.0)


def _folded(function: Callable[[mx.array, mx.array], mx.array], parts: list[mx.array]) -> list[mx.array]:
    """The slices in one array, by a tree of a function of two, and the shorter rest, if any."""
    same = [x for x in parts if x.shape == parts[0].shape]
    rest = parts[len(same) :]
    while len(same) > 1:  # a power of two
        same = [function(a, b) for a, b in zip(same[::2], same[1::2], strict=True)]
    return same + rest


def unit_of(largest: mx.array) -> mx.array:
    """The power of two close to the largest element, fp32: quotients by it are exact."""
    bits = mx.stop_gradient(largest.astype(mx.float32)).view(mx.uint32)
    power = mx.bitwise_and(bits, mx.array(0x7F800000, mx.uint32)).view(mx.float32)  # of an Inf and a NaN: Inf
    return mx.clip(power, 1 / LARGEST_UNIT, LARGEST_UNIT)


def _norms(gradients: Any, modifiers: Modifiers) -> Iterator[tuple[Sequence[Keys], mx.array]]:
    """The 2-norms of gradients, those of some small ones of the same size in one array."""
    leaves = [*present(gradients)]
    keys, values = [keys for keys, _ in leaves], [_values(g) for _, g in leaves]
    columns = [[at(s, path) for path in keys] for s in (modifiers.scale, modifiers.low, modifiers.high)]
    for places in split([(x.size, x.dtype) for x in values], KnownSets()):
        gs, scalars = pick(values, places), [pick(column, places) for column in columns]
        if gs[0].size < SMALL:
            yield pick(keys, places), _norms_of_small(gs, *scalars)
            continue
        for path, g, *own in zip(pick(keys, places), gs, *scalars, strict=True):
            unit = unit_of(_largest(g, *own))
            yield [path], (unit * root(_sum_of_squares(g, unit, *own)))[None]


@compiled
def _norms_of_small(gs: list[mx.array], *scalars: list[Any]) -> mx.array:
    scale, low, high = (None if s[0] is None else mx.stack(s)[:, None] for s in scalars)
    x = Modifiers(scale, low, high).modified((), mx.stack([g.reshape(-1) for g in gs]))
    x = mx.abs(mx.concatenate([mx.real(x), mx.imag(x)], axis=-1) if x.dtype == mx.complex64 else x)
    unit = unit_of(mx.max(x, axis=-1) if x.size else mx.zeros((len(gs),)))
    quotients = x * (1.0 / unit).astype(x.dtype)[:, None]
    return unit * root(_total(mx.square(quotients)))


@compiled
def _finite(g: mx.array, scale: Any, low: Any, high: Any) -> mx.array:
    g = Modifiers(scale, low, high).modified((), g)
    parts = (mx.real(g), mx.imag(g)) if g.dtype == mx.complex64 else (g,)
    return mx.all(mx.stack([mx.all(mx.abs(part) < LIMIT[part.dtype]) for part in parts]))


def _total(x: mx.array) -> mx.array:
    """The sums along the last axis, fp32."""
    while x.shape[-1] > BLOCK:
        whole = x.shape[-1] - x.shape[-1] % BLOCK
        sums = x[..., :whole].reshape(*x.shape[:-1], -1, BLOCK).sum(axis=-1)
        x = sums if whole == x.shape[-1] else mx.concatenate([sums, x[..., whole:]], axis=-1)
    return x.sum(axis=-1).astype(mx.float32)
