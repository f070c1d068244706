"""The schedulers of ``mindspore.experimental.optim.lr_scheduler``, which keep the rate in fp32."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim

from .arguments import NonNegative, Period
from .named import named


@named
def mindspore_step_lr(step: mx.array, lr: NonNegative, step_size: Period, gamma: NonNegative = 0.1) -> mx.array:
    """MindSpore's StepLR: ``lr * gamma ** (step // step_size)``.

    Args:
        lr: The rate at step 0, >= 0.
        step_size: Steps from one decay to the next, >= 1.
        gamma: Factor of each decay, >= 0. Default: ``0.1``.
    """
    return optim.step_decay(lr, gamma, step_size)(step)


@named
def mindspore_exponential_lr(step: mx.array, lr: NonNegative, gamma: NonNegative) -> mx.array:
    """MindSpore's ExponentialLR: ``lr * gamma ** step``.

    Args:
        lr: The rate at step 0, >= 0.
        gamma: Factor of each step, >= 0.
    """
    return optim.exponential_decay(lr, gamma)(step)
