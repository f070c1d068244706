"""Random numbers of a traced step: drawn from a key that goes in and out of it.

A trace freezes the global random state, so that a dropout mask would repeat for ever; MLX lets nobody put a traced key
in its place. So while a step is traced, the functions of ``mx.random`` take their keys from here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

DRAWING = (
    "bernoulli",
    "categorical",
    "gumbel",
    "laplace",
    "multivariate_normal",
    "normal",
    "permutation",
    "randint",
    "truncated_normal",
    "uniform",
)


class Keys:
    """A sequence of keys split from one; ``key`` is what the next step starts from."""

    def __init__(self, key: mx.array):
        self.key = key
        self.drawn = 0

    def next(self) -> mx.array:
        """A key for one draw."""
        self.key, key = mx.random.split(self.key)
        self.drawn += 1
        return key


@contextmanager
def drawing_from(keys: Keys) -> Iterator[None]:
    """Let this thread's calls of ``mx.random`` that name no key take one of ``keys``."""
    thread = threading.get_ident()

    def keyed(function: Any) -> Any:
        def draw(*args: Any, **kwargs: Any) -> mx.array:
            if threading.get_ident() != thread or kwargs.get("key") is not None or _is_key(args):
                return function(*args, **kwargs)
            return function(*args, **{**kwargs, "key": keys.next()})

        return draw

    functions = {name: getattr(mx.random, name) for name in DRAWING}
    try:
        for name, function in functions.items():
            setattr(mx.random, name, keyed(function))
        yield
    finally:
        for name, function in functions.items():
            setattr(mx.random, name, function)


def _is_key(args: tuple[Any, ...]) -> bool:
    # a key given by position is the only array of two uint32 that these functions take beside their numbers
    return any(isinstance(a, mx.array) and a.dtype == mx.uint32 and a.shape == (2,) for a in args[1:])


def global_key() -> mx.array:
    """A copy of the global random state."""
    state: Any = mx.random.state
    return mx.array(state[0])


def set_global_key(key: mx.array) -> None:
    """Make ``key`` the global random state, which MLX takes as a seed only."""
    values: Any = key.tolist()
    mx.random.seed(values[0] << 32 | values[1])
