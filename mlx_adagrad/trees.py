"""Walking, rebuilding and filling trees of dicts, lists and tuples; the path to a leaf is a tuple of keys.

Only error messages and users' patterns see a path as a string (:func:`dotted`): keys may themselves hold dots, slashes
or digits, so a string does not lead back to a leaf.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import mlx.core as mx
from mlx.nn import Module

from .update.accumulators import COMPUTE_DTYPE

Keys: TypeAlias = tuple[Any, ...]
CONTAINERS = (dict, list, tuple)
FROZEN = "frozen ones are seen only where the whole model is passed, as update(model, gradients) does"


def dotted(keys: tuple[Any, ...]) -> str:
    """The dotted path of a tuple of keys."""
    return ".".join(map(str, keys))


def labels(paths: Iterable[Keys]) -> dict[str, Keys]:
    """The keys by what people call them: the dotted path, or the :func:`name` where that means several of them."""
    paths = list(paths)
    count = Counter(map(dotted, paths))
    return {dotted(keys) if count[dotted(keys)] == 1 else name(keys): keys for keys in paths}


def is_absent(gradient: Any) -> bool:
    """Whether this place of a gradient tree holds no gradient (and never asks an array for its value)."""
    return gradient is None or (isinstance(gradient, CONTAINERS) and not gradient)


def children(tree: Any) -> Iterator[tuple[Any, Any]] | Any:
    """The (key, child) pairs of a dict, a list or a tuple."""
    if isinstance(tree, dict):
        return tree.items()
    if isinstance(tree, list | tuple):
        return enumerate(tree)
    raise TypeError(f"[Adagrad] gradients must be a dict, list or tuple of arrays but got {type(tree).__name__}.")


def child(tree: Any, key: Any) -> Any:
    """What a tree holds at one key; None where it holds nothing."""
    if isinstance(tree, dict):
        return tree.get(key)
    if isinstance(tree, list | tuple):
        return tree[key] if isinstance(key, int) and key < len(tree) else None
    return None


def find(tree: Any, keys: Keys) -> Any:
    """What a tree holds at ``keys``; None where it ends before."""
    for key in keys:
        tree = child(tree, key)
    return tree


def present(tree: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """The (keys, leaf) pairs of a tree in order; None and empty containers hold nothing."""
    array = mx.array
    for key, child in children(tree):
        if type(child) is array:
            yield (*keys, key), child
        elif isinstance(child, CONTAINERS):
            yield from present(child, (*keys, key))
        elif child is not None:
            yield (*keys, key), child


def mapped(function: Callable[[Keys, Any], Any], tree: Any, keys: Keys = ()) -> Any:
    """``tree`` with ``function(keys, leaf)`` in place of each leaf; what is absent stays so."""
    if is_absent(tree):
        return tree
    if isinstance(tree, dict):
        return {key: mapped(function, child, (*keys, key)) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return sequence(type(tree), (mapped(function, child, (*keys, i)) for i, child in enumerate(tree)))
    return function(keys, tree)


def pruned(tree: Any, named: bool = True) -> Any:
    """``tree`` without what is absent: left out of dicts, an empty hole in lists, as stock optimizers want it.

    They make no state for a named tuple that they have seen before: without ``named`` it becomes a tuple.
    """
    if isinstance(tree, dict):
        kept = {key: pruned(child, named) for key, child in tree.items()}
        return {key: child for key, child in kept.items() if not is_absent(child)}
    if isinstance(tree, list | tuple):
        kept = [pruned(child, named) for child in tree]
        filled = ({} if is_absent(child) else child for child in kept)
        kind = tuple if isinstance(tree, tuple) and not named else type(tree)
        return {} if all(map(is_absent, kept)) else sequence(kind, filled)
    return tree


def sequence(kind: type, items: Iterable[Any]) -> Any:
    """A list, tuple or namedtuple of the items."""
    return kind(*items) if hasattr(kind, "_fields") else kind(items)


def optimizable(tree: Any) -> Any:
    """``tree`` with everything that cannot be optimised taken out (None in its place)."""
    if isinstance(tree, dict):
        return {k: optimizable(child) for k, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [optimizable(child) for child in tree]
    return tree if isinstance(tree, mx.array) and tree.dtype in COMPUTE_DTYPE else None


def existing(parameters: Any) -> Iterator[tuple[Keys, mx.array]]:
    """The (keys, array) pairs of all parameters that there are: of a module the frozen ones too."""
    tree = parameters.parameters() if isinstance(parameters, Module) else parameters
    return ((keys, w) for keys, w in present(tree) if isinstance(w, mx.array))


def trainable(parameters: Any) -> dict[str, tuple[Keys, mx.array]]:
    """The parameters that an optimizer may change, by their :func:`name`: of a module those that are not frozen."""
    tree = parameters.trainable_parameters() if isinstance(parameters, Module) else parameters
    return {name(keys): (keys, w) for keys, w in present(tree) if isinstance(w, mx.array) and w.dtype in COMPUTE_DTYPE}


_ESCAPED = str.maketrans({"~": "~0", "/": "~1", ".": "~2"})
_INDEX, _OTHER = "~3", "~4"  # before a string that reads like an index, and before what is no string


def name(keys: Keys) -> str:
    """The key of a parameter in a wrapper's own state: another string for any other tuple of keys.

    It has no dots and is no number, so that ``mlx.utils.tree_unflatten`` does not take it apart.
    """
    return "/".join(("", *map(_segment, keys)))


def _segment(key: Any) -> str:
    if type(key) is int:
        return str(key)
    text = str(key).translate(_ESCAPED)
    if not isinstance(key, str):
        return _OTHER + text
    return _INDEX + text if text.removeprefix("-").isdecimal() else text


def old_name(name: str) -> str:
    """What version 0.1 called the parameter that has this :func:`name` now."""
    segments = (segment.removeprefix(_INDEX).removeprefix(_OTHER) for segment in name.split("/"))
    return "/".join(segment.replace("~2", ".").replace("~1", "/").replace("~0", "~") for segment in segments)


def slot(state: dict[str, Any], gradients: Any, keys: tuple[Any, ...]) -> dict[str, Any]:
    """The dict for the state of the parameter at ``keys``, made in place where it is missing."""
    node: Any = state
    for key in keys:
        gradients = gradients[key]
        wanted = list if isinstance(gradients, list | tuple) else dict
        if isinstance(node, list):
            node.extend({} for _ in range(key + 1 - len(node)))
        below = child(node, key)
        if not isinstance(below, wanted):
            if below and not (wanted is list and isinstance(below, tuple)):
                kinds = f"a {type(below).__name__} where the parameters have a {wanted.__name__}"
                raise ValueError(f"[Adagrad] the state of '{dotted(keys)}' is in {kinds}: assign the whole state anew.")
            below = wanted(below or ())  # a tuple cannot grow, an empty hole has no kind yet
            node[key] = below
        node = below
    return node


def fill(target: dict | list, source: dict | list | tuple, places: bool = False) -> None:
    """Make ``target`` equal to ``source`` and keep its dicts and lists themselves, since compiled steps hold them.

    With ``places`` an empty dict stays where ``source`` has none: MLX takes the arrays of a compiled step by position,
    and does not ask for their order, so that what is made again has to come to where it was.
    """
    new = dict(children(source))
    if isinstance(target, dict):
        for key in [key for key in target if key not in new]:
            if places and isinstance(target[key], dict | list):
                new[key] = type(target[key])()
            else:
                del target[key]
    else:
        del target[len(new) :]
        target.extend({} for _ in range(len(new) - len(target)))
    for key, value in new.items():
        old = target.get(key) if isinstance(target, dict) else target[key]
        if isinstance(value, dict) and isinstance(old, dict) or isinstance(value, list) and isinstance(old, list):
            fill(old, value, places)
        else:
            target[key] = copied(value)


def copied(tree: Any) -> Any:
    """The tree with the same arrays in containers of its own."""
    if isinstance(tree, dict):
        return {key: copied(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return sequence(type(tree), map(copied, tree))
    return tree
