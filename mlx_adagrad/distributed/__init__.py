"""Training on several machines with MLX's own engine, ``mx.distributed``: no transport of our own.

``gradients.py`` averages gradients, ``embedding.py`` spreads a table over processes, ``sharding.py`` knows which
parameters are parts of larger ones, ``agreement.py`` what the processes must decide alike.
"""

from .embedding import ShardedEmbedding, shard_embedding
from .gradients import average_gradients

__all__ = ["ShardedEmbedding", "average_gradients", "shard_embedding"]
