"""For trainers that look an optimizer up by name: one of ours in the place of a class of ``mlx.optimizers``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.optimizers as optim
from mlx.optimizers import Optimizer

from . import checks


@contextmanager
def stand_in(name: str, make: Callable[..., Optimizer]) -> Iterator[None]:
    """While the block lasts, ``mlx.optimizers.<name>(...)`` returns what ``make`` makes of the same arguments.

    It reaches every trainer that asks ``mlx.optimizers`` for the class when it needs it, as ``optim.AdamW(...)`` does.
    One that imported the class itself beforehand keeps it: import such a trainer inside the block. ``isinstance`` and
    ``issubclass`` answer as before, and inside ``make`` the name is the real class. The class comes back whatever
    happens in the block. All threads see the change.

    Args:
        name: The name of a class in ``mlx.optimizers``, such as ``"AdamW"``.
        make: Called with the arguments that the trainer gives to the class (``learning_rate=...`` and whatever else it
            knows of: take those that mean nothing here as ``**ignored``); returns the optimizer.

    Raises:
        ValueError: If ``mlx.optimizers`` has no optimizer of that name.
        TypeError: If ``make`` cannot be called; in the block, if it returns no optimizer.

    Example::

        with stand_in("AdamW", lambda learning_rate, **ignored: Adagrad(learning_rate)):
            trainer.train()
    """
    real: Any = getattr(optim, name, None) if isinstance(name, str) else None
    if not (isinstance(real, type) and issubclass(real, Optimizer)):
        wanted = "that of an optimizer in mlx.optimizers"
        raise ValueError(f"[stand_in] 'name' must be {wanted} but got {checks.shown(name)}.")
    if not callable(make):
        wanted = f"callable with the arguments of {name}"
        raise TypeError(f"[stand_in] 'make' must be {wanted} but got {checks.shown(make)}.")
    setattr(optim, name, _class_of(real, make))
    try:
        yield
    finally:
        setattr(optim, name, real)


def _class_of(real: type, make: Callable[..., Optimizer]) -> type:
    """What looks like the class ``real`` and makes something else."""

    class Kind(type(real)):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if cls is not stand:  # a subclass that was defined in the block
                return super().__call__(*args, **kwargs)
            shown = getattr(optim, real.__name__)
            setattr(optim, real.__name__, real)
            try:
                made = make(*args, **kwargs)
            finally:
                setattr(optim, real.__name__, shown)
            if not isinstance(made, Optimizer):
                wanted = "an mlx.optimizers.Optimizer"
                raise TypeError(f"[stand_in] 'make' must return {wanted} but got {checks.shown(made)}.")
            return made

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, real) if cls is stand else super().__instancecheck__(instance)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, real) if cls is stand else super().__subclasscheck__(subclass)

    stand: type = Kind(real.__name__, (real,), {"__module__": real.__module__, "__doc__": real.__doc__})
    return stand
