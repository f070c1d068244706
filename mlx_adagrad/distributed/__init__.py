"""Training on several machines with MLX's own engine, ``mx.distributed``: no transport of our own.

``gradients.py`` averages gradients, ``embedding.py`` spreads a table over processes, ``sharding.py`` knows which
parameters are parts of larger ones, ``layout.py`` puts them together; ``groups.py`` checks arguments. What the
processes must decide alike is in ``wrappers/agreement.py``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .embedding import ShardedEmbedding, shard_embedding
    from .gradients import average_gradients

__all__ = ["ShardedEmbedding", "average_gradients", "shard_embedding"]

# Every optimizer imports sharding.py, and most need no more of this folder.
ON_DEMAND = {
    "ShardedEmbedding": "embedding",
    "average_gradients": "gradients",
    "shard_embedding": "embedding",
}


def __getattr__(name: str) -> Any:
    if name not in ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{ON_DEMAND[name]}", __name__), name)
