"""The schedulers of ``torch.optim.lr_scheduler``, stepped after each step of the optimizer as torch's docs say."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim

from .. import checks
from .arguments import Anneal, ArrayFunction, Counts, Flag, Fraction, NonNegative, Period, Positive
from .curves import half_cosine, power
from .named import named


@named
def torch_step_lr(step: mx.array, lr: NonNegative, step_size: Period, gamma: NonNegative = 0.1) -> mx.array:
    """torch's StepLR: ``lr * gamma ** (step // step_size)``.

    Args:
        lr: The rate at step 0, >= 0.
        step_size: Steps from one decay to the next, >= 1.
        gamma: Factor of each decay, >= 0. Default: ``0.1``.
    """
    return optim.step_decay(lr, gamma, step_size)(step)


@named
def torch_multi_step_lr(step: mx.array, lr: NonNegative, milestones: Counts, gamma: NonNegative = 0.1) -> mx.array:
    """torch's MultiStepLR: ``lr`` times ``gamma`` for each milestone that the step has reached.

    Args:
        lr: The rate before the first milestone, >= 0.
        milestones: Steps, >= 0, in any order; one that is named twice counts twice.
        gamma: Factor of each milestone, >= 0. Default: ``0.1``.
    """
    return lr * power(gamma, (mx.array(milestones, mx.int64) <= step).sum())


@named
def torch_exponential_lr(step: mx.array, lr: NonNegative, gamma: NonNegative) -> mx.array:
    """torch's ExponentialLR: ``lr * gamma ** step``.

    Not ``mlx.optimizers.exponential_decay``, which rounds gamma to fp32: at 0.9999 it is 2e-4 off after 10,000 steps.

    Args:
        lr: The rate at step 0, >= 0.
        gamma: Factor of each step, >= 0.
    """
    return lr * power(gamma, step)


@named
def torch_linear_lr(
    step: mx.array, lr: NonNegative, start_factor: Fraction = 1 / 3, end_factor: Fraction = 1.0, total_iters: Period = 5
) -> mx.array:
    """torch's LinearLR: along a line from ``lr * start_factor`` to ``lr * end_factor``, where it stays.

    Args:
        lr: The rate that the factors multiply, >= 0.
        start_factor: Factor at step 0, above 0 and at most 1. Default: ``1 / 3``.
        end_factor: Factor from step ``total_iters`` on, 0 to 1. Default: ``1.0``.
        total_iters: Steps between the two, >= 1. Default: ``5``.
    """
    checks.positive("torch_linear_lr", "start_factor", start_factor)
    return optim.linear_schedule(lr * start_factor, lr * end_factor, total_iters)(step)


@named
def torch_lambda_lr(step: mx.array, lr: NonNegative, lr_lambda: ArrayFunction) -> mx.array:
    """torch's LambdaLR: ``lr * lr_lambda(step)``.

    Args:
        lr: The rate that the function's value multiplies, >= 0.
        lr_lambda: Function of the step that works on a 0-d int64 array without reading its value, as
            ``lambda step: 0.95**step`` does. Such a schedule has no config and cannot be saved.
    """
    return lr * lr_lambda(step)


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
    return _piecewise(step, ends, rates, anneal_strategy == "cos")


def _piecewise(step: mx.array, ends: list[float], rates: list[float], cosine: bool) -> mx.array:
    """The rate in the first phase that is not over: phase i leads to ``rates[i + 1]`` at step ``ends[i]``."""
    rate = mx.array(rates[-1])
    for i, end in reversed(list(enumerate(ends))):
        start = ends[i - 1] if i else 0.0
        left = half_cosine(step - start, end - start) if cosine else (end - step) / (end - start)
        rate = mx.where(step <= end, rates[i + 1] + (rates[i] - rates[i + 1]) * left, rate)
    return rate
