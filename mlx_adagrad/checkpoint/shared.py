"""One file for several processes: whole arrays, written by the first of them; each reads its part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from zlib import crc32

import mlx.core as mx
from mlx.nn import Module

from ..distributed.groups import check_group
from ..distributed.layout import Layout
from ..distributed.sharding import Predicate, cuts_of
from ..trees import dotted
from .safetensors import Entry

Result = TypeVar("Result")
Group = mx.distributed.Group


def layout_of(model: Any, group: Group | None, sharded: Predicate | None) -> Layout | None:
    """How the model is spread over the processes; None where there is only this one.

    Raises:
        TypeError: If ``group`` is no group, ``sharded`` cannot be called, or the model is no module.
        ValueError: If ``sharded`` is given without ``group``, or the model is sharded and there is no group.
    """
    if group is None:
        if sharded is not None:
            raise ValueError("[checkpoint] 'sharded' needs 'group', the processes that have the parts.")
        check_whole(model)
        return None
    check_group("checkpoint", group)
    if sharded is not None and not callable(sharded):
        raise TypeError(f"[checkpoint] 'sharded' must be callable but got {type(sharded).__name__}.")
    if group.size() == 1:
        return None
    if not isinstance(model, Module):
        got = type(model).__name__
        raise TypeError(f"[checkpoint] 'group' needs a module, which knows what is sharded, but got {got}.")
    return Layout(model, group, sharded)


def check_whole(model: Any) -> None:
    """Raise ValueError for a model of which this process has a part only."""
    for keys in cuts_of(model):
        raise ValueError(
            f"[checkpoint] '{dotted(keys)}' is sharded, so this process has a part of it: call save and load in every "
            "process with 'group', the processes that have the parts."
        )


def agreed(group: Group, action: Callable[[], Result], digest: Callable[[Result], str] | None = None) -> Result:
    """The result of ``action`` if it has succeeded in every process; all wait for each other.

    Args:
        group: The processes.
        action: What each of them does.
        digest: Of the result, what must be equal in all processes.

    Raises:
        RuntimeError: If it has failed in another process, or the results differ.
        Exception: What ``action`` has raised here.
    """
    error, result = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    number = 0 if error is not None or digest is None else crc32(digest(result).encode()) >> 1  # type: ignore[arg-type]
    told = mx.array([int(error is not None), number, -number], mx.int32)
    answers: Any = mx.distributed.all_max(told, group=group, stream=mx.cpu).tolist()
    failed, largest, smallest = answers
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("[checkpoint] another process has failed; nothing has changed here.")
    if largest != -smallest:
        raise RuntimeError("[checkpoint] the processes do not read the same file; nothing has changed.")
    return result  # type: ignore[return-value]


def part_of(entry: Entry, shape: tuple[int, ...], cut: Callable[[mx.array], mx.array]) -> Entry:
    """The entry of a part of an array in a file."""

    def read() -> mx.array:
        with mx.stream(mx.cpu):
            return cut(entry.read())

    return Entry(shape, entry.dtype, read)
