"""``mx.compile`` for functions that all threads share, and the end of a thread.

MLX keeps what a thread has compiled, and its random state, in storage of that thread which holds Python objects. If
some are left when the thread ends, MLX takes the interpreter's lock to free them; where the interpreter ends meanwhile,
the process aborts (MLX 0.32.4: "terminate called without an active exception"). So they go earlier: Python drops the
attributes of a ``threading.local`` while the thread still holds the lock, before ``join`` returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx

_thread = threading.local()


class Compiled(threading.local):
    """``function``, compiled by ``mx.compile`` anew on each thread that calls it.

    A compiled function that is dropped takes its own entries out of the cache.
    """

    def __init__(self, function: Callable, shapeless: bool):  # Python calls it on each thread
        self.on_this_thread: Any = mx.compile(function, shapeless=shapeless)
        clear_at_the_end()

    def __call__(self, *args: Any) -> Any:
        return self.on_this_thread(*args)


def compiled(function: Callable, *, shapeless: bool = False) -> Compiled:
    """``function`` under ``mx.compile``, for functions that outlive a thread; also a decorator.

    Args:
        function: Takes arrays and trees of them, and closes over no array.
        shapeless: As for ``mx.compile``. Default: ``False``.
    """
    return Compiled(function, shapeless)


def clear_at_the_end() -> None:
    """Let MLX free all that it keeps for this thread when Python's part of it ends, also what others have left there.

    Only where nothing runs on the thread afterwards: not on the main thread, nor on one that Python has not started.
    """
    thread = threading.current_thread()
    if hasattr(_thread, "end") or thread is threading.main_thread() or isinstance(thread, threading._DummyThread):
        return
    _thread.end = _End()


class _End:
    """The end of the thread that it was made on."""

    def __init__(self):
        self.thread = threading.get_native_id()

    def __del__(self):
        # elsewhere where threads are emulated, and at the end of the process
        if self.thread == threading.get_native_id() != threading.main_thread().native_id:
            mx.clear_streams()
