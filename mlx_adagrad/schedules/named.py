"""Makes a formula of the step into a function that returns checked and serialisable schedules."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Concatenate, ParamSpec, get_args, get_type_hints

import mlx.core as mx

from ..checks import bound, shown
from . import mlx

P = ParamSpec("P")


@dataclass(frozen=True)
class NamedSchedule:
    """A learning rate as a function of the step, known by the name and the arguments it was made with.

    Args:
        name: Name of a function in :mod:`mlx_adagrad.schedules`; those make and check schedules.
        config: The arguments of that function.
    """

    name: str
    config: dict[str, Any]

    def __call__(self, step: mx.array | int) -> mx.array:
        """The learning rate at ``step``, the first being 0, as a 0-d fp32 array; also inside a trace."""
        # MLX counts in uint64, where 3 - 5 is huge; fp32 holds no odd number above 2**24.
        step = step.astype(mx.int64) if isinstance(step, mx.array) else mx.array(int(step), mx.int64)
        rate = FORMULAS[self.name](step, **self.config)
        return rate.astype(mx.float32) if isinstance(rate, mx.array) else mx.array(rate, mx.float32)

    def get_config(self) -> dict[str, Any]:
        """``{"name": ..., "config": {...}}``, for JSON and :func:`mlx_adagrad.schedules.from_config`.

        Raises:
            TypeError: If an argument is a function, as torch's LambdaLR takes it.
        """
        return {"name": self.name, "config": {k: _plain(self.name, k, v) for k, v in self.config.items()}}


def with_arguments(schedule: NamedSchedule, **arguments: Any) -> NamedSchedule:
    """The schedule with some of its arguments replaced, unchecked."""
    return replace(schedule, config=schedule.config | arguments)


FORMULAS: dict[str, Callable[..., Any]] = {}
FACTORIES: dict[str, Callable[..., NamedSchedule]] = {}


def named(formula: Callable[Concatenate[mx.array, P], Any]) -> Callable[P, NamedSchedule]:
    """The function that checks the arguments of ``formula`` but the step and returns the schedule of them.

    The annotation of each argument carries its check (see ``arguments.py``).
    """
    name, signature = formula.__name__, inspect.signature(formula)
    parameters = dict(list(signature.parameters.items())[1:])
    signature = signature.replace(parameters=list(parameters.values()), return_annotation=NamedSchedule)
    hints = get_type_hints(formula, include_extras=True)
    check = {key: _check_in(hints[key]) for key in parameters}

    @functools.wraps(formula)
    def factory(*args: P.args, **kwargs: P.kwargs) -> NamedSchedule:
        given = bound(name, signature, args, kwargs)
        config = dict(given.arguments)
        for key, value in config.items():
            if value is not None or parameters[key].default is not None:
                config[key] = check[key](name, key, value)
        schedule = NamedSchedule(name, config)
        schedule(0)  # what the formula itself refuses is refused here, not in the middle of a run
        return schedule

    factory.__signature__ = signature  # type: ignore[attr-defined]
    FORMULAS[name], FACTORIES[name] = formula, factory
    return factory


def get_config(schedule: Callable[..., Any]) -> dict[str, Any]:
    """``{"name": ..., "config": {...}}`` of a schedule made here or by ``mlx.optimizers``, for JSON.

    Raises:
        TypeError: If the schedule is another callable, or one that was made with a function.
    """
    if isinstance(schedule, NamedSchedule):
        return schedule.get_config()
    config = mlx.config_of(schedule, get_config)
    if config is None:
        known = "schedules made here or by mlx.optimizers"
        raise TypeError(f"[schedules] only {known} can be saved, not {shown(schedule)}.")
    return config


def from_config(config: Any) -> Callable[[mx.array], mx.array]:
    """The schedule that :func:`get_config` described.

    Raises:
        ValueError: If it describes none.
        TypeError: If an option has a wrong type.
    """
    if not isinstance(config, Mapping) or set(config) != {"name", "config"}:
        raise ValueError(f"[schedules] a config must have 'name' and 'config' but got {shown(config)}.")
    name, options = config["name"], config["config"]
    if not isinstance(name, str) or name not in FACTORIES | mlx.MLX:
        raise ValueError(f"[schedules] there is no schedule {shown(name)}.")
    if name in mlx.MLX and isinstance(options, Mapping):
        options = mlx.plain_options(name, options, from_config)
    return call_with("schedules", (FACTORIES | mlx.MLX)[name], options)


def _plain(owner: str, key: str, value: Any) -> Any:
    """An argument for JSON, with the config of each schedule in it."""
    if isinstance(value, list):
        return [_plain(owner, key, item) for item in value]
    if not callable(value):
        return copy.deepcopy(value)
    try:
        return get_config(value)
    except TypeError:
        raise TypeError(f"[{owner}] '{key}' is a function and cannot be saved.") from None


def call_with(owner: str, function: Callable[..., Any], options: Any) -> Any:
    """``function(**options)`` for options that come from a file or another framework.

    Raises:
        ValueError: If ``options`` is no mapping, or names an option too many or too few.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"[{owner}] the options of {function.__name__} must be a mapping but got {shown(options)}.")
    known = inspect.signature(function).parameters
    unknown = [key for key in options if key not in known]
    missing = [key for key in known if key not in options and known[key].default is inspect.Parameter.empty]
    for problem, keys in (("does not know", unknown), ("lacks", missing)):
        if keys:
            raise ValueError(f"[{owner}] {function.__name__} {problem} {', '.join(map(repr, keys))}.")
    return function(**options)


def _check_in(hint: Any) -> Callable[[str, str, Any], Any]:
    """The check that an annotation carries, also inside ``... | None``."""
    return next(part.__metadata__[0] for part in (hint, *get_args(hint)) if hasattr(part, "__metadata__"))
