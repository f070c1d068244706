"""Two models on the same batches, one with dense and one with row-sparse gradients: training, table and pictures."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from mlx.optimizers import Optimizer
from tqdm import tqdm

from mlx_adagrad import SparseEmbedding, value_and_grad

SEED = 0
QUICK_EPOCHS = 3
Batch = tuple[mx.array, ...]
EMBEDDINGS = {"dense": nn.Embedding, "sparse": SparseEmbedding}
# Both losses coincide: dense is broad, and sparse is dashed on top of it.
STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#1a1a1a", "linewidth": 4.5, "alpha": 0.4, "solid_capstyle": "round"},
    "sparse": {"color": "#d62728", "linewidth": 1.6, "linestyle": (0, (4, 2)), "zorder": 5},
}


@dataclass
class Run:
    """One model in training: per epoch its mean loss, its seconds in steps, and its score if it has one."""

    name: str
    model: Any
    optimizer: Optimizer
    loss_fn: Callable[..., mx.array]
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        # nn.value_and_grad serves nn.Embedding; ours is the same, and gives RowSparse for each SparseEmbedding.
        differentiate = value_and_grad if self.name == "sparse" else nn.value_and_grad
        self.loss_and_grad = differentiate(self.model, self.loss_fn)

    def step(self, batch: Batch) -> float:
        """One update; returns the loss before it."""
        loss, grads = self.loss_and_grad(self.model, *batch)
        self.optimizer.update(self.model, grads)
        mx.eval(loss, self.model.parameters(), self.optimizer.state)
        return loss.item()

    def epoch(self, batches: Iterator[Batch], bar: tqdm) -> None:
        """Train on all batches; only the steps are timed, not the making of batches."""
        loss, seconds, sizes = 0.0, 0.0, []
        for batch in batches:
            mx.eval(batch)
            start = perf_counter()
            mean = self.step(batch)
            seconds += perf_counter() - start
            sizes.append(len(batch[0]))
            loss += mean * sizes[-1]
            bar.update()
        self.loss.append(loss / sum(sizes))
        self.seconds.append(seconds)
        self.steps = len(sizes)

    @property
    def seconds_per_epoch(self) -> float:
        """The median, which leaves out the first epoch's compilation."""
        return median(self.seconds)


@dataclass(frozen=True)
class Batches:
    """Arrays of equal length, cut into batches in an order of its own for each epoch."""

    data: Batch
    size: int = 4096

    def __len__(self) -> int:
        return -(-len(self.data[0]) // self.size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch: the same each time it is asked for."""
        order = mx.array(np.random.default_rng([SEED, number]).permutation(len(self.data[0])))
        for start in range(0, len(order), self.size):
            rows = order[start : start + self.size]
            yield tuple(part[rows] for part in self.data)

    def rows_touched(self) -> int:
        """How many different numbers the first array of a batch holds, in the median."""
        return int(median(len(np.unique(np.array(batch[0]))) for batch in self.epoch(0)))


def train(runs: Sequence[Run], batches: Batches, epochs: int, score: Callable[[Any], float] | None = None) -> None:
    """Train all runs epoch by epoch in turn, so that a busy machine slows them alike.

    Args:
        runs: What to train.
        batches: What to train on.
        epochs: How often to pass over the data.
        score: What to write down of each model after each epoch.
    """
    with tqdm(total=len(batches) * epochs * len(runs), unit="step") as bar:
        for epoch in range(epochs):
            for run in runs if epoch % 2 == 0 else runs[::-1]:
                bar.set_description(f"{run.name:<6} epoch {epoch + 1}/{epochs}", refresh=False)
                run.epoch(batches.epoch(epoch), bar)
                if score is not None:
                    run.score.append(score(run.model))
                last = f"loss {run.loss[-1]:.4f}" + (f", held out {run.score[-1]:.4f}" if run.score else "")
                bar.set_postfix_str(last, refresh=False)


def table(runs: Sequence[Run], score: str | None = None) -> str:
    """One line a run: the losses, the score and the seconds."""
    columns = f"{'gradients':<11}{'first loss':>12}{'last loss':>12}{'s/epoch':>10}{'ms/step':>10}{'s in all':>10}"
    lines = [columns + (f"{score:>16}" if score else "")]
    for run in runs:
        each = run.seconds_per_epoch
        line = f"{run.name:<11}{run.loss[0]:>12.5f}{run.loss[-1]:>12.5f}{each:>10.3f}{1e3 * each / run.steps:>10.2f}"
        line += f"{sum(run.seconds):>10.1f}"
        lines.append(line + (f"{run.score[-1]:>16.4f}" if score else ""))
    return "\n".join(lines)


def ratio(dense: Run, sparse: Run) -> str:
    """Which of the two was faster, and by how much, in words."""
    times = dense.seconds_per_epoch / sparse.seconds_per_epoch
    fast, slow = ("sparse", "dense") if times >= 1 else ("dense", "sparse")
    return f"{fast} is {max(times, 1 / times):.1f}x faster than {slow}"


def draw_curves(ax: Axes, runs: Sequence[Run], values: str, title: str) -> None:
    """The losses or the scores of all runs by epoch."""
    for run in runs:
        ax.plot(range(1, len(run.loss) + 1), getattr(run, values), label=run.name, **STYLES[run.name])
    ax.set(title=title, xlabel="epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.legend(frameon=False)
    tidy(ax)


def tidy(ax: Axes) -> None:
    """A light grid, and no box."""
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def plain_log(axis: Axis) -> None:
    """Tick labels like 0.02 on a logarithmic axis, where powers of ten alone would be too few."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def positive(text: str) -> int:
    """An option that is a positive whole number."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def add_options(parser: argparse.ArgumentParser, epochs: int) -> None:
    """The options that the examples share."""
    parser.add_argument("--epochs", type=positive, help=f"default: {epochs}, with --quick {QUICK_EPOCHS}")
    parser.add_argument("--quick", action="store_true", help="do less, to see that all of it works")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where the picture goes")
