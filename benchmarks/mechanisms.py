"""What does each mechanism that serves CPUs only gain? Each is switched off by itself, in one process, in turns.

Wall time says what a user waits, processor time what it costs. ``--busy`` keeps every core at work with something else.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import mlx.core as mx

import mlx_adagrad
from dense import CASES, describe
from mlx_adagrad.sparse import gradient as row_gradient
from mlx_adagrad.sparse import ops as row_ops
from mlx_adagrad.update import ops, streams
from report import bullets, cores, machine, options, save, table
from row_steps import Problem, sparse_loop
from steps import eager_steps
from timing import Comparison, Step, compare

Switch = Callable[[], Any]  # a context in which the mechanism is off

DENSE: dict[str, Switch] = {
    "streams": partial(mock.patch.object, streams, "PARALLEL_ELEMENTS", 2**62),
    "batches": partial(mock.patch.object, ops.Functions, "batches", lambda self, w: False),
}
SPARSE: dict[str, Switch] = {
    "words of 8 bytes": partial(mock.patch.object, row_gradient, "_words", lambda table, dtype: None),
    "replacing rows": partial(mock.patch.object, row_ops, "_worth_reading", lambda w, g: False),
    "second stream": partial(mock.patch.object, streams, "second_stream", lambda size: nullcontext()),
}
ROWS = Problem(1_000_000)


def without(switch: Switch, setup: Callable[[], Step]) -> Callable[[], Step]:
    """``setup`` whose steps run with a mechanism switched off."""

    def switched() -> Step:
        step = setup()

        def run() -> Any:
            with switch():
                return step()

        return run

    return switched


def measure(setup: Callable[[], Step], switches: Mapping[str, Switch], chosen: argparse.Namespace) -> Comparison:
    """The steps as they are, and without each mechanism."""
    candidates = {"as it is": setup} | {f"without {name}": without(s, setup) for name, s in switches.items()}
    budget = {"rounds": 3, "warmup": 1} if chosen.quick else {"seconds": chosen.seconds}
    return compare(candidates, **budget)


def report(case: str, comparison: Comparison) -> Iterator[list[str]]:
    """A row of the table for each candidate."""
    for name in comparison.seconds:
        wall, cpu = comparison.time(name).median, comparison.cpu_time(name).median
        slower = 1 / comparison.speedup(name, "as it is").median
        yield [f"{case}, {name}", f"{1e3 * wall:.2f}", f"{1e3 * cpu:.2f}", f"{slower:.2f}x"]


@contextmanager
def busy_cores(number: int) -> Iterator[None]:
    """Processes that keep this many cores at work."""
    workers = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(number)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()


def _spin() -> None:
    while True:
        pass


def run(chosen: argparse.Namespace, facts: Mapping[str, str], busy: int = 0) -> None:
    """Measure every case, print the table and write the figures."""
    ours = partial(mlx_adagrad.Adagrad, 0.01, fused=False)
    cases = [[(8, 4)] * 20, [(40, 30)]] if chosen.quick else CASES
    problem = Problem(1000, 64, 8) if chosen.quick else ROWS
    rows: list[list[str]] = []
    with busy_cores(busy):
        for shapes in cases:
            rows += report(describe(shapes), measure(partial(eager_steps, ours, shapes), DENSE, chosen))
        case = f"{problem.look_ups:,} rows of {problem.rows:,} x {problem.columns}"
        rows += report(case, measure(partial(sparse_loop, ours, problem), SPARSE, chosen))
    title = f"## Mechanisms of the CPU path, {busy} other processes at work"
    print(f"{title}\n\n{table(['case', 'wall ms', 'processor ms', 'wall, relative'], rows)}\n", flush=True)
    save(chosen.out / f"mechanisms_{busy}.json", {"machine": dict(facts), "busy": busy, "rows": rows})


def main() -> None:
    """Print the machine, then the table on idle cores, and on busy ones."""
    chosen, facts = options(__doc__), machine()
    if mx.default_device() != mx.cpu:
        raise SystemExit("these mechanisms act on CPUs only")
    print(f"{bullets(facts)}\n")
    run(chosen, facts)
    run(chosen, facts, busy=cores())


if __name__ == "__main__":
    main()
