"""One bad batch, at step 20: a run inside SkipNonFinite goes on unharmed, one with stock MLX is lost."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from matplotlib.figure import Figure

from mlx_adagrad import Adagrad
from mlx_adagrad.wrappers import SkipNonFinite

STEPS, BAD_STEP, LEARNING_RATE = 60, 20, 0.05
# All three coincide up to the bad batch: the broadest is below, the dashed one on top.
STYLES: dict[str, dict[str, Any]] = {
    "never harmed": {"color": "#bbbbbb", "linewidth": 6},
    "ours": {"color": "#d62728", "linewidth": 2},
    "stock": {"color": "#1a1a1a", "linewidth": 1.4, "linestyle": (0, (3, 2))},
}


def batches(bad_step: int | None) -> list[tuple[mx.array, mx.array]]:
    """Points of a wave; in one batch a reading is missing and came in as NaN."""
    key = mx.random.key(0)
    made = []
    for step in range(STEPS):
        key, own = mx.random.split(key)
        x = mx.random.uniform(-3, 3, (64, 1), key=own)
        missing = (mx.arange(64) == 7)[:, None] if step == bad_step else False
        made.append((mx.where(missing, math.nan, x), mx.sin(x)))
    return made


def train(optimizer: optim.Optimizer, bad_step: int | None = BAD_STEP) -> list[float]:
    """The loss on clean points after each step."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
    step = nn.value_and_grad(model, lambda x, y: nn.losses.mse_loss(model(x), y))
    grid = mx.linspace(-3, 3, 256)[:, None]
    losses = []
    for x, y in batches(bad_step):
        _, gradients = step(x, y)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(nn.losses.mse_loss(model(grid), mx.sin(grid)).item())
    return losses


def report_skip(count: int) -> None:
    """What SkipNonFinite calls when it has left out a step."""
    print(f"a batch was left out: its gradients are not finite ({count} so far)")


def draw(runs: dict[str, list[float]], path: Path) -> None:
    """The losses; a lost run ends where it was lost."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    ax: Any = figure.subplots()
    for name, style in STYLES.items():
        ax.plot(runs[name], label=name, **style)
    last = next(i for i, loss in enumerate(runs["stock"]) if math.isnan(loss)) - 1
    ax.plot(last, runs["stock"][last], "x", color="#1a1a1a", markersize=10, markeredgewidth=2)
    ax.annotate("stock is NaN from here on", (last, runs["stock"][last]), (last + 1.5, 1.6 * runs["stock"][last]))
    ax.set(xlabel="step", ylabel="loss", yscale="log", title=f"A batch that yields NaN at step {BAD_STEP}")
    ax.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    path = parser.parse_args().out / "skip_nonfinite.png"
    skipping = SkipNonFinite(Adagrad(LEARNING_RATE), on_skip=report_skip)
    runs = {
        "never harmed": train(Adagrad(LEARNING_RATE), bad_step=None),
        "stock": train(optim.Adagrad(LEARNING_RATE)),
        "ours": train(skipping),
    }
    for name, losses in runs.items():
        print(f"{name:<13} loss before step {BAD_STEP}: {losses[BAD_STEP - 1]:.4f}, at the end: {losses[-1]:.4f}")
    print(f"steps skipped: {skipping.skipped_steps.item()} of {STEPS}; steps counted: {skipping.step.item()}")
    draw(runs, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
