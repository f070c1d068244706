"""Whether another thread may be in the middle of a step: MLX breaks down where two threads evaluate one graph."""

from __future__ import annotations

import linecache
import opcode
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mlx.optimizers import Optimizer

from ..configurable import Configurable

# Where a thread waits for others, or hands a result on to them: it evaluates nothing meanwhile.
POOLS = ("asyncio", "concurrent.futures")
MODULES = ("threading", "queue", "selectors", "multiprocessing")
FUNCTIONS = ("wait", "join", "_wait_for_tstate_lock", "acquire", "__enter__", "select", "get", "put", "_recv", "poll")
ENTERS_WITH = ("BEFORE_WITH", "SETUP_WITH", "LOAD_SPECIAL")  # ``with lock:``, by version of Python
PATIENCE = 1.0  # seconds in which a thread gets to a lock that this one holds, or to where it waits for more work
POLL = 0.002  # seconds between two looks


@contextmanager
def between_steps(optimizer: Optimizer, what: str) -> Iterator[None]:
    """A context to look at the state in, if no other thread updates the optimizer, or that one waits all the time.

    Args:
        optimizer: Any optimizer; only those of this package know which thread updates them.
        what: What to do instead, for the message.

    Raises:
        RuntimeError: If another thread may be in the middle of a step, before the block or after it.
    """
    others = [part for part in _marked(optimizer) if part.updated_on not in (None, threading.get_ident())]
    threads = dict.fromkeys(part.updated_on for part in others)
    before = [part.step for part in others]
    for thread in threads:
        _refuse_step(thread, what)
    yield
    stepped = any(part.step is not step for part, step in zip(others, before, strict=True))
    for thread in threads:
        _refuse_step(thread, what, stepped)


def _refuse_step(thread: int, what: str, stepped: bool = False) -> None:
    end = time.monotonic() + PATIENCE
    while not stepped:
        frame = sys._current_frames().get(thread)
        if frame is None or _waits(frame):
            return
        if time.monotonic() > end:
            break
        time.sleep(POLL)
    named = (other.name for other in threading.enumerate() if other.ident == thread)
    why = f"'{next(named, 'another thread')}' updates this optimizer and may be in the middle of a step"
    raise RuntimeError(f"[checkpoint] {why}: {what}.")


def _marked(optimizer: Any) -> Iterator[Any]:
    """The optimizers of this package in it, which know the thread that updates them."""
    if isinstance(optimizer, Configurable):
        yield optimizer
    inner = getattr(optimizer, "optimizer", None)
    for part in (*getattr(optimizer, "optimizers", ()), *([] if inner is None else [inner])):
        yield from _marked(part)


def _waits(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    if any(module == name or module.startswith(f"{name}.") for name in POOLS):
        return True
    if any(module == name or module.startswith(f"{name}.") for name in MODULES):
        return frame.f_code.co_name in FUNCTIONS
    if ".acquire(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
        return True
    at = frame.f_lasti
    return at >= 0 and opcode.opname[frame.f_code.co_code[at]] in ENTERS_WITH
