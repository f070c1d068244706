"""``save`` and ``load``: a run's whole state in one safetensors file, and back into the live optimizer and model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.nn import Module
from mlx.optimizers import Optimizer

from ..wrappers.states import expect_new_state
from ..wrappers.swap import holds_averages, own_parameters
from . import kinds, safetensors, trees
from .atomic import replacing
from .config import describe, differences, stack
from .fitted import fitted

FORMAT = "mlx_adagrad"
VERSION = 1


def save(path: str | os.PathLike, optimizer: Optimizer, model: Module | dict | None = None) -> None:
    """Write the optimizer's state, and the model's parameters if given, as one safetensors file.

    The file appears whole or not at all: whatever happens meanwhile, ``path`` holds the old file or the new one. Every
    array keeps its dtype and every bit. State lies under ``optimizer.``, parameters under ``model.``; hyperparameters
    and the structure of the trees (lists, empty dicts) are in the metadata. Inside ``with optimizer.averaged(model)``
    the model's own weights are written, so that the run can go on; ``model.save_weights`` writes the averages there.

    Args:
        path: Where to write; a link is followed, an old file's permissions are kept.
        optimizer: Any ``mlx.optimizers.Optimizer``.
        model: A module, or a tree of its parameters. Default: ``None``.

    Raises:
        TypeError: If the state holds something that is no array.
        ValueError: Inside ``mx.compile`` or another transformation, or if ``path`` is no file.
        OSError: If the file cannot be written; the old one is as it was.
    """
    arrays: dict[str, mx.array] = {}
    trees_of = {"optimizer": optimizer.state, "model": _parameters(model)}
    structure = {name: trees.pack(tree, name, arrays) for name, tree in trees_of.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": json.dumps(describe(optimizer)),
        "structure": json.dumps(structure),
    }
    mx.eval(arrays)
    with replacing(path) as stream:
        safetensors.write(stream, arrays, metadata)


def load(
    path: str | os.PathLike, optimizer: Optimizer, model: Module | dict | None = None, *, strict: bool = True
) -> None:
    """Put a saved run back into the live ``optimizer`` and ``model``, in place: a step compiled with them goes on.

    An optimizer that has seen no parameter takes the state as it is in the file; one that has must have the same names,
    shapes and dtypes. A learning rate that is a number comes from the file; other hyperparameters must be the same.

    Args:
        path: A file that :func:`save` wrote.
        optimizer: An optimizer built as the saved one was.
        model: A module, or a tree of its parameters, to load the saved parameters into. Default: ``None``.
        strict: Refuse other hyperparameters than the saved ones. ``False``: a ``v`` that was kept in another way (fp32,
            bf16, 8 bits) is converted, too. Default: ``True``.

    Raises:
        ValueError: If the file is damaged, or does not fit; each difference is named. Or if the model holds averages at
            the moment (:meth:`~mlx_adagrad.wrappers.Wrapper.averaged`). Nothing has changed then.
        OSError: If the file cannot be read. Nothing has changed then.
    """
    if model is not None and holds_averages(model):
        raise ValueError("[checkpoint] 'model' holds averages: leave the 'with' block of 'averaged' before you load.")
    live = {"optimizer": optimizer.state} | ({} if model is None else {"model": _parameters(model)})
    with _opened(path) as (entries, metadata):
        saved = _unpack(entries, metadata)
        saved["optimizer"] = trees.renamed(saved["optimizer"], optimizer.state)
        if model is not None and saved["model"] is None:
            raise ValueError("it was saved without a model")
        if not strict:
            saved["optimizer"] = fitted(saved["optimizer"], optimizer.state)
        problems = _other_hyperparameters(_json(metadata, "config"), describe(optimizer)) if strict else []
        for name, tree in live.items():
            problems += trees.mismatches(saved[name], tree, name)
        problems += trees.surplus(saved["model"], live.get("model"), "model")
        if problems:
            raise ValueError(trees.listed(problems))
        new = trees.read({name: saved[name] for name in live})
        mx.eval(new)
        if isinstance(model, Module):  # in the module's own structure, so that nothing can be refused below
            trees.fill(live["model"], new["model"])
    trees.fill(live["optimizer"], new["optimizer"])
    expect_new_state(optimizer)
    if isinstance(model, Module):
        model.update(live["model"])
    elif model is not None:
        trees.fill(model, new["model"])


def _other_hyperparameters(config: Any, own: Any) -> list[str]:
    """In words; between optimizers of other classes a list of what differs would help nobody.

    Raises:
        ValueError: If the classes differ.
    """
    if stack(config) != stack(own):
        raise ValueError(f"the optimizer is {stack(config):.200} in the file but {stack(own)} here")
    return list(differences(config, own))


def _parameters(model: Module | dict | None) -> Any:
    return None if model is None else own_parameters(model)


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[dict[str, safetensors.Entry], dict[str, str]]]:
    """The entries and the metadata of a file; what is wrong with it is said with its name."""
    try:
        kinds.expect(path, kinds.OWN, kinds.SAFETENSORS)
        with open(path, "rb") as stream:
            yield safetensors.read(stream)
    except (ValueError, RecursionError) as error:  # the latter for what is nested too deeply, wherever it shows
        raise ValueError(f"[checkpoint] '{os.fsdecode(path)}' cannot be loaded: {error}.") from error


def _unpack(entries: dict[str, safetensors.Entry], metadata: dict[str, str]) -> dict[str, Any]:
    """The trees of a file, structure checked."""
    if metadata.get("format") != FORMAT:
        raise ValueError("it is no checkpoint of mlx_adagrad; stock MLX ones are for import_mlx")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"it has version {metadata.get('version')!r:.20} of the format, and only {VERSION} is known")
    structure = _json(metadata, "structure")
    if not isinstance(structure, dict) or structure.keys() != {"optimizer", "model"}:
        raise ValueError("its structure must have an optimizer and a model")
    left = dict(entries)
    saved = trees.unpack(structure, left)
    if left:
        raise ValueError(f"its structure does not know the tensor {next(iter(left))!r:.80}")
    return saved


def _json(metadata: dict[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError):
        raise ValueError(f"its {key} is missing or is no JSON") from None
