"""Predict ratings by matrix factorisation with hashed ids, once with dense gradients and once with row-sparse ones.

    python examples/recommender.py                   # a generated set of ratings
    python examples/recommender.py u.data            # MovieLens 100K
    python examples/recommender.py ratings.csv       # any csv with columns user..., item... (or movie...) and rating...

A rating is mean + b_u + b_i + p_u . q_i (Koren, Bell and Volinsky, 2009). Users and items share one table, whose rows
their ids are hashed to; it is large, so that few ids meet in one row, and each batch touches little of it. Both models
start from the same weights and see the same batches. The picture goes to out/.
"""

import argparse
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlx_adagrad import Adagrad
from recommender_data import Ratings, generate, hashed, load_ratings
from side_by_side import (
    EMBEDDINGS,
    QUICK_EPOCHS,
    SEED,
    STYLES,
    Batch,
    Batches,
    Run,
    add_options,
    draw_curves,
    plain_log,
    positive,
    ratio,
    table,
    tidy,
    train,
)

LEARNING_RATE = 0.1
PENALTY = 0.1
EPOCHS = 8
DIMS = 32
HELD_OUT = 10  # one rating in ten


class Factors(nn.Module):
    """Biases and factors of users and items, in one table; its last column holds the biases."""

    def __init__(self, kind: str, rows: int, mean: float):
        super().__init__()
        self.table = EMBEDDINGS[kind](rows, DIMS + 1)
        mx.random.seed(SEED)
        self.table.weight = 0.1 * mx.random.normal((rows, DIMS + 1)) * (mx.arange(DIMS + 1) < DIMS)
        self.mean = mean

    def __call__(self, ids: mx.array) -> mx.array:
        """The ratings of (user, item) rows ``ids``."""
        return self.rate(self.table(ids))

    def rate(self, rows: mx.array) -> mx.array:
        """The ratings that these rows of the table stand for, of shape (n, 2, columns)."""
        user, item = rows[:, 0], rows[:, 1]
        return self.mean + user[:, -1] + item[:, -1] + (user[:, :-1] * item[:, :-1]).sum(axis=1)


def loss_fn(model: Factors, ids: mx.array, stars: mx.array) -> mx.array:
    """Squared error, and a penalty on the rows of each rating, so that untouched rows have no gradient."""
    rows = model.table(ids)
    return mx.square(model.rate(rows) - stars).mean() + PENALTY * mx.square(rows).sum(axis=(1, 2)).mean()


def rmse(model: Factors, ids: mx.array, stars: mx.array) -> float:
    """The root of the mean squared error."""
    return float(mx.sqrt(mx.square(model(ids) - stars).mean()))


def split(ratings: Ratings, rows: int) -> tuple[Batch, Batch]:
    """Hashed ids and stars, to train on and held out."""
    pairs = [hashed("user", ratings.users, rows), hashed("item", ratings.items, rows)]
    ids, stars = mx.array(np.stack(pairs, axis=1)), mx.array(ratings.stars.astype(np.float32))
    order = mx.array(np.random.default_rng(SEED).permutation(len(ratings.stars)))
    out = len(order) // HELD_OUT
    return (ids[order[out:]], stars[order[out:]]), (ids[order[:out]], stars[order[:out]])


def describe(ratings: Ratings, rows: int) -> str:
    """How many ratings, users and items there are, and how many ids share a row with another."""
    kinds = {"user": np.unique(ratings.users), "item": np.unique(ratings.items)}
    counts = np.bincount(np.concatenate([hashed(kind, ids, rows) for kind, ids in kinds.items()]))
    shared = counts[counts > 1].sum() / counts.sum()
    users, items = (len(ids) for ids in kinds.values())
    return (
        f"{ratings.name}: {len(ratings.stars):,} ratings by {users:,} users of {items:,} items\n"
        f"hashed to a table of {rows:,} x {DIMS + 1}: {shared:.1%} of the ids share a row with another"
    )


def draw(title: str, runs: list[Run], baseline: float, path: Path) -> None:
    """Write the held-out error by epoch, where the two coincide, and by time, where they do not."""
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    draw_curves(left, runs, "score", "RMSE on held-out ratings")
    _draw_by_time(right, runs)
    for ax in (left, right):
        ax.axhline(baseline, color="0.5", linewidth=1, linestyle=":")
        ax.annotate("always the mean", (1, baseline), (-2, -11), ("axes fraction", "data"), "offset points", ha="right")
    figure.suptitle(title, fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_by_time(ax: Axes, runs: list[Run]) -> None:
    for run in runs:
        style = STYLES[run.name] | {"linestyle": "-", "marker": "o", "markersize": 4}
        ax.plot(np.cumsum(run.seconds), run.score, label=run.name, **style)
    ax.set(title="the same by time", xlabel="seconds of training", xscale="log")
    plain_log(ax.xaxis)
    ax.legend(frameon=False)
    tidy(ax)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Matrix factorisation with dense and with row-sparse Adagrad.")
    parser.add_argument("ratings", type=Path, nargs="?", help="u.data or a csv file; default: a generated set")
    parser.add_argument("--rows", type=positive, default=2**20, help="of the table that ids hash to; default: 2^20")
    add_options(parser, EPOCHS)
    return parser.parse_args()


def load(args: argparse.Namespace) -> Ratings:
    if args.ratings is None:
        return generate(20_000) if args.quick else generate()
    try:
        return load_ratings(args.ratings)
    except (OSError, ValueError) as error:
        sys.exit(f"recommender.py: {error}")


def main() -> None:
    args = parse_arguments()
    ratings = load(args)
    print(describe(ratings, args.rows))
    if args.ratings is None:
        print("These ratings are made up, from known tastes and noise: name a file to see real ones.")
    training, held_out = split(ratings, args.rows)
    mean = float(training[1].mean())
    dense, sparse = runs = [Run(k, Factors(k, args.rows, mean), Adagrad(LEARNING_RATE), loss_fn) for k in EMBEDDINGS]
    batches = Batches(training)
    train(runs, batches, args.epochs or (QUICK_EPOCHS if args.quick else EPOCHS), lambda model: rmse(model, *held_out))
    baseline = float(mx.sqrt(mx.square(held_out[1] - mean).mean()))
    print(f"\n{table(runs, 'held-out RMSE')}\n\nalways the mean: RMSE {baseline:.4f}")
    print(f"{ratio(dense, sparse)}: a batch touches {batches.rows_touched():,} of {args.rows:,} rows")
    path = args.out / "recommender.png"
    draw(f"Matrix factorisation with Adagrad: {ratings.name}, {args.rows:,} rows", runs, baseline, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
