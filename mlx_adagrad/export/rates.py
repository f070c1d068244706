"""Who decides the learning rates of an exported step: the host, or the schedules of the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.optimizers import MultiOptimizer, Optimizer

from ..adagrad import Adagrad
from .inputs import OWNER

SCHEDULE, INPUT = "schedule", "input"


def checked(learning_rate: str | None, optimizer: Optimizer) -> str:
    """``learning_rate`` as :func:`export_step` takes it, with its default.

    Raises:
        ValueError: If it is neither, or does not go with the optimizer.
    """
    schedules = [schedule for one in _optimizers(optimizer) for schedule in _schedules(one)]
    if learning_rate not in (None, SCHEDULE, INPUT):
        raise ValueError(f"[{OWNER}] 'learning_rate' must be 'schedule' or 'input' but got {learning_rate!r:.80}.")
    if learning_rate is None and schedules:
        raise ValueError(
            f"[{OWNER}] the optimizer has a schedule: 'learning_rate' must say whether it lives in the step "
            "('schedule') or the host sets optimizer.learning_rate ('input')."
        )
    if learning_rate == SCHEDULE and not schedules:
        raise ValueError(f"[{OWNER}] 'learning_rate' is 'schedule' but the optimizer has none.")
    if learning_rate == SCHEDULE and any(not getattr(schedule, "takes_step", True) for schedule in schedules):
        raise ValueError(
            f"[{OWNER}] the learning rate is a callable without arguments, whose value would be frozen into the step: "
            "take a schedule of the step, or learning_rate='input'."
        )
    return learning_rate or INPUT


def _optimizers(optimizer: Any) -> Iterator[Any]:
    """The optimizers inside wrappers and MultiOptimizers that have learning rates themselves."""
    if isinstance(optimizer, MultiOptimizer):
        for part in optimizer.optimizers:
            yield from _optimizers(part)
    elif isinstance(getattr(optimizer, "optimizer", None), Optimizer | MultiOptimizer):
        yield from _optimizers(optimizer.optimizer)
    else:
        yield optimizer


def _scheduled_groups(optimizer: Any) -> list[int]:
    groups = optimizer.groups.groups if isinstance(optimizer, Adagrad) else []
    return [i for i, group in enumerate(groups) if callable(group.lr)]


def _schedules(optimizer: Any) -> list[Any]:
    groups = optimizer.groups.groups if isinstance(optimizer, Adagrad) else []
    return [*optimizer._schedulers.values(), *(group.lr for group in groups if callable(group.lr))]


@contextmanager
def left_to_the_host(optimizer: Optimizer, active: bool) -> Iterator[None]:
    """Let the learning rates be what the state holds, without the optimizers' schedules."""
    changed = list(_optimizers(optimizer)) if active else []
    schedules = [one._schedulers for one in changed]
    groups = [list(one.groups.groups) if isinstance(one, Adagrad) else [] for one in changed]
    try:
        for one in changed:
            one._schedulers = {}
            for i in _scheduled_groups(one):
                one.groups.groups[i] = one.groups.groups[i]._replace(lr=mx.array(0.0))  # not read: the state holds it
        yield
    finally:
        for one, saved, saved_groups in zip(changed, schedules, groups, strict=True):
            one._schedulers = saved
            if saved_groups:
                one.groups.groups[:] = saved_groups
