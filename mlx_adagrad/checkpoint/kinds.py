"""What a file or a folder is, told by its first bytes, and who reads it."""

from __future__ import annotations

import glob
import json
import os
import re
import zipfile
from typing import IO

KERAS, HDF5, NPZ, SAFETENSORS, OWN, TORCH = "keras", "hdf5", "npz", "safetensors", "own", "torch"

# what it is, and what to do
WORDS = {
    KERAS: ("a .keras file", "import_keras reads it"),
    HDF5: ("an HDF5 file, as Keras writes them", "import_keras reads it"),
    NPZ: (
        "an .npz of numpy",
        "import_keras reads an optimizer's variables from one, import_mlx the flattened state of stock MLX",
    ),
    SAFETENSORS: ("a safetensors file", "import_mlx reads the state of stock MLX from one"),
    OWN: ("a checkpoint of mlx_adagrad itself", "checkpoint.load reads it"),
    TORCH: ("a file of torch.save", "import_torch reads it"),
    "torch_old": (
        "a file of torch.save in the old format, before torch 1.6: a plain pickle, which torch.save never writes now",
        "load it with torch and save it anew: torch.save(torch.load(path, weights_only=True), path)",
    ),
    "torch_script": ("a TorchScript archive, a model", "save the optimizer's state_dict() with torch.save"),
    "torch_folder": (
        "a folder of torch.distributed.checkpoint",
        "make one file of it with torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, path)",
    ),
    "pickle": (
        "a pickle, which can run code when it is read, and which torch.save never writes now",
        "if you trust it, unpickle it yourself and give the dict of arrays in it",
    ),
    "npy": ("one array of numpy", "give a dict of arrays, or an .npz or a safetensors file of them"),
    "saved_model": (
        "a SavedModel of TensorFlow",
        "load it with tf.keras and give import_keras dict(enumerate(model.optimizer.get_weights()))",
    ),
    "tensorflow": (
        "a checkpoint of TensorFlow",
        "restore it in tf.keras and give import_keras dict(enumerate(model.optimizer.get_weights()))",
    ),
    "orbax": (
        "an orbax checkpoint of JAX",
        "restore it with orbax and give import_mlx {'step': ..., 'learning_rate': ..., '<path>.v': squares' sum, ...}",
    ),
    "gguf": ("a GGUF file, a model", "it holds no optimizer"),
    "tar": ("a tar archive, as torch wrote before 0.2", "unpack it, or load it with the torch that wrote it"),
    "gzip": ("compressed with gzip", "unpack it first"),
    "zip": ("a zip archive of something else", "give the file in it that holds the optimizer's state"),
    "folder": ("a folder", "give the file in it that holds the optimizer's state"),
}

STARTS = (
    (b"\x89HDF\r\n\x1a\n", HDF5),
    (b"\x93NUMPY", "npy"),
    (b"GGUF", "gguf"),
    (b"\x1f\x8b", "gzip"),
    (b"model_checkpoint_path:", "tensorflow"),
)
TORCH_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # pickled first in torch's old format
TABLE_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")  # at the end of TensorFlow's .index, a table of LevelDB
IN_FOLDERS = (
    ("saved_model.pb", "saved_model"),
    ("keras_metadata.pb", "saved_model"),
    ("_CHECKPOINT_METADATA", "orbax"),
    ("_METADATA", "orbax"),
    ("manifest.ocdbt", "orbax"),
    ("*.orbax-checkpoint*", "orbax"),
    ("*.distcp", "torch_folder"),
    (".metadata", "torch_folder"),
    ("checkpoint", "tensorflow"),
    ("*.index", "tensorflow"),
)
MAX_HEADER = 100_000_000


def expect(path: str | os.PathLike, *readable: str) -> str | None:
    """What a file is: one of ``readable``, or None if it cannot be told.

    Raises:
        ValueError: If it is something else; says what, and what to do.
        OSError: If it cannot be opened.
    """
    name = os.fsdecode(path)
    kind = _of_folder(name) if os.path.isdir(name) else _of_prefix(name) or _of_file(name)
    if kind is not None and kind not in readable:
        what, todo = WORDS[kind]
        raise ValueError(f"it is {what}: {todo}")
    return kind


def _of_folder(name: str) -> str:
    for pattern, kind in IN_FOLDERS:
        for folder in (name, os.path.join(name, "default")):  # where orbax's managers put the item
            if glob.glob(os.path.join(glob.escape(folder), pattern)):
                return kind
    return "folder"


def _of_prefix(name: str) -> str | None:
    """TensorFlow names its checkpoints by what the names of their files begin with."""
    return "tensorflow" if not os.path.exists(name) and os.path.exists(f"{name}.index") else None


def _of_file(name: str) -> str | None:
    with open(name, "rb") as stream:
        start = stream.read(512)
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 8))
        end = stream.read(8)
        # first: the length of a header may be the first bytes of anything, a pickle's too
        if (kind := _of_safetensors(stream, start, size)) is not None:
            return kind
        kind = next((kind for magic, kind in STARTS if start.startswith(magic)), None)
        if kind is None and start[:2] == b"PK":
            return _of_zip(stream)
        if kind is None and start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5":
            return "torch_old" if TORCH_MAGIC in start[:40] else "pickle"
        if kind is None and start[257:262] == b"ustar":
            return "tar"
        if kind is None and (end == TABLE_MAGIC or re.search(r"\.data-\d{5}-of-\d{5}$", name)):
            return "tensorflow"
        if kind is None and os.path.basename(name) in ("saved_model.pb", "keras_metadata.pb"):
            return "saved_model"
        return kind


def _of_zip(stream: IO[bytes]) -> str | None:
    try:
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
    except Exception:  # whatever zipfile makes of a damaged one: the reader says so
        return None
    if any(name.endswith(".weights.h5") for name in names):
        return KERAS
    if any(name.endswith("constants.pkl") for name in names):
        return "torch_script"
    if any(name.endswith("data.pkl") for name in names):
        return TORCH
    return NPZ if names and all(name.endswith(".npy") for name in names) else None if not names else "zip"


def _of_safetensors(stream: IO[bytes], start: bytes, size: int) -> str | None:
    length = int.from_bytes(start[:8], "little")
    if len(start) < 10 or start[8:9] != b"{" or not 2 <= length <= min(size - 8, MAX_HEADER):
        return None
    stream.seek(8)
    try:
        metadata = json.loads(stream.read(length)).get("__metadata__")
    except (ValueError, RecursionError, AttributeError):
        return SAFETENSORS
    return OWN if isinstance(metadata, dict) and metadata.get("format") == "mlx_adagrad" else SAFETENSORS
