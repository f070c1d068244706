"""``save`` and ``load``: a run's whole state in one safetensors file, and back into the live optimizer and model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.nn import Module
from mlx.optimizers import Optimizer

from ..distributed.layout import Layout
from ..distributed.sharding import Predicate
from ..trees import present
from ..update.compiled import clear_at_the_end
from ..wrappers.states import expect_new_state
from ..wrappers.swap import holds_averages
from . import safetensors, threads, trees
from .config import describe, differences, stack
from .fitted import fitted
from .opened import json_in, opened, unpacked
from .shared import agreed, layout_of, part_of
from .snapshots import TRAINABLE, Snapshot, check_path, check_run, parameters, taken


def save(
    path: str | os.PathLike,
    optimizer: Optimizer | Snapshot,
    model: Module | dict | None = None,
    *,
    trainable_only: bool = False,
    random_state: bool = False,
    notes: Mapping[str, Any] | None = None,
    group: mx.distributed.Group | None = None,
    sharded: Predicate | None = None,
) -> None:
    """Write the optimizer's state, and the model's parameters if given, as one safetensors file.

    The file appears whole or not at all: whatever happens meanwhile, ``path`` holds the old file or the new one. Every
    array keeps its dtype and every bit. State lies under ``optimizer.``, parameters under ``model.``; hyperparameters
    and the structure of the trees (lists, empty dicts) are in the metadata. Inside ``with optimizer.averaged(model)``
    the model's own weights are written, so that the run can go on; ``model.save_weights`` writes the averages there.

    Args:
        path: Where to write; a link is followed, an old file's permissions are kept.
        optimizer: Any ``mlx.optimizers.Optimizer``; or alone, what :func:`snapshot` returned.
        model: A module, or a tree of its parameters. Default: ``None``.
        trainable_only: Leave out the module's frozen parameters, such as the base of a LoRA run. Default: ``False``.
        random_state: Keep the state of ``mx.random``, this thread's, too. Default: ``False``.
        notes: What else to keep, such as the position in the data, in the types of JSON. Default: ``None``.
        group: Processes that train together, each of which calls this: the first writes whole
            arrays, the others wait for it. Default: ``None``.
        sharded: Where ``shard_inplace`` was used, its predicate (path, array). Default: ``None``, the model's layers
            tell which parameters are sharded.

    Raises:
        TypeError: If an argument is of another type (in another order), or the state holds what is no array, or the
            notes what JSON has not.
        ValueError: Inside ``mx.compile`` or another transformation, or if ``path`` is no file.
        RuntimeError: On another thread than the one that trains, while that may be in the middle of a step.
        OSError: If the file cannot be written; the old one is as it was.
    """
    check_path("save", path)
    if isinstance(optimizer, Snapshot):
        if model is not None or trainable_only or random_state or notes is not None or group is not None:
            raise TypeError("[checkpoint] what a snapshot holds was said when it was taken: save(path, snapshot).")
        return optimizer.save(path)
    check_run("save", optimizer, model)
    layout = layout_of(model, group, sharded)
    run = taken(optimizer, model, trainable_only, random_state, layout, notes)
    if layout is None:
        return run.save(path)
    agreed(layout.group, lambda: run.save(path) if layout.group.rank() == 0 else None)


def load(
    path: str | os.PathLike,
    optimizer: Optimizer,
    model: Module | dict | None = None,
    *,
    strict: bool = True,
    trainable_only: bool | None = None,
    random_state: bool | None = None,
    group: mx.distributed.Group | None = None,
    sharded: Predicate | None = None,
) -> None:
    """Put a saved run back into the live ``optimizer`` and ``model``, in place: a step compiled with them goes on.

    An optimizer that has seen no parameter takes the state as it is in the file; one that has must have the same names,
    shapes and dtypes. A learning rate that is a number comes from the file; other hyperparameters must be the same. A
    file with the trainable parameters only leaves the others as they are.

    Args:
        path: A file that :func:`save` wrote.
        optimizer: An optimizer built as the saved one was.
        model: A module, or a tree of its parameters, to load the saved parameters into. Default: ``None``.
        strict: Refuse other hyperparameters than the saved ones. ``False``: a ``v`` that was kept in another way (fp32,
            bf16, 8 bits) is converted, too. Default: ``True``.
        trainable_only: ``True``: load only what is trainable here, whatever else the file has; ``False``: refuse a file
            that has no more than the trainable parameters. Default: ``None``, what the file has.
        random_state: Put the saved state of ``mx.random`` back, for this thread. Default: ``None``, if it is there.
        group: Processes that train together, each of which calls this: each gets its part,
            or an error if another one has failed. Default: ``None``.
        sharded: Where ``shard_inplace`` was used, its predicate (path, array). Default: ``None``, the model's layers
            tell which parameters are sharded.

    Raises:
        ValueError: If the file is damaged, or does not fit; each difference is named. Or if the model holds averages at
            the moment (:meth:`~mlx_adagrad.wrappers.Wrapper.averaged`). Nothing has changed then.
        TypeError: If an argument is of another type (in another order).
        RuntimeError: On another thread than the one that trains, while that may be in the middle of a step.
        OSError: If the file cannot be read. Nothing has changed then.
    """
    check_path("load", path)
    check_run("load", optimizer, model)
    if trainable_only and not isinstance(model, Module):
        raise TypeError(f"[checkpoint] 'trainable_only' needs a module but got {type(model).__name__}.")
    if model is not None and holds_averages(model):
        raise ValueError("[checkpoint] 'model' holds averages: leave the 'with' block of 'averaged' before you load.")
    layout = layout_of(model, group, sharded)

    def read() -> Prepared:
        return _read(path, optimizer, model, strict, trainable_only, random_state, layout)

    prepared = read() if layout is None else agreed(layout.group, read, lambda prepared: prepared.told)
    _install(prepared, optimizer, model)


class Prepared(NamedTuple):
    """A file that has been read and checked: what it is to fill, with what, the seed of the random state, and what
    tells it from others: its metadata and its numbers, such as the step.
    """

    live: dict[str, Any]
    new: dict[str, Any]
    key: int | None
    told: str


def _read(
    path: str | os.PathLike,
    optimizer: Optimizer,
    model: Module | dict | None,
    strict: bool,
    trainable_only: bool | None,
    random_state: bool | None,
    layout: Layout | None,
) -> Prepared:
    with opened(path) as (entries, metadata):
        saved = unpacked(entries, metadata)
        if layout is not None:
            for name in ("optimizer", "model"):
                saved[name] = layout.parts(saved[name], name, part_of)
        saved["optimizer"] = trees.renamed(saved["optimizer"], optimizer.state)
        live = {"optimizer": optimizer.state}
        if model is not None:
            partial = metadata.get("model") == TRAINABLE
            live["model"], saved["model"] = _to_fill(model, saved["model"], partial, trainable_only)
        if not strict:
            saved["optimizer"] = fitted(saved["optimizer"], optimizer.state)
        problems = _other_hyperparameters(json_in(metadata, "config"), describe(optimizer)) if strict else []
        for name, tree in live.items():
            problems += trees.mismatches(saved[name], tree, name)
        problems += trees.surplus(saved["model"], live.get("model"), "model")
        if problems:
            raise ValueError(trees.listed(problems))
        key = _random_key(saved.get("random"), random_state, layout)
        new = trees.read({name: saved[name] for name in live})
        mx.eval(new)
        if isinstance(model, Module):  # in the module's own structure, so that nothing can be refused below
            trees.fill(live["model"], new["model"])
        numbers = [array.item() for _, array in present(new["optimizer"]) if array.ndim == 0]
        return Prepared(live, new, key, repr((sorted(metadata.items()), numbers)))


def _install(prepared: Prepared, optimizer: Optimizer, model: Module | dict | None) -> None:
    live, new, key, _ = prepared
    with threads.between_steps(optimizer, "load on that thread, between two steps"):
        pass
    trees.fill(live["optimizer"], new["optimizer"])
    expect_new_state(optimizer)
    if isinstance(model, Module):
        model.update(live["model"])
    elif model is not None:
        trees.fill(model, new["model"])
    if key is not None:
        mx.random.seed(key)


def read_notes(path: str | os.PathLike) -> dict[str, Any]:
    """The ``notes`` that were saved with a run; ``{}`` for a file without any.

    Raises:
        ValueError: If the file is damaged, or is none that :func:`save` wrote.
        OSError: If the file cannot be read.
    """
    check_path("read_notes", path)
    with opened(path) as (entries, metadata):
        unpacked(entries, metadata)
        notes = json_in(metadata, "notes") if "notes" in metadata else {}
        if not isinstance(notes, dict):
            raise ValueError("its notes are no mapping")
    return notes


def _to_fill(model: Module | dict, saved: Any, partial: bool, trainable_only: bool | None) -> tuple[Any, Any]:
    """The parameters that a file must fit, and what of the file fits them.

    All; of a file that is ``partial``, those that are trainable here and those that are in the file; or the trainable.
    """
    if saved is None:
        raise ValueError("it was saved without a model")
    if partial and trainable_only is False:
        raise ValueError("it was saved with the trainable parameters only (trainable_only=True)")
    tree = parameters(model)
    trainable = model.trainable_parameters() if isinstance(model, Module) else {}
    if trainable_only:
        return trees.part(tree, trainable), trees.part(saved, trainable)
    return (trees.part(tree, saved, trainable) if partial else tree), saved


def _random_key(saved: Any, wanted: bool | None, layout: Layout | None) -> int | None:
    """The seed that puts the saved state of ``mx.random`` back, None if it is to stay."""
    if wanted is False or (saved is None and wanted is None):
        return None
    if saved is None:
        raise ValueError("it was saved without the random state (random_state=True)")
    processes = 1 if layout is None else layout.group.size()
    if isinstance(saved, list) and len(saved) != processes:
        raise ValueError(f"its random state is that of {len(saved)} processes, and here are {processes}")
    entry = saved[0 if layout is None else layout.group.rank()] if isinstance(saved, list) else None
    if not isinstance(entry, safetensors.Entry) or (entry.shape, entry.dtype) != ((2,), mx.uint32):
        raise ValueError("its random state is none of mx.random")
    halves: Any = entry.read().tolist()
    clear_at_the_end()
    return halves[0] << 32 | halves[1]


def _other_hyperparameters(config: Any, own: Any) -> list[str]:
    """In words; between optimizers of other classes a list of what differs would help nobody.

    Raises:
        ValueError: If the classes differ.
    """
    if stack(config) != stack(own):
        raise ValueError(f"the optimizer is {stack(config):.200} in the file but {stack(own)} here")
    return list(differences(config, own))
