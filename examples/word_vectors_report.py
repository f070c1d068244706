"""Tables and the picture of word_vectors.py."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from sklearn.cluster import AgglomerativeClustering
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from side_by_side import STYLES, Run, draw_curves, plain_log, tidy
from word_vectors_data import FEWEST_WORDS, Corpus

COLORS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#e67700", "#0b7285", "#8c564b", "#c2255c"]
SHOWN = 150
NEIGHBOURS = 6
SHORTEST = 3


def unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors at length 1, so that dot products are cosines."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def content_words(corpus: Corpus, most: int) -> list[int]:
    """The commonest words that mean something by themselves; all words where there are few of them."""
    found = [i for i, w in enumerate(corpus.words) if len(w) >= SHORTEST and w not in ENGLISH_STOP_WORDS]
    return (found if len(found) >= FEWEST_WORDS else list(range(len(corpus.words))))[:most]


def neighbours_table(corpus: Corpus, vectors: np.ndarray, words: Iterable[str]) -> str:
    """Words and what stands nearest to them by cosine; the commonest where none of them is in the vocabulary."""
    number = {word: i for i, word in enumerate(corpus.words)}
    chosen = [number[word] for word in words if word in number] or content_words(corpus, 8)
    directions = unit(vectors)
    lines = ["nearest words, by cosine"]
    for i in chosen:
        cosines = directions @ directions[i]
        nearest = [j for j in np.argsort(-cosines) if j != i][:NEIGHBOURS]
        lines.append(f"  {corpus.words[i]:<14}" + "  ".join(f"{corpus.words[j]} {cosines[j]:.2f}" for j in nearest))
    return "\n".join(lines)


def growth_table(times: dict[int, dict[str, float]]) -> str:
    """Milliseconds of one step by the rows of the tables."""
    lines = [f"{'rows':>9}{'dense ms/step':>16}{'sparse ms/step':>16}{'dense / sparse':>16}"]
    for rows, t in times.items():
        lines.append(f"{rows:>9,}{1e3 * t['dense']:>16.2f}{1e3 * t['sparse']:>16.2f}{t['dense'] / t['sparse']:>16.2f}")
    return "\n".join(lines)


def project(vectors: np.ndarray) -> np.ndarray:
    """The two directions in which the vectors differ most: principal components, by SVD."""
    centred = vectors - vectors.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * sizes[:2]


def draw(
    corpus: Corpus, vectors: np.ndarray, runs: Sequence[Run], times: dict[int, dict[str, float]], path: Path
) -> None:
    """Write the map of the words, the losses, and the time of a step by the rows of the tables."""
    figure = Figure(figsize=(15, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["map", "loss"], ["map", "time"]], width_ratios=[2.1, 1])
    draw_curves(axes["loss"], runs, "loss", "weighted squared error (mean of the epoch)")
    axes["loss"].set_yscale("log")
    plain_log(axes["loss"].yaxis)
    _draw_times(axes["time"], times)
    tokens = f"{corpus.tokens:,} words of text, {len(corpus.words):,} different ones"
    figure.suptitle(f"GloVe with Adagrad: {corpus.name} ({tokens})", fontsize=14)
    words = _draw_map(axes["map"], corpus, vectors)
    figure.draw_without_rendering()  # settles the layout, and with it where a point lies in pixels
    _label(axes["map"], *words)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_times(ax: Axes, times: dict[int, dict[str, float]]) -> None:
    for name in STYLES:
        style = STYLES[name] | {"linestyle": "-", "marker": "o", "markersize": 5}
        ax.plot(list(times), [1e3 * t[name] for t in times.values()], label=name, **style)
    ax.set(title="time of one step, the same words in larger tables", xlabel="rows of each table", ylabel="ms")
    ax.set(xscale="log", yscale="log")
    ax.margins(x=0.1)
    plain_log(ax.yaxis)
    ax.set_xticks(list(times), [f"{rows:,}" for rows in times])
    ax.minorticks_off()
    ax.legend(frameon=False)
    tidy(ax)


def _draw_map(ax: Axes, corpus: Corpus, vectors: np.ndarray) -> tuple[list[str], np.ndarray, list[str]]:
    """Project the commonest content words; a colour is a cluster in all dimensions, not in the two that are shown."""
    chosen = content_words(corpus, SHOWN)
    directions = unit(vectors[chosen])
    points = project(directions)
    clusters = min(len(COLORS), len(chosen))
    group = AgglomerativeClustering(clusters).fit_predict(directions)
    colors = [COLORS[g] for g in group]
    ax.scatter(points[:, 0], points[:, 1], s=9, c=colors, alpha=0.6, linewidths=0)
    ax.set(title="the commonest words in the plane of most variance; clusters of all dimensions in colour")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return [corpus.words[i] for i in chosen], points, colors


def _label(ax: Axes, words: list[str], points: np.ndarray, colors: list[str]) -> None:
    """Name the points, the commonest words first; a name that would cover another is left out."""
    taken: list[Bbox] = []
    for word, (x, y), color in zip(words, points, colors, strict=True):
        for shift, side in (((0, 4), "center"), ((5, -3), "left"), ((-5, -3), "right"), ((0, -11), "center")):
            text = ax.annotate(word, (x, y), shift, textcoords="offset points", ha=side, color=color, fontsize=9)
            box = text.get_window_extent().padded(1.5)
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
