"""Train GloVe word vectors with Adagrad, once with dense gradients and once with row-sparse ones.

    python examples/word_vectors.py                # on Python's own manual
    python examples/word_vectors.py book.txt       # on any text in UTF-8
    python examples/word_vectors.py --words list try

GloVe fits the logarithm of how often two words stand near each other by weighted least squares:
w_i . c_j + b_i + b'_j = log X_ij (Pennington, Socher and Manning, 2014). Both models start from the same weights and
see the same batches. The picture goes to out/.
"""

import argparse
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_adagrad import Adagrad
from side_by_side import EMBEDDINGS, QUICK_EPOCHS, SEED, Batch, Batches, Run, add_options, positive, ratio, table, train
from word_vectors_data import Corpus, load_manual, load_text
from word_vectors_report import draw, growth_table, neighbours_table

LEARNING_RATE = 0.05
X_MAX = 100
ALPHA = 0.75
EPOCHS = 30
DIMS = 50
GROWN = (10_000, 100_000, 400_000)  # the last is the vocabulary of the vectors that GloVe's authors published
WORDS = ("tuple", "float", "exception", "try", "keyword", "global", "import", "generator", "true", "left")


class GloVe(nn.Module):
    """Two tables, of words and of contexts; as in the original program the last column of each holds the biases."""

    def __init__(self, kind: str, vocabulary: int):
        super().__init__()
        self.words = EMBEDDINGS[kind](vocabulary, DIMS + 1)
        self.contexts = EMBEDDINGS[kind](vocabulary, DIMS + 1)
        mx.random.seed(SEED)
        for side in (self.words, self.contexts):
            side.weight = mx.random.uniform(-0.5, 0.5, (vocabulary, DIMS + 1)) / DIMS

    def __call__(self, i: mx.array, j: mx.array) -> mx.array:
        """The log co-occurrence of words ``i`` and contexts ``j``."""
        w, c = self.words(i), self.contexts(j)
        return (w[:, :-1] * c[:, :-1]).sum(axis=1) + w[:, -1] + c[:, -1]

    def vectors(self) -> np.ndarray:
        """One vector a word: the matrix is symmetric, so the two tables differ by chance, and their sum is better."""
        return np.array(self.words.weight + self.contexts.weight)[:, :-1]


def loss_fn(model: GloVe, i: mx.array, j: mx.array, log_x: mx.array, weight: mx.array) -> mx.array:
    """Weighted least squares, over the batch."""
    return (weight * mx.square(model(i, j) - log_x)).mean()


def make_run(kind: str, vocabulary: int) -> Run:
    return Run(kind, GloVe(kind, vocabulary), Adagrad(LEARNING_RATE), loss_fn)


def make_data(corpus: Corpus) -> Batch:
    """Numbers of words and contexts, log co-occurrences and their weights in the loss."""
    weights = np.minimum(1, corpus.cooccurrences / X_MAX) ** ALPHA
    floats = (mx.array(part.astype(np.float32)) for part in (np.log(corpus.cooccurrences), weights))
    return (mx.array(corpus.rows.astype(np.int32)), mx.array(corpus.columns.astype(np.int32)), *floats)


def growth(batch: Batch, vocabulary: int, grown: tuple[int, ...], repeats: int) -> dict[int, dict[str, float]]:
    """Median seconds of a step on this batch, by the rows of the tables: the same words, spread over larger ones."""
    i, j, *rest = batch
    times = {}
    for rows in (vocabulary, *(size for size in grown if size > vocabulary)):
        spread = rows // vocabulary
        mx.eval(wide := (i * spread, j * spread, *rest))
        runs = [make_run(kind, rows) for kind in EMBEDDINGS]
        taken: dict[str, list[float]] = {run.name: [] for run in runs}
        for _ in range(repeats):
            for run in runs:
                start = perf_counter()
                run.step(wide)
                taken[run.name].append(perf_counter() - start)
        times[rows] = {name: median(seconds[2:]) for name, seconds in taken.items()}  # the first two warm up
    return times


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train GloVe word vectors with dense and with row-sparse Adagrad.")
    parser.add_argument("text", type=Path, nargs="?", help="a text file in UTF-8; default: Python's own manual")
    parser.add_argument("--words", nargs="+", metavar="WORD", help="show the neighbours of these")
    parser.add_argument("--min-count", type=positive, default=5, help="drop words that occur less often; default: 5")
    add_options(parser, EPOCHS)
    return parser.parse_args()


def load(args: argparse.Namespace) -> Corpus:
    try:
        return load_text(args.text, args.min_count) if args.text else load_manual(args.min_count)
    except (OSError, ValueError) as error:
        sys.exit(f"word_vectors.py: {error}")


def verdict(dense: Run, sparse: Run, touched: int, vocabulary: int) -> str:
    """Whether row-sparse gradients were worth it here, plainly."""
    share = f"a batch touches {touched:,} rows, {touched / vocabulary:.0%}"
    text = f"Over {vocabulary:,} words {ratio(dense, sparse)}: {share}."
    if sparse.seconds_per_epoch >= dense.seconds_per_epoch:
        text += "\nThis vocabulary is too small for sparse to win."
    return text + " The same steps in larger tables:"


def main() -> None:
    args = parse_arguments()
    corpus = load(args)
    vocabulary, pairs = len(corpus.words), len(corpus.cooccurrences)
    print(f"{corpus.name}: {corpus.tokens:,} words, {vocabulary:,} different ones, {pairs:,} co-occurrences")
    dense, sparse = runs = [make_run(kind, vocabulary) for kind in EMBEDDINGS]
    batches = Batches(make_data(corpus))
    train(runs, batches, args.epochs or (QUICK_EPOCHS if args.quick else EPOCHS))
    print(f"\n{table(runs)}\n\n{verdict(dense, sparse, batches.rows_touched(), vocabulary)}\n")
    grown, repeats = (GROWN[:1], 5) if args.quick else (GROWN, 9)
    times = growth(next(batches.epoch(0)), vocabulary, grown, repeats)
    print(f"{growth_table(times)}\n")
    vectors = sparse.model.vectors()
    print(neighbours_table(corpus, vectors, args.words or WORDS))
    if missing := set(args.words or ()) - set(corpus.words):
        print(f"not in the vocabulary: {', '.join(sorted(missing))}")
    path = args.out / "word_vectors.png"
    draw(corpus, vectors, runs, times, path)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
