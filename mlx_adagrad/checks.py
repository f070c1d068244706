"""Argument checks shared by every constructor: one wording, made before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

# The numbers of a step are fp32.
LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127


def real(owner: str, name: str, value: Any) -> float:
    """Return ``value`` as a float, or raise TypeError if it is no real number (bool is none)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"[{owner}] '{name}' must be a real number but got {value!r}.")
    return float(value)


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


def positive_integer(owner: str, name: str, value: Any) -> int:
    """Return ``value`` as an int >= 1, or raise ValueError (TypeError if it is no integer) naming the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"[{owner}] '{name}' must be an integer but got {value!r}.")
    if value < 1:
        raise ValueError(f"[{owner}] '{name}' must be at least 1 but got {value}.")
    return int(value)


def boolean(owner: str, name: str, value: Any) -> bool:
    """Return ``value`` if it is a bool, or raise TypeError: 0 and "False" are mistakes here."""
    if not isinstance(value, bool):
        raise TypeError(f"[{owner}] '{name}' must be True or False but got {value!r}.")
    return value


def one_of(owner: str, name: str, value: Any, words: Sequence[str]) -> str:
    """Return ``value`` if it is one of the words, or raise ValueError naming them."""
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"[{owner}] '{name}' must be {' or '.join(map(repr, words))} but got {value!r}.")
    return value
