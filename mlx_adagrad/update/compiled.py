"""``mx.compile`` for module-level functions: whatever a thread compiles goes when the thread ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx


class Compiled(threading.local):
    """``function``, compiled by ``mx.compile`` anew on each thread that calls it.

    MLX keeps what a thread has compiled in a cache of that thread, which holds Python objects. If it still holds some
    when the thread ends, it takes the interpreter's lock to free them; where the interpreter ends at the same time, the
    process aborts (MLX 0.32.4: "terminate called without an active exception"). Python drops the attributes of a
    ``threading.local`` at the end of each thread, before ``join`` returns; a compiled function that is dropped takes
    its own entries out of the cache.
    """

    def __init__(self, function: Callable, shapeless: bool):  # Python calls it on each thread
        self.on_this_thread: Any = mx.compile(function, shapeless=shapeless)

    def __call__(self, *args: Any) -> Any:
        return self.on_this_thread(*args)


def compiled(function: Callable, *, shapeless: bool = False) -> Compiled:
    """``function`` under ``mx.compile``, for functions that outlive a thread; also a decorator.

    Args:
        function: Takes arrays and trees of them, and closes over no array.
        shapeless: As for ``mx.compile``. Default: ``False``.
    """
    return Compiled(function, shapeless)
