"""Train a digit classifier with Adagrad, then compare it with its relatives on the same run.

    python examples/digits.py                    # scikit-learn's bundled digits of 8 x 8 pixels
    python examples/digits.py --mnist DIR        # the four MNIST IDX files in DIR, gzipped or plain
    python examples/digits.py --dtype bfloat16   # watch the stock accumulator stall, and ours not

Every optimizer starts from the same weights and sees the same batches. The picture goes to out/.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import numpy as np
from mlx.utils import tree_map
from tqdm import tqdm

from digits_data import Data, load_digits, load_mnist
from digits_report import Accumulator, Run, accumulator_table, comparison_table, draw
from mlx_adagrad import Adagrad

SEED = 0
HIDDEN = 64
CLASSES = 10
BATCH = 32
# Learning rates at which each does well on the digits.
OPTIMIZERS = {
    "Adagrad (ours)": (Adagrad, 0.05),
    "Adagrad (stock)": (stock.Adagrad, 0.05),
    "SGD": (stock.SGD, 0.3),
    "RMSProp": (stock.RMSprop, 0.003),
    "AdaDelta": (stock.AdaDelta, 1.0),
    "Adam": (stock.Adam, 0.003),
}


class ExactSum:
    """The sum of g² in fp32, kept beside an optimizer to hold its accumulator against."""

    def __init__(self) -> None:
        self.tree: dict = {}

    def add(self, grads: dict) -> None:
        squares = tree_map(lambda g: mx.square(g.astype(mx.float32)), grads)
        self.tree = tree_map(mx.add, self.tree, squares) if self.tree else squares

    def compare(self, state: dict) -> Accumulator:
        pairs: list[tuple[mx.array, mx.array]] = []
        tree_map(lambda exact, leaf: pairs.append((exact.flatten(), leaf["v"].flatten())), self.tree, state)
        exact = mx.concatenate([exact for exact, _ in pairs])
        kept = mx.concatenate([v.astype(mx.float32) for _, v in pairs])
        top = mx.argmax(exact)
        return Accumulator(*(float(a) for a in (kept[top], exact[top], kept.sum(), exact.sum())))


def make_model(inputs: int, dtype: mx.Dtype) -> nn.Module:
    mx.random.seed(SEED)
    model = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    model.set_dtype(dtype)
    return model


def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    """Softmax cross-entropy, in fp32 whatever the model's dtype."""
    return nn.losses.cross_entropy(model(x).astype(mx.float32), y, reduction="mean")


def accuracy(model: nn.Module, x: mx.array, y: mx.array) -> float:
    return float((mx.argmax(model(x), axis=1) == y).mean())


def batches(x: mx.array, y: mx.array, rng: np.random.Generator) -> Iterator[tuple[mx.array, mx.array]]:
    order = mx.array(rng.permutation(len(y)))
    for start in range(0, len(y), BATCH):
        rows = order[start : start + BATCH]
        yield x[rows], y[rows]


def train(name: str, data: Data, dtype: mx.Dtype, epochs: int) -> Run:
    """Train a fresh model with one optimizer; in half precision watch an Adagrad's accumulator too."""
    kind, learning_rate = OPTIMIZERS[name]
    optimizer = kind(learning_rate=learning_rate)
    model = make_model(data.train_x.shape[1], dtype)
    exact = ExactSum() if dtype != mx.float32 and "Adagrad" in name else None
    run = Run(name, learning_rate)
    rng = np.random.default_rng(SEED)
    steps = epochs * -(-len(data.train_y) // BATCH)
    with tqdm(total=steps, desc=f"{name:<15}", unit="batch") as bar:
        for _ in range(epochs):
            run.loss.append(train_epoch(model, optimizer, data, rng, exact, bar))
            run.accuracy.append(accuracy(model, data.test_x, data.test_y))
            if exact is not None:
                run.accumulator.append(exact.compare(optimizer.state))
            bar.set_postfix_str(f"loss {run.loss[-1]:.4f}, accuracy {run.accuracy[-1]:.3f}", refresh=False)
    return run


def train_epoch(model, optimizer, data: Data, rng, exact: ExactSum | None, bar: tqdm) -> float:
    """One pass over the training data; returns the mean loss."""
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    losses = []
    for x, y in batches(data.train_x, data.train_y, rng):
        loss, grads = loss_and_grad(model, x, y)
        optimizer.update(model, grads)
        if exact is not None:
            exact.add(grads)
        mx.eval(loss, model.parameters(), optimizer.state, exact.tree if exact else None)
        losses.append(loss.item())
        bar.update()
    return float(np.mean(losses))


def parse_arguments() -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return int(text)

    parser = argparse.ArgumentParser(description="Compare Adagrad with its relatives on handwritten digits.")
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="train on the MNIST IDX files in DIR")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model")
    parser.add_argument("--epochs", type=positive, help="default: 20, in bfloat16 40, on MNIST 5")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where the picture goes")
    return parser.parse_args()


def load(args: argparse.Namespace) -> Data:
    try:
        return load_mnist(args.mnist) if args.mnist else load_digits()
    except (OSError, ValueError) as error:
        sys.exit(f"digits.py: {error}")


def main() -> None:
    args = parse_arguments()
    data, dtype = load(args), getattr(mx, args.dtype)
    data = data.astype(dtype)
    epochs = args.epochs or (5 if args.mnist else 20 if dtype == mx.float32 else 40)
    print(f"{data.name}: {len(data.train_y):,} to train on, {len(data.test_y):,} held out; {args.dtype}")
    runs = [train("Adagrad (ours)", data, dtype, epochs)]
    print(f"held-out accuracy: {runs[0].accuracy[-1]:.4f}\n")
    runs += [train(name, data, dtype, epochs) for name in OPTIMIZERS if name != runs[0].name]
    print(f"\n{comparison_table(runs)}")
    if dtype != mx.float32:
        print(f"\n{accumulator_table([run for run in runs if run.accumulator])}")
        print("A bfloat16 v has 8 significant bits: where g² is below v / 512, it stands still.")
    path = args.out / f"{data.name}_{args.dtype}.png"
    draw(runs, f"{data.name}, {HIDDEN} hidden units, {args.dtype}", path)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
