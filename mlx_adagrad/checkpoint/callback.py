"""A callback that saves a run while a trainer trains, for mlx-lm's trainer and those that take its callbacks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.nn import Module
from mlx.optimizers import Optimizer

from .. import checks
from .snapshots import check_path, check_run
from .state import load, read_notes, save


class Callback:
    """Saves the run at the first report of the training loss after every so many iterations, and puts it back.

    The file holds the optimizer's state, the trainable parameters, the state of ``mx.random``, and the iteration as a
    note. Where a trainer keeps its position in the data is its own affair; for mlx-lm :func:`mlx_adagrad.lm.train`
    saves that too.

    Args:
        path: The file, replaced whole at each save.
        optimizer: The optimizer of the run.
        model: The module of the run.
        every: Iterations between two saves, >= 1. Default: ``1``, at every report.
        wrapped: Another callback, which is called too. Default: ``None``.

    Raises:
        ValueError: If ``every`` is below 1.
        TypeError: If an argument is of another type.
    """

    def __init__(
        self, path: str | os.PathLike, optimizer: Optimizer, model: Module, every: int = 1, wrapped: Any = None
    ):
        check_path("Callback", path)
        check_run("Callback", optimizer, model)
        self.path = path
        self.optimizer = optimizer
        self.model = model
        self.every = checks.positive_integer("Callback", "every", every)
        self.wrapped = wrapped
        self.before = 0  # iterations of earlier processes, where the trainer counts from 1 again
        self.saved = 0

    def resume(self) -> int:
        """Put the saved run back into the optimizer and the model; returns its iterations, 0 without a file.

        Raises:
            ValueError: If the file is damaged, or does not fit; each difference is named. Nothing has changed then.
        """
        if os.path.exists(self.path):
            iterations = checks.natural("Callback", "iterations", read_notes(self.path).get("iterations", 0))
            load(self.path, self.optimizer, self.model)
            self.before = self.saved = iterations
        return self.before

    def on_train_loss_report(self, train_info: Mapping[str, Any]) -> None:
        """What mlx-lm's trainer calls with the number of the iteration, when all of it is done."""
        done = self.before + int(train_info["iteration"])
        if done // self.every > self.saved // self.every:
            self.saved = done
            if mx.distributed.init().rank() == 0:
                notes = {"iterations": done}
                save(self.path, self.optimizer, self.model, trainable_only=True, random_state=True, notes=notes)
        if self.wrapped is not None:
            self.wrapped.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: Mapping[str, Any]) -> None:
        """What mlx-lm's trainer calls after a validation; handed on."""
        if self.wrapped is not None:
            self.wrapped.on_val_loss_report(val_info)
