"""The learning rate schedules of Keras, torch, MindSpore and optax, as functions of the step like MLX's own.

Each function bears its framework's name and takes the framework's arguments; torch's and MindSpore's begin with the
rate that their schedulers find in the optimizer. What it returns is called with the step, a uint64 array or an int,
0 first, and gives a 0-d fp32 array, inside ``mx.compile`` too::

    optimizer = Adagrad(schedules.torch_step_lr(0.1, step_size=30))

Wrong arguments are refused at once: TypeError for a wrong type, ValueError for a value out of range, as negative
rates, factors and exponents are throughout. Where the function is one of MLX's, MLX's own does the computing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from .. import checks
from .keras import (
    keras_cosine_decay,
    keras_cosine_decay_restarts,
    keras_exponential_decay,
    keras_inverse_time_decay,
    keras_piecewise_constant_decay,
    keras_polynomial_decay,
)
from .mindspore import mindspore_exponential_lr, mindspore_step_lr
from .named import FACTORIES, NamedSchedule, call_with
from .optax import (
    optax_cosine_decay_schedule,
    optax_exponential_decay,
    optax_linear_schedule,
    optax_piecewise_constant_schedule,
    optax_polynomial_schedule,
    optax_warmup_cosine_decay_schedule,
)
from .torch import (
    torch_cosine_annealing_lr,
    torch_exponential_lr,
    torch_lambda_lr,
    torch_linear_lr,
    torch_multi_step_lr,
    torch_one_cycle_lr,
    torch_step_lr,
)

__all__ = [
    "NamedSchedule",
    "from_config",
    "from_keras",
    "get_config",
    "keras_cosine_decay",
    "keras_cosine_decay_restarts",
    "keras_exponential_decay",
    "keras_inverse_time_decay",
    "keras_piecewise_constant_decay",
    "keras_polynomial_decay",
    "mindspore_exponential_lr",
    "mindspore_step_lr",
    "optax_cosine_decay_schedule",
    "optax_exponential_decay",
    "optax_linear_schedule",
    "optax_piecewise_constant_schedule",
    "optax_polynomial_schedule",
    "optax_warmup_cosine_decay_schedule",
    "torch_cosine_annealing_lr",
    "torch_exponential_lr",
    "torch_lambda_lr",
    "torch_linear_lr",
    "torch_multi_step_lr",
    "torch_one_cycle_lr",
    "torch_step_lr",
]

Schedule = Callable[[mx.array], mx.array]

KERAS = {
    "CosineDecay": keras_cosine_decay,
    "CosineDecayRestarts": keras_cosine_decay_restarts,
    "ExponentialDecay": keras_exponential_decay,
    "InverseTimeDecay": keras_inverse_time_decay,
    "PiecewiseConstantDecay": keras_piecewise_constant_decay,
    "PolynomialDecay": keras_polynomial_decay,
}
MLX: dict[str, Callable[..., Schedule]] = {
    "cosine_decay": optim.cosine_decay,
    "exponential_decay": optim.exponential_decay,
    "join_schedules": optim.join_schedules,
    "linear_schedule": optim.linear_schedule,
    "step_decay": optim.step_decay,
}


def from_keras(schedule: Any) -> NamedSchedule:
    """The schedule that a Keras or tf.keras schedule, or its serialised dict, describes; it is never called.

    Args:
        schedule: An object of a class of Keras's, or ``{"class_name": ..., "config": {...}}``.

    Raises:
        TypeError: If it is neither.
        ValueError: If its class or one of its options is not known here.
    """
    if isinstance(schedule, Mapping):
        # Keras registers classes of users only, and such a class may share a name with one of Keras's.
        name, config = schedule.get("registered_name") or schedule.get("class_name"), schedule.get("config")
    elif callable(getattr(schedule, "get_config", None)):
        name, config = type(schedule).__name__, schedule.get_config()
    else:
        raise TypeError(f"[from_keras] expected a Keras schedule or its config but got {schedule!r}.")
    if not isinstance(name, str) or name not in KERAS:
        raise ValueError(f"[from_keras] there is no schedule {name!r} here, only {', '.join(KERAS)}.")
    if isinstance(config, Mapping):
        config = {key: value for key, value in config.items() if key != "name"}  # a label for graphs
    return call_with("from_keras", KERAS[name], config)


def get_config(schedule: Schedule) -> dict[str, Any]:
    """``{"name": ..., "config": {...}}`` of a schedule made here or by ``mlx.optimizers``, for JSON.

    Raises:
        TypeError: If the schedule is another callable, or one that was made with a function.
    """
    if isinstance(schedule, NamedSchedule):
        return schedule.get_config()
    # MLX's schedules are closures over the arguments of the function that made them.
    name, _, inner = getattr(schedule, "__qualname__", "").partition(".<locals>.")
    if name in MLX and inner == "schedule" and inspect.getmodule(schedule) is inspect.getmodule(MLX[name]):
        held = inspect.getclosurevars(schedule).nonlocals
        return {"name": name, "config": _mlx_options(name, held, get_config)}
    raise TypeError(f"[schedules] only schedules made here or by mlx.optimizers can be saved, not {schedule!r}.")


def from_config(config: Any) -> Schedule:
    """The schedule that :func:`get_config` described.

    Raises:
        ValueError: If it describes none.
        TypeError: If an option has a wrong type.
    """
    if not isinstance(config, Mapping) or set(config) != {"name", "config"}:
        raise ValueError(f"[schedules] a config must have 'name' and 'config' but got {config!r}.")
    name, options = config["name"], config["config"]
    if not isinstance(name, str) or name not in FACTORIES | MLX:
        raise ValueError(f"[schedules] there is no schedule {name!r}.")
    if name in MLX and isinstance(options, Mapping):
        options = _mlx_options(name, options, from_config)
    return call_with("schedules", (FACTORIES | MLX)[name], options)


def _mlx_options(name: str, options: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """Options of MLX's functions as plain numbers and lists, with the schedules among them converted."""

    def number(key: str, value: Any) -> float:
        checked = checks.real(name, key, value)
        return int(value) if isinstance(value, Integral) else checked

    if name != "join_schedules":
        return {key: number(key, value) for key, value in options.items()}
    for key, values in options.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"[join_schedules] '{key}' must be a list but got {values!r}.")
    return {
        key: [convert(value) if key == "schedules" else number(key, value) for value in values]
        for key, values in options.items()
    }
