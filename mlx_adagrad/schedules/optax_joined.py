"""The schedules of ``optax.schedules`` that are made of several parts: warm-ups, phases, and any others joined."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .arguments import (
    Count,
    Counts,
    Flag,
    Fraction,
    Interpolation,
    NonNegative,
    OptionsList,
    Period,
    Positive,
    Scales,
    Schedules,
)
from .curves import joined, phases, warm_up
from .named import call_with, named
from .optax import optax_cosine_decay_schedule, optax_exponential_decay, optax_linear_schedule


@named
def optax_join_schedules(step: mx.array, schedules: Schedules, boundaries: Counts) -> Any:
    """optax's join_schedules: one schedule after the other, each from its own step 0 on.

    Args:
        schedules: Schedules, at least one.
        boundaries: The step, >= 0, at which each but the first begins; in ascending order.
    """
    return joined("optax_join_schedules", schedules, "boundaries", boundaries)(step)


@named
def optax_warmup_constant_schedule(
    step: mx.array, init_value: NonNegative, peak_value: NonNegative, warmup_steps: Count
) -> mx.array:
    """optax's warmup_constant_schedule: a linear warm-up, then ``peak_value``.

    Args:
        init_value: The rate at step 0, >= 0.
        peak_value: The rate after the warm-up, >= 0.
        warmup_steps: Steps of the warm-up, >= 0; at 0 the rate stays at ``init_value``, as in optax.
    """
    return optax_linear_schedule(init_value, peak_value, warmup_steps)(step)


@named
def optax_warmup_cosine_decay_schedule(
    step: mx.array,
    init_value: NonNegative,
    peak_value: NonNegative,
    warmup_steps: Count,
    decay_steps: Period,
    end_value: NonNegative = 0.0,
    exponent: NonNegative = 1.0,
) -> mx.array:
    """optax's warmup_cosine_decay_schedule: a linear warm-up, then half a cosine.

    Args:
        init_value: The rate at step 0, >= 0.
        peak_value: The rate after the warm-up, >= 0.
        warmup_steps: Steps of the warm-up, >= 0.
        decay_steps: Steps of the whole, the warm-up included, > ``warmup_steps``.
        end_value: The rate it ends at, >= 0. Default: ``0.0``.
        exponent: Exponent of the half cosine, >= 0. Default: ``1.0``.
    """
    if decay_steps <= warmup_steps:
        raise ValueError(
            "[optax_warmup_cosine_decay_schedule] 'decay_steps' must be more than 'warmup_steps' but got "
            f"{decay_steps} and {warmup_steps}."
        )
    alpha = end_value / peak_value if peak_value else 0.0
    decay = optax_cosine_decay_schedule(peak_value, decay_steps - warmup_steps, alpha, exponent)
    return warm_up(init_value, peak_value, warmup_steps, decay)(step)


@named
def optax_warmup_exponential_decay_schedule(
    step: mx.array,
    init_value: NonNegative,
    peak_value: NonNegative,
    warmup_steps: Count,
    transition_steps: Count,
    decay_rate: NonNegative,
    transition_begin: Count = 0,
    staircase: Flag = False,
    end_value: NonNegative | None = None,
) -> mx.array:
    """optax's warmup_exponential_decay_schedule: a linear warm-up, then an exponential decay.

    Args:
        init_value: The rate at step 0, >= 0.
        peak_value: The rate after the warm-up, >= 0.
        warmup_steps: Steps of the warm-up, >= 0.
        transition_steps: As in :func:`optax_exponential_decay`, as are those that follow, counted from the end of the
            warm-up on.
        decay_rate: Factor, >= 0.
        transition_begin: Steps before the decay, >= 0. Default: ``0``.
        staircase: Decay at the end of ``transition_steps`` and not at every step. Default: ``False``.
        end_value: The rate where the decay stops, >= 0; ``None`` for nowhere. Default: ``None``.
    """
    decay = optax_exponential_decay(peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value)
    return warm_up(init_value, peak_value, warmup_steps, decay)(step)


@named
def optax_sgdr_schedule(step: mx.array, cosine_kwargs: OptionsList) -> Any:
    """optax's sgdr_schedule: several of :func:`optax_warmup_cosine_decay_schedule`, one after the other.

    Args:
        cosine_kwargs: The arguments of each, dicts; ``decay_steps`` is how long it lasts.
    """
    make = optax_warmup_cosine_decay_schedule
    cycles = [call_with("optax_sgdr_schedule", make, options) for options in cosine_kwargs]
    ends = [sum(cycle.config["decay_steps"] for cycle in cycles[: i + 1]) for i in range(len(cycles) - 1)]
    return joined("optax_sgdr_schedule", cycles, "cosine_kwargs", ends)(step)


@named
def optax_piecewise_interpolate_schedule(
    step: mx.array,
    interpolate_type: Interpolation,
    init_value: NonNegative,
    boundaries_and_scales: Scales | None = None,
) -> mx.array:
    """optax's piecewise_interpolate_schedule: lines or half cosines from one boundary to the next.

    Args:
        interpolate_type: ``"linear"`` or ``"cosine"``.
        init_value: The rate at step 0, >= 0.
        boundaries_and_scales: For each step named, the factor, >= 0, between the rate there and the one at the boundary
            before. Default: ``None``.
    """
    rates, ends = [init_value], []
    for boundary, scale in (boundaries_and_scales or {}).items():
        rates.append(rates[-1] * scale)
        ends.append(int(boundary))
    return phases(step, ends, rates, interpolate_type == "cosine")


@named
def optax_linear_onecycle_schedule(
    step: mx.array,
    transition_steps: Period,
    peak_value: NonNegative,
    pct_start: Fraction = 0.3,
    pct_final: Fraction = 0.85,
    div_factor: Positive = 25.0,
    final_div_factor: Positive = 1e4,
) -> mx.array:
    """optax's linear_onecycle_schedule: lines up to ``peak_value``, back to the first rate, and down to the last.

    Args:
        transition_steps: Steps of the whole, >= 1.
        peak_value: The highest rate, >= 0.
        pct_start: Part of the steps that go up, 0 to 1. Default: ``0.3``.
        pct_final: Part of the steps after which the first rate is reached again, 0 to 1. Default: ``0.85``.
        div_factor: ``peak_value`` over the first rate, > 0. Default: ``25.0``.
        final_div_factor: The first rate over the last one, > 0. Default: ``1e4``.
    """
    scales = {
        int(pct_start * transition_steps): div_factor,
        int(pct_final * transition_steps): 1 / div_factor,
        transition_steps: 1 / final_div_factor,
    }
    return optax_piecewise_interpolate_schedule("linear", peak_value / div_factor, scales)(step)


@named
def optax_cosine_onecycle_schedule(
    step: mx.array,
    transition_steps: Period,
    peak_value: NonNegative,
    pct_start: Fraction = 0.3,
    div_factor: Positive = 25.0,
    final_div_factor: Positive = 1e4,
) -> mx.array:
    """optax's cosine_onecycle_schedule: half a cosine up to ``peak_value``, and one down below the first rate.

    Args:
        transition_steps: Steps of the whole, >= 1.
        peak_value: The highest rate, >= 0.
        pct_start: Part of the steps that go up, 0 to 1. Default: ``0.3``.
        div_factor: ``peak_value`` over the first rate, > 0. Default: ``25.0``.
        final_div_factor: The first rate over the last one, > 0. Default: ``1e4``.
    """
    scales = {int(pct_start * transition_steps): div_factor, transition_steps: 1 / (div_factor * final_div_factor)}
    return optax_piecewise_interpolate_schedule("cosine", peak_value / div_factor, scales)(step)
