"""The dialect of MindSpore: parameters by name, in a message of protobuf, which is read by hand.

``Checkpoint {repeated Value {tag, tensor {repeated dims, type, content}}}``
"""

from __future__ import annotations

import binascii
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer

from . import kinds, sources
from .foreign import Foreign, Names, V
from .install import Live, install
from .safetensors import Entry, from_bytes, is_shape

STEPS = ("step_t", "global_step")  # of experimental.optim and of nn
ACCUMULATOR = "accum."

DTYPES = {
    "Bool": mx.bool_,
    "Int8": mx.int8,
    "UInt8": mx.uint8,
    "Int16": mx.int16,
    "UInt16": mx.uint16,
    "Int32": mx.int32,
    "UInt32": mx.uint32,
    "Int64": mx.int64,
    "UInt64": mx.uint64,
    "Float16": mx.float16,
    "BFloat16": mx.bfloat16,
    "Float32": mx.float32,
    "Float64": mx.float64,
}
VARINT, BYTES = 0, 2  # protobuf's wire types; a checkpoint has no others
CHECKSUM = b"crc_num"  # followed by ten bytes, at the end of a file saved with crc_check=True


def import_mindspore(source: Any, optimizer: Optimizer, names: Names | None = None) -> dict[str, mx.array]:
    """Go on from an Adagrad of MindSpore: its parameters by name, or a file of ``mindspore.save_checkpoint``.

    Both ``experimental.optim.Adagrad`` and ``nn.Adagrad``. MindSpore is not needed. Hyperparameters are not in such a
    file, but for the learning rate of ``nn.Adagrad``.

    Args:
        source: ``{"accum.<parameter>": array, "step_t": count, ...}``, or a path.
        optimizer: ``presets.mindspore(...)``, ``presets.mindspore_nn(...)`` or the same by hand, initialised.
        names: Ours for theirs where they differ: a mapping from their name, or a list of our
            dotted paths in their order (None: leave it out). In place of a path, ``(path, axes)`` reorders the axes.

    Returns:
        The weights in it, by our dotted path, for ``model.load_weights(list(weights.items()), strict=False)``.

    Raises:
        ValueError: If the file is damaged or does not fit; each difference is named. Nothing has changed then.
    """
    with sources.naming(source):
        entries = sources.entries(source) if isinstance(source, Mapping) else read(source)
        foreign = _foreign(entries)
        weights = {name: entries[name].read() for name in foreign.tensors if name in entries}
        mx.eval(weights)
        matched = install(Live(optimizer), foreign, names)
    with mx.stream(mx.cpu):
        return {
            path: weights[name] if axes is None else mx.transpose(weights[name], axes)
            for path, (name, axes) in matched.items()
            if name in weights
        }


def _foreign(entries: dict[str, Entry]) -> Foreign:
    names = [name.removeprefix(ACCUMULATOR) for name in entries if name.startswith(ACCUMULATOR)]
    counts = [entries[name] for name in STEPS if name in entries]
    if not names or len(counts) != 1:
        raise ValueError(f"it has no '{ACCUMULATOR}...', or no '{STEPS[0]}': it is not of an Adagrad")
    tensors = {name: {V: entries[ACCUMULATOR + name]} for name in names}
    rate = entries.get("learning_rate")
    rates = {} if rate is None else dict.fromkeys(tensors, sources.number("learning_rate", rate))
    return Foreign(tensors, int(sources.number("the step count", counts[0])), rates)


def read(path: str | os.PathLike) -> dict[str, Entry]:
    """The entries of a file of ``mindspore.save_checkpoint`` by parameter name.

    Raises:
        ValueError: If the file is damaged, encrypted, or no checkpoint.
    """
    kinds.expect(path)
    with open(path, "rb") as stream:
        message = _checked(stream.read())
    parts: dict[str, tuple[mx.Dtype, tuple[int, ...], list[bytes]]] = {}
    for number, value in _fields(message):
        if number != 1 or not isinstance(value, memoryview):
            raise ValueError("it is no checkpoint of MindSpore")
        name, dtype, shape, content = _value(value)
        if parts.setdefault(name, (dtype, shape, []))[:2] != (dtype, shape):
            raise ValueError(f"'{name[:80]}' is given twice")
        parts[name][2].append(content)  # large tensors come in several pieces of one name
    return {name: _entry(name, *part) for name, part in parts.items()}


def _checked(data: bytes) -> memoryview:
    if data[-17:-10] == CHECKSUM:
        if binascii.crc32(data[:-17]) != int.from_bytes(data[-10:], "big"):
            raise ValueError("its checksum is wrong: it is damaged")
        data = data[:-17]
    return memoryview(data)


def _entry(name: str, dtype: mx.Dtype, shape: tuple[int, ...], pieces: list[bytes]) -> Entry:
    size = sum(map(len, pieces))
    shape = () if shape == (0,) and size == dtype.size else shape  # how older versions write a scalar
    if math.prod(shape) * dtype.size != size:
        raise ValueError(f"'{name[:80]}' promises {shape} of {dtype} but has {size} bytes")
    return Entry(shape, dtype, lambda: from_bytes(b"".join(pieces), dtype, shape))


def _value(message: memoryview) -> tuple[str, mx.Dtype, tuple[int, ...], bytes]:
    fields = dict(_fields(message))
    tag, tensor = fields.get(1), fields.get(2)
    if not isinstance(tag, memoryview) or not isinstance(tensor, memoryview):
        raise ValueError("it holds something other than named tensors")
    name = _text(tag)
    dims: list[int] = []
    dtype, content = None, b""
    for number, value in _fields(tensor):
        if number == 1:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif number == 2 and isinstance(value, memoryview):
            dtype = DTYPES.get(_text(value))
        elif number == 3 and isinstance(value, memoryview):
            content = bytes(value)
    if dtype is None or not is_shape(dims):
        raise ValueError(f"'{name[:80]}' has a dtype or a shape that cannot be read")
    return name, dtype, tuple(dims), content


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The (number, value) pairs of a message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        value, at = _varint(message, at)
        if key & 7 == BYTES:
            if value > len(message) - at:
                raise ValueError("it is truncated or damaged")
            yield key >> 3, message[at : at + value]
            at += value
        elif key & 7 == VARINT:
            yield key >> 3, value
        else:
            raise ValueError("it is damaged, encrypted, or no checkpoint of MindSpore")


def _varints(message: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(message):
        value, at = _varint(message, at)
        values.append(value)
    return values


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(message):
            break
        byte, at = message[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("it is truncated or damaged")


def _text(value: memoryview) -> str:
    try:
        return bytes(value).decode()
    except UnicodeDecodeError:
        raise ValueError("it has a name that is no text") from None
