"""What the schedules of several frameworks are made of; steps are int64 arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim


def periods(step: mx.array, length: float, staircase: bool) -> mx.array:
    """How many periods of ``length`` steps have passed, only whole ones for a staircase."""
    return step // length if staircase else step / length


def power(base: float, exponent: mx.array) -> mx.array:
    """``base ** exponent`` with ``base`` in double precision.

    fp32 rounds a base near 1 by up to 3e-8, an error that the exponent multiplies; the logarithm keeps all digits.
    """
    return mx.exp(exponent * math.log(base)) if base > 0 else exponent == 0


def half_cosine(done: Any, total: Any) -> mx.array:
    """``(1 + cos(pi done / total)) / 2``, from 1 down to 0, without the cancellation near 0."""
    return mx.square(mx.sin((math.pi / 2) * ((total - done) / total)))


Schedule = Callable[[Any], mx.array]


def warm_up(start: float, peak: float, steps: float, then: Schedule) -> Schedule:
    """A line from ``start`` to ``peak`` in ``steps`` steps, and after it the schedule ``then``."""
    if steps == 0:
        return then
    line = optim.linear_schedule(start, peak, steps)  # type: ignore[arg-type]  # fractions of a step work too
    return optim.join_schedules([line, then], [steps])  # type: ignore[list-item]
