"""The dialect of ``mlx.optimizers.Adagrad``: the flattened state, ``step``, ``learning_rate`` and ``<path>.v``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_unflatten

from ..trees import Keys, copied, dotted, fill, labels, present, slot
from ..wrappers.states import expect_new_state
from . import export, sources, trees
from .foreign import Foreign, Key, Names, V, few
from .install import Live, install, slots
from .safetensors import Entry, entry_of

MAX_DEPTH = 100
HOLES = 100  # places without a tensor, for each tensor, that lists of a new state may have
STOCK = {"lr_decay": 0.0, "weight_decay": 0.0, "maximize": False}


def import_mlx(source: Any, optimizer: Optimizer, names: Names | None = None) -> None:
    """Go on from a ``mlx.optimizers.Adagrad``: its ``state``, or a safetensors or .npz file of the flattened state.

    An optimizer that has seen no parameter takes the state as it is; one that has, in place. A ``v`` in half precision
    becomes fp32, at the first step at the latest.

    Args:
        source: The state, or ``dict(mlx.utils.tree_flatten(state))``, or a path.
        optimizer: ``presets.mlx(...)`` or any Adagrad of this package.
        names: Ours for theirs where they differ: a mapping from their dotted path, or a list of ours in their order;
            the optimizer must be initialised then. In place of a path, ``(path, axes)`` reorders the axes.

    Raises:
        ValueError: If the file is damaged or does not fit; each difference is named. Nothing has changed then.
    """
    flat, keys = _flattened(source) if isinstance(source, Mapping) else (source, {})
    with sources.naming(source), sources.opened(flat) as entries:
        live, foreign = Live(optimizer), _read(entries)
        if live.slots or names is not None:
            install(live, foreign, names)
            expect_new_state(optimizer)
            return
        before = copied(live.adagrad.state)
        try:
            foreign = _begin(live, foreign, source, keys)
            install(Live(optimizer), foreign, names)
            expect_new_state(optimizer)
        except BaseException:
            fill(live.adagrad.state, before)
            raise


def export_mlx(
    optimizer: Optimizer, names: Names | None = None, *, dtype: mx.Dtype | None = None
) -> dict[str, mx.array]:
    """The flattened state of a ``mlx.optimizers.Adagrad``, for ``mx.save_safetensors`` or ``tree_unflatten``.

    Args:
        optimizer: ``presets.mlx(...)`` or an Adagrad of this package with no more options than stock MLX has.
        names: Ours for theirs where they differ: a mapping as in :func:`import_mlx`. Default: the same paths.
        dtype: What to cast ``v`` to. Stock MLX makes half-precision parameters fp32 beside an fp32 ``v``: give it the
            parameters' dtype. Default: ``None``, as it is.

    Raises:
        ValueError: If stock MLX cannot go on as this optimizer would: it has no learning-rate decay, weight decay,
            maximize, groups, eps inside the root, averages and so on; or if there is no state yet.
        TypeError: If ``names`` is no mapping.
    """
    if names is not None and not isinstance(names, Mapping):
        raise TypeError(f"[checkpoint] 'names' must map their paths to ours but got {type(names).__name__}.")
    live, parts = export.parts(optimizer, names, "stock MLX", STOCK)
    if live.adagrad.groups.groups:
        raise ValueError("[checkpoint] the Adagrad of stock MLX has no groups.")
    if live.adagrad.rule.eps == 0:
        raise ValueError("[checkpoint] the Adagrad of stock MLX has no eps of 0.")
    if names is None and any(path != dotted(slot.keys) for path, slot in live.slots.items()):
        several = few(path for path, slot in live.slots.items() if path != dotted(slot.keys))
        raise ValueError(f"[checkpoint] MLX's strings cannot tell {several} apart: give them other 'names'.")
    vs = {f"{part.key}.{V}": part.v if dtype is None else part.v.astype(dtype) for part in parts}
    return {"step": live.adagrad.step, "learning_rate": live.adagrad.learning_rate, **vs}


def _flattened(state: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[str, Keys]]:
    """A state in names as in a file, and the keys to what its parameters have, by their paths there."""
    leaves = list(present(dict(state)))
    keys = labels(dict.fromkeys(keys[:-1] for keys, _ in leaves if len(keys) > 1))
    paths = {above: path for path, above in keys.items()}
    return {f"{paths[k[:-1]]}.{k[-1]}" if k[:-1] else str(*k): value for k, value in leaves}, keys


def _begin(live: Live, foreign: Foreign, source: Any, keys: dict[str, Keys]) -> Foreign:
    """Give an optimizer without state that of the file, as it is."""
    if not keys:
        _check_lists(foreign.tensors)
    states = {path: kinds[V].read() for path, kinds in foreign.tensors.items()}
    mx.eval(states)
    trees.fill(live.adagrad.state, _nested(states, source, keys))
    return replace(foreign, tensors={path: {V: entry_of(v)} for path, v in states.items()})


def _nested(states: dict[str, mx.array], source: Any, keys: dict[str, Keys]) -> dict[str, Any]:
    """What an optimizer has for its parameters: in the shape of the source, or as MLX takes its strings apart.

    Where those do not lead back to the same paths they stay whole: the next step finds the parameters that they mean.
    """
    if keys:
        new: dict[str, Any] = {}
        for path, v in states.items():
            slot(new, source, keys[path])[V] = v
        return new
    nested: Any = tree_unflatten({f"{path}.{V}": v for path, v in states.items()})
    same = isinstance(nested, dict) and {dotted(found.keys) for found in slots(nested)} == states.keys()
    return nested if same else {path: {V: v} for path, v in states.items()}


def _check_lists(paths: Iterable[str]) -> None:
    """Refuse indices far beyond the number of tensors: a list is made as long as its largest index."""
    longest: dict[str, int] = {}
    paths = list(paths)
    for path in paths:
        parts = path.split(".")
        for i, part in enumerate(parts):
            with suppress(ValueError):
                above = ".".join(parts[:i])
                longest[above] = max(longest.get(above, 0), int(part))
    if sum(longest.values()) > HOLES * (len(paths) + 10):
        where, index = max(longest.items(), key=lambda item: item[1])
        raise ValueError(
            f"the index {index} under '{where:.80}' is far beyond its {len(paths)} tensors: if it is right, call "
            "optimizer.init(model.trainable_parameters()) first"
        )


def _read(entries: dict[str, Entry]) -> Foreign:
    suffix = f".{V}"
    paths = [name.removesuffix(suffix) for name in entries if name.endswith(suffix)]
    if not paths or "step" not in entries:
        raise ValueError("it is no state of an Adagrad of MLX: it must have 'step' and '<path>.v'")
    unknown = [name for name in entries if not name.endswith(suffix) and name not in ("step", "learning_rate")]
    if unknown:
        raise ValueError(f"it is no state of an Adagrad of MLX: it has {unknown[0]!r:.80}")
    if any(path.count(".") > MAX_DEPTH for path in paths):
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    tensors: dict[Key, dict[str, Entry]] = {path: {V: entries[path + suffix]} for path in paths}
    rate = entries.get("learning_rate")
    rates = {} if rate is None else dict.fromkeys(tensors, float(sources.number("learning_rate", rate)))
    return Foreign(tensors, int(sources.number("step", entries["step"])), rates)
