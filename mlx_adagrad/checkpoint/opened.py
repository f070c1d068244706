"""Files that ``save`` wrote, opened and taken apart: what is wrong with one is said with its name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import kinds, safetensors, trees
from .snapshots import FORMAT, VERSION


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[tuple[dict[str, safetensors.Entry], dict[str, str]]]:
    """The entries and the metadata of a file; what is wrong with it is said with its name."""
    try:
        kinds.expect(path, kinds.OWN, kinds.SAFETENSORS)
        with open(path, "rb") as stream:
            yield safetensors.read(stream)
    except (ValueError, RecursionError) as error:  # the latter for what is nested too deeply, wherever it shows
        raise ValueError(f"[checkpoint] '{os.fsdecode(path)}' cannot be loaded: {error}.") from error


def unpacked(entries: dict[str, safetensors.Entry], metadata: dict[str, str]) -> dict[str, Any]:
    """The trees of a file, structure checked."""
    if metadata.get("format") != FORMAT:
        raise ValueError("it is no checkpoint of mlx_adagrad; stock MLX ones are for import_mlx")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"it has version {metadata.get('version')!r:.20} of the format, and only {VERSION} is known")
    structure = json_in(metadata, "structure")
    if not isinstance(structure, dict) or structure.keys() - {"random"} != {"optimizer", "model"}:
        raise ValueError("its structure must have an optimizer and a model")
    left = dict(entries)
    saved = trees.unpack(structure, left)
    if left:
        raise ValueError(f"its structure does not know the tensor {next(iter(left))!r:.80}")
    return saved


def json_in(metadata: dict[str, str], key: str) -> Any:
    """What an entry of the metadata holds; ValueError if it is missing or no JSON."""
    try:
        return json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError):
        raise ValueError(f"its {key} is missing or is no JSON") from None
