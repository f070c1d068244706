"""The embedding of a full fine-tune with row-sparse gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..sparse.embedding import SparseEmbedding
from ..sparse.trainers import sparse_gradients


@contextmanager
def embedding(model: nn.Module, args: Any) -> Iterator[None]:
    """Train the embedding of a language model too, by the rows that a batch names, as long as the block lasts.

    Raises:
        ValueError: If the model has no embedding that this suits, or the training is of a kind that cannot use it.
    """
    what = "[optimizer_config.adagrad] 'sparse_embedding'"
    tables = [module for _, module in model.named_modules() if type(module) is nn.Embedding]
    if not tables:
        raise ValueError(f"{what}: the model has no nn.Embedding (a quantised one cannot be trained).")
    if getattr(getattr(model, "args", None), "tie_word_embeddings", False):
        raise ValueError(f"{what}: this model computes its output with the embedding too, so its gradient is dense.")
    if args.grad_accumulation_steps > 1:
        raise ValueError(f"{what}: mlx-lm cannot add up row-sparse gradients; use 'accumulate' in place of its flag.")
    if mx.distributed.init().size() > 1:
        raise ValueError(f"{what}: mlx-lm cannot average row-sparse gradients over machines.")
    for table in tables:
        SparseEmbedding.from_embedding(table).unfreeze()
    with sparse_gradients():
        yield
