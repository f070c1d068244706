"""``mlx.nn.average_gradients`` refuses row-sparse gradients, with one process too.

With one process MLX returns the gradients before it looks at them, so that a program would fail on the cluster first.
Inside ``sparse_gradients()``, for trainers that call it by name, it averages them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import mlx.nn as nn
import mlx.nn.utils

from ..trees import CONTAINERS, Keys, dotted, present
from .gradient import INSTEAD, RowSparse


def _refusing(average: Callable) -> Callable:
    @wraps(average)
    def average_gradients(gradients: Any, *args: Any, **kwargs: Any) -> Any:
        for keys, g in present(gradients) if isinstance(gradients, CONTAINERS) else ():
            if isinstance(g, RowSparse):
                return _average_rows(keys, gradients, *args, **kwargs)
        return average(gradients, *args, **kwargs)

    return average_gradients


def _average_rows(keys: Keys, gradients: Any, *args: Any, **kwargs: Any) -> Any:
    # imported here since few programs come here
    from ..distributed import average_gradients
    from .trainers import is_open

    if is_open():
        return average_gradients(gradients, *args, **kwargs)
    raise TypeError(f"[RowSparse] the gradient of '{dotted(keys)}' is row-sparse. {INSTEAD}")


def refuse_row_sparse_gradients() -> None:
    """Put the check in front of MLX's function; called once, when this package is imported."""
    guarded = _refusing(mlx.nn.utils.average_gradients)
    for holder in (nn, mlx.nn.utils):
        holder.average_gradients = guarded  # type: ignore[attr-defined]
