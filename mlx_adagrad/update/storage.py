"""How the weights and the state of a parameter are kept: what the optimizer's ``accumulator`` and ``rounding`` say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..checks import shown
from . import rounding
from .accumulators import EXPONENTS, HALF, Dense

COMPENSATION = "compensation"  # in the state of a parameter: what its weights lack, in their dtype
KEYS = ("v", EXPONENTS, COMPENSATION)  # of the arrays in the state of a parameter that an update reads and writes


@dataclass(frozen=True)
class Storage:
    """How an optimizer keeps weights and state, asked for one parameter at a time.

    Args:
        accumulator: How ``v`` is stored.
        rounding: How new weights in half precision are rounded: "nearest", "stochastic" or "compensated".
    """

    accumulator: Dense
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if self.rounding not in rounding.MODES:
            allowed = ", ".join(map(repr, rounding.MODES))
            raise ValueError(f"[Adagrad] 'rounding' must be one of {allowed} but got {shown(self.rounding)}.")

    @property
    def draws(self) -> bool:
        """Whether anything is rounded with random bits, so that the state holds a seed."""
        return self.rounding == "stochastic" or self.accumulator.draws

    def rounding_of(self, w: mx.array) -> str:
        """How new weights like ``w`` are rounded; fp32 and wider ones need no care."""
        return self.rounding if w.dtype in HALF else "nearest"

    def is_plain(self, w: mx.array) -> bool:
        """Whether everything of a parameter like ``w`` is rounded to nearest, with nothing kept beside ``v``."""
        return self.rounding_of(w) == "nearest" and not self.accumulator.is_random(w)

    def initial(self, w: mx.array, value: float) -> dict[str, mx.array]:
        """The state of a parameter at the start."""
        return self.accumulator.state(w, value) | self._compensation(w)

    def _compensation(self, w: mx.array) -> dict[str, mx.array]:
        return {COMPENSATION: mx.zeros_like(w)} if self.rounding_of(w) == "compensated" else {}

    def adopt(self, w: mx.array, state: dict[str, Any]) -> None:
        """Turn a state that another storage has left into one of this, in place."""
        new = self.accumulator.at(w).adopted(w, state)
        if new is not None:
            state.pop(EXPONENTS, None)
            state.update(new)
        if self.rounding_of(w) != "compensated":
            state.pop(COMPENSATION, None)
        elif COMPENSATION not in state:
            state.update(self._compensation(w))

    def problem(self, w: mx.array, state: dict[str, Any]) -> tuple[str, str] | None:
        """The key of what keeps the update from going on with ``state``, and why, in words."""
        if state.get("v") is not None and (why := self.accumulator.at(w).problem(w, state)):
            return "v", why
        rest = state.get(COMPENSATION)
        if rest is not None and (not isinstance(rest, mx.array) or (rest.shape, rest.dtype) != (w.shape, w.dtype)):
            return COMPENSATION, f"must be an array of shape {w.shape} and {w.dtype}"
        return None

    def kept(self, state: dict[str, Any]) -> dict[str, mx.array]:
        """The part of ``state`` that an update reads and writes."""
        return {key: state[key] for key in KEYS if key in state}
