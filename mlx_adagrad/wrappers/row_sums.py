"""Sums of row-sparse gradients over several calls, in arrays that the state of a wrapper can hold.

Where the number of calls is known, a sum is a list of parts, ``[{"indices": (K,), "values": (K, ...)}, ...]``: a call
adds one, and parts are merged once they are many, so that memory is bounded by the rows that were named. Inside a
trace no shape may depend on the call, and a sum is one part with room for every call of a window,
``{"indices": (steps, K), "values": (steps, K, ...)}``. Indices below 0 name no row.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import mlx.core as mx

from ..sparse.gradient import RowSparse
from ..update.accumulators import wide_dtype
from ..update.tracing import read

Part: TypeAlias = dict[str, mx.array]
RowSum: TypeAlias = "list[Part] | Part"

PARTS = 8  # that stand side by side before they are merged: one sort for so many calls


def is_row_sum(total: Any) -> bool:
    """Whether an entry of a wrapper's state is a sum of rows and not of arrays."""
    return isinstance(total, list | dict)


def mismatch(total: mx.array | RowSum | None, like: mx.array) -> str:
    """In words, what keeps a sum from being one of gradients of ``like``; empty where nothing does."""
    if isinstance(total, mx.array) and total.shape != like.shape:
        return f"shape {total.shape} but the parameter {like.shape}"
    for part in _parts(total) if is_row_sum(total) else ():
        rows = part["values"].shape[part["indices"].ndim :]
        if rows != like.shape[1:]:
            return f"rows of shape {rows} but the parameter {like.shape}"
    return ""


def as_gradient(total: mx.array | RowSum, like: mx.array) -> mx.array | RowSparse:
    """A sum as the gradient of the parameter ``like``."""
    return total if isinstance(total, mx.array) else gradient(total, like)


def gradient(total: RowSum, like: mx.array) -> RowSparse:
    """A sum of rows as the gradient of the parameter ``like``."""
    parts = [_flat(part) for part in _parts(total)]
    parts = [part for part in parts if len(part["indices"])] or parts[:1] or [_free((0,), like)]
    indices, values = (mx.concatenate([part[key] for part in parts]) for key in ("indices", "values"))
    return RowSparse(indices, values, len(like))


def extended(total: RowSum, rows: RowSparse, like: mx.array) -> list[Part]:
    """The sum with the rows of one more call, where the number of calls is known."""
    parts = [part if part["indices"].ndim == 1 else _flat(part) for part in _parts(total)] + [_part(rows)]
    sizes = [len(part["indices"]) for part in parts]
    if len(parts) < PARTS or sum(sizes[1:]) < sizes[0]:  # the first is what was merged before
        return parts
    merged = gradient(parts, like).coalesce()
    return [_part(_trimmed(merged))]


def with_room(total: RowSum | mx.array, rows: RowSparse, like: mx.array, steps: int) -> Part:
    """The same sum with room for as many rows in each of ``steps`` calls, or for all rows of the table.

    Of a dense sum the rows that are not 0 are kept: those that are may never have been named.
    """
    every = -(-len(like) // steps)
    if isinstance(total, mx.array):
        axes = tuple(range(1, total.ndim))
        named = mx.any(total != 0, axis=axes) if axes else total != 0
        total = [{"indices": mx.where(named, mx.arange(len(like), dtype=mx.int32), -1), "values": total}]
    if isinstance(total, list):
        given = gradient(total, like)
        room = min(max(len(rows.indices), len(given.indices)), every)  # each call may have named all that are there
        return _rearranged(given, like, steps, room)
    places = total["indices"].shape
    room = max(min(len(rows.indices), every), -(-total["indices"].size // steps))
    if places == (steps, room):
        return total
    return _rearranged(gradient(total, like), like, steps, room)


def added(total: Part, rows: RowSparse, like: mx.array) -> Part:
    """The sum with the rows of one more call, in the shapes of ``total``, which has room for them."""
    shape = total["indices"].shape
    return _rearranged(gradient([_flat(total), _part(rows)], like), like, *shape)


def emptied(total: mx.array | RowSum, due: mx.array | bool) -> mx.array | RowSum:
    """A sum of nothing where ``due``, else ``total``."""
    if isinstance(total, mx.array):
        zeros = mx.zeros_like(total)
        return mx.where(due, zeros, total) if isinstance(due, mx.array) else zeros if due else total
    if isinstance(due, bool):
        return [] if due else total
    parts = [{**part, "indices": mx.where(due, -1, part["indices"])} for part in _parts(total)]
    return parts if isinstance(total, list) else parts[0]


def selected(apply: mx.array, new: Any, old: Any) -> Any:
    """``new`` where ``apply``, else ``old``, which has the same form."""
    if isinstance(new, mx.array):
        return mx.where(apply, new, old)
    if isinstance(new, list):
        return [selected(apply, a, b) for a, b in zip(new, old, strict=True)]
    return {key: mx.where(apply, new[key], old[key]) for key in new}


def _parts(total: Any) -> list[Part]:
    return total if isinstance(total, list) else [total]


def _part(rows: RowSparse) -> Part:
    return {"indices": rows.indices, "values": rows.values}


def _flat(part: Part) -> Part:
    indices, values = part["indices"], part["values"]
    return {"indices": indices.reshape(-1), "values": values.reshape(-1, *values.shape[indices.ndim :])}


def _free(shape: tuple[int, ...], like: mx.array) -> Part:
    return {"indices": mx.full(shape, -1, mx.int32), "values": mx.zeros((*shape, *like.shape[1:]), wide_dtype(like))}


def _trimmed(rows: RowSparse) -> RowSparse:
    """Coalesced rows without those that stand for none, unless something is tracing."""
    count = read(mx.sum(rows.indices < rows.num_rows))
    return rows if count is None else RowSparse(rows.indices[:count], rows.values[:count], rows.num_rows)


def _rearranged(rows: RowSparse, like: mx.array, steps: int, room: int) -> Part:
    """The rows, coalesced, in ``steps`` times ``room`` places."""
    coalesced = rows.coalesce()
    places = steps * room
    kept = min(places, len(coalesced.indices))  # coalesced rows are at the front, and there is room for them
    indices, values = coalesced.indices[:kept], coalesced.values[:kept]
    free = _free((places - kept,), like)
    indices = mx.concatenate([mx.where(indices < len(like), indices, -1), free["indices"]])
    values = mx.concatenate([values, free["values"]])
    return {"indices": indices.reshape(steps, room), "values": values.reshape(steps, room, *like.shape[1:])}
