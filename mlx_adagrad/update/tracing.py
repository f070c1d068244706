"""Evaluation that leaves alone what MLX is tracing."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def evaluate(tree: Any, wait: bool = True) -> bool:
    """Evaluate the arrays of a tree, or only start to, unless something is tracing (``mx.compile``, ``vmap``, export);
    tells whether.
    """
    try:
        mx.eval(tree) if wait else mx.async_eval(tree)
        return True
    except ValueError:
        pass  # a traced value; what else may be wrong shows when the result is evaluated
    except RuntimeError as error:  # a traced value that mx.value_and_grad has taken the mark of
        if "array without a primitive" not in str(error):
            raise
    return False


def read(array: mx.array) -> Any:
    """The Python value of an array, or None inside a transformation, where it has none."""
    try:
        return array.item()
    except ValueError as error:
        if "during function transformations" not in str(error):
            raise
        return None
