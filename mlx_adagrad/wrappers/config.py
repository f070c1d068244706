"""Configs of wrappers, and what configs hold: arguments in the types of JSON, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict
from numbers import Integral, Real
from typing import Any

from .. import checks, schedules
from ..checks import shown
from . import accumulation, average, clip, constraint, loss_scale, skip
from .base import Wrapper
from .constraint import NAMED

WRAPPERS: dict[str, type[Wrapper]] = {
    kind.__name__: kind
    for kind in (
        accumulation.GradientAccumulation,
        average.ExponentialMovingAverage,
        clip.ClipByGlobalNorm,
        clip.ClipByNorm,
        clip.ClipByValue,
        constraint.Constraint,
        loss_scale.DynamicLossScale,
        loss_scale.LossScale,
        skip.SkipNonFinite,
    )
}


def config_of(wrapper: Wrapper) -> dict[str, Any]:
    """``{"wrapper": name, argument: value, ..., "optimizer": config of the optimizer inside}``, for JSON.

    Raises:
        TypeError: If the wrapper is none of this package, depends on a function or on other processes, or is around an
            optimizer without a config.
    """
    name, inner = type(wrapper).__name__, wrapper.optimizer
    if WRAPPERS.get(name) is not type(wrapper):
        raise TypeError(f"[{name}] only wrappers of mlx_adagrad have a config.")
    if not callable(getattr(inner, "get_config", None)):
        raise TypeError(f"[{name}] {type(inner).__name__} inside has no config; those of mlx_adagrad.presets have one.")
    given = {key: _argument(wrapper, key) for key in _arguments(type(wrapper))}
    entries = {key: entry(name, key, value) for key, value in given.items() if value is not None}
    return {"wrapper": name, **entries, "optimizer": inner.get_config()}  # type: ignore[union-attr]


def wrapper_of(config: Mapping[str, Any], make: Callable[[Any], Any]) -> Wrapper:
    """The wrapper that :func:`config_of` described; ``make`` makes the optimizer inside of its config.

    Raises:
        ValueError: If there is no such wrapper, it has no such argument, or a value is refused by it.
        TypeError: If a value has a wrong type.
    """
    name = config["wrapper"]
    if not isinstance(name, str) or name not in WRAPPERS:
        raise ValueError(f"[presets] there is no wrapper {shown(name)}, only {', '.join(WRAPPERS)}.")
    options = {key: value for key, value in config.items() if key != "wrapper"}
    if isinstance(options.get("constraints"), Mapping):
        options["constraints"] = constraints(options["constraints"])
    if "optimizer" in options:
        options["optimizer"] = make(options["optimizer"])
    return schedules.call_with("presets", WRAPPERS[name], options)


def _arguments(kind: type[Wrapper]) -> list[str]:
    return [key for key in inspect.signature(kind).parameters if key != "optimizer"]


def _argument(wrapper: Any, key: str) -> Any:
    """What a wrapper was given as ``key``: an attribute of that name, its own or that of its agreement."""
    return getattr(wrapper, key) if hasattr(wrapper, key) else getattr(wrapper._agreement, key)


def entry(owner: str, key: str, value: Any) -> Any:
    """An argument of a preset or a wrapper, for JSON."""
    if key == "constraints" and value:
        return {plain(owner, key, pattern): _constraint(owner, c) for pattern, c in value.items()}
    return plain(owner, key, value)


def constraints(configs: Mapping[Any, Any]) -> dict[Any, Any]:
    """Constraints by their patterns, those that are configs made again."""
    return {pattern: _revived_constraint(config) for pattern, config in configs.items()}


def _constraint(owner: str, constraint: Any) -> Any:
    """A constraint for JSON: its name, with its arguments where it is one of those that have some."""
    for name, kind in NAMED.items():
        if type(constraint) is kind:
            return {"name": name} | plain(owner, "constraints", asdict(constraint))
    return plain(owner, "constraints", constraint)


def _revived_constraint(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    name, arguments = config.get("name"), {key: value for key, value in config.items() if key != "name"}
    if name not in NAMED:
        raise ValueError(f"[presets] there is no constraint {shown(name)}, only {', '.join(NAMED)}.")
    return schedules.call_with("presets", NAMED[name], arguments)


def plain(owner: str, name: str, value: Any) -> Any:
    """``value`` in the types of JSON."""
    if checks.is_array(value) and value.size == 1:
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Mapping):
        return {key: plain(owner, name, child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(owner, name, child) for child in value]
    raise TypeError(f"[{owner}] '{name}' holds {shown(value)}, which a config cannot.")
