"""mlx-lm with the optimizers of this package: its command line, and its ``train`` for runs that can be resumed.

``python -m mlx_adagrad.lm lora --config lora.yaml --train`` is mlx-lm's own command line, which also knows
``optimizer: adagrad`` and ``--resume``. mlx-lm is imported when it is used, never before.
"""

from .training import train

__all__ = ["train"]
