"""Updates by an incomplete window of a gradient accumulation, as at the end of an epoch.

A flush is a call whose gradients are all zero and count for nothing: wrappers outside of the accumulation see an
ordinary call, the accumulation updates by the mean of what it has, and what is inside sees an ordinary update.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.nn import Module

from ..trees import mapped, optimizable
from ..update.modifiers import UNMODIFIED
from ..update.tracing import read
from .states import parts


def accumulations(optimizer: Any) -> list[Any]:
    """The gradient accumulations among an optimizer and those inside it, the outermost first."""
    return [part for part in parts(optimizer) if hasattr(part, "waiting")]


def flush(wrapper: Any, model_or_tree: Any) -> Any:
    """:meth:`mlx_adagrad.wrappers.Wrapper.flush`."""
    module = isinstance(model_or_tree, Module)
    waiting = [part.waiting for part in accumulations(wrapper)]
    for part in accumulations(wrapper):
        if accumulations(part.optimizer):
            what = "one GradientAccumulation is inside another, so that a part of a window has no defined weight"
            raise ValueError(f"[{type(part).__name__}] {what}: flush takes one of them.")
    known = [read(count) for count in waiting]
    if all(count == 0 for count in known):
        return model_or_tree.parameters() if module else model_or_tree
    apply = True if None not in known else mx.any(mx.stack(waiting) > 0)
    tree = optimizable(model_or_tree.trainable_parameters() if module else model_or_tree)
    zeros = mapped(lambda _, w: mx.broadcast_to(mx.array(0, w.dtype), w.shape), tree)
    new = wrapper.apply_modified(zeros, model_or_tree, UNMODIFIED.flushing(apply))
    return model_or_tree.update(new).parameters() if module else new
