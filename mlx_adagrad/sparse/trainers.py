"""Row-sparse gradients in trainers that call ``mlx.nn.value_and_grad`` by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
import mlx.nn.utils

from .embedding import stock_value_and_grad, value_and_grad

_HOLDERS: tuple[Any, ...] = (nn, mlx.nn.utils)
_before: list[Callable] = [stock_value_and_grad] * len(_HOLDERS)  # what they had when ours was put in its place
_open: set[object] = set()  # a token for each context; ours is MLX's function where there is none


@contextmanager
def sparse_gradients() -> Iterator[None]:
    """A context in which ``mlx.nn.value_and_grad`` is :func:`mlx_adagrad.value_and_grad`.

    For trainers that call ``nn.value_and_grad`` themselves, as mlx-lm's ``train`` does. A function that was made inside
    stays row-sparse after the end; one that was made before is as it was, and so is one that a module took over by
    ``from mlx.nn import value_and_grad``. At the end, whatever ends it, ``mlx.nn`` is as before. Contexts may be
    nested. The change is one of the whole process: other threads see it too, until the last of several contexts ends;
    for models without a :class:`~mlx_adagrad.SparseEmbedding` it makes no difference. Also a decorator.
    ``mlx.nn.average_gradients``, which refuses row-sparse gradients elsewhere, averages them meanwhile.

    Raises:
        TypeError: In place of MLX's error, where a compiled step of the trainer takes a :class:`RowSparse`.
    """
    token = object()
    try:
        try:
            _enter(token)
            yield
        finally:
            _leave(token)
    except ValueError as error:
        if "received type" not in str(error) or "RowSparse" not in str(error):
            raise
        raise TypeError(
            "[sparse_gradients] a compiled step of the trainer takes gradients of the call before, and a RowSparse "
            "cannot cross mx.compile: let the trainer accumulate nothing (mlx-lm: grad_accumulation_steps=1), and give "
            "it mlx_adagrad.wrappers.GradientAccumulation(optimizer, steps), which accumulates the same."
        ) from error
    finally:
        _leave(token)  # an interrupt may have come at any line of the first time


def is_open() -> bool:
    """Whether any thread is inside :func:`sparse_gradients`."""
    return bool(_open)


# no lock, which an interrupt just before the end of its ``with`` would leave locked


def _enter(token: object) -> None:
    _open.add(token)
    for i, holder in enumerate(_HOLDERS):
        current = holder.value_and_grad  # read once: another thread may change it
        if current is not _sparse_while_open:
            _before[i] = current
            holder.value_and_grad = _sparse_while_open


def _leave(token: object) -> None:
    _open.discard(token)
    for i, holder in enumerate(_HOLDERS):
        if holder.value_and_grad is _sparse_while_open:  # else somebody else has put theirs in its place
            # asked and done in one statement: a context of another thread may begin
            holder.value_and_grad = _sparse_while_open if _open else _before[i]


def _sparse_while_open(model: nn.Module, fn: Callable) -> Callable:
    # somebody else may keep this function, and put it back when all contexts have ended
    return value_and_grad(model, fn) if _open else stock_value_and_grad(model, fn)
