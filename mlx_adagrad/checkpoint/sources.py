"""Files and arrays of other frameworks as entries: what an array claims to be is judged before it is read."""

from __future__ import annotations

import ast
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import mlx.core as mx

from . import kinds, safetensors
from .safetensors import Entry, entry_of, from_bytes

# numpy's letters for a dtype, without the byte order
NUMPY = {
    "b1": mx.bool_,
    "u1": mx.uint8,
    "i1": mx.int8,
    "u2": mx.uint16,
    "i2": mx.int16,
    "f2": mx.float16,
    "V2": mx.bfloat16,  # as MLX writes it
    "u4": mx.uint32,
    "i4": mx.int32,
    "f4": mx.float32,
    "u8": mx.uint64,
    "i8": mx.int64,
    "f8": mx.float64,
    "c8": mx.complex64,
}
BY_NAME = {str(dtype).removeprefix("mlx.core."): dtype for dtype in safetensors.NAMES} | {"|v2": mx.bfloat16}
MAX_NPY_HEADER = 10_000  # numpy's own limit
# What zipfile makes of a damaged archive; a seek to where there is nothing is an OSError.
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, OverflowError)
# what else a damaged file may bring about in a library that reads it, std::bad_alloc of MLX for one
UNREADABLE = (RuntimeError, OverflowError, MemoryError)
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # numpy's


@contextmanager
def opened(source: Any) -> Iterator[dict[str, Entry]]:
    """The entries of a safetensors or .npz file, or of a mapping of arrays; read them inside the block."""
    if isinstance(source, Mapping):
        yield entries(source)
        return
    kinds.expect(source, kinds.SAFETENSORS, kinds.NPZ)
    with open(source, "rb") as stream:
        zipped = stream.read(2) == b"PK"
        stream.seek(0)
        yield _npz(stream) if zipped else safetensors.read(stream)[0]


def entries(arrays: Mapping[Any, Any]) -> dict[str, Entry]:
    """The entries of arrays that are there already."""
    return {str(key): entry(f"'{key}'", value) for key, value in arrays.items()}


def entry(name: str, array: Any) -> Entry:
    """An array of MLX, numpy, torch, TensorFlow, MindSpore or h5py, or a number, as an entry.

    Raises:
        ValueError: If it is none of them.
    """
    if type(array) is int and not -(2**63) <= array < 2**63:
        raise ValueError(f"{name} is too large: an integer of {array.bit_length()} bits")
    if type(array) in (int, float):
        return entry_of(mx.array(array, mx.int64 if isinstance(array, int) else mx.float64))
    if isinstance(array, mx.array):
        return entry_of(array)
    dtype = BY_NAME.get(re.split(r"[.']", str(getattr(array, "dtype", "")).rstrip("'>"))[-1].lower())
    if dtype is None or not hasattr(array, "shape"):
        raise ValueError(f"{name} is no array of numbers: {getattr(array, 'dtype', type(array))!s:.80}")
    shape = tuple(int(n) for n in array.shape)  # pyright: ignore[reportAttributeAccessIssue]

    def read() -> mx.array:
        try:
            values = _numpy(array, dtype)
            if values.dtype.str == "|V2":  # bfloat16, as h5py and numpy have it without ml_dtypes
                return mx.array(values.view("u2")).view(mx.bfloat16, stream=mx.cpu)
            return mx.array(values, dtype)
        except (TypeError, RuntimeError, NotImplementedError) as error:  # sparse, quantised, without data
            raise ValueError(f"{name} cannot be read: {error}") from error

    return Entry(shape, dtype, read)


def _numpy(array: Any, dtype: mx.Dtype) -> Any:
    import numpy as np

    if hasattr(array, "detach"):  # torch: off the graph and the device
        array = array.detach().cpu()
    if dtype == mx.bfloat16 and hasattr(array, "float"):  # numpy has no bfloat16; float32 holds every one
        array = array.float()
    array = np.asarray(array.asnumpy() if hasattr(array, "asnumpy") else array, order="C")  # MLX: no negative strides
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


@contextmanager
def unzipping() -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise ValueError(f"it is a damaged archive: {error}") from error


def _npz(stream: IO[bytes]) -> dict[str, Entry]:
    with unzipping():
        archive = zipfile.ZipFile(stream)
        return {info.filename.removesuffix(".npy"): _npy(archive, info) for info in archive.infolist()}


def _npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Entry:
    """An entry of a .npz file, whose size must be what its header promises."""
    name = info.filename
    if info.compress_type not in METHODS:
        raise ValueError(f"'{name}' is compressed in a way that numpy never does")
    with archive.open(info) as stream:
        dtype, fortran, shape, start = _npy_header(name, stream)
    size = math.prod(shape) * dtype.size
    if start + size != info.file_size:
        raise ValueError(f"'{name}' promises {size} bytes but has {info.file_size - start}")

    def read() -> mx.array:
        with unzipping(), archive.open(info) as stream:
            stream.read(start)
            data = stream.read(size)
        if len(data) != size:
            raise ValueError(f"'{name}' is truncated")
        return mx.transpose(from_bytes(data, dtype, shape[::-1])) if fortran else from_bytes(data, dtype, shape)

    return Entry(shape, dtype, read)


def _npy_header(name: str, stream: IO[bytes]) -> tuple[mx.Dtype, bool, tuple[int, ...], int]:
    """dtype, column order, shape and where the data starts."""
    magic = stream.read(8)
    wide = magic[6:7] != b"\x01"
    length = int.from_bytes(stream.read(4 if wide else 2), "little")
    if magic[:6] != b"\x93NUMPY" or length > MAX_NPY_HEADER:
        raise ValueError(f"'{name}' is no array of numpy")
    try:
        header = ast.literal_eval(stream.read(length).decode("latin1").strip())
        descr, fortran, shape = (header[key] for key in ("descr", "fortran_order", "shape"))
        dtype = NUMPY[descr.lstrip("<|=")]
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, MemoryError, RecursionError):
        raise ValueError(f"'{name}' has a header or a dtype that cannot be read") from None
    if not isinstance(shape, tuple) or not safetensors.is_shape(shape):
        raise ValueError(f"'{name}' has the impossible shape {str(shape)[:80]}")
    return dtype, bool(fortran), shape, 8 + (4 if wide else 2) + length


def number(name: str, value: Any) -> float:
    """A number, or an array or entry with one element, as a Python number.

    Raises:
        ValueError: If it is no real number, or is not finite.
    """
    found: Entry = value if isinstance(value, Entry) else entry(f"'{name}'", value)
    if found.shape not in ((), (1,)):
        raise ValueError(f"'{name}' must be one number but has shape {found.shape}")
    result = found.read().item()
    if not isinstance(result, int | float) or not math.isfinite(result):
        raise ValueError(f"'{name}' is {result}")
    return result


def plain(name: str, value: Any) -> Any:
    """A hyperparameter as a Python number, also where it is an array; what is no number raises ValueError."""
    return value if isinstance(value, bool) else number(name, value)


@contextmanager
def naming(source: Any) -> Iterator[None]:
    """What is wrong with a file is said with its name."""
    what = f"'{os.fsdecode(source)}'" if isinstance(source, str | os.PathLike) else "the state"
    try:
        yield
    except (ValueError, *UNREADABLE) as error:
        said = str(error) or type(error).__name__
        raise ValueError(f"[checkpoint] {what} cannot be imported: {said}.") from error
