"""One file that holds all of a run at one moment: weights, optimizer, random numbers, position in the data, options.

Since it is one file, which is replaced whole, no part of it can belong to another moment than the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn import Module
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten

from .. import checkpoint
from ..checkpoint import safetensors
from ..checkpoint.atomic import replacing

NAME = "resume.safetensors"
SHOWN = 10  # differences that an error message lists


def save(path: Path, optimizer: Optimizer, model: Module, notes: Mapping[str, Any]) -> None:
    """Write the run: the trainable parameters, the optimizer's state, MLX's random state, and ``notes``."""
    checkpoint.save(path, optimizer, model, trainable_only=True, random_state=True, notes=notes)


def read_notes(path: Path) -> dict[str, Any]:
    """The notes alone.

    Raises:
        ValueError: If the file is damaged, or no run.
        OSError: If it cannot be read.
    """
    notes = checkpoint.read_notes(path)
    if not {"iterations", "position", "options"} <= notes.keys():
        raise ValueError(f"[train] '{path}' cannot be loaded: it is a checkpoint, but not one of mlx_adagrad.lm.train.")
    return notes


def check_options(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError for a run that was made under other options, with all that differs."""
    problems = list(_differences(saved, json.loads(json.dumps(own)), ""))
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        listed = "\n  ".join([*problems[:SHOWN], *more])
        raise ValueError(f"[train] '{path}' cannot be resumed under other options:\n  {listed}")


def _differences(saved: Any, own: Any, path: str) -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(own, dict):
        for key in {**saved, **own}:
            yield from _differences(saved.get(key), own.get(key), f"{path}.{key}" if path else key)
    elif saved != own:
        yield f"'{path}' was {saved!r:.120} but is {own!r:.120} here"


def save_adapters(path: Path, model: Module) -> None:
    """Write the trainable parameters as mlx-lm does, but so that a crash leaves the old file or the new one."""
    weights: Any = dict(tree_flatten(model.trainable_parameters()))
    mx.eval(weights)
    with replacing(path) as stream:
        safetensors.write(stream, weights, {"format": "mlx"})
