"""Trees whose keys are hard to write as strings, each with the same four arrays, and optimizers that walk them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim

from mlx_adagrad import Adagrad, presets
from mlx_adagrad.trees import present
from mlx_adagrad.wrappers import (
    ClipByNorm,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    MaxNorm,
    SkipNonFinite,
)

STEPS = 6


class Pair(NamedTuple):
    first: Any
    second: Any


Place = Callable[[Any, Any, Any, Any], Any]
PLAIN: Place = lambda a, b, c, d: {"first": a, "second": b, "third": c, "fourth": d}  # noqa: E731
TREES: dict[str, Place] = {
    "digits": lambda a, b, c, d: {"experts": {"0": {"w": a, "b": c}, "7": {"w": b}}, "1": d},
    "dots": lambda a, b, c, d: {"user.id": {"w": a}, "user": {"name": {"w": b}}, "a.b.": {".c": c}, "..": d},
    "slashes": lambda a, b, c, d: {"a/b": a, "a": {"b": b}, "/": c, "": {"/": d}},
    "tildes": lambda a, b, c, d: {"~1": a, "/": b, "~": {"0": c}, "~0": {"~3": d}},
    "unicode": lambda a, b, c, d: {"größe": a, "重み": {"層.0": b}, "٣": c, "🙂": [d]},
    "empty": lambda a, b, c, d: {"": a, "x": {"": b, "y": {"": c}}, " ": d},
    "quotes": lambda a, b, c, d: {"a'b": a, 'c"d': b, "e\\f": [c], "[0]*?": d},
    "integers": lambda a, b, c, d: {0: a, 1: {2: b, 3: c}, "x": {10: d}},
    "tuples": lambda a, b, c, d: {"pair": (a, [b, {"0": c}]), "0": [d]},
    "named": lambda a, b, c, d: {"pair": Pair(a, (b, {"x.y": c})), "single": d},
    "root": lambda a, b, c, d: (a, [b, {"0": c}], (d,)),
    "lists": lambda a, b, c, d: {"layers": [a, c], "heads": {"0": b, "1": d}},
    "padded": lambda a, b, c, d: {"x": {"01": a}, "y": {"+1": b}, "z": {"1_0": c}, " 1": d},
    "flat": lambda a, b, c, d: {"layers.0.weight": a, "layers.1.weight": b, "layers.0.bias": c, "scale": d},
    "padded and not": lambda a, b, c, d: {"e": {"01": a, "1": b}, "f": {"01.x": c, "1": {"x": d}}},
    "prefixes": lambda a, b, c, d: {"a": a, "a.b": b, "a.b.c": c, "a.b.v": d},
}
# where MLX's own strings mean two arrays, or an order that cannot be told from a list
AMBIGUOUS: dict[str, Place] = {
    "dotted twice": lambda a, b, c, d: {"a.b": a, "a": {"b": b}, "c": c, "d": d},
    "integer and string": lambda a, b, c, d: {"e": {2: a, "2": b}, "c": c, "d": d},
    "negative": lambda a, b, c, d: {"e": {"-1": a, "0": b, "1": c}, "d": d},
}
EVERY = {"plain": PLAIN, **TREES, **AMBIGUOUS}

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adagrad": lambda: Adagrad(0.1, lr_decay=0.1),
    "torch": lambda: presets.torch(0.1, lr_decay=0.1),
    "clipped": lambda: ClipByNorm(Adagrad(0.1), 0.5),
    "averaged": lambda: ExponentialMovingAverage(Adagrad(0.1), 0.5, overwrite_frequency=4),
    "accumulated": lambda: GradientAccumulation(Adagrad(0.1), 2),
    "adam": lambda: ClipByNorm(GradientAccumulation(optim.Adam(0.1), 2), 0.5),
    "multi": lambda: ClipByNorm(
        optim.MultiOptimizer([GradientAccumulation(Adagrad(0.1), 2), optim.SGD(0.1, 0.9)], [lambda _, w: w.ndim > 1]),
        0.5,
    ),
    "all": lambda: DynamicLossScale(
        Constraint(
            ExponentialMovingAverage(GradientAccumulation(ClipByNorm(Adagrad(0.1), 0.5), 2), 0.5),
            {lambda _, w: w.ndim > 1: MaxNorm(0.9)},
        ),
        4.0,
        3,
    ),
    "skip": lambda: SkipNonFinite(ExponentialMovingAverage(presets.keras(0.1, clipnorm=0.5), 0.5)),
}


def drawn(key: int) -> tuple[mx.array, ...]:
    """Four arrays: two of one shape, two of another, so that what changes places is seen by its value only."""
    keys = mx.random.split(mx.random.key(key), 4)
    return tuple(mx.random.normal(shape, key=k) for shape, k in zip([(2, 3), (2, 3), (4,), (4,)], keys, strict=True))


def gradients(place: Place, step: int) -> Any:
    return place(*drawn(100 + step))


def order(place: Place) -> list[int]:
    """Which of the four arrays each leaf is, in the order of the tree."""
    return [int(i.item()) for _, i in present(place(*(mx.array(i) for i in range(4))))]


def leaves(place: Place, tree: Any) -> list[mx.array]:
    """The four arrays of a tree, wherever the tree has them."""
    found = dict(zip(order(place), (w for _, w in present(tree)), strict=True))
    return [found[i] for i in range(4)]


def train(optimizer: Any, parameters: Any, place: Place, steps: range) -> Any:
    """The parameters after some steps, given a tree with all of them."""
    for step in steps:
        parameters = optimizer.apply_gradients(gradients(place, step), parameters)
        mx.eval([w for _, w in present(parameters)], [a for _, a in present(optimizer.state)])
    return parameters


def same(got: list[mx.array], want: list[mx.array]) -> Iterator[Any]:
    return (mx.array_equal(a, b).item() for a, b in zip(got, want, strict=True))
