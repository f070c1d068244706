"""For which device an exported step is: MLX writes the device of every operation into the file.

A build of MLX without a GPU cannot place an operation there, so a step for a Mac's GPU that is exported elsewhere is
traced on the CPU, with the kernels in it, and the devices in the file are changed afterwards.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from ..update.devices import traced_for_gpu
from .inputs import OWNER

CPU, GPU = "cpu", "gpu"
# A stream in the file (MLX's export.cpp): its index, the type of its device and the device's index, three int32.
STREAM = struct.Struct("<iii")
DEVICE_TYPES = {CPU: 0, GPU: 1}
ANY_STREAM = -1  # the importing process takes a stream that it has on the device


def checked(device: str | None) -> str:
    """The name of the device to export for; None stands for the default device.

    Raises:
        ValueError: If it is neither ``"cpu"`` nor ``"gpu"``.
    """
    if device is None:
        return GPU if mx.default_device() == mx.gpu else CPU
    if device not in DEVICE_TYPES:
        raise ValueError(f"[{OWNER}] 'device' must be 'cpu' or 'gpu' but got {device!r:.80}.")
    return device


def has_gpu() -> bool:
    """Whether this build of MLX can place operations on a GPU."""
    return mx.is_available(mx.gpu)


@contextmanager
def tracing_for(device: str) -> Iterator[None]:
    """Trace a step as it runs on ``device``."""
    if device == GPU and not has_gpu():
        with traced_for_gpu():
            yield
    else:
        with mx.stream(mx.gpu if device == GPU else mx.cpu):
            yield


def moved_to_gpu(file: bytes, operations: Sequence[str]) -> bytes:
    """An exported function with all its operations on the GPU.

    Args:
        file: What MLX wrote.
        operations: The names of its operations in their order, as MLX's export callback tells them: each must be met in
            turn, so that nothing else is taken for an operation.

    Raises:
        RuntimeError: If the file is not made up as this version knows it.
    """
    new, position = bytearray(file), 0
    for name in operations:
        text = name.encode()
        marked = struct.pack("<Q", len(text)) + text
        at = file.find(marked, position)
        start = at - STREAM.size
        if at < 0 or start < position or not _is_stream(file, start):
            version = mx.__version__  # type: ignore[attr-defined]
            raise RuntimeError(
                f"[{OWNER}] MLX {version} writes operations in a way that is not known here, so device='gpu' takes a "
                "machine with a GPU."
            )
        STREAM.pack_into(new, start, ANY_STREAM, DEVICE_TYPES[GPU], 0)
        position = at + len(marked)
    return bytes(new)


def _is_stream(file: bytes, start: int) -> bool:
    _, kind, index = STREAM.unpack_from(file, start)
    return kind in DEVICE_TYPES.values() and index == 0
