"""Saving while another thread trains: a snapshot is right whatever goes on, and what cannot be right is refused."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_map

from checkpoint_runs import MAKERS, Run, bits
from mlx_adagrad import Adagrad, checkpoint
from mlx_adagrad.checkpoint import Snapshot, snapshot, threads
from mlx_adagrad.wrappers import ClipByNorm, ExponentialMovingAverage, SkipNonFinite

SIZES = [(400, 300), (7,), (300, 200), (64, 64)]


def parameters() -> dict[str, mx.array]:
    w = {f"w{i}": mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(SIZES)}
    mx.eval(w)
    return w


def step(optimizer: Any, w: dict[str, mx.array], t: int) -> None:
    """One step whose new values are marked by ``t``: what is torn, or of two steps, is seen."""
    w.update(optimizer.apply_gradients(tree_map(lambda p: mx.full(p.shape, float(t + 1)), w), w))
    mx.eval(w, optimizer.state)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("case", ["adagrad", "torch", "keras", "row_wise", "adam", "multi", "float64"])
def test_a_snapshot_holds_the_step_at_which_it_was_taken(tmp_path: Path, case: str, mode: str) -> None:
    assert case in MAKERS
    run = Run(case, mode)
    run.train(0, 4)
    run.save(tmp_path / "then")
    with mx.stream(mx.cpu):
        taken = snapshot(run.optimizer, run.parameters)
        for leaf in run.parameters["layers"][0].values():
            leaf[0] = 5  # in place
    run.train(4, 7)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(taken.save, tmp_path / "a").result()
    checkpoint.save(tmp_path / "b", taken)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "then").read_bytes()


def test_snapshots_are_written_while_training_goes_on(tmp_path: Path) -> None:
    optimizer, w = ClipByNorm(Adagrad(0.1), 1e9), parameters()
    expected, files = [], []
    with ThreadPoolExecutor(2) as pool:
        for t in range(30):
            step(optimizer, w, t)
            if t % 3 == 0:
                files.append(pool.submit(snapshot(optimizer, w).save, tmp_path / f"{t}"))
                expected.append((tmp_path / f"{t}", bits([w, optimizer.state])))
    for file in files:
        file.result()
    for path, then in expected:
        live, tree = ClipByNorm(Adagrad(0.1), 1e9), parameters()
        checkpoint.load(path, live, tree)
        assert bits([tree, live.state]) == then


@contextmanager
def training(optimizer: Any, w: dict[str, mx.array], lock: Any = None) -> Iterator[threading.Thread]:
    """A thread that trains for as long as the block lasts."""
    done, begun, failures = threading.Event(), threading.Event(), []

    def train() -> None:
        try:
            t = 0
            while not done.is_set():
                if lock is None:
                    step(optimizer, w, t)
                elif t % 2:
                    with lock:
                        step(optimizer, w, t)
                else:
                    lock.acquire()
                    try:
                        step(optimizer, w, t)
                    finally:
                        lock.release()
                time.sleep(0.001)  # a lock need not be fair
                begun.set()
                t += 1
        except BaseException as error:
            failures.append(error)
            begun.set()

    thread = threading.Thread(target=train, name="trainer")
    thread.start()
    begun.wait()
    try:
        yield thread
    finally:
        done.set()
        thread.join()
    assert not failures


WRAPPED: list[Callable[[], Any]] = [
    lambda: Adagrad(0.1),
    lambda: SkipNonFinite(ExponentialMovingAverage(Adagrad(0.1), 0.9)),
    lambda: ClipByNorm(optim.Adam(0.1), 1e9),
    lambda: optim.MultiOptimizer([Adagrad(0.1), Adagrad(0.2)], [lambda path, w: w.ndim > 1]),
]


@pytest.mark.parametrize("make", WRAPPED)
def test_a_save_or_load_in_the_middle_of_a_step_is_refused_in_words(
    tmp_path: Path, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "PATIENCE", 0.1)
    optimizer, w = make(), parameters()
    step(optimizer, w, 0)
    checkpoint.save(tmp_path / "a", optimizer, w)
    message = "'trainer' updates this optimizer and may be in the middle of a step: "
    with training(optimizer, w):
        for _ in range(4):
            with pytest.raises(RuntimeError, match=message + r"take checkpoint.snapshot\(optimizer, model\) there"):
                checkpoint.save(tmp_path / "b", optimizer, w)
            with pytest.raises(RuntimeError, match=message + "take checkpoint.snapshot"):
                snapshot(optimizer, w)
            with pytest.raises(RuntimeError, match=message + "load on that thread"):
                checkpoint.load(tmp_path / "a", optimizer, w)
    checkpoint.save(tmp_path / "b", optimizer, w)  # the thread has ended


@pytest.mark.parametrize("kind", [threading.Lock, threading.RLock, threading.Condition, threading.Semaphore])
def test_a_lock_around_both_is_right(tmp_path: Path, kind: Callable[[], Any]) -> None:
    optimizer, w, lock = Adagrad(0.1), parameters(), kind()
    with training(optimizer, w, lock):
        for i in range(10):
            time.sleep(0.005)
            with lock:
                before = bits([w, optimizer.state])
                checkpoint.save(tmp_path / f"{i}", optimizer, w)
            live, tree = Adagrad(0.1), parameters()
            checkpoint.load(tmp_path / f"{i}", live, tree)
            assert bits([tree, live.state]) == before


def test_a_thread_that_waits_for_work_is_in_no_step(tmp_path: Path) -> None:
    optimizer, w = Adagrad(0.1), parameters()

    async def run() -> None:
        for t in range(4):
            await asyncio.to_thread(step, optimizer, w, t)
            checkpoint.save(tmp_path / "a", optimizer, w)
            await asyncio.to_thread(checkpoint.save, tmp_path / "b", optimizer, w)
            assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    asyncio.run(run())
    step(optimizer, w, 4)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(checkpoint.load, tmp_path / "a", optimizer, w).result()
    assert optimizer.step.item() == 4


def test_what_an_ended_thread_left_unevaluated_is_refused_in_words(tmp_path: Path) -> None:
    optimizer, w = Adagrad(0.1), parameters()

    def unevaluated() -> None:
        w.update(optimizer.apply_gradients(w, w))

    thread = threading.Thread(target=unevaluated)
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match=r"has not evaluated it: take checkpoint.snapshot\(optimizer, model\) there"):
        checkpoint.save(tmp_path / "a", optimizer, w)


def test_weights_and_state_are_read_on_another_thread_between_steps() -> None:
    optimizer, w = Adagrad(0.1), parameters()
    step(optimizer, w, 0)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(bits, [w, optimizer.state]).result() == bits([w, optimizer.state])


def test_a_snapshot_says_how_much_memory_it_holds() -> None:
    optimizer, w = Adagrad(0.1), parameters()
    step(optimizer, w, 0)
    size = sum(p.nbytes for p in w.values())
    assert 2 * size <= snapshot(optimizer, w).nbytes <= 2 * size + 16
    before = mx.get_active_memory()
    taken = snapshot(optimizer, w)
    assert mx.get_active_memory() - before < 1000, "the arrays are those of the run"
    assert isinstance(taken, Snapshot)


def test_a_snapshot_inside_a_trace_is_refused() -> None:
    optimizer = Adagrad(0.1)

    def traced(g: mx.array) -> mx.array:
        optimizer.apply_gradients({"w": g}, {"w": g})
        snapshot(optimizer)
        return g

    with pytest.raises(ValueError, match="during function transformations"):
        mx.compile(traced)(mx.ones(3))


def test_arguments_in_another_order_are_named(tmp_path: Path) -> None:
    optimizer: Any = Adagrad(0.1)
    model: Any = nn.Linear(2, 2)
    path: Any = tmp_path / "a"
    calls: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: checkpoint.save(optimizer, path),
            r"'path' must be a path but got Adagrad: save\(path, optimizer, model\)",
        ),
        (
            lambda: checkpoint.load(optimizer, path),
            r"'path' must be a path but got Adagrad: load\(path, optimizer, model\)",
        ),
        (
            lambda: checkpoint.save(path, model, optimizer),
            "'optimizer' must be an mlx.optimizers.Optimizer but got Linear",
        ),
        (
            lambda: checkpoint.load(path, model, optimizer),
            "'optimizer' must be an mlx.optimizers.Optimizer but got Linear",
        ),
        (lambda: checkpoint.save(path, optimizer, path), "'model' must be a module or a tree .* but got PosixPath"),
        (lambda: snapshot(model, optimizer), r"'optimizer' must be .* but got Linear: snapshot\(optimizer, model\)"),
        (lambda: snapshot(optimizer, model).save(optimizer), "'path' must be a path but got Adagrad"),
        (lambda: checkpoint.save(path, snapshot(optimizer), model), "what a snapshot holds was said when it was taken"),
    ]
    for call, message in calls:
        with pytest.raises(TypeError, match=message):
            call()
    assert not path.exists()
