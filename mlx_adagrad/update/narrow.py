"""The update of one tensor whose weights or ``v`` are rounded with care (stochastic, compensated, in 8 bits), in MLX
operations. The counterpart of ``ops``, which rounds to nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import mlx.core as mx

from . import quantization, rounding, rule
from .accumulators import COMPUTE_DTYPE, EXPONENTS, HALF, Dense
from .compiled import compiled
from .rule import Form, Scalars
from .storage import COMPENSATION, Storage
from .streams import StreamScheduler

Kept = dict[str, mx.array]


class Kind(NamedTuple):
    """What decides which code updates a tensor, apart from the formula."""

    accumulator: Dense
    rounding: str
    w_dtype: mx.Dtype
    v_dtype: mx.Dtype
    differentiable: bool

    @classmethod
    def of(cls, storage: Storage, w: mx.array, differentiable: bool) -> Kind:
        """The kind of a parameter."""
        accumulator = storage.accumulator.at(w)
        return cls(accumulator, storage.rounding_of(w), w.dtype, accumulator.storage_dtype(w), differentiable)

    @property
    def quantized(self) -> bool:
        """Whether ``v`` is kept in 8 bits."""
        return self.v_dtype == mx.uint8

    @property
    def v_is_random(self) -> bool:
        """Whether ``v`` is rounded with random bits, to bf16."""
        return self.accumulator.dtype == "bfloat16"


class Functions:
    """The update of one kind of tensor under one form of the formula, compiled."""

    def __init__(self, form: Form, kind: Kind):
        self.form, self.kind = form, kind
        wrap: Callable = rounding.straight_through if kind.differentiable else lambda function: function
        self._round_w = wrap(partial(rounding.stochastic, dtype=kind.w_dtype)) if kind.w_dtype in HALF else None
        self._round_v = wrap(partial(rounding.stochastic, dtype=mx.bfloat16))
        self._dense: Any = compiled(self._update)

    def update(
        self, w: mx.array, g: mx.array, kept: Kept, s: Scalars, key: mx.array, streams: StreamScheduler | None = None
    ) -> tuple[mx.array, Kept]:
        """The new weights and state.

        Args:
            w: The weights.
            g: The gradient, of the shape of ``w`` and any real dtype.
            kept: The arrays of its state.
            s: The numbers of the step, in the compute dtype of ``w``.
            key: The key of the parameter in this step, four words.
            streams: Where to run it. Default: ``None``, on the default stream.
        """
        if w.size == 0:
            return w, kept
        if streams is None:
            return self._dense(w, g, kept, s, key)
        stream, s = streams.assign(w.size, s)
        with stream:
            return self._dense(w, g, kept, s, key)

    def _update(self, w: mx.array, g: mx.array, kept: Kept, s: Scalars, key: mx.array) -> tuple[mx.array, Kept]:
        new, total = self.computed(w, g, kept, self.read_v(kept, w), s)
        weights = self.weights(new, lambda: rounding.all_halves(w.shape, key[:2]))
        if self.kind.quantized:
            stored = self.encoded(total, kept[EXPONENTS], rounding.all_words(w.shape, key[2:]))
        else:
            stored = {"v": self.stored_v(total, lambda: rounding.all_halves(kept["v"].shape, key[2:]))}
        return self.gated(s.apply, w, kept, *weights, stored)

    def read_v(self, kept: Kept, w: mx.array) -> mx.array:
        """``v`` as the update computes with it."""
        if self.kind.quantized:
            return quantization.decode(kept["v"], kept[EXPONENTS]).astype(COMPUTE_DTYPE[w.dtype])
        return self.kind.accumulator.read(kept["v"], mx.zeros((1,) * w.ndim, COMPUTE_DTYPE[w.dtype]))

    def computed(self, w: mx.array, g: mx.array, kept: Kept, v: mx.array, s: Scalars) -> tuple[mx.array, mx.array]:
        """The new weights and ``v``, neither rounded yet."""
        compute = COMPUTE_DTYPE[w.dtype]
        w, g = w.astype(compute), g.astype(compute)
        if COMPENSATION in kept:
            w = w + kept[COMPENSATION].astype(compute)
        total = rule.accumulate(self.form, w, g, v, s, self.kind.accumulator.pool)
        return rule.descend(self.form, w, g, total, s, self.kind.w_dtype), total

    def weights(self, new: mx.array, bits: Callable[[], mx.array]) -> tuple[mx.array, Kept]:
        """The new weights as they are stored, and what is kept beside them."""
        if self.kind.rounding == "compensated":
            w, rest = rounding.compensated(new, self.kind.w_dtype)
            return w, {COMPENSATION: rest}
        if self._round_w is not None and self.kind.rounding == "stochastic":
            return self._round_w(new, bits()), {}
        return new.astype(self.kind.w_dtype), {}

    def stored_v(self, total: mx.array, bits: Callable[[], mx.array]) -> mx.array:
        """``v`` as it is stored, where it is not in 8 bits."""
        total = self.kind.accumulator.write(total, total.dtype)
        if self.form.guarded:
            total = mx.minimum(total, rule.LARGEST[self.kind.v_dtype])
        return self._round_v(total, bits()) if self.kind.v_is_random else total.astype(self.kind.v_dtype)

    def encoded(self, total: mx.array, exponents: mx.array, bits: mx.array) -> Kept:
        """``v`` in 8 bits, with exponents that are at least the given ones."""
        total = mx.stop_gradient(total).astype(mx.float32)  # codes have no derivative
        codes, new = quantization.encode(total, exponents, bits)
        return {"v": codes, EXPONENTS: new}

    def gated(
        self, acts: mx.array | None, w: mx.array, kept: Kept, new_w: mx.array, rest: Kept, stored: Kept
    ) -> tuple[mx.array, Kept]:
        """The new values where ``acts`` says so, else the old ones, bit for bit."""
        new = {**kept, **stored, **rest}
        if acts is None:
            return new_w, new

        def chosen(new: mx.array, old: mx.array) -> mx.array:
            where = acts.reshape(-1, *(1,) * (new.ndim - 1)) if acts.ndim else acts
            return mx.where(where, new, old.astype(new.dtype))

        return chosen(new_w, w), {key: chosen(new[key], kept[key]) for key in new}


@cache
def functions(form: Form, kind: Kind) -> Functions:
    """The compiled functions, one set for each combination."""
    return Functions(form, kind)
