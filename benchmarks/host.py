"""What a step costs the host: the time of building its graph, before anything runs, in the thread's own CPU time.

Nothing is evaluated. On a Mac this is the time before the GPU gets its work; elsewhere the kernels, which cannot run,
are recorded: the steps are timed while ``mx.export_function`` traces.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import thread_time_ns
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
from mlx.utils import tree_flatten

from mlx_adagrad import Adagrad
from mlx_adagrad.update import devices
from mlx_adagrad.wrappers import ClipByNorm
from report import bullets, machine, on_gpu, options, save, table

Tree = dict[str, Any]

NOTES = """A compiled step is one inside a mx.compile of the user, replayed. Medians; in brackets the ratio to stock, or
to stock with the same clip written by hand."""
MAX_NORM = 1.0


class Way(NamedTuple):
    """One way to build the graph of a step.

    Args:
        optimizer: Its state is put back after each step.
        call: Makes the step.
        against: The way that it is compared with.
    """

    optimizer: stock.Optimizer
    call: Callable[[], Any]
    against: str = "stock"


def problems(quick: bool) -> dict[str, Tree]:
    """The parameters of each problem."""
    count = 20 if quick else 1
    block = tree_flatten(nn.TransformerEncoderLayer(64, 4).trainable_parameters())
    return {
        "448 of 8 x 512": {f"w{i}": mx.ones((8, 512)) for i in range(448 // count)},
        "300 of 64 x 64": {f"w{i}": mx.ones((64, 64)) for i in range(300 // count)},
        f"a transformer block, {len(block)} tensors": {f"w{i}": w for i, (_, w) in enumerate(block)},
        "one of 256 x 256": {"w0": mx.ones((256, 256))},
    }


def ways(parameters: Tree) -> dict[str, Way]:
    """Every way, with its state made."""
    gradients = {key: mx.ones_like(w) for key, w in parameters.items()}
    mx.eval(parameters, gradients)
    groups = [{"params": ["w*1", "w*3", "w0"], "lr": 0.2}]
    made: dict[str, tuple[stock.Optimizer, str]] = {
        "stock": (stock.Adagrad(0.1), "stock"),
        "operations": (Adagrad(0.1, fused=False), "stock"),
        "fused": (Adagrad(0.1), "stock"),
        "fused, groups": (Adagrad(0.1, groups=groups), "stock"),
        "fused, mask": (Adagrad(0.1, weight_decay=0.1, weight_decay_mask=lambda path, w: w.ndim > 1), "stock"),
        "stock, norms by hand": (stock.Adagrad(0.1), "stock, norms by hand"),
        "fused, ClipByNorm": (ClipByNorm(Adagrad(0.1), MAX_NORM), "stock, norms by hand"),
    }
    found = {}
    for name, (optimizer, against) in made.items():
        optimizer.init(parameters)
        mx.eval(optimizer.state)
        clip = _clipped if name == "stock, norms by hand" else None
        found[name] = Way(optimizer, _eager(optimizer, gradients, parameters, clip), against)
    for name in ("stock", "operations", "fused"):
        optimizer = made[name][0]
        found[f"{name}, compiled"] = Way(optimizer, _compiled(optimizer, gradients, parameters), "stock, compiled")
    return found


def _clipped(gradients: Tree) -> Tree:
    norms = {key: mx.sqrt(mx.square(g).sum()) for key, g in gradients.items()}
    return {key: g * (MAX_NORM / mx.maximum(norms[key], MAX_NORM)) for key, g in gradients.items()}


def _eager(optimizer: Any, gradients: Tree, parameters: Tree, clip: Callable[[Tree], Tree] | None) -> Callable[[], Any]:
    return lambda: optimizer.apply_gradients(clip(gradients) if clip else gradients, parameters)


def _compiled(optimizer: Any, gradients: Tree, parameters: Tree) -> Callable[[], Any]:
    state = optimizer.state
    step: Any = mx.compile(lambda g, w: optimizer.apply_gradients(g, w), inputs=state, outputs=state)
    return lambda: step(gradients, parameters)


def measure(parameters: Tree, rounds: int) -> dict[str, float]:
    """The median time of each way in us, their steps one after another in every round."""
    found = ways(parameters)
    states = {name: [*_entries(way.optimizer.state)] for name, way in found.items()}
    times: dict[str, list[float]] = {name: [] for name in found}
    for lap in range(rounds + 3):  # what comes again is compiled in the second and third
        for name, way in found.items():
            start = thread_time_ns()
            new = way.call()
            taken = (thread_time_ns() - start) / 1e3
            del new
            for within, key, array in states[name]:  # as if it had been evaluated: no graph grows from step to step
                within[key] = array
            if lap >= 3:
                times[name].append(taken)
    return {name: median(taken) for name, taken in times.items()}


def _entries(tree: Any) -> Iterator[tuple[Any, Any, mx.array]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            yield from _entries(value)
        elif isinstance(value, mx.array):
            yield tree, key, value


@contextmanager
def _quiet() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def recorded(function: Callable[[], Any]) -> Any:
    """What ``function`` returns, called where kernels can be launched: on a GPU, or in a trace for one."""
    if on_gpu():
        return function()
    results = []

    def trace(x: mx.array) -> mx.array:
        with devices.traced_for_gpu():
            results.append(function())
        return x

    with tempfile.TemporaryDirectory() as folder:
        mx.export_function(str(Path(folder) / "step.mlxfn"), trace, mx.ones((1,)))
    return results[0]


def run(chosen: Any, facts: dict[str, str]) -> None:
    """Measure, print the table and write the figures."""
    results: dict[str, dict[str, float]] = {}
    for name, parameters in problems(chosen.quick).items():
        rounds = 3 if chosen.quick else min(301, 41 + 3000 // len(parameters))
        with _quiet():
            results[name] = recorded(lambda parameters=parameters, rounds=rounds: measure(parameters, rounds))
    against = {name: way.against for name, way in recorded(lambda: ways({"w0": mx.ones((8,))})).items()}
    print("## What a step costs the host before anything runs, in us of CPU time\n")
    print(f"{NOTES}\n")
    rows = [
        [way] + [f"{r[way]:,.0f} ({r[way] / r[against[way]]:.2f})" for r in results.values()] for way in against
    ]
    print(table(["", *results], rows), end="\n\n")
    save(chosen.out / "host.json", {"machine": facts, "microseconds": results})
    print(f"JSON: {chosen.out / 'host.json'}\n")


def main() -> None:
    """Run this script alone."""
    chosen, facts = options(__doc__), machine()
    print(f"{bullets(facts)}\n")
    run(chosen, facts)


if __name__ == "__main__":
    main()
