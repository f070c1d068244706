"""What a function asks of MLX, read from the graph that MLX exports, and how many kernels Metal runs for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .errors import HostError

# Neither computes nor copies (eval in mlx/backend/common/common.cpp; Slice in mlx/backend/gpu/slicing.cpp; View of
# equal size in mlx/backend/gpu/primitives.cpp). A reshape copies where strides cannot express the new shape
# (reshape_gpu): here it is taken to be of an array that is row-contiguous.
VIEWS = frozenset(
    """AsStrided Broadcast BroadcastAxes Copy CustomTransforms Depends ExpandDims Flatten NumberOfElements Reshape Slice
    Split Squeeze StopGradient Transpose Unflatten View""".split()
)
# One kernel each: element-wise operations, fills, gathers, and a scatter whose table is donated, else one more that
# copies it (Scatter::eval_gpu in mlx/backend/metal/indexing.cpp).
ONE_KERNEL = frozenset(
    """Abs Add Arange AsType BitwiseBinary Divide Equal Full Gather GatherAxis Greater GreaterEqual Less LessEqual Log
    LogicalAnd LogicalNot LogicalOr Maximum Minimum Multiply Negative NotEqual Power Remainder Scatter ScatterAxis
    Select Sign Sqrt Square Subtract CustomKernel""".split()
)
SORTED_AT_ONCE = 2048  # elements of up to 4 bytes, half as many of 8 (gpu_merge_sort in mlx/backend/metal/sort.cpp)
REDUCED_AT_ONCE = 4096  # all_reduce_dispatch in mlx/backend/metal/reduce.cpp


@dataclass(frozen=True)
class Primitive:
    """One operation of a graph; inputs and outputs are (name, shape, dtype)."""

    name: str
    inputs: list[tuple[str, tuple[int, ...], mx.Dtype]]
    outputs: list[tuple[str, tuple[int, ...], mx.Dtype]]
    arguments: list[Any]

    @property
    def kernel(self) -> str:
        """The name of a custom kernel, without MLX's prefix and what it appends; "" for other primitives."""
        return self.arguments[0].removeprefix("custom_kernel_").split("__")[0] if self.name == "CustomKernel" else ""

    @property
    def launches(self) -> int:
        """How many kernels Metal runs for it (an upper bound: what mx.compile fuses counts one by one).

        Copies of inputs that are not row-contiguous come on top; ``HostMetal`` counts those of custom kernels.
        """
        if self.name in VIEWS:
            return 0
        _, shape, dtype = self.inputs[0]
        if self.name == "AsType" and dtype == self.outputs[0][2]:  # mx.array(x): x is donated, as to a scatter
            return 0
        if self.name in ONE_KERNEL:
            return 1
        if self.name == "Concatenate":  # a copy of each input into its place (concatenate_gpu)
            return len(self.inputs)
        if self.name == "Reduce":
            return 1 if _size(shape) <= REDUCED_AT_ONCE else 2
        if self.name in ("ArgSort", "Sort"):
            return _sort_launches(shape[-1], dtype)
        raise HostError(f"how many kernels Metal runs for {self.name} is not known here")


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _sort_launches(size: int, dtype: mx.Dtype) -> int:
    """One for a block; else the blocks, a partition and a merge for each doubling, and a copy (multi_block_sort)."""
    blocks = -(-size // (SORTED_AT_ONCE if dtype.size <= 4 else SORTED_AT_ONCE // 2))
    return 1 if blocks == 1 else 2 + 2 * (blocks - 1).bit_length()


def record(function: Callable[..., Any], *inputs: mx.array) -> list[Primitive]:
    """The graph of ``function(*inputs)``, as ``mx.export_function`` records it: what no output needs is left out."""
    found: list[Primitive] = []

    def take(event: dict[str, Any]) -> None:
        if event["type"] == "primitive":
            found.append(Primitive(event["name"], event["inputs"], event["outputs"], event["arguments"]))

    mx.export_function(take, function, *inputs)
    return found


def launches(graph: list[Primitive]) -> int:
    """How many kernels Metal runs for a graph."""
    return sum(primitive.launches for primitive in graph)
