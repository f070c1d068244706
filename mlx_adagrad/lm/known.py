"""What this package knows of mlx-lm, and relies on; a version that differs is refused in one sentence."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

VERSIONS = "0.31 to 0.32"  # those that the tests of this package were run with
SIGNATURES = {
    "lora.build_parser": "",
    "lora.run": "args, training_callback",
    "lora.train_model": "args, model, train_set, valid_set, training_callback",
    "tuner.trainer.iterate_batches": "dataset, batch_size, max_seq_length, loop, seed, comm_group",
    "tuner.trainer.train": "model, optimizer, train_dataset, val_dataset, args, loss, iterate_batches, "
    "training_callback",
}


class NotKnown(RuntimeError):
    """mlx-lm is missing, or another one than this package knows."""


def mlx_lm(name: str) -> Any:
    """The module of mlx-lm of this name, checked.

    Raises:
        NotKnown: If mlx-lm is not installed, or its functions take other arguments than they did.
    """
    try:
        module = importlib.import_module(f"mlx_lm.{name}")
    except ImportError as error:
        raise NotKnown(f"mlx-lm cannot be imported ({error}): pip install 'mlx-adagrad[lm]'.") from None
    for path, wanted in SIGNATURES.items():
        where, _, function = path.rpartition(".")
        if where == name:
            _check(path, getattr(module, function, None), wanted)
    return module


def _check(path: str, function: Callable[..., Any] | None, wanted: str) -> None:
    taken = "is gone" if function is None else f"takes ({', '.join(inspect.signature(function).parameters)})"
    if taken != f"takes ({wanted})":
        raise _not_known(f"mlx_lm.{path} {taken}, where ({wanted}) was expected")


def _not_known(what: str) -> NotKnown:
    import mlx_lm as package

    return NotKnown(f"mlx-lm {package.__version__} is not known here ({what}): install one of {VERSIONS}.")


def trainer() -> Any:
    """mlx-lm's module with ``train``, checked."""
    return mlx_lm("tuner.trainer")


def optimizer_choices(parser: Any) -> list[str]:
    """The names that ``--optimizer`` of mlx-lm's parser takes, to append to."""
    choices = next((action.choices for action in parser._actions if action.dest == "optimizer"), None)
    if not isinstance(choices, list):
        raise _not_known("its --optimizer has no list of choices")
    return choices


@contextmanager
def counting_from(module: Any, done: int, iterations: int) -> Iterator[Callable[[], None]]:
    """Let the loop of ``train`` count its iterations from ``done + 1``, so that validation, reports and saves come when
    they would have come.

    The loop is ``zip(range(1, iterations + 1), batches)``; the module's ``range`` stands for another one meanwhile.
    What is yielded raises NotKnown if the loop does not ask for its range by the time of the first batch.
    """
    reached = not done  # nothing to change

    def counted(*bounds: int) -> range:
        nonlocal reached
        if bounds != (1, iterations + 1):
            return range(*bounds)
        reached = True
        return range(done + 1, iterations + 1)

    def check() -> None:
        if not reached:
            raise _not_known("its loop counts iterations in another way")

    if done:
        module.range = counted
    try:
        yield check
    finally:
        vars(module).pop("range", None)
