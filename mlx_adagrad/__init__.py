"""Adagrad for MLX: right in half precision, fused on Apple GPUs, a drop-in for ``mlx.optimizers.Adagrad``."""

from . import old_names as old_names
from .adagrad import Adagrad
from .export import export_step, load_step
from .sparse.averaging import refuse_row_sparse_gradients
from .sparse.bag import SparseEmbeddingBag
from .sparse.embedding import SparseEmbedding, value_and_grad
from .sparse.gradient import RowSparse
from .sparse.trainers import sparse_gradients
from .stand_in import stand_in
from .update.accumulators import Dense, Quantized, RowWise

refuse_row_sparse_gradients()

__version__ = "0.1.0"

__all__ = [
    "Adagrad",
    "Dense",
    "Quantized",
    "RowSparse",
    "RowWise",
    "SparseEmbedding",
    "SparseEmbeddingBag",
    "export_step",
    "load_step",
    "sparse_gradients",
    "stand_in",
    "value_and_grad",
    "__version__",
]
