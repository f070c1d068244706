"""The device that a step is for: MLX's default device, or the one that an export is being traced for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

_thread = threading.local()


def on_gpu() -> bool:
    """Whether the step is for a GPU."""
    return _traced_for_gpu() or mx.default_device() == mx.gpu


def on_cpu() -> bool:
    """Whether the step is for the CPU."""
    return not on_gpu()


def has_metal() -> bool:
    """Whether kernels can be launched, or recorded for a GPU that this machine does not have."""
    return _traced_for_gpu() or mx.metal.is_available()


def _traced_for_gpu() -> bool:
    return getattr(_thread, "traced_for_gpu", False)


@contextmanager
def traced_for_gpu() -> Iterator[None]:
    """Let this thread's steps be recorded as they run on an Apple GPU, also where there is none."""
    before = _traced_for_gpu()
    _thread.traced_for_gpu = True
    try:
        yield
    finally:
        _thread.traced_for_gpu = before
