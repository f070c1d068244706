"""The update of one tensor in MLX operations, on any device: read, step, write, compiled and in place where it pays."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import mlx.core as mx

from . import rule
from .accumulators import COMPUTE_DTYPE, HALF, Dense, RowWise
from .rule import Form, Scalars

# From here on (32 MiB of fp32) two single-output functions win over one function of two outputs: a primitive with one
# output writes into its input's buffer, while glibc maps allocations of this size afresh each time (measured on Linux
# x86-64, MLX 0.32.4: at 8.0M elements 18 ms in one pass and 26 in place, at 8.5M 45 and 22).
IN_PLACE_ELEMENTS = 2**23
# Work on this many elements (a tensor, or a batch of small ones) is dealt over the CPU's streams; less gains nothing.
PARALLEL_ELEMENTS = 32_768
# More than the two cores this was measured on: while one stream waits for its next task, another has one (448 tensors
# of 8 x 512 take 7 % less time than on two streams, large tensors the same).
CPU_STREAMS = 4
# One tensor in place keeps one core busy, most of the time with square roots. If it outweighs all others, its steps are
# therefore computed on two streams and added to it in turns: a large piece from the second stream, and small ones from
# the first, which also accumulates and adds (4000 x 4000: 36 ms instead of 40). About six turns are under way at once,
# 6 MB of fp32: larger pieces would be faster, at the price of memory.
LARGE_PIECE, SMALL_PIECE, SMALL_PIECES = 160_000, 32_000, 3
# Smaller tensors of one shape are updated this many in one compiled call: a call costs about as much as a small update.
BATCH = 16

_thread = threading.local()


class Functions:
    """The update of one (form, accumulator, dtype of v), compiled: in one function, or in two that run in place."""

    def __init__(self, form: Form, accumulator: Dense, v_dtype: mx.Dtype, shapeless: bool = False):
        self.v_dtype = v_dtype
        # Then both phases must be one: the update divides by the root of v before that is rounded, as the kernels do.
        # What underflows in fp16 would else leave a large gradient over a v of 0.
        self.rounds = v_dtype in HALF
        v_storage = mx.float32 if v_dtype == mx.complex64 else v_dtype  # of each part

        def accumulate(w: mx.array, g: mx.array, v: mx.array, s: Scalars) -> mx.array:
            w, g = _computing(w, g)
            total = rule.accumulate(form, w, g, accumulator.read(v, w), s, accumulator.pool)
            return accumulator.write(total, v_storage)

        def descend(w: mx.array, g: mx.array, v: mx.array, s: Scalars) -> mx.array:
            storage = w.dtype
            w, g = _computing(w, g)
            return rule.descend(form, w, g, accumulator.read(v, w), s).astype(storage)

        def negative_step(g: mx.array, v: mx.array, s: Scalars) -> mx.array:
            g = g.astype(s.lr.dtype)
            return -rule.quotient(form, None, g, accumulator.read(v, g), s)

        def both(w: mx.array, g: mx.array, v: mx.array, s: Scalars) -> tuple[mx.array, mx.array]:
            storage = w.dtype
            w, g = _computing(w, g)
            total = rule.accumulate(form, w, g, accumulator.read(v, w), s, accumulator.pool)
            return rule.descend(form, w, g, total, s).astype(storage), accumulator.write(total, v_storage)

        def many(ws: list, gs: list, vs: list, s: Scalars) -> tuple[list[mx.array], list[mx.array]]:
            pairs = [both(w, g, v, s) for w, g, v in zip(ws, gs, vs, strict=True)]
            return [w for w, _ in pairs], [v for _, v in pairs]

        self.many: Any = mx.compile(many)
        # MLX 0.32.4 crashes on a shapeless reduction over an axis of length 1
        pools = shapeless and isinstance(accumulator, RowWise)
        self.accumulate: Any = accumulate if pools else mx.compile(accumulate, shapeless=shapeless)
        self.descend: Any = descend if pools else mx.compile(descend, shapeless=shapeless)
        self.negative_step: Any = mx.compile(negative_step)
        # Only a step that does not read w can be added to it: w would be copied for its readers
        self.adds = not (form.coupled or form.decoupled or form.gated)
        self.both: Any = both if pools else mx.compile(both, shapeless=shapeless)

    def update(
        self, w: mx.array, g: mx.array, v: mx.array, scalars: Scalars, dealer: StreamDealer | None = None
    ) -> tuple[mx.array, mx.array]:
        """The new ``(w, v)`` of one tensor; ``w`` keeps its dtype.

        ``scalars`` are of the compute dtype of ``w``; ``g`` has the shape of ``w`` and any real dtype (complex for
        complex).
        """
        if self.v_dtype == mx.complex64:
            return self._complex_update(w, g, v, scalars)
        if dealer is None:
            return self._real_update(w, g, v, scalars)
        # MLX's vmap adds to a slice of the first member only, and a shapeless trace has no slices
        if self.adds and w.dtype == scalars.lr.dtype and dealer.cuts(w) and not is_traced(w, g, v, *scalars):
            return self._update_in_pieces(w, g, v, scalars, dealer)
        stream, scalars = dealer.deal(w.size, scalars)
        with stream:
            return self._real_update(w, g, v, scalars)

    def _real_update(self, w: mx.array, g: mx.array, v: mx.array, scalars: Scalars) -> tuple[mx.array, mx.array]:
        if w.size < IN_PLACE_ELEMENTS or self.rounds:
            return self.both(w, g, v, scalars)
        v = self.accumulate(w, g, v, scalars)
        return self.descend(w, g, v, scalars), v

    def _update_in_pieces(
        self, w: mx.array, g: mx.array, v: mx.array, scalars: Scalars, dealer: StreamDealer
    ) -> tuple[mx.array, mx.array]:
        """:meth:`update` in place on two cores, with the same bits: ``w + -step`` is ``w - step``."""
        v = self.accumulate(w, g, v, scalars)
        start, turns = 0, itertools.cycle(dealer.turn(w))
        while start < len(w):
            rows, stream = next(turns)
            piece = slice(start, start + rows)
            with stream:  # slicing, too: else this stream would wait for the other before each piece
                step = self.negative_step(g[piece], v[piece], scalars)
            w = w.at[piece].add(step)
            start += rows
        return w, v

    def batches(self, w: mx.array) -> bool:
        """Whether tensors like ``w`` are to be collected for :meth:`update_many`."""
        return w.size < PARALLEL_ELEMENTS and self.v_dtype != mx.complex64

    def update_many(
        self, ws: list[mx.array], gs: list[mx.array], vs: list[mx.array], scalars: Scalars, dealer: StreamDealer
    ) -> tuple[list[mx.array], list[mx.array]]:
        """:meth:`update` for many tensors of one shape, in as few calls as compile a bounded number of functions."""
        new_ws, new_vs, size = [], [], BATCH
        while (done := len(new_ws)) < len(ws):
            while size > len(ws) - done:
                size //= 2  # 8, 4, 2, 1: a set of tensors that changes from step to step must not compile anew for ever
            batch = slice(done, done + size)
            stream, own_scalars = dealer.deal(size * ws[0].size, scalars)
            with stream:
                updated = self.many(ws[batch], gs[batch], vs[batch], own_scalars)
            new_ws += updated[0]
            new_vs += updated[1]
        return new_ws, new_vs

    def _complex_update(self, w: mx.array, g: mx.array, v: mx.array, scalars: Scalars) -> tuple[mx.array, mx.array]:
        # torch's rule: the real and the imaginary part are two independent parameters
        g, v = g.astype(mx.complex64), v.astype(mx.complex64)
        parts = [self.both(part(w), part(g), part(v), scalars) for part in (mx.real, mx.imag)]
        (w_real, v_real), (w_imag, v_imag) = parts
        return join(w_real, w_imag), join(v_real, v_imag)


def is_traced(*arrays: mx.array | None) -> bool:
    """Whether a transformation (``mx.compile``, ``vmap``, ``grad``, export) sees one of these; evaluates nothing.

    MLX calls the Python function behind a compiled one anew for arrays that are being traced.
    """
    given = [array for array in arrays if array is not None]
    _probe(*given)  # compiled for as many arrays now, if it was not before
    _thread.probe_ran = False
    _probe(*given)
    return _thread.probe_ran


@partial(mx.compile, shapeless=True)
def _probe(*_arrays: mx.array) -> list[mx.array]:
    _thread.probe_ran = True
    return []


def join(real: mx.array, imaginary: mx.array) -> mx.array:
    """The complex64 array of two parts, each as it is: ``1j * inf`` would put a NaN into the other part."""
    exact = mx.stack([real, imaginary], axis=-1).view(mx.complex64).squeeze(-1)
    finite = mx.logical_and(mx.isfinite(real), mx.isfinite(imaginary))
    return mx.where(finite, real + 1j * imaginary, mx.stop_gradient(exact))  # a view has no derivative


def _computing(w: mx.array, g: mx.array) -> tuple[mx.array, mx.array]:
    compute = COMPUTE_DTYPE[w.dtype]
    return w.astype(compute), g.astype(compute)


@cache
def functions(form: Form, accumulator: Dense, v_dtype: mx.Dtype, shapeless: bool = False) -> Functions:
    """The compiled functions, one set for each combination; ``shapeless``: those for one tensor take any number of rows
    without compiling anew.
    """
    return Functions(form, accumulator, v_dtype, shapeless)


class StreamDealer:
    """Deals work over the CPU's streams, each time to the one with the least so far; a no-op on a GPU.

    One for each call of an optimizer. The streams belong to the calling thread, since MLX lets no other thread use
    them.
    """

    def __init__(self) -> None:
        self.work = [0] * CPU_STREAMS
        self.parameters: Sequence[mx.array] = ()  # all that this call updates
        self.on_cpu = mx.default_device() == mx.cpu
        self._own: dict[tuple[int, int], tuple[Scalars, Scalars]] = {}

    def deal(self, size: int, scalars: Scalars) -> tuple[AbstractContextManager, Scalars]:
        """The stream on which to update ``size`` elements, as a context, and the scalars to use there."""
        if size < PARALLEL_ELEMENTS or not self.on_cpu:
            return nullcontext(), scalars
        least = self.work.index(min(self.work))
        self.work[least] += size
        if least == 0:
            return nullcontext(), scalars
        return mx.stream(_extra_streams()[least - 1]), self._own_scalars(least - 1, scalars)

    def cuts(self, w: mx.array) -> bool:
        """Whether to update ``w`` in pieces: in place, a core would have nothing else to do, as far as this optimizer
        knows, and its rows are short.
        """
        if w.size < IN_PLACE_ELEMENTS or w.size > SMALL_PIECE * len(w) or not self.on_cpu:
            return False
        return 2 * w.size > sum(p.size for p in self.parameters)

    def turn(self, w: mx.array) -> list[tuple[int, AbstractContextManager]]:
        """The pieces of a turn: how many rows of ``w``, and the stream that computes their step."""
        large, small = (elements * len(w) // w.size for elements in (LARGE_PIECE, SMALL_PIECE))
        return [(large, mx.stream(_extra_streams()[0])), *[(small, nullcontext())] * SMALL_PIECES]

    def _own_scalars(self, extra: int, scalars: Scalars) -> Scalars:
        # Inside a user's mx.compile equal operations on one array become one, on whichever stream, and what crosses
        # streams is not fused: 1.2 times slower (12 tensors of 1024 x 1024). Aliases keep the scalars apart, for each
        # stream one more alias of an alias, since equal ones would become one too.
        key = extra, id(scalars)
        if key not in self._own:
            tiny = mx.array(rule.SMALLEST_NORMAL[scalars.lr.dtype], scalars.lr.dtype)
            given = {name: s for name, s in scalars._replace(tiny=tiny)._asdict().items() if s is not None}
            with mx.stream(_extra_streams()[extra]):
                for _ in range(extra + 1):
                    # an alias that, unlike mx.contiguous, can be exported
                    given = {name: mx.squeeze(mx.expand_dims(s, 0), 0) for name, s in given.items()}
            own = scalars._replace(**given)
            self._own[key] = scalars, own  # both: once freed, other scalars could get that id
        return self._own[key][1]


def beside(size: int) -> AbstractContextManager:
    """For work on ``size`` elements that need not wait for other work: a second stream of the CPU, as a context."""
    worth_it = size >= PARALLEL_ELEMENTS and mx.default_device() == mx.cpu
    return mx.stream(_extra_streams()[0]) if worth_it else nullcontext()


def _extra_streams() -> list[mx.Stream]:
    """The CPU streams beside the default one, the calling thread's own."""
    if not hasattr(_thread, "streams"):
        _thread.streams = [mx.new_stream(mx.cpu) for _ in range(CPU_STREAMS - 1)]
    return _thread.streams
