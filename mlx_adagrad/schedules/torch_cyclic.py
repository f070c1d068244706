"""The schedulers of ``torch.optim.lr_scheduler`` that go up and down, and those that are made of others."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .arguments import (
    Anneal,
    ArrayFunction,
    Counts,
    CycleMode,
    Flag,
    Fraction,
    NonNegative,
    Period,
    Positive,
    ScaleMode,
    Schedules,
)
from .curves import cosine_restarts, half_cosine, joined, phases, power
from .named import NamedSchedule, named, with_arguments

# Schedulers whose rate is the optimizer's times a factor of the step alone, so that a chain multiplies the factors.
MULTIPLY = (
    "torch_constant_lr",
    "torch_cosine_annealing_lr",
    "torch_exponential_lr",
    "torch_linear_lr",
    "torch_multi_step_lr",
    "torch_multiplicative_lr",
    "torch_polynomial_lr",
    "torch_step_lr",
)


@named
def torch_cosine_annealing_lr(step: mx.array, lr: NonNegative, T_max: Period, eta_min: NonNegative = 0.0) -> mx.array:
    """torch's CosineAnnealingLR: ``eta_min + (lr - eta_min) * (1 + cos(pi * step / T_max)) / 2``.

    Args:
        lr: The rate at step 0, >= 0.
        T_max: Steps until ``eta_min``, >= 1; in as many more the rate rises to ``lr`` again.
        eta_min: The rate at ``T_max``, >= 0. Default: ``0.0``.
    """
    return eta_min + (lr - eta_min) * half_cosine(step % (2 * T_max), T_max)


@named
def torch_cosine_annealing_warm_restarts(
    step: mx.array, lr: NonNegative, T_0: Period, T_mult: Period = 1, eta_min: NonNegative = 0.0
) -> mx.array:
    """torch's CosineAnnealingWarmRestarts: half cosines from ``lr`` to ``eta_min``, each ``T_mult`` times longer.

    Args:
        lr: The rate at each restart, >= 0.
        T_0: Steps until the first restart, >= 1.
        T_mult: Length of a period over that of the one before, >= 1. Default: ``1``.
        eta_min: The rate that each period goes down to, >= 0. Default: ``0.0``.
    """
    return eta_min + (lr - eta_min) * cosine_restarts(step, T_0, T_mult)[1]


@named
def torch_cyclic_lr(
    step: mx.array,
    base_lr: NonNegative,
    max_lr: NonNegative,
    step_size_up: Period = 2000,
    step_size_down: Period | None = None,
    mode: CycleMode = "triangular",
    gamma: NonNegative = 1.0,
    scale_fn: ArrayFunction | None = None,
    scale_mode: ScaleMode = "cycle",
) -> mx.array:
    """torch's CyclicLR: lines up from ``base_lr`` to ``max_lr`` and down again, over and over.

    Momentum is not cycled, Adagrad has none.

    Args:
        base_lr: The lowest rate, >= 0.
        max_lr: The rate at the top of a cycle that is not scaled, >= 0.
        step_size_up: Steps up, >= 1. Default: ``2000``.
        step_size_down: Steps down, >= 1; ``None`` for as many as up. Default: ``None``.
        mode: ``"triangular"``; ``"triangular2"``, which halves the height in each cycle; ``"exp_range"``, whose height
            is ``gamma ** step``. Default: ``"triangular"``.
        gamma: Factor of ``"exp_range"``, >= 0. Default: ``1.0``.
        scale_fn: Factor of the height, in place of ``mode``: a function of a 0-d int64 array that does not read its
            value. Such a schedule has no config and cannot be saved. Default: ``None``.
        scale_mode: Whether ``scale_fn`` gets the cycle, 1 first, or the step: ``"cycle"`` or ``"iterations"``. Default:
            ``"cycle"``.
    """
    down = step_size_up if step_size_down is None else step_size_down
    cycle, done = step // (step_size_up + down), step % (step_size_up + down)
    height = mx.where(done <= step_size_up, done / step_size_up, (step_size_up + down - done) / down)
    if scale_fn is not None:
        height = height * scale_fn(1 + cycle if scale_mode == "cycle" else step)
    elif mode != "triangular":
        height = height * (power(0.5, cycle) if mode == "triangular2" else power(gamma, step))
    return base_lr + (max_lr - base_lr) * height


@named
def torch_one_cycle_lr(
    step: mx.array,
    max_lr: NonNegative,
    total_steps: Period | None = None,
    epochs: Period | None = None,
    steps_per_epoch: Period | None = None,
    pct_start: Fraction = 0.3,
    anneal_strategy: Anneal = "cos",
    div_factor: Positive = 25.0,
    final_div_factor: Positive = 1e4,
    three_phase: Flag = False,
) -> mx.array:
    """torch's OneCycleLR: up from ``max_lr / div_factor`` to ``max_lr``, then down below where it began.

    Momentum is not cycled, Adagrad has none. After the cycle, where torch raises, the last rate stays.

    Args:
        max_lr: The highest rate, >= 0.
        total_steps: Steps of the cycle, >= 1; ``None`` for ``epochs * steps_per_epoch``. Default: ``None``.
        epochs: Epochs of the cycle, >= 1. Default: ``None``.
        steps_per_epoch: Steps of an epoch, >= 1. Default: ``None``.
        pct_start: Part of the cycle that goes up, 0 to 1. Default: ``0.3``.
        anneal_strategy: ``"cos"`` or ``"linear"``. Default: ``"cos"``.
        div_factor: ``max_lr`` over the first rate, > 0. Default: ``25.0``.
        final_div_factor: The first rate over the last one, > 0. Default: ``1e4``.
        three_phase: Go down to the first rate as fast as up, and then to the last. Default: ``False``.
    """
    if total_steps is None and (epochs is None or steps_per_epoch is None):
        raise ValueError("[torch_one_cycle_lr] give 'total_steps', or 'epochs' and 'steps_per_epoch'.")
    last = (total_steps or (epochs or 0) * (steps_per_epoch or 0)) - 1
    first_lr = max_lr / div_factor
    up = pct_start * (last + 1) - 1
    if up == 0:
        raise ValueError("[torch_one_cycle_lr] 'pct_start' times the steps must not be 1: the way up takes no time.")
    ends, rates = [up, last], [first_lr, max_lr, first_lr / final_div_factor]
    if three_phase:
        ends, rates = [up, 2 * up, last], [first_lr, max_lr, first_lr, first_lr / final_div_factor]
    return phases(step, ends, rates, anneal_strategy == "cos")


@named
def torch_sequential_lr(step: mx.array, schedulers: Schedules, milestones: Counts) -> Any:
    """torch's SequentialLR: one schedule after the other, each from its own step 0 on.

    Args:
        schedulers: Schedules, at least one; torch's take the same ``lr`` as they share an optimizer there.
        milestones: The step, >= 0, at which each but the first begins; in ascending order.
    """
    return joined("torch_sequential_lr", schedulers, "milestones", milestones)(step)


@named
def torch_chained_scheduler(step: mx.array, schedulers: Schedules) -> mx.array:
    """torch's ChainedScheduler: ``lr`` times the factors of all schedules at this step.

    Args:
        schedulers: Schedules of torch's with the same ``lr``, at least one. Only those whose rate is ``lr`` times a
            factor can be chained: ConstantLR, ExponentialLR, LinearLR, MultiplicativeLR, MultiStepLR, PolynomialLR,
            StepLR, and CosineAnnealingLR without an ``eta_min``, which equals torch's up to its ``T_max``. The others
            set the rate anew at each step: in torch only the last of them and what follows it act.
    """
    for schedule in schedulers:
        _check_link(schedule, schedulers[0])
    factors = [with_arguments(schedule, lr=1.0)(step) for schedule in schedulers if isinstance(schedule, NamedSchedule)]
    return _rate_of(schedulers[0]) * mx.stack(factors).prod()


def _rate_of(schedule: Any) -> Any:
    return schedule.config["lr"] if isinstance(schedule, NamedSchedule) and "lr" in schedule.config else None


def _check_link(schedule: Any, first: Any) -> None:
    """Raise ValueError for a schedule that cannot be multiplied with others."""
    name = schedule.name if isinstance(schedule, NamedSchedule) else repr(schedule)
    if name not in MULTIPLY or schedule.config.get("eta_min"):
        why = "its rate is not 'lr' times a factor of the step; torch_sequential_lr runs one schedule after the other"
        raise ValueError(f"[torch_chained_scheduler] {name} cannot be chained: {why}.")
    if _rate_of(schedule) != _rate_of(first):
        rates = f"{_rate_of(first)} and {_rate_of(schedule)}"
        raise ValueError(f"[torch_chained_scheduler] the schedules must have the same 'lr' but got {rates}.")
