"""Keras's HDF5 files, which h5py reads in a process of its own: a damaged one may end that process, not this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import hdf5_worker, safetensors, sources
from .safetensors import Entry


@contextmanager
def opened(path: str | os.PathLike, key: str | None) -> Iterator[dict[str, Entry]]:
    """The variables of an optimizer in a ``.keras``, ``.weights.h5`` or ``.h5`` file by index; read them inside.

    Args:
        path: The file.
        key: The name of the optimizer, where there are several. ``None``: "optimizer".

    Raises:
        ImportError: Without h5py.
        ValueError: If the file is damaged, or holds no optimizer.
    """
    try:
        import h5py  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        what = "the files of Keras are HDF5, read by h5py, which is not installed"
        raise ImportError(f"[checkpoint] {what}: pip install 'mlx-adagrad[keras]'.") from None
    with open(path, "rb") as stream, tempfile.TemporaryFile() as out:
        command = [sys.executable, "-I", hdf5_worker.__file__, json.dumps(sys.path), *([] if key is None else [key])]
        done = subprocess.run(command, stdin=stream, stdout=out, stderr=subprocess.PIPE)
        if done.returncode:
            said = done.stderr.decode(errors="replace")[-300:] if done.returncode == 2 else "h5py breaks down over it"
            raise ValueError(said)
        out.seek(0)
        yield safetensors.read(out)[0]


def variables(group: Any, key: str | None) -> dict[str, Entry]:
    """The same of a file that is open in h5py, or of a group in it.

    Raises:
        ValueError: If there is no optimizer, or there are several.
    """
    return {name: sources.entry(f"'{name}'", dataset) for name, dataset in hdf5_worker.variables(group, key).items()}
