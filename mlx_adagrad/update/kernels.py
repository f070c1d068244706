"""The Metal kernels: the only file that knows Metal. It finds the sources, builds each kernel once and launches it."""

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any, TypeAlias

import mlx.core as mx

from . import devices
from .accumulators import Dense, RowWise
from .batches import Batch, KnownSets, split
from .compiled import compiled
from .ops import Functions
from .rule import KERNEL_SCALARS, Form, Scalars

# MLX's own element-wise kernels: 8 bytes of work for each thread, one element below 65,536 elements
# (get_work_per_thread in mlx/backend/metal/utils.h).
BYTES_PER_THREAD = 8
ONE_PER_THREAD_BELOW = 65_536
# Of a threadgroup; 1024 fail on some chips by register pressure.
THREADS = 256
# Threads of a threadgroup along either of the last two axes, where both are that long.
TILE = 16
# From so many elements on a whole threadgroup works on a row, and not one simdgroup: a few long rows are few threads.
LONG_ROW = 1024
# A grid axis is an int32; a thread takes several blocks where there are more.
MOST_BLOCKS = 2**30

Where: TypeAlias = "dict[str, tuple[int, int, int]]"

PARAMETER_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
GRADIENT_DTYPES = PARAMETER_DTYPES


def available() -> bool:
    """Whether a kernel would run now: Metal is there, and the step is for the GPU."""
    return devices.has_metal() and devices.on_gpu()


def require() -> None:
    """Raise RuntimeError unless a kernel can run, or be recorded by ``mx.export_function``, now.

    Without Metal a throw-away launch decides: MLX refuses it, except while it traces an export.
    """
    if devices.has_metal():
        if devices.on_gpu():
            return
        reason = "the default device is not the GPU"
    else:
        try:
            zeros = mx.zeros((8,))
            numbers = Scalars(*(mx.zeros(()) for _ in range(3)))
            launch(Form(*(False for _ in Form._fields)), zeros, zeros, zeros, numbers)
            return
        except RuntimeError as error:
            reason = str(error).rstrip(".")
    raise RuntimeError(f"[Adagrad] 'fused=True' needs a Metal GPU: {reason}. Use fused=None to fall back by itself.")


def supports(accumulator: Dense, w: mx.array, g: Any) -> bool:
    """Whether there is a kernel for these arrays; the operations of ``ops`` take everything else."""
    return type(accumulator) in (Dense, RowWise) and w.dtype in PARAMETER_DTYPES and g.dtype in GRADIENT_DTYPES


def launch(
    form: Form, w: mx.array, g: mx.array, v: mx.array, scalars: Scalars, v_dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, mx.array]:
    """Update one tensor in one launch and return the new ``(w, v)``; an empty tensor comes back as it is.

    Args:
        form: The branches of the formula, compiled into the kernel.
        w: Parameter, fp32, fp16 or bf16, of any shape.
        g: Gradient of the same shape.
        v: Accumulator of the same shape, or of one number a row.
        scalars: The numbers of the step, fp32.
        v_dtype: What the new accumulator is stored in. Default: fp32.
    """
    if w.size == 0:
        return w, v.astype(v_dtype)
    w, g, v, shape = (w, g, v, w.shape) if w.ndim else (w.reshape(1), g.reshape(1), v.reshape(1), ())
    if v.ndim < w.ndim:
        simdgroups = 1 if w.size < LONG_ROW * len(w) else THREADS // 32
        name, work, where = "rowwise", ("SIMDGROUPS", simdgroups), simdgroups_per_row(simdgroups, len(w))
    else:
        per_thread = 1 if w.size < ONE_PER_THREAD_BELOW else BYTES_PER_THREAD // w.dtype.size
        name, work, where = "dense", ("N", per_thread), grid(w.shape, per_thread)
    new_v_is_written = form.update_accumulator
    outputs = 1 + new_v_is_written
    names = ("w", "g", "v", *KERNEL_SCALARS), ("new_weights", "new_accumulator")[:outputs]
    # strided: the gradient of every nn.Linear weight is a transposed view
    new_w, *new_v = kernel(name, *names, strided=True, v_mode=None if new_v_is_written else 0)(
        inputs=[w, g, v, *scalars.inputs()],
        template=[("W", w.dtype), ("V", v_dtype), work, *branches(form)],
        output_shapes=[w.shape, v.shape][:outputs],
        output_dtypes=[w.dtype, v_dtype][:outputs],
        **where,
    )
    v = new_v[0] if new_v else v.astype(v_dtype)
    return (new_w, v) if shape else (new_w.reshape(()), v.reshape(()))


def branches(form: Form) -> list[tuple[str, bool]]:
    """The branches of the formula as template arguments."""
    return [(name.upper(), value) for name, value in form._asdict().items()]


class Launches:
    """:func:`launch` for many tensors at once, compiled.

    Outside ``mx.compile`` a launch costs the host ten times as much: MLX writes the whole source of a kernel anew.
    """

    def __init__(self, form: Form, v_dtype: mx.Dtype):
        def many(ws: list, gs: list, vs: list, scalars: Scalars) -> tuple[list[mx.array], list[mx.array]]:
            tensors = enumerate(zip(ws, gs, vs, strict=True))
            pairs = [launch(form, w, g, v, scalars.at(i), v_dtype) for i, (w, g, v) in tensors]
            return [w for w, _ in pairs], [v for _, v in pairs]

        self._many: Any = compiled(many)
        self._sets = KnownSets()

    def __call__(self, batch: Batch) -> tuple[list[mx.array], list[mx.array]]:
        """The new parameters and accumulators."""
        if len(batch.ws) == 1:
            return self._many(*batch[:4])
        new_ws, new_vs, order = [], [], []
        for places in split(batch.kinds, self._sets):
            ws, vs = self._many(*batch.part(places)[:4])
            new_ws += ws
            new_vs += vs
            order += places
        if order == [*range(len(order))]:
            return new_ws, new_vs
        back = sorted(range(len(order)), key=order.__getitem__)
        return [new_ws[i] for i in back], [new_vs[i] for i in back]


@cache
def launches(form: Form, v_dtype: mx.Dtype) -> Launches:
    """The launches of one form."""
    return Launches(form, v_dtype)


def simdgroups_per_row(simdgroups: int, rows: int) -> Where:
    """A grid of one or more simdgroups along x and a row along y, so that one threadgroup sums up a row."""
    across = 32 * simdgroups
    return {"grid": (across, rows, 1), "threadgroup": (across, THREADS // across, 1)}


def grid(shape: tuple[int, ...], per_thread: int) -> Where:
    """The grid of ``metal/layout.metal`` for an array of this shape, each thread with so many elements of a row.

    A threadgroup is a tile of 16 x 16 threads, as far as the axes reach: a transposed array is read along its columns,
    so that both it and what lies row after row use whole cache lines.
    """
    rows, blocks = (1, 1, *shape)[-2], min(math.prod(shape[:-2]), MOST_BLOCKS)
    threads = -(-shape[-1] // per_thread)
    across = min(threads, THREADS // min(rows, TILE))
    down = min(rows, THREADS // across)
    return {"grid": (threads, rows, blocks), "threadgroup": (across, down, min(blocks, THREADS // (across * down)))}


@cache
def kernel(
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    strided: bool = False,
    header: str | None = None,
    before: str = "",
    v_mode: int | None = None,
) -> Any:
    """The kernel whose body is ``metal/<name>.metal``, built once, at its first launch.

    Args:
        name: Of the body.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        strided: It reads its inputs where they lie; else MLX copies first what is not row-contiguous.
        header: One more file with helpers.
        before: Code in front of the body.
        v_mode: What the body makes of ``v``, where it has fewer outputs then.
    """
    define, suffix = ("", "") if v_mode is None else (f"#define V_MODE {v_mode}\n", f"_v{v_mode}")
    return mx.fast.metal_kernel(
        name=f"mlx_adagrad_{name}{suffix}",
        input_names=list(inputs),
        output_names=list(outputs),
        header=define + source("rule") + source("layout") + (source(header) if header else ""),
        source=f"{before}\n{source(name)}" if before else source(name),
        ensure_row_contiguous=not strided,
    )


@cache
def source(name: str) -> str:
    """The text of ``metal/<name>.metal``."""
    package = os.path.dirname(os.path.dirname(__file__))
    with open(os.path.join(package, "metal", f"{name}.metal"), encoding="utf-8") as file:
        return file.read()


def differentiable_launch(
    form: Form, w: mx.array, g: mx.array, v: mx.array, scalars: Scalars, functions: Functions
) -> tuple[mx.array, mx.array]:
    """:func:`launch` with the derivative of ``functions``, the same update; such a step cannot be exported."""
    used = {name: s for name, s in scalars._asdict().items() if s is not None}

    def numbers(values: tuple[mx.array, ...]) -> Scalars:
        return Scalars(**dict(zip(used, values, strict=True)))

    def forward(w: mx.array, g: mx.array, v: mx.array, *values: mx.array) -> tuple[mx.array, mx.array]:
        return launch(form, w, g, v, numbers(values), functions.v_dtype)

    def reference(w: mx.array, g: mx.array, v: mx.array, *values: mx.array) -> tuple[mx.array, mx.array]:
        return functions.update(w, g, v, numbers(values))

    function: Any = mx.custom_function(forward)

    @function.vjp
    def backward(primals, cotangents, _outputs):  # noqa: ANN001, ANN202 - MLX calls it
        return mx.vjp(reference, list(primals), list(cotangents))[1]

    new_w, new_v = function(w, g, v, *used.values())
    return new_w, new_v
