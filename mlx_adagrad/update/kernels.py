"""The Metal kernels: the only file that knows Metal. It finds the sources, builds each kernel once and launches it."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import mlx.core as mx

from .accumulators import Dense, RowWise
from .rule import Form, Scalars
from .step import Plan

# MLX's own element-wise kernels: 8 bytes of work for each thread, one element below 65,536 elements
# (get_work_per_thread in mlx/backend/metal/utils.h).
BYTES_PER_THREAD = 8
ONE_PER_THREAD_BELOW = 65_536
# 1024 threads fail on some chips by register pressure.
THREADGROUP = (256, 1, 1)
# A grid axis is an int32; further rows of threads go into the second axis.
GRID_ROW = 2**30

PARAMETER_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
GRADIENT_DTYPES = PARAMETER_DTYPES


def available() -> bool:
    """Whether a kernel would run now: Metal is there, and the default device is the GPU."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


def require() -> None:
    """Raise RuntimeError unless a kernel can run, or be recorded by ``mx.export_function``, now.

    Without Metal a throw-away launch decides: MLX refuses it, except while it traces an export.
    """
    if mx.metal.is_available():
        if mx.default_device() == mx.gpu:
            return
        reason = "the default device is not the GPU"
    else:
        try:
            zeros = mx.zeros((8,))
            numbers = Scalars(*(mx.zeros(()) for _ in range(3)))
            launch(Form(*(False for _ in Form._fields)), zeros, zeros, zeros, numbers.row())
            return
        except RuntimeError as error:
            reason = str(error).rstrip(".")
    raise RuntimeError(f"[Adagrad] 'fused=True' needs a Metal GPU: {reason}. Use fused=None to fall back by itself.")


def supports(accumulator: Dense, w: mx.array, g: Any) -> bool:
    """Whether there is a kernel for these arrays; the operations of ``ops`` take everything else."""
    return type(accumulator) in (Dense, RowWise) and w.dtype in PARAMETER_DTYPES and g.dtype in GRADIENT_DTYPES


def launch(
    form: Form, w: mx.array, g: mx.array, v: mx.array, row: mx.array, v_dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, mx.array]:
    """Update one tensor in one launch and return the new ``(w, v)``; an empty tensor comes back as it is.

    Args:
        form: The branches of the formula, compiled into the kernel.
        w: Parameter, fp32, fp16 or bf16, of any shape.
        g: Gradient of the same shape.
        v: Accumulator of the same shape, or of one number a row.
        row: The numbers of the step, ``Scalars.row()``.
        v_dtype: What the new accumulator is stored in. Default: fp32.
    """
    if w.size == 0:
        return w, v.astype(v_dtype)
    if v.ndim < w.ndim:
        return _launch_row_wise(form, w, g, v, row, v_dtype)
    shape = w.shape or (1,)
    per_thread = 1 if w.size < ONE_PER_THREAD_BELOW else BYTES_PER_THREAD // w.dtype.size
    template: list[tuple[str, Any]] = [("W", w.dtype), ("V", v_dtype), ("N", per_thread)]
    new_w, new_v = kernel("dense", ("w", "g", "v", "scalars"), ("new_weights", "new_accumulator"))(
        inputs=[w.reshape(shape), g.reshape(shape), v.reshape(shape), row],
        template=template + [(name.upper(), value) for name, value in form._asdict().items()],
        output_shapes=[shape, shape],
        output_dtypes=[w.dtype, v_dtype],
        grid=grid(-(-w.size // per_thread)),
        threadgroup=THREADGROUP,
    )
    return new_w.reshape(w.shape), new_v.reshape(w.shape)


def _launch_row_wise(
    form: Form, w: mx.array, g: mx.array, v: mx.array, row: mx.array, v_dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    shape = (len(w), w.size // len(w))
    names = ("w", "g", "v", "scalars"), ("new_weights", "new_accumulator")
    new_w, new_v = kernel("rowwise", *names)(
        inputs=[w.reshape(shape), g.reshape(shape), v, row],
        template=[("W", w.dtype), ("V", v_dtype), *((name.upper(), value) for name, value in form._asdict().items())],
        output_shapes=[shape, v.shape],
        output_dtypes=[w.dtype, v_dtype],
        **simdgroup_per_row(len(w)),
    )
    return new_w.reshape(w.shape), new_v


def simdgroup_per_row(rows: int) -> dict[str, tuple[int, int, int]]:
    """A grid of 32 lanes along x and a row along y, so that a row is summed up inside one simdgroup."""
    return {"grid": (32, rows, 1), "threadgroup": (32, THREADGROUP[0] // 32, 1)}


def grid(threads: int) -> tuple[int, int, int]:
    """The grid for at least this many threads: one row, or full rows of 2^30 where int32 would overflow."""
    return (threads, 1, 1) if threads <= GRID_ROW else (GRID_ROW, -(-threads // GRID_ROW), 1)


@cache
def kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Any:
    """The kernel whose body is ``metal/<name>.metal``, built once, at its first launch."""
    return mx.fast.metal_kernel(
        name=f"mlx_adagrad_{name}",
        input_names=list(inputs),
        output_names=list(outputs),
        header=source("rule"),
        source=source(name),
    )


@cache
def source(name: str) -> str:
    """The text of ``metal/<name>.metal``."""
    package = os.path.dirname(os.path.dirname(__file__))
    with open(os.path.join(package, "metal", f"{name}.metal"), encoding="utf-8") as file:
        return file.read()


def differentiable_launch(plan: Plan, w: mx.array, g: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    """:func:`launch` with the derivative of the formula in ``rule.py``; such a step cannot be exported."""
    used = {name: s for name, s in plan.scalars._asdict().items() if s is not None}

    def numbers(values: tuple[mx.array, ...]) -> Scalars:
        return Scalars(**dict(zip(used, values, strict=True)))

    def forward(w: mx.array, g: mx.array, v: mx.array, *values: mx.array) -> tuple[mx.array, mx.array]:
        return launch(plan.form, w, g, v, numbers(values).row(), plan.v_dtype)

    def reference(w: mx.array, g: mx.array, v: mx.array, *values: mx.array) -> tuple[mx.array, mx.array]:
        return plan.functions.update(w, g, v, numbers(values))

    function: Any = mx.custom_function(forward)

    @function.vjp
    def backward(primals, cotangents, _outputs):  # noqa: ANN001, ANN202 - MLX calls it
        return mx.vjp(reference, list(primals), list(cotangents))[1]

    new_w, new_v = function(w, g, v, *used.values())
    return new_w, new_v
