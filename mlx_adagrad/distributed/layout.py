"""Parameters and state of a sharded run as whole arrays under the names of the unsharded model, and back in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.nn import Module
from mlx.nn.layers.distributed import FullyShardedModule

from ..leaves import OWN, RESERVED
from ..trees import Keys, child, name, present
from .sharding import Cut, Predicate, cuts

OWNER = "checkpoint"
LEVEL = "module"  # that fully_shard puts between a module and its parameters

# What an array, or an entry of a file, is replaced by, given the parameter that it belongs to (or None) and its path.
Convert = Callable[[Any, Keys | None, str], Any]


class Layout:
    """How the parameters of a model are spread over the processes of a group.

    Args:
        model: The model of this process.
        group: The processes.
        sharded: Tells of parameters that the modules do not tell of: a predicate (path, array) to an axis or (axis,
            segments), as that of ``shard_inplace``. Default: ``None``.
    """

    def __init__(self, model: Module, group: mx.distributed.Group, sharded: Predicate | None = None):
        self.model, self.group = model, group
        self.cuts = cuts(model, sharded)
        self.shapes = {keys: w.shape for keys, w in present(model.parameters()) if isinstance(w, mx.array)}

    def whole(self, tree: Any, what: str) -> Any:
        """A tree of arrays put together, under the names of the unsharded model; every process must ask for it.

        Only the first process gets the arrays; to save memory, the others get empty ones.

        Args:
            tree: The model's parameters, or an optimizer's state.
            what: ``"model"`` or ``"optimizer"``.
        """

        def gather(array: Any, keys: Keys | None, path: str) -> Any:
            if keys is not None and keys in self.cuts and isinstance(array, mx.array) and array.ndim:
                array = self._together(array, self._axis(array.shape, keys, self.shapes[keys], path), self.cuts[keys])
            mx.eval(array)  # one at a time
            return array if self.group.rank() == 0 else mx.zeros((0,))

        return self._walked(tree, gather, _collapsed, what)

    def parts(self, tree: Any, what: str, cut: Callable[[Any, tuple[int, ...], Callable], Any]) -> Any:
        """A tree of whole arrays, or of entries of a file, cut to what this process has of them.

        Args:
            tree: A tree as :meth:`whole` makes it.
            what: ``"model"`` or ``"optimizer"``.
            cut: Makes what stands for the part of one: given it, the shape of the part, and a function from the whole
                array to the part.
        """

        def convert(leaf: Any, keys: Keys | None, path: str) -> Any:
            if keys is None or keys not in self.cuts or not getattr(leaf, "shape", ()):
                return leaf
            whole = self._whole_shape(keys)
            axis, shape = self._axis(leaf.shape, keys, whole, path), list(leaf.shape)
            shape[axis] = self._length(self.cuts[keys], shape[axis])
            return cut(leaf, tuple(shape), lambda array: self._part(array, axis, self.cuts[keys]))

        return self._walked(_expanded(tree, self.model, what), convert, None, what)

    def _whole_shape(self, keys: Keys) -> tuple[int, ...]:
        shape, cut = list(self.shapes[keys]), self.cuts[keys]
        shape[cut.axis] = cut.rows or shape[cut.axis] * self.group.size()
        return tuple(shape)

    def _axis(self, shape: tuple[int, ...], keys: Keys, of: tuple[int, ...], path: str) -> int:
        """The axis along which an array beside a parameter is cut: that of the parameter, or of its rows."""
        axis = self.cuts[keys].axis
        if shape == of or (axis == 0 and shape == of[:1]):
            return axis
        raise ValueError(
            f"[{OWNER}] '{path}' has shape {shape} beside a part of a parameter of shape {of}, whose axes it does not "
            "follow: use Dense() or RowWise() for the accumulator of a sharded run."
        )

    def _length(self, cut: Cut, whole: int) -> int:
        return -(-whole // self.group.size())

    def _together(self, part: mx.array, axis: int, cut: Cut) -> mx.array:
        segments = _whole_number(cut.segments)
        rows = mx.contiguous(mx.moveaxis(part, axis, 0))
        gathered = mx.distributed.all_gather(rows, group=self.group)
        # by rank, segment, and place in the piece of a segment
        pieces = gathered.reshape(self.group.size(), segments, -1, *gathered.shape[1:])
        whole = mx.moveaxis(pieces, 0, 1).reshape(gathered.shape)
        return mx.contiguous(mx.moveaxis(whole[: cut.rows], 0, axis))

    def _part(self, whole: mx.array, axis: int, cut: Cut) -> mx.array:
        segments, size, rank = _whole_number(cut.segments), self.group.size(), self.group.rank()
        rows = mx.moveaxis(whole, axis, 0)
        missing = self._length(cut, len(rows)) * size - len(rows)
        if missing:
            rows = mx.concatenate([rows, mx.zeros((missing, *rows.shape[1:]), rows.dtype)])
        pieces = rows.reshape(segments, size, -1, *rows.shape[1:])[:, rank]
        return mx.contiguous(mx.moveaxis(pieces.reshape(-1, *rows.shape[1:]), 0, axis))

    def _walked(self, tree: Any, convert: Convert, shape: Callable | None, what: str) -> Any:
        if what == "model":
            new = self._parameters(tree, (), convert, what)
            return shape(new, self.model, what) if shape else new
        return self._state(tree, convert, shape, what)

    def _parameters(self, tree: Any, keys: Keys, convert: Convert, path: str) -> Any:
        """A tree of the model's structure, or one level deeper, as the state of parameters is."""
        if isinstance(tree, dict):
            return {k: self._parameters(c, (*keys, k), convert, f"{path}.{k}") for k, c in tree.items()}
        if isinstance(tree, list | tuple):
            return [self._parameters(c, (*keys, i), convert, f"{path}.{i}") for i, c in enumerate(tree)]
        if tree is None:
            return None
        owner = keys if keys in self.shapes else keys[:-1] if keys[:-1] in self.shapes else None
        return convert(tree, owner, path)

    def _state(self, tree: Any, convert: Convert, shape: Callable | None, path: str) -> Any:
        """The state of an optimizer, of a wrapper around one, or of a MultiOptimizer."""
        if not isinstance(tree, dict):
            return tree
        if tree.keys() == {"states"}:
            states = enumerate(tree["states"])
            return {"states": [self._state(s, convert, shape, f"{path}.states.{i}") for i, s in states]}
        if tree.keys() == {"inner", OWN}:
            inner = self._state(tree["inner"], convert, shape, f"{path}.inner")
            return {"inner": inner, OWN: self._kept(tree[OWN], convert, shape is not None, f"{path}.{OWN}")}
        new = self._parameters(tree, (), convert, path)
        return shape(new, self.model, "optimizer") if shape else new

    def _kept(self, tree: Any, convert: Convert, whole: bool, path: str) -> Any:
        """A wrapper's own entries: of those that are dicts, the arrays stand under the names of parameters."""
        ours = {name(keys): keys for keys in self.shapes}
        theirs = {name(_without_levels(keys, self.model)): keys for keys in self.shapes}
        known, new_name = (ours, lambda keys: name(_without_levels(keys, self.model))) if whole else (theirs, name)
        new: dict[str, Any] = {}
        for key, entry in tree.items():
            if not isinstance(entry, dict):
                new[key] = convert(entry, None, f"{path}.{key}")
                continue
            new[key] = {}
            for parameter, array in entry.items():
                keys, where = known.get(parameter), f"{path}.{key}.{parameter}"
                if keys in self.cuts and isinstance(array, dict):
                    what = f"[{OWNER}] '{where}' are accumulated rows of a table that is spread over processes"
                    raise ValueError(f"{what}: save after an update, not between two.")
                if isinstance(array, dict):
                    new[key][parameter] = {k: convert(a, None, f"{where}.{k}") for k, a in array.items()}
                else:
                    new[key][new_name(keys) if keys else parameter] = convert(array, keys, where)
        return new


def _whole_number(segments: Any) -> int:
    if isinstance(segments, int):
        return segments
    raise ValueError(f"[{OWNER}] a parameter cut at {segments!r:.80} cannot be put together: only whole segments can.")


def _collapsed(tree: Any, module: Any, what: str) -> Any:
    """The tree without the levels that fully_shard put in."""
    if isinstance(module, FullyShardedModule) and isinstance(tree, dict):
        counts = {key: tree[key] for key in tree if key != LEVEL} if what == "optimizer" else {}
        return {**counts, **_collapsed(tree.get(LEVEL, {}), module.module, "model")}
    if isinstance(tree, dict):
        return {key: _collapsed(below, child(module, key), "model") for key, below in tree.items()}
    if isinstance(tree, list | tuple):
        return [_collapsed(below, child(module, i), "model") for i, below in enumerate(tree)]
    return tree


def _expanded(tree: Any, module: Any, what: str) -> Any:
    """The tree with the levels of fully_shard in it again."""
    if what == "optimizer" and isinstance(tree, dict) and tree.keys() in ({"states"}, {"inner", OWN}):
        if "states" in tree:
            return {"states": [_expanded(state, module, what) for state in tree["states"]]}
        return {"inner": _expanded(tree["inner"], module, what), OWN: tree[OWN]}
    if isinstance(module, FullyShardedModule):
        counts = {key: tree[key] for key in RESERVED if key in tree} if what == "optimizer" else {}
        below = {key: tree[key] for key in tree if key not in counts} if counts else tree
        return {**counts, LEVEL: _expanded(below, module.module, "model")}
    if isinstance(tree, dict):
        return {key: _expanded(below, child(module, key), "model") for key, below in tree.items()}
    if isinstance(tree, list | tuple):
        return [_expanded(below, child(module, i), "model") for i, below in enumerate(tree)]
    return tree


def _without_levels(keys: Keys, module: Any) -> Keys:
    short: Keys = ()
    for key in keys:
        if not (isinstance(module, FullyShardedModule) and key == LEVEL):
            short = (*short, key)
        module = child(module, key)
    return short


