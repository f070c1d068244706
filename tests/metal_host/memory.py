"""The memory of one launch: every buffer between guards, aligned to its element and no further."""

import ctypes
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .errors import HostError

OUTPUT, INITIALISED, ATOMIC = 1, 2, 4
_GUARD = 256  # bytes, at least, on either side
_GUARD_BYTE = 0xA5


class HostBuffer(ctypes.Structure):
    """`Buffer` of runner.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("pointer", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("item", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("loaded", ctypes.c_uint64),
        ("stored", ctypes.c_uint64),
        ("unwritten", ctypes.c_uint64),
    ]


class HostDispatch(ctypes.Structure):
    """`Dispatch` of runner.h."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
        ("most_loads", ctypes.c_uint64),
        ("flush", ctypes.c_uint64),
    ]


@dataclass
class Block:
    """One buffer before it has a place: its bytes to start with, and what the runner must know."""

    name: str
    data: np.ndarray  # 1-D, of an element's dtype
    flags: int = 0
    first: int = 0  # the element that the kernel's pointer points at: negative strides count back from it


class Arena:
    """All buffers of a launch in one allocation."""

    def __init__(self, blocks: list[Block]):
        self.blocks = blocks
        size = _GUARD + sum(b.data.nbytes + _GUARD + 128 for b in blocks)
        self._memory = np.full(size, _GUARD_BYTE, np.uint8)
        self._start: list[int] = []
        base, at = self._memory.ctypes.data, _GUARD
        for b in blocks:
            at += -(base + at) % 64 + b.data.itemsize
            self._start.append(at)
            self._memory[at : at + b.data.nbytes] = b.data.view(np.uint8)
            at += b.data.nbytes + _GUARD
        self.table = (HostBuffer * len(blocks))(*map(self._entry, blocks, self._start))

    def _entry(self, b: Block, start: int) -> HostBuffer:
        address = self._memory.ctypes.data + start
        pointer = address + b.first * b.data.itemsize
        return HostBuffer(b.name.encode(), pointer, address, b.data.nbytes, b.data.itemsize, b.flags)

    def contents(self, index: int) -> np.ndarray:
        """The bytes of a buffer now, as its elements."""
        b, start = self.blocks[index], self._start[index]
        return self._memory[start : start + b.data.nbytes].view(b.data.dtype)

    def check_guards(self) -> None:
        """Refuse a launch that wrote beside its buffers (the only check where accesses go unseen)."""
        ends = [0, *(s + b.data.nbytes for s, b in zip(self._start, self.blocks, strict=True))]
        starts = [*self._start, self._memory.size]
        for i, (end, start) in enumerate(zip(ends, starts, strict=True)):
            if (self._memory[end:start] != _GUARD_BYTE).any():
                near = " or ".join(repr(b.name) for b in self.blocks[max(i - 1, 0) : i + 1])
                raise HostError(f"out of bounds: bytes beside {near} were overwritten")


def input_blocks(name: str, array: mx.array, contiguous: bool) -> list[Block]:
    """An input, and the shape, strides (in elements) and ndim that the kernel may ask for."""
    values = to_numpy(array)
    if contiguous:
        values = np.ascontiguousarray(values).reshape(array.shape)
    strides = [s // values.itemsize for s in values.strides]
    span, first = _span(values, strides)
    return [
        Block(name, span, first=first),
        Block(f"{name}_shape", np.array(array.shape, np.int32)),
        Block(f"{name}_strides", np.array(strides, np.int64)),
        Block(f"{name}_ndim", np.array([array.ndim], np.int32)),
    ]


def _span(values: np.ndarray, strides: list[int]) -> tuple[np.ndarray, int]:
    """The elements from the first to the last in memory, with those skipped, and where the array starts."""
    if values.size == 0:
        return values.reshape(-1), 0
    reach = [(n - 1) * s for n, s in zip(values.shape, strides, strict=True)]
    first = -sum(r for r in reach if r < 0)
    lowest = values[tuple(slice(-1, None) if s < 0 else slice(None, 1) for s in strides)]
    count = 1 + sum(map(abs, reach))
    return np.lib.stride_tricks.as_strided(lowest, (count,), (values.itemsize,)).copy(), first


def is_row_contiguous(array: mx.array) -> bool:
    """MLX's flag ``row_contiguous``: the elements lie one after another, row after row."""
    return to_numpy(array).flags.c_contiguous


def output_block(name: str, shape: tuple[int, ...], dtype: mx.Dtype, init: float | None, atomic: bool) -> Block:
    """An output, full of its initial value or of 0xFF bytes (NaN)."""
    count = int(np.prod(shape))
    flags = OUTPUT | (ATOMIC if atomic else 0)
    if init is not None:
        return Block(name, np.repeat(to_numpy(mx.array([init]).astype(dtype)), count), flags | INITIALISED)
    item = to_numpy(mx.zeros((1,), dtype)).dtype
    return Block(name, np.full(count * item.itemsize, 0xFF, np.uint8).view(item), flags)


def to_numpy(array: mx.array) -> np.ndarray:
    """The array's values without a change of bits; bf16 as uint16."""
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def to_mlx(values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The reverse of `to_numpy`."""
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
