"""The update of one tensor in MLX operations, on any device: read, step, write, compiled and in place where it pays."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import mlx.core as mx

from . import rule
from .accumulators import COMPUTE_DTYPE, Dense
from .rule import Form, Scalars

# From here on two single-output functions win over one function of two outputs: a primitive with one output writes into
# its input's buffer, and glibc maps larger allocations afresh each time (measured on Linux x86-64, MLX 0.32.4).
IN_PLACE_ELEMENTS = 2_000_000
# Between these sizes tensors are dealt over two CPU streams; smaller ones gain nothing, larger ones are bound by
# memory.
PARALLEL_ELEMENTS = 32_768
CPU_STREAMS = 2


def update(
    form: Form, accumulator: Dense, w: mx.array, g: mx.array, v: mx.array, scalars: Scalars
) -> tuple[mx.array, mx.array]:
    """The new ``(w, v)`` of one tensor: ``w`` keeps its dtype, ``v`` comes in the accumulator's.

    ``scalars`` are of the compute dtype of ``w``; ``g`` has the shape of ``w`` and any real dtype (complex for
    complex).
    """
    if w.dtype == mx.complex64:
        return _complex_update(form, accumulator, w, g, v, scalars)
    functions = _functions(form, accumulator, accumulator.storage_dtype(w))
    if w.size >= IN_PLACE_ELEMENTS:
        v = functions.accumulate(w, g, v, scalars)
        return functions.descend(w, g, v, scalars), v
    return functions.both(w, g, v, scalars)


def _complex_update(
    form: Form, accumulator: Dense, w: mx.array, g: mx.array, v: mx.array, scalars: Scalars
) -> tuple[mx.array, mx.array]:
    # torch's rule: the real and the imaginary part are two independent parameters
    g, v = g.astype(mx.complex64), v.astype(mx.complex64)
    parts = (update(form, accumulator, part(w), part(g), part(v), scalars) for part in (mx.real, mx.imag))
    (w_real, v_real), (w_imag, v_imag) = parts
    return w_real + 1j * w_imag, v_real + 1j * v_imag


class _Functions:
    """The update of one (form, accumulator, dtype of v), compiled: in one function, or in two that run in place."""

    def __init__(self, form: Form, accumulator: Dense, v_dtype: mx.Dtype):
        def accumulate(w: mx.array, g: mx.array, v: mx.array, s: Scalars) -> mx.array:
            w, g = _computing(w, g)
            total = rule.accumulate(form, w, g, accumulator.read(v, w), s, accumulator.pool)
            return accumulator.write(total, v_dtype)

        def descend(w: mx.array, g: mx.array, v: mx.array, s: Scalars) -> mx.array:
            storage = w.dtype
            w, g = _computing(w, g)
            return rule.descend(form, w, g, accumulator.read(v, w), s).astype(storage)

        def both(w: mx.array, g: mx.array, v: mx.array, s: Scalars) -> tuple[mx.array, mx.array]:
            storage = w.dtype
            w, g = _computing(w, g)
            total = rule.accumulate(form, w, g, accumulator.read(v, w), s, accumulator.pool)
            return rule.descend(form, w, g, total, s).astype(storage), accumulator.write(total, v_dtype)

        self.accumulate: Any = mx.compile(accumulate)
        self.descend: Any = mx.compile(descend)
        self.both: Any = mx.compile(both)


def _computing(w: mx.array, g: mx.array) -> tuple[mx.array, mx.array]:
    compute = COMPUTE_DTYPE[w.dtype]
    return w.astype(compute), g.astype(compute)


@cache
def _functions(form: Form, accumulator: Dense, v_dtype: mx.Dtype) -> _Functions:
    return _Functions(form, accumulator, v_dtype)


class StreamDealer:
    """Deals tensors over the CPU's streams, each to the one with the least work so far; a no-op on a GPU.

    One for each call of an optimizer. The streams belong to the calling thread, since MLX lets no other thread use
    them.
    """

    def __init__(self) -> None:
        self.work = [0] * CPU_STREAMS
        self.streams = _cpu_streams() if mx.default_device() == mx.cpu else None

    def place(self, tensor: mx.array) -> AbstractContextManager:
        """The stream on which to update ``tensor``, as a context."""
        if self.streams is None or not PARALLEL_ELEMENTS <= tensor.size < IN_PLACE_ELEMENTS:
            return nullcontext()
        least = self.work.index(min(self.work))
        self.work[least] += tensor.size
        stream = self.streams[least]
        return nullcontext() if stream is None else mx.stream(stream)


_thread = threading.local()


def _cpu_streams() -> list[mx.Stream | None]:
    if not hasattr(_thread, "streams"):
        _thread.streams = [None] + [mx.new_stream(mx.cpu) for _ in range(CPU_STREAMS - 1)]
    return _thread.streams
