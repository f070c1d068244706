"""A run's whole state between two steps, which later steps do not change and any thread may write."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.nn import Module
from mlx.optimizers import Optimizer

from ..distributed.layout import Layout
from ..update.compiled import clear_at_the_end
from ..wrappers.swap import own_parameters
from . import safetensors, threads, trees
from .atomic import replacing
from .config import describe
from .shared import check_whole

FORMAT = "mlx_adagrad"
VERSION = 1
TRAINABLE = "trainable"  # the metadata's "model" where only the trainable parameters are in the file
ADVICE = "take checkpoint.snapshot(optimizer, model) there between two steps, and write it here: snapshot.save(path)"


class Snapshot:
    """What :func:`snapshot` returns: arrays in memory that nothing else changes, and the metadata of their file."""

    def __init__(self, arrays: dict[str, mx.array], metadata: dict[str, str]):
        self._arrays = arrays
        self._metadata = metadata

    @property
    def nbytes(self) -> int:
        """The bytes of its arrays; as long as it lives, the next step needs as much memory more."""
        return sum(array.nbytes for array in self._arrays.values())

    def save(self, path: str | os.PathLike) -> None:
        """Write the file that ``checkpoint.save`` would have written then; on any thread, also while training goes on.

        Args:
            path: Where to write; a link is followed, an old file's permissions are kept.

        Raises:
            ValueError: If ``path`` is something other than a file.
            TypeError: If ``path`` is no path.
            OSError: If the file cannot be written; the old one is as it was.
        """
        check_path("save", path)
        with replacing(path) as stream:
            safetensors.write_contiguous(stream, self._arrays, self._metadata)


def snapshot(
    optimizer: Optimizer,
    model: Module | dict | None = None,
    *,
    trainable_only: bool = False,
    random_state: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> Snapshot:
    """The state of a run between two steps, for another thread to write: ``snapshot.save(path)``.

    Take it on the thread that trains. Pending computations are evaluated, but nothing is copied: the next step writes
    to new memory where it would have reused the old.

    Args:
        optimizer: Any ``mlx.optimizers.Optimizer``.
        model: A module, or a tree of its parameters. Default: ``None``.
        trainable_only: Leave out the module's frozen parameters, such as the base of a LoRA run. Default: ``False``.
        random_state: Keep the state of ``mx.random``, this thread's. Default: ``False``.
        notes: What else to keep, such as the position in the data, in the types of JSON. Default: ``None``.

    Raises:
        TypeError: If an argument is of another type, or the state holds what is no array, or the notes what JSON lacks.
        ValueError: Inside ``mx.compile`` or another transformation, or if the model is sharded between processes.
        RuntimeError: On another thread than the one that trains, while that may be in the middle of a step.
    """
    check_whole(model)
    return taken(optimizer, model, trainable_only, random_state, None, notes)


def taken(
    optimizer: Optimizer,
    model: Module | dict | None,
    trainable_only: bool,
    random_state: bool,
    layout: Layout | None,
    notes: Mapping[str, Any] | None,
) -> Snapshot:
    """:func:`snapshot`, of whole arrays where the model is spread over processes; only the first can write it."""
    check_run("snapshot", optimizer, model)
    if trainable_only and not isinstance(model, Module):
        got = type(model).__name__
        raise TypeError(f"[checkpoint] 'trainable_only' needs a module, which knows what is frozen, but got {got}.")
    written = {} if notes is None else {"notes": _as_json(notes)}
    arrays: dict[str, mx.array] = {}
    with threads.between_steps(optimizer, ADVICE):
        run = {"optimizer": optimizer.state, "model": parameters(model, trainable_only)}
        if layout is not None:
            run = {name: layout.whole(tree, name) for name, tree in run.items()}
        structure = {name: trees.pack(tree, name, arrays) for name, tree in run.items()}
    if random_state:
        clear_at_the_end()  # to read it makes one for this thread
        key: mx.array = mx.random.state[0]  # type: ignore[index]
        keys = [key] if layout is None else [*mx.distributed.all_gather(key[None], group=layout.group)]
        structure["random"] = trees.pack(keys, "random", arrays)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": json.dumps(describe(optimizer)),
        "structure": json.dumps(structure),
    }
    return Snapshot(_kept(arrays), metadata | ({"model": TRAINABLE} if trainable_only else {}) | written)


def _as_json(notes: Mapping[str, Any]) -> str:
    if not isinstance(notes, Mapping):
        raise TypeError(f"[checkpoint] 'notes' must be a mapping but got {notes!r:.80}.")
    try:
        return json.dumps(dict(notes))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"[checkpoint] 'notes' must be of the types of JSON: {error}.") from error


def _kept(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Evaluated arrays of the same memory, which ``a += b`` and ``a[i] = b`` do not reach, nor MLX while they live."""
    try:
        mx.eval(arrays)
        kept = {name: mx.contiguous(array, stream=mx.cpu) for name, array in arrays.items()}
        mx.eval(kept)
    except RuntimeError as error:
        if "current thread" not in str(error):
            raise
        what = "another thread has begun to compute the state and has not evaluated it"
        raise RuntimeError(f"[checkpoint] {what}: {ADVICE}.") from error
    return kept


def parameters(model: Module | dict | None, trainable_only: bool = False) -> Any:
    """The parameters to save of a module or a tree, not the averages that may be in their place now."""
    if model is None:
        return None
    tree = own_parameters(model)
    return trees.part(tree, model.trainable_parameters()) if trainable_only and isinstance(model, Module) else tree


def check_path(function: str, path: Any) -> None:
    """Raise TypeError for what is no path, such as an optimizer in its place."""
    if not isinstance(path, str | bytes | os.PathLike):
        wanted = f"{function}(path, optimizer, model)"
        raise TypeError(f"[checkpoint] 'path' must be a path but got {type(path).__name__}: {wanted}.")


def check_run(function: str, optimizer: Any, model: Any) -> None:
    """Raise TypeError for arguments in another order."""
    order = f"{function}({'' if function == 'snapshot' else 'path, '}optimizer, model)"
    if not isinstance(optimizer, Optimizer):
        what = "an mlx.optimizers.Optimizer"
        raise TypeError(f"[checkpoint] 'optimizer' must be {what} but got {type(optimizer).__name__}: {order}.")
    if model is not None and not isinstance(model, Module | dict | list | tuple):
        what = "a module or a tree of its parameters"
        raise TypeError(f"[checkpoint] 'model' must be {what} but got {type(model).__name__}: {order}.")
