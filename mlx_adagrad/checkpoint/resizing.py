"""The state of tables whose number of rows has changed: a vocabulary that grew, or lost words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.nn import Module
from mlx.optimizers import Optimizer

from ..adagrad import Adagrad
from ..trees import find, name
from ..update.accumulators import EXPONENTS, dense_v, stored_like
from ..update.storage import KEYS
from ..wrappers import row_sums
from ..wrappers.swap import own_parameters
from . import threads
from .foreign import AVERAGE, GRADIENT, few
from .install import Live, Slot
from .snapshots import check_run

Rows = Mapping[str, Sequence[int]]


class Move(NamedTuple):
    """Which old row is at each of the new ones, -1 for none, and how many old ones there were."""

    rows: mx.array
    before: int

    def moved(self, old: mx.array, fresh: mx.array) -> mx.array:
        """``old`` by its rows, and the rows of ``fresh`` that come from none, in the dtype of ``old``."""
        if self.before == 0:
            return fresh.astype(old.dtype)
        taken = old[mx.maximum(self.rows, 0)]
        kept = (self.rows >= 0).reshape(-1, *[1] * (old.ndim - 1))
        return mx.where(kept, taken, fresh.astype(old.dtype))

    def renumbered(self, indices: mx.array) -> mx.array:
        """Old indices as new ones; -1 for what has no row any more, or had none."""
        numbers = mx.arange(len(self.rows), dtype=mx.int32)
        places = mx.where(self.rows >= 0, self.rows, self.before)
        table = mx.full(self.before + 1, -1, mx.int32)
        table[places] = mx.where(self.rows >= 0, numbers, -1)
        named = mx.logical_and(indices >= 0, indices < self.before)
        return table[mx.where(named, indices, self.before)]


def resize(optimizer: Optimizer, model: Module | dict, rows: Rows | None = None) -> list[str]:
    """Fit the optimizer's state to tables (parameters of any kind) that have got another number of rows.

    Change the weights first. Rows that stay keep their ``v``, average and accumulated gradient, bit for bit; a new row
    starts as a new parameter does: ``v`` at the initial accumulator value, the average at its weights, gradients at 0.

    Args:
        optimizer: An Adagrad, or wrappers around one.
        model: The module, or the tree of its parameters, with the new weights.
        rows: For tables whose rows have moved, by dotted path: for each new row, which old one it was, -1 for a new
            one. Default: ``None``, the first rows are those that there were.

    Returns:
        The paths of the parameters whose state has changed.

    Raises:
        ValueError: If anything but the number of rows differs, or ``rows`` does not fit; nothing has changed then.
        TypeError: If an argument is of another type.
        RuntimeError: On another thread than the one that trains, while that may be in the middle of a step.
    """
    check_run("resize", optimizer, model)
    live, parameters, rows = _live(optimizer), own_parameters(model), dict(rows or {})
    unknown = [path for path in rows if path not in live.slots]
    if unknown:
        raise ValueError(f"[resize] 'rows' has {few(unknown)}, which has no state here ({few(live.slots)}).")
    moves = {path: move for path in live.slots if (move := _move(live, path, parameters, rows.get(path))) is not None}
    with threads.between_steps(optimizer, "resize on that thread, between two steps"):
        changes = [change for path, move in moves.items() for change in _changes(live, path, move, parameters)]
    mx.eval([new for _, _, new in changes])
    for holder, key, new in changes:
        holder[key] = new
    return list(moves)


def _live(optimizer: Optimizer) -> Live:
    try:
        return Live(optimizer)
    except ValueError as error:
        raise ValueError(f"[resize] {error}.") from None


def _move(live: Live, path: str, parameters: Any, rows: Sequence[int] | None) -> Move | None:
    """What happens to the rows of one parameter, None if nothing does.

    Raises:
        ValueError: If anything else than the number of rows differs.
    """
    keys, state = live.slots[path]
    w, v = find(parameters, keys), state["v"]
    wanted = live.adagrad.accumulator.shape(w) if isinstance(w, mx.array) else None
    if wanted is None or len(wanted) != v.ndim or wanted[1:] != v.shape[1:]:
        got = f"a parameter of shape {w.shape}" if isinstance(w, mx.array) else "no parameter"
        raise ValueError(f"[resize] there is {got} for the state of '{path}', whose v has shape {v.shape}.")
    if rows is None:
        if wanted == v.shape:
            return None
        kept = min(len(v), wanted[0])
        return Move(mx.array([*range(kept), *[-1] * (wanted[0] - kept)], mx.int32), len(v))
    numbers = [int(row) for row in rows]
    if v.ndim == 0 or len(numbers) != wanted[0] or any(not -1 <= row < len(v) for row in numbers):
        each = f"{wanted[0] if wanted else 'no'} rows, each of the {len(v) if v.ndim else 0} old ones or -1"
        raise ValueError(f"[resize] 'rows' of '{path}' must be {each}, but got {len(numbers)}: {few(numbers)}.")
    if len({row for row in numbers if row >= 0}) < sum(row >= 0 for row in numbers):
        raise ValueError(f"[resize] 'rows' of '{path}' names an old row twice: {few(numbers)}.")
    return Move(mx.array(numbers, mx.int32), len(v))


def _changes(live: Live, path: str, move: Move, parameters: Any) -> Iterator[tuple[dict[str, Any], Any, Any]]:
    slot = live.slots[path]
    w, key = find(parameters, slot.keys), name(slot.keys)
    for part, new in _state(live.adagrad, slot, w, move).items():
        yield slot.state, part, new
    kinds: dict[str, Callable[[Any], Any]] = {
        AVERAGE: lambda old: move.moved(old, w),
        GRADIENT: lambda old: _gradients(old, move, w),
    }
    for kind, change in kinds.items():
        if key in live.kept.get(kind, {}):
            yield live.kept[kind], key, change(live.kept[kind][key])


def _state(adagrad: Adagrad, slot: Slot, w: mx.array, move: Move) -> dict[str, mx.array]:
    """The arrays of one parameter in an Adagrad's state; a step count of its own stays."""
    fresh: dict[str, Any] = {}
    adagrad.init_single(w, fresh)
    old = {key: slot.state[key] for key in KEYS if key in slot.state}
    by_rows = {key: fresh[key] for key in old if key in fresh and fresh[key].shape[1:] == old[key].shape[1:]}
    new = {key: move.moved(old[key], start) for key, start in by_rows.items() if len(old[key]) == move.before}
    if EXPONENTS in old and EXPONENTS not in new:  # blocks that hold several rows
        v = move.moved(dense_v(old), dense_v(fresh))
        new |= stored_like(fresh, v)
    return new


def _gradients(old: Any, move: Move, w: mx.array) -> Any:
    if not row_sums.is_row_sum(old):
        return move.moved(old, mx.zeros(w.shape, old.dtype))
    if isinstance(old, list):
        return [_gradients(part, move, w) for part in old]
    return {**old, "indices": move.renumbered(old["indices"])}
