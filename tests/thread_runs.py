"""A process that trains on other threads than its main one: ``python thread_runs.py WORK WAY``."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import exponential_decay

import mlx_adagrad as ma
from mlx_adagrad import checkpoint, presets, wrappers


def make_model() -> nn.Module:
    """Tensors of each kind of update: batched, alone, on more than one stream; and a table."""
    mx.random.seed(0)
    layers = [*(nn.Linear(16, 16) for _ in range(5)), nn.Linear(16, 2048), nn.Linear(2048, 16)]
    model = nn.Sequential(ma.SparseEmbedding(4096, 16), *layers)
    mx.eval(model.parameters())
    return model


def train(optimizer: Any, model: nn.Module, value_and_grad: Callable = nn.value_and_grad) -> None:
    """Three steps."""
    step = value_and_grad(model, lambda x: optimizer.scale_loss(model(x).square().mean()))
    for _ in range(3):
        _, gradients = step(mx.arange(3000) % 4096)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


def small(_model: nn.Module) -> None:
    """What takes the least time; the optimizer is not the only one to leave something with the thread."""
    mx.eval(nn.gelu(mx.random.normal((8,))))
    w = {"w": mx.ones((8,))}
    mx.eval(ma.Adagrad(0.1).apply_gradients(w, w))


def dense(model: nn.Module) -> None:
    """The ways of the dense update."""
    train(ma.Adagrad(exponential_decay(0.1, 0.9), weight_decay=0.1), model)
    train(ma.Adagrad(0.1, accumulator=ma.RowWise()), model)
    w = {"half": mx.ones((8,), mx.float16), "complex": mx.ones((8,), mx.complex64), "large": mx.ones((2**23,))}
    mx.eval(ma.Adagrad(0.1).apply_gradients(w, w))


def rows(model: nn.Module) -> None:
    """The ways of the row-sparse update: many rows, few rows; and the step that can be exported."""
    train(ma.Adagrad(0.1), model, partial(ma.value_and_grad, exportable=True))
    layers: Any = model.layers
    for accumulator in (ma.Dense(), ma.RowWise()):
        optimizer = ma.Adagrad(0.1, weight_decay=0.1, accumulator=accumulator)
        train(optimizer, model, ma.value_and_grad)
        few = ma.RowSparse(mx.array([1, 5, 5]), mx.ones((3, 16)), 4096)
        w = {"weight": layers[0].weight}
        mx.eval(ma.Adagrad(0.1, accumulator=accumulator).apply_gradients({"weight": few}, w))


def wrapped(model: nn.Module) -> None:
    """Every wrapper."""
    inner = wrappers.ClipByNorm(wrappers.ClipByValue(ma.Adagrad(0.1), 1.0), 1.0)
    inner = wrappers.GradientAccumulation(wrappers.ClipByGlobalNorm(inner, 1.0), 2)
    inner = wrappers.ExponentialMovingAverage(inner, overwrite_frequency=2)
    inner = wrappers.Constraint(inner, {"*": "max_norm"})
    train(wrappers.DynamicLossScale(inner), model)
    train(wrappers.SkipNonFinite(ma.Adagrad(0.1)), model)
    train(presets.keras(0.1, clipnorm=1.0), model)


def saved(model: nn.Module) -> None:
    """Checkpoints."""
    optimizer = ma.Adagrad(0.1)
    train(optimizer, model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.safetensors"
        checkpoint.save(path, optimizer, model)
        checkpoint.load(path, optimizer, model)
    train(optimizer, model)


WORK = {"small": small, "dense": dense, "rows": rows, "wrapped": wrapped, "saved": saved}


def threads(count: int, work: Callable[[], None], daemon: bool = False) -> list[threading.Thread]:
    """Started threads that do the work."""
    started = [threading.Thread(target=work, daemon=daemon) for _ in range(count)]
    for thread in started:
        thread.start()
    return started


def in_threads(count: int, work: Callable[[], None]) -> None:
    """Wait for threads that do the work."""
    for thread in threads(count, work):
        thread.join()


def in_pool(work: Callable[[], None]) -> None:
    """Pools: one is closed, one is left to the end of the process."""
    with ThreadPoolExecutor(2) as pool:
        pool.submit(work).result()
    ThreadPoolExecutor(1).submit(work).result()


def as_idle_daemon(work: Callable[[], None]) -> None:
    """A daemon that still waits when the process ends."""
    done = threading.Event()

    def serve() -> None:
        work()
        done.set()
        threading.Event().wait()

    threads(1, serve, daemon=True)
    done.wait()


def in_process(method: str, name: str) -> None:
    """A child that trains on a thread; a forked one, before MLX has run here."""
    context: Any = multiprocessing.get_context(method)
    child = context.Process(target=run, args=(name, "thread"))
    child.start()
    child.join()
    sys.exit(child.exitcode)


def run(name: str, way: str) -> None:
    """Do the work ``name`` on other threads."""
    if way in ("fork", "spawn"):
        return in_process(way, name)

    def work() -> None:
        WORK[name](make_model())

    ways: dict[str, Callable[[], Any]] = {
        "thread": lambda: in_threads(1, work),
        "threads": lambda: in_threads(3, work),
        "pool": lambda: in_pool(work),
        "asyncio": lambda: asyncio.run(asyncio.to_thread(work)),
        "not joined": lambda: threads(2, work),
        "idle daemon": lambda: as_idle_daemon(work),
    }
    ways[way]()


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2])
