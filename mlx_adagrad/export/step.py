"""``export_step``: trace one training step, with its loss and its optimizer, and write it with where it starts from."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn import Module
from mlx.optimizers import MultiOptimizer, Optimizer

from ..sparse.embedding import value_and_grad
from ..sparse.gradient import RowSparse
from ..trees import copied, fill, find, present
from ..wrappers.swap import holds_averages
from . import devices, rates
from .inputs import LOSS, OWNER, RANDOM, Refused, Run, batches, described, takes_model
from .randomness import Keys, drawing_from, global_key, set_global_key

STEP, START, MANIFEST = "step.mlxfn", "start.safetensors", "manifest.json"
FORMAT, VERSION = "mlx_adagrad step", 1


def export_step(
    folder: str | os.PathLike,
    model: Module,
    optimizer: Optimizer,
    loss_fn: Callable[..., Any],
    example_batch: Any,
    *,
    learning_rate: str | None = None,
    device: str | None = None,
    shapeless: bool = False,
) -> None:
    r"""Write a training step that runs without Python: in an app in C++ or Swift, or by :func:`load_step`.

    The folder gets three files: ``step.mlxfn``, the function

    .. math:: (\text{parameters}, \text{optimizer state}, \text{batch}) \mapsto (\text{loss}, \text{new ones})

    with all of them by name, and the names of its outputs, in their order, a line each in its metadata;
    ``start.safetensors``, the arrays to start from; and ``manifest.json``, which describes both. A step takes every
    array of ``start.safetensors`` and the batch; what it returns takes the place of the arrays of the same names. The
    names are ``model.<path>``, ``optimizer.<path>`` and those of the batch; with random numbers in the step (dropout)
    there is ``random``, the key of the next ones. The live model and optimizer are left as they are.

    Args:
        folder: Where to write; made if it is missing. Files of an earlier export are replaced.
        model: The model. Parameters that are frozen go in, and come out only if the step changes them (BatchNorm).
        optimizer: Any ``mlx.optimizers.Optimizer``; state that it lacks is made. A loss scale of a wrapper is applied.
        loss_fn: ``loss_fn(model, ...)`` or ``loss_fn(...)`` with the arrays of a batch by name; returns the scalar
            loss, or a tuple that starts with it, of which the rest is left out.
        example_batch: A dict of arrays, or a tuple in the order of loss_fn's arguments, whose shapes and dtypes the
            step takes; a list of those makes a step for each of several shapes.
        learning_rate: ``"input"``: the host sets ``optimizer.learning_rate``; ``"schedule"``: the optimizer's
            schedule lives in the step. Default: ``"input"`` without a schedule; with one, it must be said.
        device: ``"cpu"`` or ``"gpu"``, which is written into the file. A step for an Apple GPU, with its kernels, may
            be exported on a machine without one. Default: the default device.
        shapeless: Refused; give a list of batches.

    Raises:
        TypeError: For arguments of a wrong type.
        ValueError: For ``shapeless``, a schedule without ``learning_rate``, a batch that does not fit ``loss_fn``,
            random numbers that are drawn in a way that the step would repeat for ever, arrays of the model that the
            loss sets and that are no parameters, or what MLX cannot export. Nothing has been written then.
    """
    _check(model, optimizer, loss_fn, shapeless)
    examples = batches(loss_fn, model, example_batch)
    device = devices.checked(device)
    learning_rate = rates.checked(learning_rate, optimizer)
    with_model = takes_model(loss_fn, list(examples[0]))
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)
    run = Run(model, optimizer)
    step = Step(run, loss_fn, with_model)
    from_host = learning_rate == rates.INPUT
    with _left_as_it_is(run), rates.left_to_the_host(optimizer, from_host), devices.tracing_for(device):
        start = run.arrays()
        operations = _rehearse(step, start, examples)
        if step.draws:
            start[RANDOM] = global_key()
        _write(Path(folder), step, start, examples, operations, device, learning_rate)


def _check(model: Any, optimizer: Any, loss_fn: Any, shapeless: Any) -> None:
    for name, value, kind, wanted in (
        ("model", model, Module, "an mlx.nn.Module"),
        ("optimizer", optimizer, Optimizer | MultiOptimizer, "an mlx.optimizers.Optimizer"),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"[{OWNER}] '{name}' must be {wanted} but got {type(value).__name__}.")
    if not callable(loss_fn):
        raise TypeError(f"[{OWNER}] 'loss_fn' must be callable but got {type(loss_fn).__name__}.")
    if holds_averages(model):
        raise ValueError(f"[{OWNER}] 'model' holds averages: leave the 'with' block of 'averaged' before the export.")
    if shapeless:
        raise ValueError(
            f"[{OWNER}] 'shapeless' must be False: MLX's shapeless export of a training step, of any optimizer, "
            "corrupts memory when it runs. Give 'example_batch' a list with one batch of each shape."
        )


@dataclass
class Step:
    """The step as MLX traces it: arrays by name in, a list of arrays out.

    Args:
        run: The model and the optimizer.
        loss_fn: The loss.
        with_model: Whether the loss takes the model first.
        outputs: The names of the arrays that come out, ``loss`` first; known after the first trace.
        draws: Whether random numbers are drawn; known after the first trace.
    """

    run: Run
    loss_fn: Callable[..., Any]
    with_model: bool
    outputs: list[str] = field(default_factory=list)
    draws: bool = False

    def __call__(self, /, **inputs: mx.array) -> list[mx.array]:
        before = {name: inputs[name] for name in self.run.names.values()}
        self.run.replace(before)
        beside = self.run.beside()
        keys = Keys(inputs[RANDOM]) if RANDOM in inputs else None
        batch = {name: x for name, x in inputs.items() if name not in before and name != RANDOM}
        if keys is None:
            loss = self._train(batch)
        else:
            with drawing_from(keys):
                loss = self._train(batch)
        after = self.run.arrays()
        self.run.check_beside(beside)
        changed = [name for name in before if after[name] is not before[name]]
        self.draws = keys is not None and keys.drawn > 0
        results = {LOSS: loss, **{name: after[name] for name in changed}}
        if keys is not None and self.draws:
            results[RANDOM] = keys.key
        self.outputs = list(results)
        return list(results.values())

    def _train(self, batch: Mapping[str, mx.array]) -> mx.array:
        model, optimizer = self.run.model, self.run.optimizer
        scale_loss = getattr(optimizer, "scale_loss", lambda loss: loss)

        def scaled(**batch: mx.array) -> tuple[mx.array, mx.array]:
            value = self.loss_fn(model, **batch) if self.with_model else self.loss_fn(**batch)
            loss = value[0] if isinstance(value, tuple | list) else value
            return scale_loss(loss), loss

        (_, loss), gradients = value_and_grad(model, scaled, exportable=True)(**batch)
        for keys, g in present(gradients):
            table = find(model, keys[:-1])
            if isinstance(g, RowSparse) and getattr(table, "max_norm", None) is not None:
                table.renorm(g.indices)  # value_and_grad leaves it to us, since this is traced
        optimizer.update(model, gradients)
        return loss


def _rehearse(step: Step, start: Mapping[str, mx.array], examples: Sequence[Mapping[str, mx.array]]) -> list[str]:
    """Trace without writing: what comes out, whether random numbers are drawn, and the operations in their order."""
    key = global_key()
    operations: list[str] = []

    def trace(inputs: dict[str, mx.array]) -> None:
        operations.clear()
        for batch in examples:
            given = {**inputs, **batch}

            # by position: a name of the user's could be that of an argument of export_function
            def positional(*arrays: mx.array, names: tuple[str, ...] = tuple(given)) -> list[mx.array]:
                return step(**dict(zip(names, arrays, strict=True)))

            mx.export_function(record, positional, *given.values())

    def record(part: dict[str, Any]) -> None:
        if part["type"] == "primitive":
            operations.append(part["name"])

    try:
        trace({**start, RANDOM: key})
        if not step.draws:
            trace(dict(start))
    except Refused:
        raise
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"[{OWNER}] MLX cannot export this step: {error}") from error
    if not mx.array_equal(global_key(), key):
        set_global_key(key)
        raise ValueError(
            f"[{OWNER}] the step draws random numbers from MLX's global state, inside a compiled function or by an "
            "imported name, and would repeat them for ever. Call mx.random's functions by that name, outside "
            "mx.compile, or put the model into evaluation mode (model.eval())."
        )
    return operations


def _write(
    folder: Path,
    step: Step,
    start: dict[str, mx.array],
    examples: Sequence[Mapping[str, mx.array]],
    operations: list[str],
    device: str,
    learning_rate: str,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        new = Path(temporary)
        with mx.exporter(str(new / STEP), step, metadata="\n".join(step.outputs)) as exporter:
            for batch in examples:
                exporter(**start, **batch)
        if device == devices.GPU and not devices.has_gpu():
            (new / STEP).write_bytes(devices.moved_to_gpu((new / STEP).read_bytes(), operations))
        mx.save_safetensors(str(new / START), start)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "mlx": mx.__version__,  # type: ignore[attr-defined]
            "device": device,
            "learning_rate": learning_rate,
            "inputs": {name: described(array) for name, array in start.items()},
            "batches": [{name: described(array) for name, array in batch.items()} for batch in examples],
            "outputs": step.outputs,
            "sha256": {name: sha256(new / name) for name in (STEP, START)},
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for name in (STEP, START, MANIFEST):  # the manifest last: it names the others by their content
            _sync(new / name)
            os.replace(new / name, folder / name)


def sha256(path: Path) -> str:
    """The digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    with open(path, "r+b") as stream:
        os.fsync(stream.fileno())


@contextmanager
def _left_as_it_is(run: Run) -> Iterator[None]:
    """Put the arrays of the model and the optimizer and the random state back afterwards, whatever happens."""
    parameters, state, key = copied(run.model.parameters()), copied(run.optimizer.state), global_key()
    beside = run.beside()
    try:
        yield
    finally:
        run.model.update(parameters)
        run.put_back(beside)
        fill(run.optimizer.state, state)
        set_global_key(key)
