"""`HostMetal.metal_kernel` stands in for `mx.fast.metal_kernel`: runs MLX's generated source on the CPU."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from . import toolchain
from .errors import HostError
from .memory import OUTPUT, Arena, Block, HostDispatch, input_blocks, is_row_contiguous, output_block, to_mlx
from .source import Signature, exported_source, for_clang, parse

_MLX_METAL_KERNEL = mx.fast.metal_kernel  # taken before anybody replaces it
_LARGEST = 2**31 - 1
_MOST_BUFFERS = 31
_LARGEST_THREADGROUP = 1024


@dataclass(frozen=True)
class Launch:
    """What one launch did. Bytes are summed over all threads, by buffer name; empty without checks.

    ``copies`` holds the inputs that MLX copies first, by a general copy kernel each, and the bytes that this reads and
    writes: with ``ensure_row_contiguous`` those that are not row-contiguous (``CustomKernel::eval_gpu`` in MLX's
    mlx/backend/metal/custom_kernel.cpp; ``launches`` counts those kernels too).
    """

    name: str
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    bytes_read: dict[str, int]
    bytes_written: dict[str, int]
    elements: dict[str, int]
    copies: dict[str, int]
    most_loads: int  # by one thread

    @property
    def launches(self) -> int:
        """Kernels that Metal runs: this one, and a copy for each input that is not read where it lies."""
        return 1 + len(self.copies)

    def traffic(self, *inputs: str) -> int:
        """Bytes read from these inputs, written to all outputs, and moved by copies before."""
        read = sum(self.bytes_read[name] for name in inputs)
        return read + sum(self.bytes_written.values()) + sum(self.copies.values())


class HostMetal:
    """A Metal device that is this computer's CPU.

    Args:
        seed (int): Decides the order in which threads run. Default: ``0``.
        check (bool): Check and count every load and store of a kernel. Default: ``True``.
        flush (bool): Flush denormal numbers to 0, as Apple's GPUs do. Default: ``False``.
        contract (bool): Fuse multiplications and additions, as Apple's compiler may. Default: ``False``.
    """

    def __init__(self, seed: int = 0, check: bool = True, flush: bool = False, contract: bool = False):
        self.seed = seed
        self.check = check
        self.flush = flush
        self.contract = contract
        self.launches: list[Launch] = []
        self.traces = 0  # by compiled functions

    @property
    def sources(self) -> set[str]:
        """The distinct sources that were launched."""
        return {launch.source for launch in self.launches}

    def clear(self) -> None:
        """Forget the launches so far."""
        self.launches.clear()

    def metal_kernel(self, **definition: Any) -> "HostKernel":
        """A kernel with the arguments and the call of ``mx.fast.metal_kernel``'s."""
        return HostKernel(self, **definition)

    def compile(self, fun: Callable[..., Any], **options: Any) -> "HostCompiled":
        """``fun`` as ``mx.compile`` returns it, for functions with kernels inside."""
        return HostCompiled(self, fun, options.get("shapeless", False))

    @contextlib.contextmanager
    def patched(self) -> Iterator["HostMetal"]:
        """Put `metal_kernel` and `compile` in the places of ``mx.fast.metal_kernel`` and ``mx.compile`` for a while."""
        before = mx.fast.metal_kernel, mx.compile
        mx.fast.metal_kernel, mx.compile = self.metal_kernel, self.compile
        try:
            yield self
        finally:
            mx.fast.metal_kernel, mx.compile = before


class HostCompiled:
    """Stands in for a compiled function: it runs as it is at each call, since no kernel runs on MLX's tracers here.

    What MLX would trace anew is counted: it keeps a graph for each combination of the shapes and dtypes of the arrays
    and of the other arguments (``CompileCache`` in mlx/compile.cpp), ``shapeless`` for each combination of dtypes.
    """

    def __init__(self, host: HostMetal, fun: Callable[..., Any], shapeless: bool):
        self._host, self._fun, self._shapeless = host, fun, shapeless
        self._kinds: set[Any] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = self._kind((args, kwargs))
        if kind not in self._kinds:
            self._kinds.add(kind)
            self._host.traces += 1
        return self._fun(*args, **kwargs)

    def _kind(self, tree: Any) -> Any:
        if isinstance(tree, mx.array):
            return tree.ndim if self._shapeless else tree.shape, tree.dtype
        if isinstance(tree, dict):
            return tuple((key, self._kind(value)) for key, value in tree.items())
        if isinstance(tree, list | tuple):
            return tuple(map(self._kind, tree))
        return tree


@dataclass
class _Call:
    """The arguments of one call, in the words of MLX."""

    inputs: list[mx.array]
    output_shapes: list[tuple[int, ...]]
    output_dtypes: list[mx.Dtype]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    options: dict[str, Any]  # template, init_value, stream: passed on to MLX as they are


class HostKernel:
    """One kernel; see ``mx.fast.metal_kernel``."""

    def __init__(
        self,
        host: HostMetal,
        *,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: dict[str, str] | None = None,
    ):
        self.name = name
        self._host = host
        self._input_names, self._output_names = list(input_names), list(output_names)
        self._contiguous, self._atomic = ensure_row_contiguous, atomic_outputs
        self._sources: dict[tuple[str, ...], tuple[str, Signature]] = {}
        self._kernel: Any = _MLX_METAL_KERNEL(
            name=name,
            input_names=self._input_names,
            output_names=self._output_names,
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            atomic_outputs=atomic_outputs,
            compile_options=compile_options,
        )

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Run the kernel now. Inputs must not be tracers: MLX refuses to evaluate those."""
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        options = {"template": template, "init_value": init_value, "stream": stream}
        shapes = [tuple(shape) for shape in output_shapes]
        call = _Call(arrays, shapes, list(output_dtypes), _triple(grid), _triple(threadgroup), options)
        self._check(call)
        mx.eval(arrays)
        source, signature = self._source(call)
        if verbose:
            print(source)
        return self._run(call, source, signature)

    def _check(self, call: _Call) -> None:
        for what, size in (("grid", call.grid), ("threadgroup", call.threadgroup)):
            if not all(0 < n <= _LARGEST for n in size):
                raise HostError(f"{what} must be three positive int32 but got {size}")
        if (size := int(np.prod(call.threadgroup, dtype=object))) > _LARGEST_THREADGROUP:
            raise HostError(f"a threadgroup has at most {_LARGEST_THREADGROUP} threads but got {size}")
        if np.prod(call.grid, dtype=object) > _LARGEST:
            raise HostError(f"a grid of {call.grid} is more than this computer runs")

    def _source(self, call: _Call) -> tuple[str, Signature]:
        """MLX's source for these arguments; it depends on no more than the key holds."""
        kinds = [(str(x.dtype), x.ndim == 0, x.size < 8) for x in call.inputs]
        key = tuple(map(str, (kinds, call.output_dtypes, call.options["template"], call.options["stream"])))
        if key not in self._sources:
            source = exported_source(lambda *inputs: self._record(call, inputs), call.inputs)
            self._sources[key] = source, parse(source)
        return self._sources[key]

    def _record(self, call: _Call, inputs: Sequence[mx.array]) -> list[mx.array]:
        return self._kernel(
            inputs=list(inputs),
            output_shapes=call.output_shapes,
            output_dtypes=call.output_dtypes,
            grid=call.grid,
            threadgroup=call.threadgroup,
            **call.options,
        )

    def _run(self, call: _Call, source: str, signature: Signature) -> list[mx.array]:
        arena = Arena(self._blocks(call, signature))
        host = self._host
        dispatch = HostDispatch(call.grid, call.threadgroup, host.seed * 0x10001 + len(host.launches), 0, host.flush)
        message = ctypes.create_string_buffer(1024)
        library = toolchain.load(for_clang(source, signature), host.check, host.contract)
        failed = library.host_run(
            arena.table, len(arena.blocks), ctypes.byref(dispatch), message, ctypes.c_size_t(len(message))
        )
        if failed:
            raise HostError(f"[{self.name}] {message.value.decode()}")
        arena.check_guards()
        self._check_written(call, arena)
        host.launches.append(self._launch(call, source, arena, dispatch.most_loads))
        first = len(arena.blocks) - len(self._output_names)
        outputs = zip(call.output_shapes, call.output_dtypes, strict=True)
        return [to_mlx(arena.contents(first + i).reshape(s), d) for i, (s, d) in enumerate(outputs)]

    def _blocks(self, call: _Call, signature: Signature) -> list[Block]:
        blocks: dict[str, Block] = {}
        for name, array in zip(self._input_names, call.inputs, strict=True):
            blocks |= {b.name: b for b in input_blocks(name, array, self._contiguous)}
        outputs = zip(self._output_names, call.output_shapes, call.output_dtypes, strict=True)
        for name, shape, dtype in outputs:
            blocks[name] = output_block(name, shape, dtype, call.options["init_value"], self._atomic)
        if len(signature.buffers) > _MOST_BUFFERS:
            raise HostError(f"{len(signature.buffers)} buffers, but Metal binds at most {_MOST_BUFFERS}")
        return [blocks[p.name] for p in signature.buffers]

    def _check_written(self, call: _Call, arena: Arena) -> None:
        if not self._host.check or call.options["init_value"] is not None:
            return
        holes = {b.name.decode(): b.unwritten for b in arena.table if b.unwritten}
        if holes:
            raise HostError(f"[{self.name}] elements left unwritten, by output: {holes}")

    def _launch(self, call: _Call, source: str, arena: Arena, most_loads: int) -> Launch:
        seen = {b.name.decode(): b for b in arena.table if self._host.check}
        return Launch(
            name=self.name,
            source=source,
            grid=call.grid,
            threadgroup=call.threadgroup,
            bytes_read={name: b.loaded for name, b in seen.items()},
            bytes_written={name: b.stored for name, b in seen.items() if b.flags & OUTPUT},
            elements={b.name: b.data.size for b in arena.blocks},
            copies=self._copies(call),
            most_loads=most_loads,
        )

    def _copies(self, call: _Call) -> dict[str, int]:
        inputs = zip(self._input_names, call.inputs, strict=True)
        return {name: 2 * x.nbytes for name, x in inputs if self._contiguous and not is_row_contiguous(x)}


def _triple(size: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = size
    return x, y, z
