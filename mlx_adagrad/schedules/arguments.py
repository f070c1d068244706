"""The types of arguments of schedules, each with its check, called as ``check(owner, name, value)``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeAlias

import mlx.core as mx

from .. import checks
from ..checks import shown
from ..update.compiled import compiled
from .named import from_config

Check: TypeAlias = Callable[[str, str, Any], Any]


def _fraction(owner: str, name: str, value: Any) -> float:
    number = checks.non_negative(owner, name, value)
    if number > 1:
        raise ValueError(f"[{owner}] '{name}' must be between 0 and 1 but got {number}.")
    return number


def _time(owner: str, name: str, value: Any) -> float:
    number = checks.non_negative(owner, name, value)
    return int(number) if number.is_integer() else number  # MLX divides by whole numbers in integers, exactly


def _duration(owner: str, name: str, value: Any) -> float:
    checks.positive(owner, name, value)
    return _time(owner, name, value)


def _period(owner: str, name: str, value: Any) -> int:
    number = checks.natural(owner, name, value)
    checks.positive(owner, name, number)
    return number


def _list_of(check: Check) -> Check:
    def check_all(owner: str, name: str, values: Any) -> list[Any]:
        if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
            raise TypeError(f"[{owner}] '{name}' must be a list of numbers but got {shown(values)}.")
        return [check(owner, name, value) for value in values]

    return check_all


def _one_of(*words: str) -> Check:
    return lambda owner, name, value: checks.one_of(owner, name, value, words)


def _scales(owner: str, name: str, value: Any) -> dict[str, float]:
    """Keys as JSON has them, strings, in the order of the steps that they name."""
    if not isinstance(value, Mapping):
        raise TypeError(f"[{owner}] '{name}' must map steps to factors but got {shown(value)}.")
    try:
        factors = {int(step): factor for step, factor in value.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"[{owner}] the keys of '{name}' must be steps but got {list(value)}.") from error
    return {str(step): checks.non_negative(owner, name, factors[step]) for step in sorted(factors)}


def _schedules(owner: str, name: str, values: Any) -> list[Callable[[mx.array], Any]]:
    """At least one schedule: of this package, of MLX's, the config of one, or another function of the step."""
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"[{owner}] '{name}' must be a list of schedules but got {shown(values)}.")
    schedules = [from_config(value) if isinstance(value, Mapping) else value for value in values]
    if not schedules:
        raise ValueError(f"[{owner}] '{name}' must hold at least one schedule.")
    return [_array_function(owner, f"{name}[{i}]", schedule) for i, schedule in enumerate(schedules)]


def _options_list(owner: str, name: str, values: Any) -> list[dict[str, Any]]:
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"[{owner}] '{name}' must be a list of dicts but got {shown(values)}.")
    options = list(values)
    if not options or not all(isinstance(value, Mapping) for value in options):
        raise ValueError(f"[{owner}] '{name}' must hold at least one dict, and nothing else, but got {shown(options)}.")
    return [dict(value) for value in options]


def _function(owner: str, name: str, function: Any) -> Any:
    if not callable(function):
        raise TypeError(f"[{owner}] '{name}' must be a function of the step but got {shown(function)}.")
    return function


def _array_function(owner: str, name: str, function: Callable[[mx.array], Any]) -> Any:
    """A function that does not read the value of its argument: tried inside a trace, where nothing can."""
    _function(owner, name, function)
    try:
        result = compiled(lambda step: mx.array(function(step)))(mx.array(0, mx.int64))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"[{owner}] '{name}' must work on an mx.array without reading its value (mx.where instead of if, "
            f"mx.minimum instead of min, mx.cos instead of math.cos) but failed: {error}"
        ) from error
    if result.shape != ():
        raise ValueError(f"[{owner}] '{name}' must return one number but returned shape {result.shape}.")
    return function


NonNegative = Annotated[float, checks.non_negative]
Positive = Annotated[float, checks.positive]
Fraction = Annotated[float, _fraction]  # 0 to 1
Flag = Annotated[bool, checks.boolean]
Time = Annotated[float, _time]  # a number of steps, at least 0, fractions allowed
Duration = Annotated[float, _duration]  # the same, above 0
Period = Annotated[int, _period]  # a whole number of steps, at least 1
Count = Annotated[int, checks.natural]  # a whole number of steps, at least 0
Counts = Annotated[list[int], _list_of(checks.natural)]
NonNegatives = Annotated[list[float], _list_of(checks.non_negative)]
Scales = Annotated[dict[Any, float], _scales]
Anneal = Annotated[str, _one_of("cos", "linear")]
Interpolation = Annotated[str, _one_of("linear", "cosine")]
CycleMode = Annotated[str, _one_of("triangular", "triangular2", "exp_range")]
ScaleMode = Annotated[str, _one_of("cycle", "iterations")]
ArrayFunction = Annotated[Callable[[mx.array], Any], _array_function]
Function = Annotated[Callable[[int], float], _function]  # called outside traces, with Python numbers
OptionsList = Annotated[list[dict[str, Any]], _options_list]
Schedules = Annotated[list[Callable[[mx.array], Any]], _schedules]
