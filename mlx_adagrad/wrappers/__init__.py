"""What acts on a whole tree or a whole run, each an optimizer around any ``mlx.optimizers.Optimizer``.

In Keras's order, outermost first::

    clipped = ClipByNorm(Adagrad(0.1), 1.0)
    averaged = ExponentialMovingAverage(GradientAccumulation(clipped, 4))
    optimizer = SkipNonFinite(LossScale(Constraint(averaged, {"*.bias": "non_neg"}), 128))

What belongs here: one module for each effect on a tree or a run, and no formula of the update. To add one, derive from
:class:`Wrapper` and override ``apply_modified``, with ``_fresh`` for entries of its own in the state; hand scalars
inward by ``Modifiers``; name it below, and add it to ``WRAPPED`` in ``tests/test_wrappers.py``, whose laws all obey.
"""

from .accumulation import GradientAccumulation
from .average import ExponentialMovingAverage
from .base import Wrapper
from .clip import ClipByGlobalNorm, ClipByNorm, ClipByValue
from .constraint import Constraint, MaxNorm, NonNeg, UnitNorm
from .loss_scale import DynamicLossScale, LossScale
from .skip import SkipNonFinite

__all__ = [
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "Constraint",
    "DynamicLossScale",
    "ExponentialMovingAverage",
    "GradientAccumulation",
    "LossScale",
    "MaxNorm",
    "NonNeg",
    "SkipNonFinite",
    "UnitNorm",
    "Wrapper",
]
