"""What the schedules of several frameworks are made of; steps are int64 arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

LONGEST_RUN = 2**40  # steps for which restarts are laid out


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


def cosine_restarts(step: mx.array, first: float, factor: float) -> tuple[mx.array, mx.array]:
    """Half cosines in a row, each ``factor`` >= 1 times as long as the one before; the first takes ``first`` steps.

    Returns:
        How many restarts there were, and the height of the present half cosine, from 1 down to 0.
    """
    if factor == 1:
        return step // first, half_cosine(step % first, first)
    starts, lengths = _periods_between_restarts(first, factor)
    # Keras and torch take logarithms, whose rounding may delay a restart by a step; integers compare exactly.
    restarts = (mx.array([math.ceil(start) for start in starts], mx.int64) <= step).sum() - 1
    return restarts, half_cosine(step - mx.array(starts)[restarts], mx.array(lengths)[restarts])


@functools.lru_cache(maxsize=8)
def _periods_between_restarts(first: float, factor: float) -> tuple[list[float], list[float]]:
    """Where each period starts and how long it is, as far as any run goes."""
    starts, lengths = [0.0], [float(first)]
    while starts[-1] + lengths[-1] < LONGEST_RUN:
        starts.append(round(starts[-1] + lengths[-1], 6))  # a rounding error would add a step to the ceiling
        lengths.append(lengths[-1] * factor)
    return starts, lengths


def phases(step: mx.array, ends: Sequence[float], rates: Sequence[float], cosine: bool) -> mx.array:
    """Lines or half cosines one after the other: phase i leads from ``rates[i]`` to ``rates[i + 1]`` at ``ends[i]``.

    The first begins at step 0; one that ends before it begins is left out. After the last the rate stays.
    """
    rate = mx.array(rates[-1])
    for i, end in reversed(list(enumerate(ends))):
        start = ends[i - 1] if i else 0.0
        if end > start:
            left = half_cosine(step - start, end - start) if cosine else (end - step) / (end - start)
            rate = mx.where(step <= end, rates[i + 1] + (rates[i] - rates[i + 1]) * left, rate)
    return rate


Schedule = Callable[[Any], mx.array]


def polynomial(start: float, end: float, exponent: float, done: mx.array, steps: Any) -> mx.array:
    """``(start - end) * (1 - done / steps) ** exponent + end``, with ``done`` clipped to 0 and ``steps``."""
    return (start - end) * ((steps - mx.clip(done, 0, steps)) / steps) ** exponent + end


def joined(owner: str, schedules: Sequence[Schedule], name: str, boundaries: Sequence[int]) -> Schedule:
    """One schedule after the other, each from its own step 0 on; ValueError for ``boundaries`` that do not fit."""
    if len(boundaries) != len(schedules) - 1:
        wanted = f"one step less than there are schedules, {len(schedules) - 1},"
        raise ValueError(f"[{owner}] '{name}' must hold {wanted} but got {len(boundaries)}.")
    if list(boundaries) != sorted(boundaries):
        raise ValueError(f"[{owner}] '{name}' must be in ascending order but got {list(boundaries)}.")
    return optim.join_schedules(list(schedules), list(boundaries)) if boundaries else schedules[0]


def warm_up(start: float, peak: float, steps: float, then: Schedule) -> Schedule:
    """A line from ``start`` to ``peak`` in ``steps`` steps, and after it the schedule ``then``."""
    if steps == 0:
        return then
    line = optim.linear_schedule(start, peak, steps)  # type: ignore[arg-type]  # fractions of a step work too
    return optim.join_schedules([line, then], [steps])  # type: ignore[list-item]
