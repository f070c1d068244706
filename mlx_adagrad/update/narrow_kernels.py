"""The Metal kernels of weights and accumulators that are rounded with care: the launches, ``narrow`` in Metal."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from . import kernels, quantization
from .accumulators import EXPONENTS, Dense, Quantized, RowWise
from .narrow import Functions, Kept
from .rule import KERNEL_SCALARS, Scalars
from .storage import COMPENSATION, Storage

# Elements of a block that one thread keeps in registers, and what a threadgroup of 256 can take at most.
LARGEST_BLOCK = 4 * kernels.THREADS
SIMDGROUP = 32


def supports(storage: Storage, w: mx.array, g: Any, differentiable: bool, by_rows: bool) -> bool:
    """Whether there is a kernel for these arrays.

    Args:
        storage: How weights and state are kept.
        w: The weights.
        g: The gradient, an array or a row-sparse one.
        differentiable: Whether gradients have to flow through it.
        by_rows: Whether a row-sparse gradient is for the rows that it names only.
    """
    dtypes = w.dtype in kernels.PARAMETER_DTYPES and g.dtype in kernels.GRADIENT_DTYPES
    accumulator = storage.accumulator.at(w)
    if not isinstance(accumulator, Quantized):
        return dtypes and not differentiable and type(accumulator) in (Dense, RowWise)
    exponents = quantization.exponents_shape(w.shape, accumulator.block)
    shared = by_rows and not isinstance(g, mx.array) and len(exponents) == 1  # blocks that cover several rows
    fits = quantization.Blocks.of(w.shape, exponents).unit <= LARGEST_BLOCK
    return dtypes and not differentiable and fits and not shared


class Launch:
    """One launch for a tensor, or for some rows of one.

    Args:
        functions: The update in MLX operations; it says what kind of tensor this is.
        w: The weights, or the rows.
        g: The gradient, of the same shape.
        kept: The arrays of the state.
        s: The numbers of the step.
        key: Four words.
        rows: Of rows: where they are in the whole tensor, and which of them to change. Default: ``None``.
    """

    def __init__(
        self,
        functions: Functions,
        w: mx.array,
        g: mx.array,
        kept: Kept,
        s: Scalars,
        key: mx.array,
        rows: tuple[mx.array, mx.array] | None = None,
    ):
        self.kind, self.w, self.kept = functions.kind, w, kept
        self.shape = w.shape or (1,) if rows is None else (len(w), w.size // max(len(w), 1))
        self.compensated = self.kind.rounding == "compensated"
        self.inputs = {"w": w.reshape(self.shape), "g": g.reshape(self.shape), "v": kept["v"], "key": key}
        self.outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {"new_weights": (self.shape, w.dtype)}
        self.aliases: list[str] = []  # names that the body has but this launch does not need
        if self.compensated:
            self.inputs["rest"] = kept[COMPENSATION].reshape(self.shape)
            self.outputs["new_rest"] = self.shape, w.dtype
        else:
            self.aliases += ["auto rest = w;", "auto new_rest = new_weights;", "auto rest_strides = w_strides;"]
        if rows is not None:
            self.inputs |= dict(zip(("targets", "live"), rows, strict=True))
        else:
            self.aliases += ["auto targets = key;", "auto live = key;"]
        self.inputs |= dict(zip(KERNEL_SCALARS, s.inputs(), strict=True))
        self.template: list[tuple[str, Any]] = [
            ("W", w.dtype),
            ("STOCHASTIC", self.kind.rounding == "stochastic"),
            ("COMPENSATED", self.compensated),
            ("ROWS", rows is not None),
            *((name.upper(), value) for name, value in functions.form._asdict().items()),
        ]

    def run(self) -> tuple[mx.array, Kept]:
        """The new weights and state; an empty tensor comes back as it is."""
        if self.w.size == 0:
            return self.w, self.kept
        if self.kind.quantized:
            return self._quantized()
        self.template += [("V", self.kind.v_dtype), ("RANDOM_V", self.kind.v_is_random)]
        if isinstance(self.kind.accumulator, RowWise) and self.w.ndim > 1:
            self._without_strides()
            where = kernels.simdgroups_per_row(1, len(self.w))
            return self._launch("narrow_rowwise", self.kept["v"].shape, where, False)
        per_thread = 1 if self.w.size < kernels.ONE_PER_THREAD_BELOW else kernels.BYTES_PER_THREAD // self.w.dtype.size
        self.inputs["v"] = self.kept["v"].reshape(self.shape)
        self.template.append(("N", per_thread))
        return self._launch("narrow", self.shape, kernels.grid(self.shape, per_thread), True)

    def _quantized(self) -> tuple[mx.array, Kept]:
        exponents = self.kept[EXPONENTS]
        blocks = quantization.Blocks.of(self.w.shape, exponents.shape)
        per_thread = min(4, -(-blocks.unit // SIMDGROUP))
        threads = -(-blocks.unit // (per_thread * SIMDGROUP)) * SIMDGROUP
        self.inputs |= {
            "v": self.kept["v"].reshape(self.shape),
            EXPONENTS: exponents.reshape(-1),
            "blocks": mx.array([blocks.line, blocks.to_a_line, blocks.unit], mx.int32),
        }
        self.outputs["new_exponents"] = (exponents.size,), mx.uint8
        self.template += [("V", mx.uint8), ("N", per_thread)]
        self._without_strides()
        where = {"grid": (threads, exponents.size, 1), "threadgroup": (threads, 1, 1)}
        return self._launch("narrow_quantized", self.shape, where, False)

    def _without_strides(self) -> None:
        self.aliases = [alias for alias in self.aliases if "strides" not in alias]

    def _launch(self, name: str, v_shape: tuple[int, ...], where: Any, strided: bool) -> tuple[mx.array, Kept]:
        self.outputs["new_accumulator"] = v_shape, self.kind.v_dtype
        body = kernels.kernel(name, (*self.inputs,), (*self.outputs,), strided, "rounding", "\n".join(self.aliases))
        results = body(
            inputs=[*self.inputs.values()],
            template=self.template,
            output_shapes=[shape for shape, _ in self.outputs.values()],
            output_dtypes=[dtype for _, dtype in self.outputs.values()],
            **where,
        )
        new = dict(zip(self.outputs, results, strict=True))
        kept = {**self.kept, "v": new["new_accumulator"].reshape(self.kept["v"].shape)}
        if self.compensated:
            kept[COMPENSATION] = new["new_rest"].reshape(self.w.shape)
        if "new_exponents" in new:
            kept[EXPONENTS] = new["new_exponents"].reshape(self.kept[EXPONENTS].shape)
        return new["new_weights"].reshape(self.w.shape), kept
