"""The safetensors format, read as if every file were hostile: nothing is allocated or read before it is checked.

``mx.load`` takes a file that became shorter meanwhile for whole, and ``mx.save_safetensors`` refuses float64. What is
written here, MLX and the ``safetensors`` package read, and the other way round.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import mlx.core as mx

DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F64": mx.float64,
    "C64": mx.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNSIGNED = {1: "B", 2: "H", 4: "I", 8: "Q"}  # struct's names for raw items of these sizes
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's reference implementation
MAX_AXES = 32
MAX_AXIS = 2**31 - 1  # MLX's shapes are int32


@dataclass(frozen=True)
class Entry:
    """An array that has not been read yet: what it claims to be, and how to get it."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], mx.array]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('mlx.core.')} {self.shape}"


def entry_of(array: mx.array) -> Entry:
    """The entry of an array that is there already."""
    return Entry(array.shape, array.dtype, lambda: array)


def from_bytes(data: bytes, dtype: mx.Dtype, shape: tuple[int, ...]) -> mx.array:
    """The array whose little-endian elements are ``data``, bit for bit."""
    if not data:
        return mx.zeros(shape, dtype, stream=mx.cpu)
    raw = mx.array(memoryview(data).cast(UNSIGNED[dtype.size], shape))  # type: ignore[call-overload]
    return raw.view(dtype, stream=mx.cpu)  # no other device has float64


def write(stream: BinaryIO, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write ``arrays`` and ``metadata`` as one safetensors file."""
    write_contiguous(stream, {name: mx.contiguous(array, stream=mx.cpu) for name, array in arrays.items()}, metadata)


def write_contiguous(stream: BinaryIO, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """The same for arrays that are evaluated and contiguous in memory: MLX has nothing to compute, on no thread."""
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.size, name))  # every element aligned in the file
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    stop = 0
    for name in names:
        array = arrays[name]
        start, stop = stop, stop + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        stream.write(memoryview(arrays[name]))  # type: ignore[arg-type]


def read(stream: BinaryIO) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries and the metadata of an open file, which must stay open until the entries have been read.

    Raises:
        ValueError: If the file is truncated or longer than it says, or its header is not what the format asks for.
    """
    size = os.fstat(stream.fileno()).st_size
    header, start = _header(stream, size)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata is not a table of strings")
    spans = {name: _span(name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, low, high) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if low != end:
            raise ValueError(f"{_shown(name)} starts at byte {low} where {end} is due: tensors overlap or leave a hole")
        end = high
    if start + end != size:
        raise ValueError(f"the header promises {start + end} bytes but the file has {size}: it is truncated or damaged")
    return {name: _entry(stream, start, *span) for name, span in spans.items()}, metadata


def _header(stream: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"it is no safetensors file: {size} bytes cannot hold a header of {max(length, 0)}")
    try:
        header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"its header cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a table")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is given twice")
    return table


def _span(name: str, entry: Any) -> tuple[mx.Dtype, tuple[int, ...], int, int]:
    """The checked (dtype, shape, first byte, byte after the last) of one tensor."""
    name = _shown(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the header's entry for {name} must have dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{name} has the dtype {_shown(entry['dtype'])}, which MLX does not know")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not is_shape(shape):
        raise ValueError(f"{name} has the impossible shape {_shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(n) for n in offsets):
        raise ValueError(f"{name} has the impossible data_offsets {_shown(offsets)}")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.size:
        raise ValueError(f"{name} of shape {tuple(shape)} in {entry['dtype']} cannot lie in the bytes {offsets}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _shown(value: Any) -> str:
    """What a file says, fit for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def is_shape(shape: Sequence[Any]) -> bool:
    """Whether an array of MLX can have this shape."""
    return len(shape) <= MAX_AXES and all(_natural(n) and n <= MAX_AXIS for n in shape)


def _natural(n: Any) -> bool:
    return type(n) is int and n >= 0


def _entry(stream: BinaryIO, base: int, dtype: mx.Dtype, shape: tuple[int, ...], low: int, high: int) -> Entry:
    def read() -> mx.array:
        stream.seek(base + low)
        data = stream.read(high - low)
        if len(data) != high - low:
            raise ValueError("the file became shorter while it was read")
        return from_bytes(data, dtype, shape)

    return Entry(shape, dtype, read)
