"""Tables and the picture of the digit examples."""

from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

TARGET = 0.95
COLORS = ["#d62728", "#1a1a1a", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e"]


@dataclass(frozen=True)
class Accumulator:
    """An accumulator and what it should hold: its largest element, and the sum of all."""

    largest: float
    largest_exact: float
    total: float
    total_exact: float


@dataclass
class Run:
    """What one optimizer did, epoch by epoch."""

    name: str
    learning_rate: float
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    accumulator: list[Accumulator] = field(default_factory=list)


def comparison_table(runs: list[Run]) -> str:
    """One line an optimizer: its end, and the epoch in which it first reached the target."""
    reach = f"epochs to {TARGET}"
    lines = [f"{'optimizer':<17}{'lr':>7}{'train loss':>13}{'held-out accuracy':>20}{reach:>17}"]
    for run in runs:
        reached = next((str(i) for i, a in enumerate(run.accuracy, 1) if a >= TARGET), "-")
        lines.append(
            f"{run.name:<17}{run.learning_rate:>7}{run.loss[-1]:>13.4f}{run.accuracy[-1]:>20.4f}{reached:>17}"
        )
    return "\n".join(lines)


def accumulator_table(runs: list[Run]) -> str:
    """The accumulators at the end beside the exact sums of their own squared gradients."""
    columns = f"{'largest v':>11}{'exact':>9}{'kept':>8}{'sum of v':>12}{'exact':>10}{'kept':>8}"
    lines = [f"{'accumulator':<17}{columns}"]
    for run in runs:
        a = run.accumulator[-1]
        lines.append(
            f"{run.name:<17}{a.largest:>11.4f}{a.largest_exact:>9.4f}{a.largest / a.largest_exact:>8.1%}"
            f"{a.total:>12.3f}{a.total_exact:>10.3f}{a.total / a.total_exact:>8.1%}"
        )
    return "\n".join(lines)


def draw(runs: list[Run], title: str, path: Path) -> None:
    """Write loss and accuracy curves, and the accumulators where they were held against the truth."""
    audited = [run for run in runs if run.accumulator]
    panels = 3 if audited else 2
    figure = Figure(figsize=(5.6 * panels, 4.6), layout="constrained")
    axes = figure.subplots(1, panels)
    styles = {run.name: _style(i, run.name) for i, run in enumerate(runs)}
    _draw_loss(axes[0], runs, styles)
    _draw_accuracy(axes[1], runs, styles)
    if audited:
        _draw_accumulators(axes[2], audited, styles)
    for ax in axes:
        _tidy(ax)
    figure.suptitle(title, fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _style(index: int, name: str) -> dict:
    """Both Adagrads may coincide: ours is broad, and stock is dashed on top of it."""
    style = {"color": COLORS[index], "linewidth": 1.6, "marker": ".", "markersize": 4, "label": name}
    if name == "Adagrad (ours)":
        style.update(linewidth=4.0, alpha=0.55, solid_capstyle="round")
    elif name == "Adagrad (stock)":
        style.update(linestyle=(0, (4, 2)), zorder=5)
    return style


def _epochs(run: Run) -> range:
    return range(1, len(run.loss) + 1)


def _draw_loss(ax: Axes, runs: list[Run], styles: dict) -> None:
    for run in runs:
        ax.plot(_epochs(run), run.loss, **styles[run.name])
    ax.set(title="training loss (mean of the epoch)", yscale="log")
    ax.legend(frameon=False)


def _draw_accuracy(ax: Axes, runs: list[Run], styles: dict) -> None:
    for run in runs:
        ax.plot(_epochs(run), run.accuracy, **styles[run.name])
    ax.axhline(TARGET, color="0.5", linewidth=1, linestyle=":")
    # The first epochs lie far below and would flatten all that follows.
    lowest = min(run.accuracy[-1] for run in runs)
    ax.set(title="held-out accuracy", ylim=(min(0.85, lowest - 0.02), 1.0))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_accumulators(ax: Axes, runs: list[Run], styles: dict) -> None:
    for run in runs:
        ax.plot(_epochs(run), [a.total / a.total_exact for a in run.accumulator], **styles[run.name])
    ax.set(title="sum of v, as a share of the exact sum of g²")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.legend(frameon=False, loc="lower left")


def _tidy(ax: Axes) -> None:
    ax.set_xlabel("epoch")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
