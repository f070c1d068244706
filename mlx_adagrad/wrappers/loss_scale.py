"""Loss scales: the loss is multiplied before it is differentiated, the gradients are divided before they are used."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer

from .. import checks
from ..distributed.sharding import Sharded
from ..update.modifiers import Modifiers
from . import reductions
from .agreement import ALONE, Agreement
from .base import Wrapper

# Between these a scale and its inverse are normal numbers: at 0 or infinity it could not come back.
SMALLEST, LARGEST = 2.0**-126, 2.0**126


class Scaling(Wrapper):
    """A loss scale; it warns once if it divides gradients of a loss that nobody has scaled."""

    whole_run = True
    _asked = False  # for the scale, or warned that nobody has

    def _check_asked(self) -> None:
        if not self._asked:
            self._asked = True
            what = "divides the gradients, but nobody has scaled the loss: differentiate optimizer.scale_loss(loss)"
            warnings.warn(f"[{self._name}] {what}, or leave {self._name} out.", stacklevel=3)


class LossScale(Scaling):
    r"""Divides the gradients by a fixed factor, with which :meth:`scale_loss` multiplied the loss.

    A first update before :meth:`scale_loss` has been called warns that the loss was not scaled.

    Args:
        optimizer: The optimizer inside.
        factor: The loss scale, > 0.

    Raises:
        ValueError: If ``factor`` is not positive, or infinite or NaN.
    """

    def __init__(self, optimizer: Optimizer, factor: float):
        self.factor = checks.positive(self._name, "factor", factor)
        super().__init__(optimizer)

    def scale_loss(self, loss: mx.array) -> mx.array:
        """``loss * factor``, fp32 for a loss of half precision, which it might overflow."""
        self._asked = True
        return super().scale_loss(_wide(loss) * self.factor)

    def apply_modified(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        if self.factor != 1 and not modifiers.flush:
            self._check_asked()
        return super().apply_modified(gradients, parameters, modifiers.scaled(mx.array(1.0 / self.factor)))


class DynamicLossScale(Scaling):
    r"""A loss scale that finds its size by itself, by the rule of Keras's ``LossScaleOptimizer``.

    Where a gradient holds an Inf or a NaN, or its square would be infinite, the scale is halved and nothing else
    changes: no weight, no state, no step count inside. Otherwise the gradients are divided by it, and after
    ``dynamic_growth_steps`` such steps it doubles.
    A first update before the scale has been asked for warns that the loss was not scaled.

    Args:
        optimizer: The optimizer inside.
        initial_scale: The loss scale to start from, > 0. Default: ``2**15``.
        dynamic_growth_steps: Finite steps in a row after which the scale doubles, >= 1. Default: ``2000``.
        group: Processes that each have a part of some gradients, or might see a NaN alone: all of them decide alike.
            Default: ``None``, this process decides alone.
        sharded: Which parameters each process has a part of: a module, or a predicate (path, array). Default: ``None``,
            the model that is updated tells (``fully_shard``, ``shard_linear``, ``shard_embedding``).

    Raises:
        ValueError: If ``initial_scale`` is not positive and finite, or ``dynamic_growth_steps`` is below 1.
    """

    _agreement = ALONE

    def __init__(
        self,
        optimizer: Optimizer,
        initial_scale: float = 2**15,
        dynamic_growth_steps: int = 2000,
        *,
        group: mx.distributed.Group | None = None,
        sharded: Sharded | None = None,
    ):
        self.initial_scale = checks.positive(self._name, "initial_scale", initial_scale)
        self.dynamic_growth_steps = checks.positive_integer(self._name, "dynamic_growth_steps", dynamic_growth_steps)
        self._agreement = Agreement(self._name, group, sharded)
        super().__init__(optimizer)

    def _fresh(self) -> dict[str, Any]:
        return {"dynamic_scale": mx.array(self.initial_scale), "step_counter": mx.array(0, mx.uint64)}

    @property
    def dynamic_scale(self) -> mx.array:
        """The loss scale of the next step, 0-d fp32."""
        self._asked = True
        return self._own["dynamic_scale"]

    def scale_loss(self, loss: mx.array) -> mx.array:
        """``loss * dynamic_scale``, in fp32 or wider."""
        return super().scale_loss(loss * self.dynamic_scale)

    def apply_modified(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        if modifiers.apply is False or modifiers.flush:
            return super().apply_modified(gradients, parameters, modifiers)
        self._agreement.check(parameters)
        self._check_asked()
        scale, count = self._own["dynamic_scale"], self._own["step_counter"]
        gradients = reductions.coalesced(self._name, gradients)
        unscaled = modifiers.scaled(1.0 / scale)
        finite, unscaled = self._agreement.finite(gradients, parameters, unscaled, self._norms_inside)
        new = super().apply_modified(gradients, parameters, unscaled.guarding(finite))
        grows = count == self.dynamic_growth_steps - 1
        scale = mx.where(finite, mx.where(grows, scale * 2.0, scale), scale * 0.5)
        count = mx.where(mx.logical_and(finite, mx.logical_not(grows)), count + 1, mx.zeros_like(count))
        self._keep(modifiers, dynamic_scale=mx.clip(scale, SMALLEST, LARGEST), step_counter=count)
        return new


def _wide(loss: mx.array) -> mx.array:
    return loss.astype(mx.float32) if loss.dtype in (mx.float16, mx.bfloat16) else loss
