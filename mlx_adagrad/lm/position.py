"""Where a run stands in its data: mlx-lm's batches, counted, and the random numbers behind their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class Batches:
    """Takes the place of mlx-lm's ``iterate_batches`` and gives the same batches, from any position on.

    mlx-lm draws the order of the batches from numpy's global generator, once an epoch, and validation draws from the
    same one. So a position is the generator's state before the epoch, the number of batches taken since, and its state
    now.

    Args:
        iterate: The function of mlx-lm, or one that takes and gives the same.
        iteration_done: Called with the number of iterations made, after each but the last, when all of it is done.
    """

    def __init__(self, iterate: Callable[..., Iterator[Any]], iteration_done: Callable[[int], None]):
        self.iterate = iterate
        self.iteration_done = iteration_done
        self.begin: Callable[[], None] = lambda: None  # called before the first batch
        self.iterations = 0
        self.taken = 0  # in this epoch
        self.epoch: Any = None
        self.now: Any = None  # where to go on, once; None: wherever the generator stands

    def __call__(self, *args: Any, loop: bool = False, seed: int | None = None, **kwargs: Any) -> Iterator[Any]:
        if not loop:  # validation
            return self.iterate(*args, loop=False, seed=seed, **kwargs)
        return self._training(seed, lambda seed: self.iterate(*args, loop=False, seed=seed, **kwargs))

    def _training(self, seed: int | None, one_epoch: Callable[[int | None], Iterator[Any]]) -> Iterator[Any]:
        import numpy as np

        self.begin()
        if self.now is not None:
            np.random.set_state(tuple(self.epoch))
            batches = one_epoch(None)
            for _ in range(self.taken):
                next(batches)
            np.random.set_state(tuple(self.now))
            self.now = None
            yield from self._counted(batches)
        while True:
            self.epoch, self.taken = _listed(np.random.get_state()), 0
            yield from self._counted(one_epoch(seed))
            seed = None
            if not self.taken:
                raise ValueError("[train] the training data makes no batch.")

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.taken += 1
            yield batch
            self.iterations += 1
            self.iteration_done(self.iterations)

    def position(self, now: Any = None) -> dict[str, Any]:
        """The position after the last iteration, in the types of JSON; ``now`` in place of the generator's state."""
        import numpy as np

        now = np.random.get_state() if now is None else now
        return {"taken": self.taken, "epoch": self.epoch, "now": _listed(now)}

    def resume(self, iterations: int, position: dict[str, Any]) -> None:
        """Go on from a position that was saved after so many iterations."""
        self.iterations, self.taken = iterations, position["taken"]
        self.epoch, self.now = position["epoch"], position["now"]


def _listed(state: Any) -> list[Any]:
    """A state of numpy's generator in the types of JSON."""
    name, keys, *rest = state
    return [name, keys.tolist(), *rest]
