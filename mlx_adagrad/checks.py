"""Argument checks shared by every constructor: one wording, made before anything changes.

A number may be Python's, numpy's, or an array of one element of MLX or numpy; a bool is never taken for one. What is
wrong is shown by :func:`shown`: a whole parameter tree, given by mistake, does not fill the message.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec

from mlx.nn import Module

P = ParamSpec("P")

# The numbers of a step are fp32.
LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127

# what one framework and another call the same argument
SYNONYMS = (
    ("learning_rate", "lr"),
    ("eps", "epsilon"),
    ("initial_accumulator_value", "accum"),
    ("lr_decay", "decay"),
)
PARAMETERS_GO_ELSEWHERE = (
    ": parameters are not given to the constructor, as in torch, but to update(model, gradients); "
    "presets.torch(lr=...) has torch's other arguments"
)


class _Shown(reprlib.Repr):
    """Containers to a depth of 2, arrays and modules by their kind, anything else cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxstring, self.maxother = 2, 3, 80, 80

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Module):
            return f"a module {type(x).__name__}"
        if is_array(x):
            return self.repr_instance(x, level) if x.size == 1 else f"an array of shape {tuple(x.shape)}"
        return super().repr1(x, level)


_SHOWN = _Shown()


def shown(value: Any) -> str:
    """``repr(value)`` for an error message, of about 100 characters at most; no large array is evaluated for it."""
    text = _SHOWN.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def bound(owner: str, signature: inspect.Signature, args: Any, kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call with the defaults filled in, or TypeError with a hint at the name that is meant."""
    try:
        given = signature.bind(*args, **kwargs)
    except TypeError as error:
        names = [*signature.parameters]
        hints = [hint for key in kwargs if key not in names and (hint := other_name(key, names))]
        hints += [hint for value in args[:2] if (hint := parameters_hint(value))]  # the first may be self
        raise TypeError(f"[{owner}] {error}{hints[0] if hints else ''}.") from None
    given.apply_defaults()
    return given


def hinted(init: Callable[P, None]) -> Callable[P, None]:
    """Make a constructor say which argument is meant by one that it does not know."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        bound(type(args[0]).__name__, signature, args, kwargs)
        init(*args, **kwargs)

    return checked


def other_name(key: str, names: Iterable[str]) -> str:
    """A hint at the one of ``names`` that other frameworks call ``key``; empty where there is none."""
    synonyms = next((words for words in SYNONYMS if key in words), ())
    meant = [name for name in names if name in synonyms]
    if key in ("params", "parameters"):
        return PARAMETERS_GO_ELSEWHERE
    return f"; here it is called '{meant[0]}'" if meant else ""


def parameters_hint(value: Any) -> str:
    """A hint for the habit of torch to give an optimizer the parameters first; empty where ``value`` is none."""
    return PARAMETERS_GO_ELSEWHERE if isinstance(value, Mapping | list | tuple | Iterator) else ""


def tree(owner: str, gradients: Any, parameters: Any) -> None:
    """Raise TypeError for gradients, or parameters to go with them, that are no tree."""
    if isinstance(gradients, tuple) and isinstance(parameters, Module):
        hint = "value_and_grad returns (value, gradients), of which this takes the second"
        raise TypeError(f"[{owner}] 'gradients' must be a dict, as the parameters are, but got a tuple: {hint}.")
    for name, value in (("gradients", gradients), ("parameters", parameters)):
        if not isinstance(value, dict | list | tuple) and (name == "gradients" or gradients):
            wanted = "a tree of arrays (a dict, list or tuple)"
            raise TypeError(f"[{owner}] '{name}' must be {wanted} but got {shown(value)}.")


def module(owner: str, model: Any, gradients: Any) -> None:
    """Raise TypeError for what ``update(model, gradients)`` could not change in place; nothing at all is fine."""
    if isinstance(model, Module):
        return
    if isinstance(gradients, Module):
        raise TypeError(f"[{owner}] the arguments are in the wrong order: it is update(model, gradients).")
    if not isinstance(model, dict) or model:
        fix = "for a tree of parameters there is parameters = apply_gradients(gradients, parameters)"
        raise TypeError(f"[{owner}] 'model' must be a module, to be updated in place, but got {shown(model)}: {fix}.")


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array of MLX, numpy or the like."""
    return all(hasattr(value, name) for name in ("shape", "dtype", "size", "item")) and not isinstance(value, type)


def _number(owner: str, name: str, value: Any) -> Any:
    """The number in an array of one element; anything else as it is."""
    if not is_array(value):
        return value
    if value.size != 1:
        shape = tuple(value.shape)
        raise ValueError(f"[{owner}] '{name}' must have one element but got an array of shape {shape}.")
    try:
        return value.item()
    except ValueError as error:  # MLX, inside mx.compile and the like
        hint = "give a number, or make the optimizer outside of the transformation"
        raise ValueError(f"[{owner}] the value of '{name}' cannot be read inside a transformation: {hint}.") from error


def real(owner: str, name: str, value: Any) -> float:
    """Return ``value`` as a float, or raise TypeError if it is no real number (bool is none)."""
    number = _number(owner, name, value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"[{owner}] '{name}' must be a real number but got {shown(value)}.")
    return float(number)


def non_negative(owner: str, name: str, value: Any) -> float:
    """Return ``value`` as a finite float >= 0, or raise ValueError naming the argument."""
    number = real(owner, name, value)
    if 0 <= number <= LARGEST_FLOAT32:
        return number
    wanted = "non-negative" if number < 0 else "finite in fp32"
    raise ValueError(f"[{owner}] '{name}' must be {wanted} but got {number}.")


def positive(owner: str, name: str, value: Any) -> float:
    """Return ``value`` as a finite float > 0, or raise ValueError naming the argument."""
    number = non_negative(owner, name, value)
    if number == 0:
        raise ValueError(f"[{owner}] '{name}' must be positive but got {number}.")
    return number


def integer(owner: str, name: str, value: Any) -> int:
    """Return ``value`` as an int, or raise TypeError if it is none (a bool and 2.0 are none)."""
    number = _number(owner, name, value)
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(f"[{owner}] '{name}' must be an integer but got {shown(value)}.")
    return int(number)


def natural(owner: str, name: str, value: Any) -> int:
    """Return ``value`` as an int >= 0, or raise ValueError (TypeError if it is no integer) naming the argument."""
    number = integer(owner, name, value)
    non_negative(owner, name, number)
    return number


def positive_integer(owner: str, name: str, value: Any) -> int:
    """Return ``value`` as an int >= 1, or raise ValueError (TypeError if it is no integer) naming the argument."""
    number = integer(owner, name, value)
    if number < 1:
        raise ValueError(f"[{owner}] '{name}' must be at least 1 but got {number}.")
    return number


def integer_between(owner: str, name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return ``value`` as an int in [low, high] (None: no limit), or raise naming the argument."""
    number = integer(owner, name, value)
    if number < low or (high is not None and number > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"[{owner}] '{name}' must be {allowed} but got {number}.")
    return number


def boolean(owner: str, name: str, value: Any) -> bool:
    """Return ``value`` if it is a bool, or raise TypeError: 0 and "False" are mistakes here."""
    if not isinstance(value, bool):
        raise TypeError(f"[{owner}] '{name}' must be True or False but got {shown(value)}.")
    return value


def one_of(owner: str, name: str, value: Any, words: Sequence[str]) -> str:
    """Return ``value`` if it is one of the words, or raise ValueError naming them."""
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"[{owner}] '{name}' must be {' or '.join(map(repr, words))} but got {shown(value)}.")
    return value
