"""The schedulers of ``torch.optim.lr_scheduler`` that go one way; those that come back are in ``torch_cyclic.py``.

They are stepped after each step of the optimizer, as torch's docs say.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from .. import checks
from .arguments import ArrayFunction, Count, Counts, Fraction, Function, NonNegative, Period
from .curves import polynomial, power
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
    step: mx.array, lr: NonNegative, start_factor: Fraction = 1 / 3, end_factor: Fraction = 1.0, total_iters: Count = 5
) -> mx.array | float:
    """torch's LinearLR: along a line from ``lr * start_factor`` to ``lr * end_factor``, where it stays.

    Args:
        lr: The rate that the factors multiply, >= 0.
        start_factor: Factor at step 0, above 0 and at most 1. Default: ``1 / 3``.
        end_factor: Factor from step ``total_iters`` on, 0 to 1. Default: ``1.0``.
        total_iters: Steps between the two, >= 0; at 0 the rate stays at ``lr * start_factor``, as in torch. Default:
            ``5``.
    """
    checks.positive("torch_linear_lr", "start_factor", start_factor)
    if total_iters == 0:
        return lr * start_factor
    return optim.linear_schedule(lr * start_factor, lr * end_factor, total_iters)(step)


@named
def torch_constant_lr(
    step: mx.array, lr: NonNegative, factor: Fraction = 1 / 3, total_iters: Count = 5
) -> mx.array | float:
    """torch's ConstantLR: ``lr * factor`` for ``total_iters`` steps, then ``lr``.

    Args:
        lr: The rate from step ``total_iters`` on, >= 0.
        factor: Factor before it, 0 to 1. Default: ``1 / 3``.
        total_iters: Steps at the lower rate, >= 0; at 0 all are, as in torch. Default: ``5``.
    """
    return mx.where(step < total_iters, lr * factor, lr) if total_iters else lr * factor


@named
def torch_polynomial_lr(
    step: mx.array, lr: NonNegative, total_iters: Count = 5, power: NonNegative = 1.0
) -> mx.array | float:
    """torch's PolynomialLR: ``lr * (1 - step / total_iters) ** power``, and 0 from ``total_iters`` on.

    Args:
        lr: The rate at step 0, >= 0.
        total_iters: Steps of the decay, >= 0; at 0 the rate stays at ``lr``, as in torch. Default: ``5``.
        power: Exponent, >= 0. Default: ``1.0``.
    """
    return polynomial(lr, 0.0, power, step, total_iters) if total_iters else lr


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
def torch_multiplicative_lr(step: mx.array, lr: NonNegative, lr_lambda: Function, total_steps: Period) -> mx.array:
    """torch's MultiplicativeLR: ``lr * lr_lambda(1) * ... * lr_lambda(step)``.

    The products are computed when the schedule is made, in double precision; hence ``total_steps``, an addition.

    Args:
        lr: The rate at step 0, >= 0.
        lr_lambda: Function of the step, an int from 1 on. Such a schedule has no config and cannot be saved.
        total_steps: Length of the run in steps, >= 1; from then on the rate stays.
    """
    return lr * mx.array(_products(lr_lambda, total_steps))[mx.clip(step, 0, total_steps)]


@functools.lru_cache(maxsize=8)
def _products(function: Callable[[int], float], steps: int) -> list[float]:
    """The products of the first 0, 1, ... ``steps`` factors."""
    owner, name = "torch_multiplicative_lr", "lr_lambda"
    factors = (checks.non_negative(owner, f"{name}({step})", function(step)) for step in range(1, steps + 1))
    return list(itertools.accumulate(factors, operator.mul, initial=1.0))
