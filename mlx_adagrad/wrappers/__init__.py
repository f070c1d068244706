"""What acts on a whole tree or a whole run, each an optimizer around any ``mlx.optimizers.Optimizer``.

In Keras's order, outermost first::

    clipped = ClipByNorm(Adagrad(0.1), 1.0)
    averaged = ExponentialMovingAverage(GradientAccumulation(clipped, 4))
    optimizer = SkipNonFinite(LossScale(Constraint(averaged, {"*.bias": "non_neg"}), 128))
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
