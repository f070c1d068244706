"""Adagrad for MLX: right in half precision, fused on Apple GPUs, a drop-in for ``mlx.optimizers.Adagrad``."""

from .accumulators import Dense, RowWise
from .adagrad import Adagrad
from .embedding import SparseEmbedding, value_and_grad
from .rows import RowSparse

__version__ = "0.1.0"

__all__ = ["Adagrad", "Dense", "RowSparse", "RowWise", "SparseEmbedding", "value_and_grad", "__version__"]
