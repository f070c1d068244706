"""The update of one tensor in MLX operations, on any device: read, step, write, compiled and in place where it pays."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from . import rule
from .accumulators import COMPUTE_DTYPE, HALF, Dense, RowWise
from .batches import Batch, KnownSets, split
from .compiled import compiled
from .rule import Form, Scalars
from .streams import PARALLEL_ELEMENTS, StreamScheduler, in_place


class Functions:
    """The update of one (form, accumulator, dtype of v), compiled: in one function, or in two that run in place."""

    def __init__(self, form: Form, accumulator: Dense, v_dtype: mx.Dtype, shapeless: bool = False):
        self.v_dtype = v_dtype
        # Then both phases must be one: the update divides by the root of v before that is rounded, as the kernels do.
        # What underflows in fp16 would else leave a large gradient over a v of 0.
        self.rounds = v_dtype in HALF
        v_storage = mx.float32 if v_dtype == mx.complex64 else v_dtype  # of each part
        # w is held back by itself where the step does not happen: MLX fuses expressions of limited depth only
        always = form._replace(gated=False, guarded=False)

        def accumulate(w: mx.array, g: mx.array, v: mx.array, s: Scalars) -> mx.array:
            w, g = _computing(w, g)
            total = rule.accumulate(form, w, g, accumulator.read(v, w), s, accumulator.pool, v_storage)
            return accumulator.write(total, v_storage)

        def descend(w: mx.array, g: mx.array, v: mx.array, s: Scalars) -> mx.array:
            wide, g = _computing(w, g)
            return rule.descend(form, wide, g, accumulator.read(v, wide), s, w.dtype).astype(w.dtype)

        def both(w: mx.array, g: mx.array, v: mx.array, s: Scalars) -> tuple[mx.array, mx.array]:
            wide, g = _computing(w, g)
            old = accumulator.read(v, wide)
            total = rule.accumulate(always, wide, g, old, s, accumulator.pool)
            new = rule.descend(form, wide, g, total, s, w.dtype).astype(w.dtype)
            if form != always:  # said twice, MLX would split one kernel into three
                total = rule.accumulate(form, wide, g, old, s, accumulator.pool, v_storage)
            return new, accumulator.write(total, v_storage)

        def many(ws: list, gs: list, vs: list, s: Scalars) -> tuple[list[mx.array], list[mx.array]]:
            pairs = [both(w, g, v, s.at(i)) for i, (w, g, v) in enumerate(zip(ws, gs, vs, strict=True))]
            return [w for w, _ in pairs], [v for _, v in pairs]

        self.many: Any = compiled(many)
        # MLX 0.32.4 crashes on a shapeless reduction over an axis of length 1
        pools = shapeless and isinstance(accumulator, RowWise)
        self.accumulate: Any = accumulate if pools else compiled(accumulate, shapeless=shapeless)
        self.descend: Any = descend if pools else compiled(descend, shapeless=shapeless)
        self.both: Any = both if pools else compiled(both, shapeless=shapeless)

    def update(
        self, w: mx.array, g: mx.array, v: mx.array, scalars: Scalars, streams: StreamScheduler | None = None
    ) -> tuple[mx.array, mx.array]:
        """The new ``(w, v)`` of one tensor; ``w`` keeps its dtype.

        ``scalars`` are of the compute dtype of ``w``; ``g`` has the shape of ``w`` and any real dtype (complex for
        complex).
        """
        if self.v_dtype == mx.complex64:
            return self._complex_update(w, g, v, scalars)
        if streams is None:
            return self._real_update(w, g, v, scalars)
        stream, scalars = streams.assign(w.size, scalars)
        with stream:
            return self._real_update(w, g, v, scalars)

    def _real_update(self, w: mx.array, g: mx.array, v: mx.array, scalars: Scalars) -> tuple[mx.array, mx.array]:
        if self.rounds or not in_place(w.size):
            return self.both(w, g, v, scalars)
        v = self.accumulate(w, g, v, scalars)
        return self.descend(w, g, v, scalars), v

    def batches(self, w: mx.array) -> bool:
        """Whether tensors like ``w`` are to be collected for :meth:`update_many`."""
        return w.size < PARALLEL_ELEMENTS and self.v_dtype != mx.complex64

    def update_many(self, batch: Batch, streams: StreamScheduler) -> tuple[list[mx.array], list[mx.array]]:
        """:meth:`update` for many tensors, in as few calls as compile a bounded number of functions."""
        new_ws, new_vs = [], []
        for places in split(batch.kinds, KnownSets()):
            part = batch.part(places)
            stream, scalars = streams.assign(len(part.ws) * part.ws[0].size, part.scalars)
            with stream:
                ws, vs = self.many(part.ws, part.gs, part.vs, scalars)
            new_ws += ws
            new_vs += vs
        return new_ws, new_vs

    def _complex_update(self, w: mx.array, g: mx.array, v: mx.array, scalars: Scalars) -> tuple[mx.array, mx.array]:
        # torch's rule: the real and the imaginary part are two independent parameters
        g, v = g.astype(mx.complex64), v.astype(mx.complex64)
        parts = [self.both(part(w), part(g), part(v), scalars) for part in (mx.real, mx.imag)]
        (w_real, v_real), (w_imag, v_imag) = parts
        return join(w_real, w_imag), join(v_real, v_imag)


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
