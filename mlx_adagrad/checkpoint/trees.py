"""Trees of arrays as a checkpoint keeps them: flattened to names, with their structure beside, and filled in place.

``mlx.utils.tree_unflatten`` guesses lists from digits and drops what is empty; a structure in JSON keeps both.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import mlx.core as mx

from ..leaves import OWN, RESERVED
from ..state_checks import with_names
from ..trees import sequence
from .safetensors import Entry, entry_of

SHOWN = 10  # problems that an error message lists
CHANGES = f".{OWN}.changes"  # makes compiled steps of this process trace again; it belongs into no file
SUMS = f".{OWN}.gradients."  # where a GradientAccumulation keeps its sums: of arrays, or of rows in parts
Structure = Any  # dicts and lists whose leaves are names of arrays, or None


def pack(tree: Any, prefix: str, arrays: dict[str, mx.array]) -> Structure:
    """The structure of ``tree``; its arrays are put into ``arrays`` under dotted names that begin with ``prefix``.

    Raises:
        TypeError: If a leaf is no array or a key no string.
    """
    if isinstance(tree, dict):
        for key in tree:
            if not isinstance(key, str):
                raise TypeError(f"[checkpoint] the keys under '{prefix}' must be strings but got {key!r}.")
        kept = {key: child for key, child in tree.items() if not f"{prefix}.{key}".endswith(CHANGES)}
        return {key: pack(child, f"{prefix}.{key}", arrays) for key, child in kept.items()}
    if isinstance(tree, list | tuple):
        return [pack(child, f"{prefix}.{i}", arrays) for i, child in enumerate(tree)]
    if tree is None:
        return None
    if not isinstance(tree, mx.array):
        raise TypeError(f"[checkpoint] '{prefix}' is {type(tree).__name__}: only arrays can be saved.")
    while prefix in arrays:  # {"a.b": x} beside {"a": {"b": y}}
        prefix += "'"
    arrays[prefix] = tree
    return prefix


def unpack(structure: Structure, entries: dict[str, Entry]) -> Any:
    """The tree of entries with this structure; each is taken out of ``entries``.

    Raises:
        ValueError: If the structure names what is not there, or anything twice, or is no structure.
    """
    if isinstance(structure, dict):
        return {key: unpack(child, entries) for key, child in structure.items()}
    if isinstance(structure, list):
        return [unpack(child, entries) for child in structure]
    if structure is None:
        return None
    if not isinstance(structure, str) or structure not in entries:
        raise ValueError(f"its structure names {structure!r:.80}, which is no tensor of it, or names it twice")
    return entries.pop(structure)


def renamed(saved: Any, live: Any) -> Any:
    """The saved tree, with the names of version 0.1 in wrappers' own entries as they are in the live one."""
    if isinstance(saved, list) and isinstance(live, list):
        return [renamed(*pair) for pair in zip(saved, live, strict=True)] if len(saved) == len(live) else saved
    if not isinstance(saved, dict) or not isinstance(live, dict):
        return saved
    own, here = saved.get(OWN), live.get(OWN)
    if isinstance(own, dict) and isinstance(here, dict):
        both = [key for key in own if isinstance(own[key], dict) and isinstance(here.get(key), dict)]
        saved = {**saved, OWN: {**own, **{key: with_names(own[key], here[key]) for key in both}}}
    inside = {key: renamed(saved[key], live[key]) for key in ("inner", "states") if key in saved and key in live}
    return {**saved, **inside}


def mismatches(saved: Any, live: Any, path: str, fresh: bool = False) -> Iterator[str]:
    """Where the saved tree of entries does not fit the live tree of arrays, in words; a fresh one takes all."""
    if isinstance(saved, Entry) and isinstance(live, mx.array):
        if (saved.shape, saved.dtype) != (live.shape, live.dtype):
            yield f"'{path}' is {saved} in the file but {entry_of(live)} here"
    elif is_empty(saved) and is_empty(live):
        return
    elif SUMS in path and (is_row_sum(saved) or is_row_sum(live)):
        if {*columns(saved)} - {*columns(live)} and not is_empty(live):
            yield f"'{path}' are sums of rows of other shapes in the file than here"
    elif kind(saved) != kind(live):
        yield f"'{path}' is {kind(saved)} in the file but {kind(live)} here"
    elif isinstance(saved, dict | list):
        here, there = children(live), children(saved)
        fresh = fresh or is_fresh(live)
        for key in {**there, **here}:
            name = f"{path}.{key}"
            if key in there and key in here and not (fresh and is_empty(here[key])):
                yield from mismatches(there[key], here[key], name, fresh)
            elif key not in there and not is_empty(here[key]) and not name.endswith(CHANGES):
                yield f"the file lacks '{name}'"
            elif key not in here and not is_empty(there[key]) and not fresh:
                yield f"the file has '{name}', which is not known here"


def part(tree: Any, *like: Any) -> Any:
    """What ``tree`` has at the places of any of the others; an empty dict in the other places of its lists."""
    if not isinstance(tree, dict | list | tuple):
        return tree
    others = [children(other) for other in like if isinstance(other, dict | list | tuple)]
    kept = {
        key: part(child, *(other[key] for other in others if key in other))
        for key, child in children(tree).items()
        if any(not is_empty(other.get(key)) for other in others)
    }
    return kept if isinstance(tree, dict) else [kept.get(i, {}) for i in range(len(tree))]


def surplus(saved: Any, live: Any, path: str) -> Iterator[str]:
    """Places without arrays (a layer without parameters) that the saved tree has and the live one has not."""
    if isinstance(saved, dict | list) and isinstance(live, dict | list | tuple) and kind(saved) == kind(live):
        here = children(live)
        for key, child in children(saved).items():
            if key in here:
                yield from surplus(child, here[key], f"{path}.{key}")
            elif is_empty(child):
                yield f"the file has '{path}.{key}' (no parameters), which is not known here"


def fill(live: Any, new: Any) -> Any:
    """``live`` with the arrays of ``new`` in it: dicts and lists stay, since compiled steps hold them."""
    if isinstance(live, dict) and isinstance(new, dict):
        for key, child in new.items():
            live[key] = fill(live.get(key), child)
    elif isinstance(live, list) and isinstance(new, list):
        for i, child in enumerate(new):
            live[i : i + 1] = [fill(live[i] if i < len(live) else None, child)]
    elif isinstance(live, tuple) and isinstance(new, list):
        return sequence(type(live), (fill(old, child) for old, child in zip_longest(live, new[: len(live)])))
    else:
        return live if live is not None and is_empty(new) else new
    return live


def read(tree: Any) -> Any:
    """The tree with every entry read."""
    if isinstance(tree, dict):
        return {key: read(child) for key, child in tree.items()}
    if isinstance(tree, list):
        return [read(child) for child in tree]
    return tree.read() if isinstance(tree, Entry) else tree


def kind(tree: Any) -> str:
    """What a node of a tree is, as an error message calls it."""
    if isinstance(tree, dict):
        return "a dict"
    if isinstance(tree, list | tuple):
        return "a list"
    return "nothing" if tree is None else "an array"


def children(tree: Any) -> dict[Any, Any]:
    """The children of a dict, list or tuple by key."""
    return dict(tree) if isinstance(tree, dict) else dict(enumerate(tree))


def is_row_sum(tree: Any) -> bool:
    """Whether a tree is a sum of row-sparse gradients: the indices and values of one part, or a list of parts."""
    parts = tree if isinstance(tree, list) else [tree]
    return all(isinstance(part, dict) and part.keys() == {"indices", "values"} for part in parts)


def columns(tree: Any) -> list[tuple[int, ...]]:
    """The shapes of the rows in a sum of gradients, of arrays or of entries."""
    if not is_row_sum(tree):
        return [tuple(tree.shape[1:])]
    parts = tree if isinstance(tree, list) else [tree]
    return [tuple(part["values"].shape[len(part["indices"].shape) :]) for part in parts]


def is_empty(tree: Any) -> bool:
    """Whether there is no array in the tree."""
    if isinstance(tree, dict | list | tuple):
        return all(is_empty(child) for child in children(tree).values())
    return tree is None


def is_fresh(tree: Any) -> bool:
    """Whether a tree is the state of an optimizer, or of a wrapper around one, that has not seen a parameter yet."""
    if not isinstance(tree, dict):
        return False
    if tree.keys() == {"states"}:  # mlx.optimizers.MultiOptimizer
        return isinstance(tree["states"], list) and all(map(is_fresh, tree["states"]))
    if tree.keys() == {"inner", OWN}:
        return is_fresh(tree["inner"])
    own = isinstance(tree.get("step"), mx.array)
    return own and all(is_empty(child) for key, child in tree.items() if key not in RESERVED)


def listed(problems: list[str]) -> str:
    """The problems as an error message."""
    more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n  ".join(["it does not fit:", *problems[:SHOWN], *more])
