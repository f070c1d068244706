"""Finds the parameters that a state belongs to, also where MLX's strings have changed the shape of the state.

State that went through ``mlx.utils.tree_flatten`` and ``tree_unflatten`` has lists where the parameters have dicts with
keys like ``"0"``, and dicts where they have keys with dots; it is put back into the shape of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, TypeAlias

import mlx.core as mx

from .leaves import RESERVED
from .trees import CONTAINERS, Keys, child, children, dotted, existing, find, is_absent, name, present, slot

NOBODYS = "which belongs to no parameter"
Path: TypeAlias = tuple[str, ...]  # the parts between the dots of MLX's strings


class Known:
    """What state may belong to: the parameters that exist, frozen ones too, or the state as it was before.

    Args:
        tree: The parameters, or the state before.
        gradients: Those of the coming step; None where there is none yet.
    """

    def __init__(self, tree: Any, gradients: Any = None):
        self.tree = tree
        self.gradients = gradients

    @cached_property
    def arrays(self) -> dict[Keys, Any]:
        """The parameters by their keys."""
        return dict(existing(self.tree))

    @cached_property
    def names(self) -> dict[str, Keys]:
        """The keys of the parameters by their names in a wrapper's own state."""
        return {name(keys): keys for keys in self.arrays}

    @cached_property
    def by_path(self) -> dict[Path, list[Keys]]:
        """The keys by their paths in MLX's strings."""
        grouped: dict[Path, list[Keys]] = {}
        for keys in self.arrays:
            grouped.setdefault(_path(keys), []).append(keys)
        return grouped

    @cached_property
    def misleading(self) -> set[Keys]:
        """The keys whose place in a list of MLX's is another than their number, since one beside them is negative."""
        paths = list(self.by_path)
        negative = {path[:i] for path in paths for i, part in enumerate(path) if _index(part).startswith("-")}
        beside = (path for path in paths if any(path[:i] in negative and _index(part) for i, part in enumerate(path)))
        return {keys for path in beside for keys in self.by_path[path]}


class Before(Known):
    """The parameters that a state knows, by the dicts that hold their entries."""

    @cached_property
    def arrays(self) -> dict[Keys, Any]:
        return {keys[:-1]: None for keys, _ in present(self.tree) if len(keys) > 1 and keys[0] not in RESERVED}


class Slots:
    """The parameters that a state belongs to, each with its entries.

    Args:
        state: The state.
        known: The parameters.
        roots: Keys of the state that belong to no parameter.
    """

    def __init__(self, state: Any, known: Known, roots: Iterable[Any] = RESERVED):
        self.known = known
        self.roots = tuple(roots)
        self.state = {key: node for key, node in children(state) if key not in self.roots}
        self.by_parameter: dict[Keys, Any] = {}
        self.unknown: dict[Keys, int] = {}  # the keys to an entry, and how many parameters it may be that of
        self.agrees = _agrees(self.state, known.tree)
        self.rearranged = False
        rest: list[tuple[Keys, Any]] = []
        for keys, value in _ends(self.state):
            above, entry = keys[:-1], keys[len(keys) - 1]
            if is_absent(value):
                self._nested(keys)
            elif keys in known.arrays and self._stands(keys):  # where a dict of arrays should be
                self.by_parameter[keys] = value
            elif above in known.arrays and self._stands(above):
                node = find(self.state, above)
                entries = self.by_parameter.setdefault(above, {} if isinstance(node, dict) else node)
                if isinstance(node, dict):
                    entries[entry] = value
            else:
                rest.append((keys, value))
        self._match(rest)

    def _stands(self, keys: Keys) -> bool:
        """Whether the state has containers of the same kinds as the parameters on the way to ``keys``."""
        node, like = self.state, self.known.tree
        for key in () if self.agrees else keys:
            if isinstance(node, dict) != isinstance(like, dict):
                return False
            node, like = child(node, key), child(like, key)
        return True

    def _match(self, rest: list[tuple[Keys, Any]]) -> None:
        """Find by its path what is not where the parameters have it."""
        exact = {*self.by_parameter}
        for keys, value in rest:
            while len(keys) > 1 and keys[-1] == "":  # of {"a": x, "a.b": y} MLX makes {"a": {"": x, "b": y}}
                keys = keys[:-1]
            above, entry = keys[:-1], keys[len(keys) - 1]
            meant = [k for k in self.known.by_path.get(_path(above), ()) if k not in exact]
            meant = [k for k in meant if k not in self.known.misleading]
            entries = self.by_parameter.setdefault(meant[0], {}) if len(meant) == 1 else None
            if isinstance(value, mx.array) and entries is not None and entry not in entries:
                entries[entry] = value
                self.rearranged = True
            elif not self._nested(keys):
                self.unknown[keys] = len(meant)

    def _nested(self, keys: Keys) -> bool:
        """Whether an entry lies deeper in what a parameter has; an optimizer of the user's may keep it so."""
        owner = next((keys[:i] for i in range(len(keys) - 1, 0, -1) if keys[:i] in self.known.arrays), None)
        if owner is None or not self._stands(owner) or not isinstance(find(self.state, owner), dict):
            return False
        self.by_parameter.setdefault(owner, {})[keys[len(owner)]] = find(self.state, keys[: len(owner) + 1])
        return True

    def leftovers(self) -> list[Exception]:
        """What is nobody's, and what could be that of two parameters."""
        problems: list[Exception] = [leftover(dotted(keys), count) for keys, count in self.unknown.items()]
        if self.known.gradients is None or not self.by_parameter:
            return problems
        trained = {keys for keys, _ in present(self.known.gradients)}
        for path, several in self.known.by_path.items() if len(self.known.by_path) < len(self.known.arrays) else ():
            with_state = [keys for keys in several if keys in self.by_parameter]
            if len(several) > len(with_state) > 0 and any(k in trained for k in several if k not in self.by_parameter):
                what = f"the state has one '{'.'.join(path)}', as MLX's strings call {len(several)} parameters"
                problems.append(ValueError(f"{what}: use checkpoint.save, or init for a new parameter."))
        return problems

    def tree(self, state: Any) -> Any:
        """``state`` in the shape of what is known; itself where it has that."""
        if not self.rearranged and self.agrees:
            return state
        new: dict[str, Any] = {key: state[key] for key in self.roots if key in state}
        for keys, entries in self.by_parameter.items():
            if isinstance(entries, dict):
                slot(new, self.known.tree, keys).update(entries)
        return new


def _ends(tree: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """The (keys, leaf) pairs of a state, with None and empty containers."""
    for key, node in children(tree):
        if isinstance(node, CONTAINERS) and node:
            yield from _ends(node, (*keys, key))
        else:
            yield (*keys, key), node


def _agrees(state: Any, like: Any) -> bool:
    """Whether the containers of a state are of the kinds that the parameters have, where both have some.

    MLX's own optimizers take an empty dict for a hole, and neither None nor an empty list.
    """
    if is_absent(state):
        return isinstance(state, dict) or (state is not None and isinstance(like, list | tuple))
    if not isinstance(state, CONTAINERS) or not isinstance(like, CONTAINERS):
        return True
    if isinstance(state, dict) != isinstance(like, dict) or not isinstance(state, dict) and len(state) > len(like):
        return False
    below = dict(children(like))
    return all(_agrees(node, below.get(key)) for key, node in children(state))


def leftover(path: str, count: int = 0) -> ValueError:
    """The refusal of state that belongs to no parameter, or may belong to several."""
    if count > 1:
        return ValueError(f"the state has '{path}', as MLX's strings call {count} parameters: use checkpoint.save.")
    return ValueError(f"the state has '{path}', {NOBODYS}.")


def _path(keys: Keys) -> Path:
    """The parts of keys in MLX's strings, with numbers as the indices that MLX makes of them."""
    return tuple(_index(part) or part for part in dotted(keys).split("."))


def _index(part: str) -> str:
    """The number that MLX takes a part of a path for; empty where it is none."""
    try:
        return str(int(part))
    except ValueError:
        return ""
