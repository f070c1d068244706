"""Adagrad for MLX: right in half precision, fused on Apple GPUs, a drop-in for ``mlx.optimizers.Adagrad``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import old_names as old_names
from .adagrad import Adagrad
from .distributed.sharding import note_segments
from .sparse.averaging import refuse_row_sparse_gradients
from .sparse.gradient import RowSparse
from .update.accumulators import Dense, Quantized, RowWise

if TYPE_CHECKING:
    from .by_name import stand_in
    from .export import export_step, load_step
    from .sparse.bag import SparseEmbeddingBag
    from .sparse.embedding import SparseEmbedding, value_and_grad
    from .sparse.trainers import sparse_gradients

refuse_row_sparse_gradients()
note_segments()

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


# What few programs need is imported when it is asked for: it would take as long to import as all else together.
ON_DEMAND = {
    "SparseEmbedding": "sparse.embedding",
    "SparseEmbeddingBag": "sparse.bag",
    "export_step": "export",
    "load_step": "export",
    "sparse_gradients": "sparse.trainers",
    "stand_in": "by_name",
    "value_and_grad": "sparse.embedding",
}


def __getattr__(name: str) -> Any:
    if name not in ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{ON_DEMAND[name]}", __name__), name)
    globals()[name] = value
    return value
