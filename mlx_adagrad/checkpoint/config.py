"""What an optimizer is apart from its state: hyperparameters as JSON, and where two of them differ, in words."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from mlx.optimizers import Optimizer

from .. import schedules
from ..adagrad import Adagrad
from ..configurable import Configurable
from ..groups import Groups
from ..presets.recipe import Recipe

RATES = ("learning_rate", "lr")  # as numbers these are state, restored from the arrays of a checkpoint
HOW_NOT_WHAT = ("owner", "on_skip")  # these do not change what is computed


def describe(value: Any) -> Any:
    """``value`` as JSON: the arguments of a preset or a schedule, else attributes; any other function by its name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if getattr(value, "size", None) == 1 and hasattr(value, "item"):  # a number of MLX or numpy
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): describe(child) for key, child in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return [describe(child) for child in value]
    recipe = getattr(value, "_recipe", None)
    if isinstance(recipe, Recipe):
        return _described(recipe.entries(value))
    config = None if isinstance(value, Configurable) else own_config(value)  # files hold attributes of our wrappers
    if config is not None:
        return describe(config)
    named = attributes(value)
    if named is not None:
        return {"class": _class(value)} | _described(named)
    held = _held(value)
    name = getattr(value, "__qualname__", type(value).__name__)
    return {"callable" if callable(value) else "object": name} | ({"holds": describe(held)} if held else {})


def _described(named: Mapping[str, Any]) -> dict[str, Any]:
    """Each by itself; constraints in their order, since the first match wins."""
    constraints = {k: list(v.items()) for k, v in named.items() if k == "constraints" and isinstance(v, Mapping)}
    return {k: describe(v) for k, v in {**named, **constraints}.items() if k not in HOW_NOT_WHAT}


def _class(value: Any) -> str:
    stock = "mlx.optimizers"  # whose Adagrad is not ours
    return f"{stock}.{type(value).__name__}" if type(value).__module__.startswith(stock) else type(value).__name__


def _held(function: Any) -> dict[str, Any]:
    """The arguments of a schedule of MLX's that ``schedules.get_config`` refuses for a function among them."""
    if not inspect.isfunction(function) or not function.__module__.startswith("mlx.optimizers"):
        return {}
    return dict(inspect.getclosurevars(function).nonlocals)


def own_config(value: Any) -> Any:
    """What ``get_config()`` of ``value``, or of a schedule of MLX's, returns; None without one or if it cannot tell."""
    get = getattr(value, "get_config", partial(schedules.get_config, value))
    if isinstance(value, type) or not callable(get):
        return None
    try:
        return get()
    except (TypeError, ValueError):
        return None


def attributes(value: Any) -> dict[str, Any] | None:
    """The hyperparameters among the attributes of an optimizer, a dataclass or a named tuple; None for other things."""
    if isinstance(value, Groups):
        return {"groups": value.groups, "weight_decay_mask": value.decays}
    if isinstance(value, Adagrad):
        # not whether it is fused or differentiable: that does not change what is computed
        named = {name: getattr(value, name) for name in ("rule", "accumulator", "groups", "lazy")}
        if value.rounding != "nearest":  # files from before there was a choice say nothing of it
            named["rounding"] = value.rounding
    elif isinstance(value, Optimizer):
        named = {k: v for k, v in vars(value).items() if not k.startswith("_") or isinstance(v, Optimizer)}
    elif hasattr(value, "_asdict"):
        return value._asdict()
    elif is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    else:
        return None
    return named | {name: getattr(rate, "given", rate) for name, rate in value._schedulers.items()}


def stack(config: Any) -> str:
    """The classes of an optimizer, outermost first, or the preset."""
    if not isinstance(config, dict):
        return "unknown"
    if "preset" in config:
        return f"presets.{config['preset']}"
    several = config.get("optimizers")
    inner = several if isinstance(several, list) else [config["optimizer"]] if "optimizer" in config else []
    return f"{config.get('class')}" + (f"({', '.join(map(stack, inner))})" if inner else "")


def differences(saved: Any, own: Any, path: str = "") -> Iterator[str]:
    """Where the configuration in a file differs from that of an optimizer, in words."""
    if isinstance(saved, dict) and isinstance(own, dict):
        for key in {**saved, **own}:
            yield from differences(saved.get(key), own.get(key), f"{path}.{key}" if path else key)
    elif isinstance(saved, list) and isinstance(own, list):
        if len(saved) != len(own):
            yield f"'{path}' has {len(saved)} entries in the file but {len(own)} here"
        for i, (theirs, ours) in enumerate(zip(saved, own, strict=False)):
            yield from differences(theirs, ours, f"{path}[{i}]")
    elif saved != own and not (is_rate(path) and is_number(saved) and is_number(own)):
        yield f"'{path}' is {saved!r:.120} in the file but {own!r:.120} here"


def is_rate(path: str) -> bool:
    """Whether ``path`` leads to the learning rate of an optimizer or a group, not to a number inside a schedule."""
    *parents, last = path.split(".")
    return last in RATES and not any(parent in RATES for parent in parents)


def is_number(value: Any) -> bool:
    """Whether a configured learning rate is no schedule."""
    return value is None or isinstance(value, int | float)
