"""Row-sparse gradients in trainers that call ``mlx.nn.value_and_grad`` by name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
import mlx.nn.utils

from .embedding import stock_value_and_grad, value_and_grad

_HOLDERS: tuple[Any, ...] = (nn, mlx.nn.utils)
_lock = threading.Lock()
_before: list[Callable] = []  # what the holders had before the first context that is open; empty outside
_open = 0


@contextmanager
def sparse_gradients() -> Iterator[None]:
    """A context in which ``mlx.nn.value_and_grad`` is :func:`mlx_adagrad.value_and_grad`.

    For trainers that call ``nn.value_and_grad`` themselves, as mlx-lm's ``train`` does. A function that was made inside
    stays row-sparse after the end; one that was made before is as it was, and so is one that a module took over by
    ``from mlx.nn import value_and_grad``. At the end, whatever ends it, ``mlx.nn`` is as before. Contexts may be
    nested. The change is one of the whole process: other threads see it too, until the last of several contexts ends;
    for models without a :class:`~mlx_adagrad.SparseEmbedding` it makes no difference. Also a decorator.

    Raises:
        TypeError: In place of MLX's error, where a compiled step of the trainer takes a :class:`RowSparse`.
    """
    _enter()
    try:
        yield
    except ValueError as error:
        if "received type" not in str(error) or "RowSparse" not in str(error):
            raise
        raise TypeError(
            "[sparse_gradients] a compiled step of the trainer takes gradients of the call before, and a RowSparse "
            "cannot cross mx.compile: let the trainer accumulate nothing (mlx-lm: grad_accumulation_steps=1), and give "
            "it mlx_adagrad.wrappers.GradientAccumulation(optimizer, steps), which accumulates the same."
        ) from error
    finally:
        _leave()


def _enter() -> None:
    global _open
    with _lock:
        if not _open:
            _before[:] = [holder.value_and_grad for holder in _HOLDERS]
            for holder in _HOLDERS:
                holder.value_and_grad = _sparse_while_open
        _open += 1


def _leave() -> None:
    global _open
    with _lock:
        _open -= 1
        if not _open:
            for holder, before in zip(_HOLDERS, _before, strict=True):
                if holder.value_and_grad is _sparse_while_open:  # else somebody else has put theirs in its place
                    holder.value_and_grad = before
            _before.clear()


def _sparse_while_open(model: nn.Module, fn: Callable) -> Callable:
    # somebody else may keep this function, and put it back when all contexts have ended
    return value_and_grad(model, fn) if _open else stock_value_and_grad(model, fn)
