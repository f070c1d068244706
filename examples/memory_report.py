"""The table and the picture of the memory example."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

MEMORIES = (8, 16, 32, 64)  # GB
# Of the memory: the rest is for activations and the system; Metal recommends a working set of about this much.
SHARE = 0.75
COLORS = {"weights": "#1f77b4", "gradients": "#9ecae1", "state": "#d62728"}


class Cost(NamedTuple):
    """Bytes for each parameter."""

    weights: float
    gradients: float
    state: float

    def billions(self, gigabytes: float) -> float:
        """The parameters, in billions, of a model whose full fine-tuning fits."""
        return SHARE * gigabytes / sum(self)


class Result(NamedTuple):
    """What one way costs, and the loss at the end of each run."""

    cost: Cost
    losses: list[float]


def table(results: dict[str, Result]) -> str:
    """A line for each way; the last columns are billions of parameters."""
    sizes = "".join(f"{f'{memory} GB':>8}" for memory in MEMORIES)
    lines = [f"{'kept as':<20}{'weights':>9}{'gradient':>10}{'state':>8}{'sum':>7}{'loss':>10}{'±':>9}{sizes}"]
    for name, (cost, losses) in results.items():
        ends = f"{np.mean(losses):>10.5f}{np.std(losses):>9.5f}" if losses else f"{'-':>10}{'-':>9}"
        fits = "".join(f"{cost.billions(memory):>7.1f}B" for memory in MEMORIES)
        shown = f"{cost.weights:>9.3f}{cost.gradients:>10.3f}{cost.state:>8.3f}{sum(cost):>7.2f}"
        lines.append(f"{name:<20}{shown}{ends}{fits}")
    return "\n".join(lines)


def draw(results: dict[str, Result], path: Path) -> None:
    """Write bars of bytes, and beside them where the runs ended."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    bytes_axes, loss_axes = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    places = np.arange(len(results))[::-1]
    left = np.zeros(len(results))
    for part, color in COLORS.items():
        width = np.array([getattr(result.cost, part) for result in results.values()])
        bytes_axes.barh(places, width, left=left, color=color, label=part)
        left += width
    for place, total in zip(places, left, strict=True):
        bytes_axes.text(total + 0.1, place, f"{total:.2f}", va="center", fontsize=9)
    bytes_axes.set(yticks=places, yticklabels=[name.strip() for name in results], xlabel="bytes for each parameter")
    bytes_axes.legend(loc="lower right", frameon=False)
    for place, result in zip(places, results.values(), strict=True):
        loss_axes.plot(result.losses, [place] * len(result.losses), "o", color="#444444", alpha=0.6)
    loss_axes.set(xlabel="training loss at the end, each seed")
    for axes in (bytes_axes, loss_axes):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
