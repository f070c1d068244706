"""What the two examples share that go on from another framework: the problem, the rest of the run, the picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from matplotlib.figure import Figure

STEPS = 300  # of the whole run
BATCH, POINTS, HIDDEN = 64, 512, 32
DATA = Path(__file__).parent / "data"


@dataclass
class Run:
    """A run in the other framework.

    Args:
        losses: The loss at each of the ``STEPS`` steps.
        weights: The weights at the hand-over, by the other framework's names.
        state: The optimizer's state at the hand-over, in the other framework's own form.
        source: Who computed it.
    """

    losses: list[float]
    weights: dict[str, np.ndarray]
    state: Any
    source: str


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of a wave, spread evenly and in the same order on every machine."""
    i = (np.arange(BATCH) + step * BATCH) % POINTS
    x = (6 * ((i * 0.6180339887) % 1) - 3).astype(np.float32)[:, None]
    return x, np.sin(2 * x)


def network() -> nn.Sequential:
    """The model, as MLX has it."""
    return nn.Sequential(nn.Linear(1, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))


def train(model: nn.Module, optimizer: optim.Optimizer, start: int) -> list[float]:
    """The losses of the steps from ``start`` on."""
    loss_and_gradients = nn.value_and_grad(model, lambda x, y: nn.losses.mse_loss(model(x), y))
    losses = []
    for step in range(start, STEPS):
        loss, gradients = loss_and_gradients(*map(mx.array, batch(step)))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    return losses


def report(name: str, run: Run, ours: list[float], path: Path) -> None:
    """Print how far the two runs are apart, and draw both."""
    start = STEPS - len(ours)
    theirs = run.losses[start:]
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{name}: {start} steps in {run.source}, {len(ours)} more there and here")
    print(f"loss at the hand-over {theirs[0]:.6f}, at the end {theirs[-1]:.6f} there and {ours[-1]:.6f} here")
    print(f"largest difference of the losses: {apart:.1e}")
    draw(name, run.losses, ours, path)
    print(f"wrote {path}")


def draw(name: str, theirs: list[float], ours: list[float], path: Path) -> None:
    """Both losses on top of each other."""
    start = len(theirs) - len(ours)
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    ax = figure.subplots()
    ax.plot(theirs, color="#bbbbbb", linewidth=5, label=f"{name}, all {len(theirs)} steps")
    ax.plot(range(start, len(theirs)), ours, color="#d62728", linewidth=1.4, label="mlx_adagrad, from the hand-over on")
    ax.axvline(start, color="#1a1a1a", linewidth=0.8, linestyle=":")
    ax.set(xlabel="step", ylabel="loss of the batch", yscale="log", title=f"Started in {name}, continued in MLX")
    ax.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(
    name: str, live: Callable[[], Run], recorded: Callable[[Path], Run], record: Callable, go_on: Callable
) -> None:
    """The command line of an example: run or read the other framework's part, go on from there, report."""
    parser = argparse.ArgumentParser(description=f"Go on in MLX from a run that began in {name}.")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--recorded", action="store_true", help=f"read the recorded run even if {name} is installed")
    parser.add_argument("--record", action="store_true", help="record the run anew")
    options = parser.parse_args()
    file = DATA / f"from_{name.lower()}.npz"
    try:
        run = recorded(file) if options.recorded else live()
    except ImportError:
        print(f"{name} is not installed: reading {file.name}")
        run = recorded(file)
    if options.record:
        file.parent.mkdir(exist_ok=True)
        record(run, file)
    report(name, run, go_on(run), options.out / f"from_{name.lower()}.png")
