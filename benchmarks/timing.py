"""Time and memory of steps that do the same work, measured side by side in one process.

On a shared machine two medians taken a minute apart differ by more than what is looked for. So a round times one step
of every candidate, in a shuffled order, and a speed-up is the median over rounds of the ratio *within* a round.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

Step = Callable[[], Any]
"""One whole step, evaluated when it returns; it returns the new parameters."""

# Where the allocator happens to place a candidate's arrays decides whether each of its steps meets fresh pages (2 times
# slower, measured with glibc at 2M to 8M elements). So everything is set up anew several times, in another order.
TRIALS = 3
# Before its clock runs a candidate takes untimed steps for this long: then the caches hold its data, and the threads of
# whoever came before sleep (torch's spin for about a millisecond after their work, on cores that the next one wants).
LEAD_IN_SECONDS = 0.005


class Quartiles(NamedTuple):
    """The quartiles of a sample."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` measured, by candidate.

    Args:
        seconds: Time of each round in s.
        extra_bytes: Peak of MLX's memory during a step above what was held before it, in bytes.
        cpu_seconds: Processor time of each round in s, that of all threads together.
    """

    seconds: dict[str, list[float]]
    extra_bytes: dict[str, int]
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str) -> Quartiles:
        """Quartiles of the time of one step in s."""
        return _quartiles(np.array(self.seconds[name]))

    def cpu_time(self, name: str) -> Quartiles:
        """Quartiles of the processor time of one step in s."""
        return _quartiles(np.array(self.cpu_seconds[name]))

    def speedup(self, name: str, baseline: str) -> Quartiles:
        """Quartiles of how many times faster than ``baseline`` each round was."""
        return _quartiles(np.array(self.seconds[baseline]) / np.array(self.seconds[name]))


def compare(
    candidates: Mapping[str, Callable[[], Step]], *, rounds: int = 200, seconds: float = 10.0, warmup: int = 3
) -> Comparison:
    """Run the candidates in turns, one timed step each, until ``rounds`` or ``seconds`` are used up.

    Args:
        candidates: By name, a function that makes fresh parameters and state and returns the step over them.
        rounds: The most rounds, at least one in each of the 3 trials.
        seconds: Time for the rounds in s; each trial finishes the round that it is in.
        warmup: Steps of each candidate before its first turn. The first one makes the state and compiles (about 0.9 s
            for each new kernel on a CPU), the next ones teach malloc which sizes to keep.
    """
    def no_rounds() -> dict[str, list[float]]:
        return {name: [] for name in candidates}

    measured = Comparison(no_rounds(), dict.fromkeys(candidates, 0), no_rounds())
    names, shuffle = list(candidates), random.Random(0).shuffle
    for _ in range(TRIALS):
        shuffle(names)
        steps = {name: candidates[name]() for name in names}
        for name, step in steps.items():
            for _ in range(warmup):
                step()
            measured.extra_bytes[name] = max(measured.extra_bytes[name], peak_extra_bytes(step))
        _trial(steps, measured, -(-rounds // TRIALS), seconds / TRIALS, shuffle)
        del steps, step
        mx.clear_cache()
    return measured


def _trial(
    steps: dict[str, Step], measured: Comparison, rounds: int, seconds: float, shuffle: Callable[[list], None]
) -> None:
    order, stop = list(steps), perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                wall, cpu = _turn(steps[name])
                measured.seconds[name].append(wall)
                measured.cpu_seconds[name].append(cpu)
            if perf_counter() > stop:
                break
    finally:
        gc.enable()


def _turn(step: Step) -> tuple[float, float]:
    begin = start = perf_counter()
    while start - begin < LEAD_IN_SECONDS:
        step()
        start = perf_counter()
    cpu, start = process_time(), perf_counter()
    step()
    return perf_counter() - start, process_time() - cpu


def peak_extra_bytes(step: Step) -> int:
    """The most memory that MLX held during a step above what it held before, in bytes (0 for a step without MLX)."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step()
    return max(0, mx.get_peak_memory() - before)


def _quartiles(sample: np.ndarray) -> Quartiles:
    return Quartiles(*np.percentile(sample, (25, 50, 75)).tolist())
