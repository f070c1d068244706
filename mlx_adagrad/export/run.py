"""``load_step``: run an exported step from Python, as an app does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint.atomic import replacing
from .inputs import described
from .step import FORMAT, MANIFEST, START, STEP, VERSION, sha256

OWNER = "load_step"


class ExportedStep:
    """A training step from a file: ``loss = step(x=x, y=y)``.

    Args:
        function: What MLX imported.
        state: The arrays that go in beside the batch, by name; each step replaces those that it changes.
        manifest: The content of ``manifest.json``.
    """

    def __init__(self, function: Any, state: dict[str, mx.array], manifest: dict[str, Any]):
        self._function = function
        self.state = state
        self.manifest = manifest

    def __call__(self, **batch: mx.array) -> mx.array:
        """Take one step and return the loss, evaluated together with the new state.

        Raises:
            ValueError: For a batch, or a state, of other names, shapes or dtypes than the step was exported for.
        """
        given = {name: _described(array) for name, array in batch.items()}
        if given not in self.manifest["batches"]:
            known = "; ".join(map(_text, self.manifest["batches"]))
            raise ValueError(f"[{OWNER}] the step takes a batch of {known} but got {_text(given)}.")
        try:
            outputs = self._function(**self.state, **batch)
        except ValueError:
            self._check_state()
            raise
        new = dict(zip(self.manifest["outputs"], outputs, strict=True))
        mx.eval(new)
        loss = new.pop("loss")
        self.state.update(new)
        return loss

    def _check_state(self) -> None:
        """Raise ValueError for what was put into the state and is not what the step takes."""
        for name in [*self.manifest["inputs"], *self.state]:
            wanted, got = self.manifest["inputs"].get(name), self.state.get(name)
            given = described(got) if isinstance(got, mx.array) else got
            if given != wanted:
                raise ValueError(f"[{OWNER}] '{name}' in the state must be {_kind(wanted)} but got {_kind(given)}.")

    def save(self, path: str | os.PathLike) -> None:
        """Write the state as a safetensors file like ``start.safetensors``, from which a run goes on.

        The file appears whole or not at all.
        """
        mx.eval(self.state)
        with replacing(path) as stream:
            mx.save_safetensors(stream, self.state)


def load_step(folder: str | os.PathLike, state: str | os.PathLike | None = None) -> ExportedStep:
    """The step that :func:`export_step` wrote.

    Args:
        folder: What it wrote to.
        state: A file of :meth:`ExportedStep.save`, or of an app, to go on from. Default: ``start.safetensors``.

    Raises:
        ValueError: If the folder holds no exported step, its files do not belong together, or the state is that of
            another step.
    """
    files = {name: Path(folder, name) for name in (STEP, START, MANIFEST)}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise ValueError(f"[{OWNER}] '{os.fspath(folder)}' is no exported step: {', '.join(missing)} missing.")
    manifest = _manifest(files[MANIFEST])
    for name in (STEP, START):
        if sha256(files[name]) != manifest["sha256"][name]:
            raise ValueError(f"[{OWNER}] {name} is not the one that {MANIFEST} describes: export the step again.")
    arrays: Any = mx.load(os.fspath(files[START] if state is None else state), format="safetensors")
    mx.eval(arrays)  # else they are read from the file later, when it may be another
    if {name: _described(array) for name, array in arrays.items()} != manifest["inputs"]:
        raise ValueError(f"[{OWNER}] '{os.fspath(state or START)}' holds the arrays of another step.")
    try:
        return ExportedStep(mx.import_function(str(files[STEP])), arrays, manifest)
    except (RuntimeError, ValueError) as error:
        device = manifest["device"]
        raise ValueError(f"[{OWNER}] MLX cannot import the step, which is for the {device}: {error}") from None


def _manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        known = (manifest["format"], manifest["version"]) == (FORMAT, VERSION)
        known = known and all(isinstance(manifest[k], dict) for k in ("inputs", "sha256"))
        known = known and all(isinstance(manifest[k], list) for k in ("batches", "outputs"))
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"[{OWNER}] '{file}' is no manifest that this version knows.")
    return manifest


def _described(array: Any) -> Any:
    if not isinstance(array, mx.array):
        raise TypeError(f"[{OWNER}] a batch must hold arrays but got {type(array).__name__}.")
    return described(array)


def _text(batch: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {_kind(d)}" for name, d in batch.items()) or "no arrays"


def _kind(array: Any) -> str:
    if isinstance(array, dict):
        return f"{array['dtype']} {tuple(array['shape'])}"
    return "nothing" if array is None else type(array).__name__
