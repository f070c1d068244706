"""Adagrad for MLX: right in half precision, fused on Apple GPUs, a drop-in for ``mlx.optimizers.Adagrad``."""

from .accumulators import Dense, RowWise
from .adagrad import Adagrad

__version__ = "0.1.0"

__all__ = ["Adagrad", "Dense", "RowWise", "__version__"]
