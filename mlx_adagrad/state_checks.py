"""State from outside against the parameters: before the first step that follows, all that does not fit is named.

Finding which parameter it belongs to is :mod:`mlx_adagrad.matching`'s part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.optimizers import Adafactor, Optimizer

from .leaves import RESERVED, check_state
from .matching import NOBODYS, Before, Known, Slots, leftover
from .trees import CONTAINERS, FROZEN, child, children, dotted, fill, is_absent, old_name
from .update.accumulators import COMPUTE_DTYPE, wide_dtype
from .update.storage import KEYS, Storage
from .update.tracing import evaluate

KEPT = (*KEYS, "step")  # for each parameter
INTEGERS = (mx.uint64, mx.int64, mx.uint32, mx.int32)


class Comparison(NamedTuple):
    """The outcome of a comparison.

    Args:
        tree: A part of the state.
        new: What is to become of it.
        problems: What does not fit.
        leftovers: What belongs to no parameter.
    """

    tree: dict[str, Any]
    new: dict[str, Any]
    problems: list[Exception]
    leftovers: list[Exception]


def settle(optimizers: Iterable[Any], parameters: Any, gradients: Any = None) -> None:
    """Compare the states of ``optimizers`` with the parameters and put them into their shape.

    Args:
        optimizers: The outermost first.
        parameters: The parameters that exist. State of others is refused where the gradients are given.
        gradients: Those of the coming step.

    Raises:
        ValueError: If anything does not fit, with all that does not. Nothing has changed then.
        TypeError: If only one thing does not fit, which is of another type.
    """
    known = Known(parameters, gradients)
    compared = [(optimizer, _compared(optimizer, known)) for optimizer in optimizers]
    problems: list[tuple[str, Exception]] = []
    for optimizer, comparison in compared:
        strict = gradients is not None or _is_rearranged(comparison)
        wrong = comparison.problems + (comparison.leftovers if strict else [])
        problems += [(type(optimizer).__name__, problem) for problem in wrong]
    if problems:
        raise _refusal(problems)
    for optimizer, comparison in compared:
        if _is_rearranged(comparison):
            fill(comparison.tree, comparison.new)
        if hasattr(optimizer, "_compared"):  # those of MLX make what is missing at the first step
            optimizer._initialized = not comparison.leftovers


def _refusal(problems: list[tuple[str, Exception]]) -> Exception:
    lines = [f"[{owner}] {problem}" for owner, problem in problems]
    hint = f" ({FROZEN.capitalize()}.)" if any(NOBODYS in line for line in lines) else ""
    if len(problems) == 1:
        return type(problems[0][1])(lines[0] + hint)
    return ValueError("\n  ".join([f"[{problems[0][0]}] the state does not fit the parameters:", *lines]) + hint)


def _is_rearranged(comparison: Comparison) -> bool:
    return comparison.new is not comparison.tree


def _compared(optimizer: Any, known: Known) -> Comparison:
    return optimizer._compared(known) if hasattr(optimizer, "_compared") else compare_stock(optimizer, known)


def restored(state: Any, before: Any) -> Any:
    """``state`` in the shape of the state before it, where it has the same paths; else as it is."""
    slots = Slots(state, Before(before))
    fits = not slots.unknown and all(isinstance(entries, dict) for entries in slots.by_parameter.values())
    return slots.tree(state) if fits else state


def compare(state: dict[str, Any], known: Known, storage: Storage, schedules: Iterable[str], extra: bool) -> Comparison:
    """Compare the state of an Adagrad, but for its groups.

    Args:
        state: The state.
        known: The parameters.
        storage: How weights and state are kept.
        schedules: Names that may be at the root besides.
        extra: Whether a subclass keeps more for a parameter than ``v`` and a step count.
    """
    problems = [*_roots(state, ("step", "learning_rate"))]
    slots = Slots(state, known, (*RESERVED, *schedules))
    for keys, entries in slots.by_parameter.items():
        if known.arrays[keys].dtype in COMPUTE_DTYPE:  # MLX's own makes state for integers too
            problems += _entry_problems(storage, known.arrays[keys], entries, dotted(keys), extra)
    new = slots.tree(state)
    if not problems and state["learning_rate"].ndim:  # MLX's own keeps one of shape (1,) as it was given
        new = {**new, "learning_rate": state["learning_rate"].reshape(())}
        evaluate(new["learning_rate"])
    return Comparison(state, new, problems, slots.leftovers())


def _entry_problems(storage: Storage, w: mx.array, entries: Any, path: str, extra: bool) -> Iterator[Exception]:
    held = entries.items() if isinstance(entries, dict) and not extra else ()
    for key, value in held:
        if key not in KEPT:
            yield ValueError(f"the state {key!r} of '{path}' is none of an Adagrad.")
        elif is_absent(value):
            yield TypeError(f"the state {key!r} of '{path}' must be an array but got {type(value).__name__}.")
    if not any(is_absent(value) for _, value in held):
        try:
            check_state(storage, w, entries, path)
        except (TypeError, ValueError) as error:
            yield type(error)(str(error).removeprefix("[Adagrad] "))


def compare_stock(optimizer: Optimizer, known: Known) -> Comparison:
    """Compare the state of an optimizer of MLX with what it would make itself."""
    state: Any = optimizer.state
    single = [key for key, value in state.items() if not isinstance(value, CONTAINERS)]
    roots = {"step", "learning_rate", *(key for key in single if child(known.tree, key) is None)}
    slots = Slots(state, known, roots)
    stock = type(optimizer).__module__.startswith("mlx.optimizers")  # and not one of the user's
    rate = ("learning_rate",) if stock and not isinstance(optimizer, Adafactor) else ()  # which needs none
    problems = [*_roots(state, ("step", *rate))]
    for keys, entries in slots.by_parameter.items():
        problems += _stock_problems(optimizer, known.arrays[keys], entries, dotted(keys), stock)
    return Comparison(state, slots.tree(state), problems, slots.leftovers())


def _stock_problems(optimizer: Optimizer, w: mx.array, entries: Any, path: str, stock: bool) -> Iterator[Exception]:
    fresh: dict[str, Any] = {}
    try:
        optimizer.init_single(w, fresh)
    except Exception:  # an optimizer of the user's, which may make its state in any way
        return
    if not isinstance(entries, dict):
        yield ValueError(f"the state of '{path}' must be a dict but got {type(entries).__name__}.")
        return
    for key in entries if stock else ():
        if key not in fresh:
            yield ValueError(f"the state {key!r} of '{path}' is none of this optimizer.")
    for key, like in fresh.items():
        value: Any = entries.get(key)
        if value is None:
            yield ValueError(f"the state of '{path}' has no {key!r}.")
        elif not isinstance(like, mx.array):
            continue
        elif not isinstance(value, mx.array):
            yield TypeError(f"the state {key!r} of '{path}' must be an array but got {type(value).__name__}.")
        elif value.shape != like.shape:
            yield ValueError(f"the state {key!r} of '{path}' has shape {value.shape} but must have {like.shape}.")
        elif _kind(value) != _kind(like):
            yield ValueError(f"the state {key!r} of '{path}' is {value.dtype} but must be {like.dtype}.")


def _kind(array: mx.array) -> mx.DtypeCategory:
    """What a dtype is of: precision may differ."""
    kinds = (mx.floating, mx.complexfloating, mx.integer)
    return next((kind for kind in kinds if mx.issubdtype(array.dtype, kind)), mx.generic)


def compare_entries(tree: dict[str, Any], fresh: dict[str, Any], known: Known) -> Comparison:
    """Compare the entries that a wrapper has for itself.

    Args:
        tree: The entries.
        fresh: What they are before the first step: a dict for what goes with parameters.
        known: The parameters.
    """
    new, problems, leftovers = dict(tree), [], []
    for key, entries in tree.items():
        if not isinstance(fresh.get(key), dict) or not entries:
            continue
        renamed = new[key] = with_names(entries, known.names)
        for name, value in renamed.items():
            keys = known.names.get(name)
            if keys is None or known.arrays[keys].dtype not in COMPUTE_DTYPE:
                leftovers.append(leftover(f"{key}{name}"))
            else:
                rows = key == "gradients"
                problems += _wrapper_problems(f"{key!r} of '{dotted(keys)}'", value, known.arrays[keys], rows)
    return Comparison(tree, tree if all(new[key] is tree[key] for key in tree) else new, problems, leftovers)


def _wrapper_problems(what: str, value: Any, w: mx.array, rows: bool) -> Iterator[Exception]:
    if rows and isinstance(value, dict | list) and _is_row_sum(value):
        for part in value if isinstance(value, list) else [value]:
            shape = part["values"].shape[part["indices"].ndim :]
            if not w.ndim or shape != w.shape[1:]:
                yield ValueError(f"{what} of the state has rows of shape {shape} but must have {w.shape[1:]}.")
    elif not isinstance(value, mx.array):
        yield TypeError(f"{what} of the state must be an array but got {type(value).__name__}.")
    elif value.shape != w.shape:
        yield ValueError(f"{what} of the state has shape {value.shape} but must have {w.shape}.")
    elif value.dtype != wide_dtype(w):
        yield ValueError(f"{what} of the state is {value.dtype} but must be {wide_dtype(w)}.")


def flat_entries(entries: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A wrapper's entries by name: names of version 0.1 have dots, at which MLX's strings are taken apart."""
    for key, value in children(entries):
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict | list) and not _is_row_sum(value):
            yield from flat_entries(value, where)
        else:
            yield where, value


def _is_row_sum(value: Any) -> bool:
    """Whether an entry is a sum of row-sparse gradients: one part, or a list of parts."""
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(part, dict) and part.keys() == {"indices", "values"} for part in parts)


def with_names(entries: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A wrapper's entries under these names, where they have those of version 0.1, which knew no escapes."""
    names = dict.fromkeys(names)
    if all(key in names for key in entries):
        return entries
    meant: dict[str, list[str]] = {}
    for new in names:
        if new not in entries:
            meant.setdefault(old_name(new), []).append(new)
    one = {old: new[0] for old, new in meant.items() if len(new) == 1 and old in entries and old not in names}
    return {one.get(key, key): value for key, value in entries.items()} if one else entries


def _roots(state: Any, wanted: Iterable[str]) -> Iterator[Exception]:
    """What is wrong with the count of steps and the learning rate."""
    for key in wanted:
        value = state.get(key)
        if key not in state:
            yield ValueError(f"the state has no {key!r}.")
        elif not isinstance(value, mx.array):
            yield TypeError(f"{key!r} of the state must be an array but got {type(value).__name__}.")
        elif value.size != 1 or value.ndim > (key != "step"):
            yield ValueError(f"{key!r} of the state has shape {value.shape} but must have ().")
        elif value.dtype not in INTEGERS if key == "step" else not mx.issubdtype(value.dtype, mx.floating):
            wanted = "uint64" if key == "step" else "float32"
            yield ValueError(f"{key!r} of the state is {value.dtype} but must be {wanted}.")
