"""Reads an optimizer's variables from a file of Keras, in a process of its own: ``python hdf5_worker.py <sys.path>``.

HDF5's library breaks down over some damaged files and takes its process with it. The file comes in as standard input,
the variables go out as a safetensors file. Only the standard library is imported here, and h5py in :func:`main`.
"""

from __future__ import annotations

import io
import json
import math
import os
import resource
import struct
import sys
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, BinaryIO

MODEL = ".weights.h5"  # how the name of the HDF5 file in a .keras file ends
MAX_NAMES = 1_000_000
DTYPES = {
    "|b1": "BOOL",
    "|u1": "U8",
    "|i1": "I8",
    "<u2": "U16",
    "<i2": "I16",
    "<f2": "F16",
    "|V2": "BF16",  # what h5py makes of it
    "<u4": "U32",
    "<i4": "I32",
    "<f4": "F32",
    "<u8": "U64",
    "<i8": "I64",
    "<f8": "F64",
}


def variables(group: Any, key: str | None) -> dict[str, Any]:
    """The datasets of an optimizer's variables by index, from a file of h5py or a group in it.

    Args:
        group: The file, or the group.
        key: The name of the optimizer, where there are several. ``None``: "optimizer".

    Raises:
        ValueError: If there is no optimizer, or there are several.
    """
    if key is None and "optimizer_weights" in group:  # the .h5 of tf.keras, and of Keras 3 where one asks for it
        weights = _child(group, "optimizer_weights")
        return {str(i): _child(weights, name) for i, name in enumerate(_weight_names(weights))}
    if key is None and len(group) and all(name.isdecimal() for name in group):  # save_own_variables(file)
        return {name: _child(group, name) for name in group}
    holder = _child(group, key or _only_optimizer(group))
    holder = _child(holder, "vars") if "vars" in holder else holder
    found = {name: _child(holder, name) for name in holder}
    if not found:
        raise ValueError("its optimizer has no variables: it was saved before the first step")
    return found


def _only_optimizer(group: Iterable[str]) -> str:
    names = [name for name in group if "optimizer" in name.lower()]
    if "optimizer" in names:
        return "optimizer"
    if names:
        raise ValueError(f"it has {', '.join(names)[:200]}: say which with 'key'")
    raise ValueError("it has no optimizer: the model was saved before compile(), or without (include_optimizer=False)")


def _child(group: Any, path: str) -> Any:
    """What is at ``path``, along hard links only: others may lead to any file of this machine."""
    for name in path.split("/"):
        link = group.get(name, getlink=True) if hasattr(group, "get") else None
        if link is None:
            raise ValueError(f"it has no {path!r:.80}")
        if type(link).__name__ != "HardLink":
            raise ValueError(f"{path!r:.80} is a link, which Keras never writes")
        group = group[name]
    return group


def _weight_names(group: Any) -> list[str]:
    """The names in the attribute ``weight_names``, or where it is long in ``weight_names0``, ``weight_names1``, ..."""
    pieces = ["weight_names"]
    if "weight_names" not in group.attrs:
        pieces = [name for name in (f"weight_names{i}" for i in range(len(group.attrs))) if name in group.attrs]
    names: list[str] = []
    for piece in pieces:
        if math.prod(group.attrs.get_id(piece).shape) > MAX_NAMES:
            raise ValueError("it has more names than any model")
        names += [name.decode() if isinstance(name, bytes) else str(name) for name in group.attrs[piece]]
    return names


def described(name: str, dataset: Any) -> tuple[str, list[int], int]:
    """The safetensors dtype, shape and bytes of a dataset, which must lie in the file as it is, all of it.

    Raises:
        ValueError: If it does not, or is no array.
    """
    if not hasattr(dataset, "dtype") or getattr(dataset, "shape", None) is None:
        raise ValueError(f"{name!r:.80} is no array")
    shape, dtype = [int(n) for n in dataset.shape], DTYPES.get(dataset.dtype.str)
    if dtype is None:
        raise ValueError(f"{name!r:.80} has the dtype {dataset.dtype!s:.40}, which cannot be read")
    plan, size = dataset.id.get_create_plist(), math.prod(shape) * dataset.dtype.itemsize
    if plan.get_nfilters() or plan.get_external_count() or dataset.is_virtual or dataset.chunks:
        raise ValueError(f"{name!r:.80} is compressed, chunked or in another file, which Keras never writes")
    if dataset.id.get_storage_size() != size:
        raise ValueError(f"{name!r:.80} promises {size} bytes but has {dataset.id.get_storage_size()}")
    return dtype, shape, size


def _opened(stream: BinaryIO) -> BinaryIO:
    """The HDF5 file, which a .keras file holds without compression."""
    if stream.read(2) != b"PK":
        return stream
    archive = zipfile.ZipFile(stream)
    info = next((info for info in archive.infolist() if info.filename.endswith(MODEL)), None)
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its weights are compressed, which Keras never does: unpack it and give the .weights.h5 in it")
    return io.BytesIO(archive.read(info))


def _limit(size: int) -> None:
    """Let a file that lies have no more memory and time than its size can need."""
    for what, most in ((resource.RLIMIT_AS, 4 * size + 2**31), (resource.RLIMIT_CPU, 60 + size // 10**7)):
        with suppress(ValueError, OSError):  # where the system has no such limit, or a lower one
            resource.setrlimit(what, (most, most))


def _write(found: dict[str, Any], most: int, out: BinaryIO) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, dataset in found.items():
        dtype, shape, size = described(name, dataset)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
        if end > most:
            raise ValueError("its variables overlap")
    text = json.dumps(header).encode()
    out.write(struct.pack("<Q", len(text)) + text)
    for dataset in found.values():
        out.write(dataset[()].tobytes())


def main() -> int:
    """Standard input to standard output; 2 and a message if the file is refused."""
    sys.path[:] = json.loads(sys.argv[1])
    import h5py  # pyright: ignore[reportMissingImports]

    size = os.fstat(0).st_size
    _limit(size)
    key = sys.argv[2] if len(sys.argv) > 2 else None
    try:
        with os.fdopen(0, "rb") as stream, h5py.File(_opened(stream), "r") as file:
            _write(variables(file, key), size, sys.stdout.buffer)
    except ValueError as error:
        sys.stderr.write(str(error))
        return 2
    except Exception as error:  # h5py has one of its own for every fault of a file
        sys.stderr.write(f"h5py cannot read it: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
