"""The schedules of ``mlx.optimizers``: read from the functions that MLX returns, and made again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from .. import checks
from ..checks import shown

MLX: dict[str, Callable[..., Callable[[mx.array], mx.array]]] = {
    "cosine_decay": optim.cosine_decay,
    "exponential_decay": optim.exponential_decay,
    "join_schedules": optim.join_schedules,
    "linear_schedule": optim.linear_schedule,
    "step_decay": optim.step_decay,
}


def config_of(schedule: Any, convert: Callable[[Any], Any]) -> dict[str, Any] | None:
    """``{"name": ..., "config": {...}}`` of a schedule of MLX's, the schedules in it converted; else None."""
    # MLX's schedules are closures over the arguments of the function that made them.
    name, _, inner = getattr(schedule, "__qualname__", "").partition(".<locals>.")
    if name in MLX and inner == "schedule" and inspect.getmodule(schedule) is inspect.getmodule(MLX[name]):
        return {"name": name, "config": plain_options(name, inspect.getclosurevars(schedule).nonlocals, convert)}
    return None


def plain_options(name: str, options: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """Options of MLX's functions as plain numbers and lists, with the schedules among them converted."""

    def number(key: str, value: Any) -> float:
        checked = checks.real(name, key, value)
        return int(value) if isinstance(value, Integral) else checked

    if name != "join_schedules":
        return {key: number(key, value) for key, value in options.items()}
    for key, values in options.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"[join_schedules] '{key}' must be a list but got {shown(values)}.")
    return {
        key: [convert(value) if key == "schedules" else number(key, value) for value in values]
        for key, values in options.items()
    }
