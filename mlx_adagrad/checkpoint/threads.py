"""Whether another thread may be in the middle of a step: MLX breaks down where two threads evaluate one graph."""

from __future__ import annotations

import opcode
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mlx.optimizers import Optimizer

from ..adagrad import Adagrad

# Where a thread waits for others, or hands a result on to them: it evaluates nothing meanwhile.
POOLS = ("asyncio", "concurrent.futures")
MODULES = ("threading", "queue", "selectors", "multiprocessing")
FUNCTIONS = ("wait", "join", "_wait_for_tstate_lock", "acquire", "__enter__", "select", "get", "put", "_recv", "poll")
ENTERS_WITH = ("BEFORE_WITH", "SETUP_WITH", "LOAD_SPECIAL")  # ``with lock:``, by version of Python
PATIENCE = 0.1  # seconds in which a thread that is done gets to where it waits for more


@contextmanager
def between_steps(optimizer: Optimizer, what: str) -> Iterator[None]:
    """A context to look at the state in, if no other thread updates the optimizer, or that one waits all the time.

    Args:
        optimizer: Any optimizer; only those of this package know which thread updates them.
        what: What to do instead, for the message.

    Raises:
        RuntimeError: If another thread may be in the middle of a step, before the block or after it.
    """
    others = [adagrad for adagrad in _adagrads(optimizer) if adagrad.updated_on not in (None, threading.get_ident())]
    before = [adagrad.step for adagrad in others]
    for adagrad in others:
        _refuse_step(adagrad, what)
    yield
    for adagrad, step in zip(others, before, strict=True):
        _refuse_step(adagrad, what, adagrad.step is not step)


def _refuse_step(adagrad: Adagrad, what: str, stepped: bool = False) -> None:
    end = time.monotonic() + PATIENCE
    while not stepped:
        frame = sys._current_frames().get(adagrad.updated_on or 0)
        if frame is None or _waits(frame):
            return
        if time.monotonic() > end:
            break
        time.sleep(PATIENCE / 50)
    named = (thread.name for thread in threading.enumerate() if thread.ident == adagrad.updated_on)
    why = f"'{next(named, 'another thread')}' updates this optimizer and may be in the middle of a step"
    raise RuntimeError(f"[checkpoint] {why}: {what}.")


def _adagrads(optimizer: Any) -> Iterator[Adagrad]:
    if isinstance(optimizer, Adagrad):
        yield optimizer
    inner = getattr(optimizer, "optimizer", None)
    for part in (*getattr(optimizer, "optimizers", ()), *([] if inner is None else [inner])):
        yield from _adagrads(part)


def _waits(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    if any(module == name or module.startswith(f"{name}.") for name in POOLS):
        return True
    if any(module == name or module.startswith(f"{name}.") for name in MODULES):
        return frame.f_code.co_name in FUNCTIONS
    at = frame.f_lasti
    return at >= 0 and opcode.opname[frame.f_code.co_code[at]] in ENTERS_WITH
