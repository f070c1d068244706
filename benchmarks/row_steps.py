"""The ways to take a whole training step of an embedding: look up, differentiate, update, evaluate.

The loss is the mean squared distance of the K rows looked up from K fixed ones. Every step draws its K ids anew,
uniformly from all rows (about 20 us of each step's time): no other law touches as many rows, and none meets as few of
them in the caches, so that a table which grows has nothing to hide behind.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import numpy as np

import mlx_adagrad
from report import has_torch
from timing import Step

LEARNING_RATE, EPS = 0.01, 1e-8
BLOCK_ROWS = 1000  # a table starts as copies of one random block: drawing 10^7 rows takes a minute
LONGEST_STEP_SECONDS = 5.0  # three trials take about twenty of them
STOCK, DENSE, SPARSE, ROW_WISE, COMPILED = (
    "stock",
    "ours dense",
    "ours sparse",
    "ours row-wise",
    "ours sparse, compiled",
)
# Where something else is at work too, torch's threads wait for each other; then one alone is up to 20 times faster.
TORCH, TORCH_SINGLE = "torch cpu sparse", "torch cpu sparse, 1 thread"


class Problem(NamedTuple):
    """A table and how much of it a step looks up: ``rows``, a multiple of 1,000, K and D."""

    rows: int
    look_ups: int = 4096
    columns: int = 64

    @property
    def table_bytes(self) -> int:
        """Size of the fp32 table in bytes."""
        return 4 * self.rows * self.columns


class Candidate(NamedTuple):
    """One way to take the step.

    Args:
        setup: Makes a fresh model and optimizer and returns the step over them.
        held: Memory of parameters and state, in tables.
        extra: What a step needs beside, in tables; what does not grow with the table is left out.
    """

    setup: Callable[[], Step]
    held: float
    extra: float


def candidates(problem: Problem) -> dict[str, Candidate]:
    """Every way to take the step that this machine has, those first that do not grow with the table."""
    ours = partial(mlx_adagrad.Adagrad, LEARNING_RATE, EPS)
    row_wise = partial(ours, accumulator=mlx_adagrad.RowWise())
    plain = partial(stock.Adagrad, LEARNING_RATE, EPS)
    sparse = partial(_loop, mlx_adagrad.SparseEmbedding, mlx_adagrad.value_and_grad)
    dense = partial(_loop, nn.Embedding, nn.value_and_grad)
    found = {
        SPARSE: Candidate(partial(sparse, ours, problem), 2, 0),
        ROW_WISE: Candidate(partial(sparse, row_wise, problem), 1 + 1 / problem.columns, 0),
    }
    if has_torch():
        found[TORCH] = Candidate(partial(_torch_loop, problem), 2, 0)
        found[TORCH_SINGLE] = Candidate(partial(_torch_loop, problem, threads=1), 2, 0)
    return found | {
        COMPILED: Candidate(partial(sparse, ours, problem, compiled=True), 2, 1),
        DENSE: Candidate(partial(dense, ours, problem), 2, 2),
        STOCK: Candidate(partial(dense, plain, problem), 2, 4),
    }


def sparse_loop(make: Callable[[], stock.Optimizer], problem: Problem) -> Step:
    """The plain loop with a row-sparse gradient."""
    return _loop(mlx_adagrad.SparseEmbedding, mlx_adagrad.value_and_grad, make, problem)


def choose(
    problem: Problem, found: Mapping[str, Candidate], last: Mapping[str, Any], memory: float
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The candidates to measure, and for the others why not.

    Args:
        problem: What is to be measured.
        found: All candidates, the most important first. Those that are measured are in memory at once.
        last: The case measured before, of a smaller table; may be empty.
        memory: Bytes that may be used.
    """
    chosen: dict[str, Candidate] = {}
    skipped: dict[str, str] = {}
    for name, candidate in found.items():
        together = [*chosen.values(), candidate]
        tables = sum(c.held for c in together) + max(c.extra for c in together)
        if name in last.get("skipped", {}):
            skipped[name] = last["skipped"][name]
        elif tables * problem.table_bytes > memory:
            skipped[name] = "does not fit in memory beside the others"
        elif (seconds := _expected_seconds(name, problem, last)) > LONGEST_STEP_SECONDS and candidate.extra:
            skipped[name] = f"a step would take about {seconds:.0f} s"
        else:
            chosen[name] = candidate
    return chosen, skipped


def _expected_seconds(name: str, problem: Problem, last: Mapping[str, Any]) -> float:
    """The time of a step that grows with the table."""
    return last["results"][name]["seconds"][1] * problem.rows / last["rows"] if last else 0.0


def arrays(problem: Problem) -> tuple[mx.array, mx.array]:
    """The block of rows that the table repeats, and the K rows that the loss compares with."""
    mx.random.seed(0)
    block = mx.random.normal((BLOCK_ROWS, problem.columns))
    wanted = mx.random.normal((problem.look_ups, problem.columns))
    mx.eval(block, wanted)
    return block, wanted


def draw(problem: Problem, generator: np.random.Generator) -> np.ndarray:
    """The ids of one step."""
    return generator.integers(problem.rows, size=problem.look_ups, dtype=np.int32)


def _loss(model: nn.Module, ids: mx.array, wanted: mx.array) -> mx.array:
    return mx.square(model(ids) - wanted).mean()


def _loop(
    embedding: type[nn.Embedding],
    value_and_grad: Callable[..., Any],
    make: Callable[[], stock.Optimizer],
    problem: Problem,
    compiled: bool = False,
) -> Step:
    """The plain loop of MLX, or the usual one around ``mx.compile``."""
    block, wanted = arrays(problem)
    model, optimizer, generator = embedding(1, problem.columns), make(), np.random.default_rng(0)
    model.weight = mx.tile(block, (problem.rows // BLOCK_ROWS, 1))
    vg = value_and_grad(model, _loss)

    def update(ids: mx.array) -> Any:
        loss, grads = vg(model, ids, wanted)
        optimizer.update(model, grads)
        return loss, grads

    if compiled:
        optimizer.init(model.trainable_parameters())
        captured: Any = [model.state, optimizer.state]
        call = mx.compile(lambda ids: update(ids)[0], inputs=captured, outputs=captured)
    else:
        call = update

    def step() -> Any:
        _held = call(mx.array(draw(problem, generator)))  # a plain loop has the gradients still when it evaluates
        mx.eval(model.parameters(), optimizer.state)
        return model.parameters()

    return step


def _torch_loop(problem: Problem, threads: int | None = None) -> Step:
    import torch  # type: ignore[import-not-found]

    torch.sparse.check_sparse_tensor_invariants.disable()  # the default; said aloud, it needs no warning
    block, wanted = (torch.from_numpy(np.array(array)) for array in arrays(problem))
    table = block.repeat(problem.rows // BLOCK_ROWS, 1)
    model = torch.nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=LEARNING_RATE, eps=EPS)
    generator, usual = np.random.default_rng(0), torch.get_num_threads()

    def step() -> Any:
        torch.set_num_threads(threads or usual)
        ids = torch.from_numpy(draw(problem, generator))
        torch.square(model(ids) - wanted).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.set_num_threads(usual)
        return {"weight": model.weight.detach()}

    return step


def torch_peak_extra_bytes(step: Step) -> int | None:
    """The most memory that torch held during a step above what it held before, in bytes; None where it cannot tell."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the profiler talks on stderr
    from torch import profiler  # type: ignore[import-not-found]

    if not profiler.kineto_available():
        return None
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = np.cumsum([0] + [size for _, size in changes])
    return int(held.max()) if changes else None


def state_bytes(problem: Problem, accumulator: mlx_adagrad.Dense) -> int:
    """Size of the accumulator of the table in bytes."""
    optimizer = mlx_adagrad.Adagrad(LEARNING_RATE, accumulator=accumulator)
    optimizer.init({"weight": mx.zeros((problem.rows, problem.columns))})
    return optimizer.state["weight"]["v"].nbytes
