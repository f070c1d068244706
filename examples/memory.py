"""What Adagrad costs in memory, and where training ends, for every way of keeping weights and accumulator.

    python examples/memory.py                  # scikit-learn's bundled digits, 3 seeds
    python examples/memory.py --seeds 5 --epochs 40

Bytes are counted on the arrays themselves, of a layer of 1024 x 1024. Weights, gradients and state are all that full
fine-tuning needs beside activations, so the last columns say how large a model may be. With bitsandbytes and torch
installed, its 8-bit Adagrad is measured too. The picture goes to out/.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import numpy as np
from mlx.utils import tree_flatten, tree_map
from tqdm import tqdm

from digits_data import Data, load_digits
from memory_report import Cost, Result, draw, table
from mlx_adagrad import Adagrad, Dense, Quantized, RowWise

LEARNING_RATE = 0.05
HIDDEN, CLASSES, BATCH = 128, 10, 32
LAYER = (1024, 1024)


class Kind(NamedTuple):
    """One way of training."""

    dtype: mx.Dtype
    make: Callable[[int], Any]


def ours(**options: Any) -> Callable[[int], Any]:
    return lambda seed: Adagrad(LEARNING_RATE, rounding_seed=seed, **options)


# Where v is small too, weights are rounded stochastically.
KINDS = {
    "fp32": Kind(mx.float32, ours()),
    "fp32, v in 8 bits": Kind(mx.float32, ours(accumulator=Quantized())),
    "bf16, stock MLX": Kind(mx.bfloat16, lambda _: stock.Adagrad(LEARNING_RATE)),
    "bf16, nearest": Kind(mx.bfloat16, ours()),
    "bf16, compensated": Kind(mx.bfloat16, ours(rounding="compensated")),
    "bf16, stochastic": Kind(mx.bfloat16, ours(rounding="stochastic")),
    "bf16, v in bf16": Kind(mx.bfloat16, ours(rounding="stochastic", accumulator=Dense("bfloat16"))),
    "bf16, v in 8 bits": Kind(mx.bfloat16, ours(rounding="stochastic", accumulator=Quantized())),
    "bf16, v by row": Kind(mx.bfloat16, ours(rounding="stochastic", accumulator=RowWise())),
}


def cost(kind: Kind) -> Cost:
    """Bytes of weights, gradients and state for each parameter of a layer."""
    w = mx.zeros(LAYER, kind.dtype)
    optimizer = kind.make(0)
    optimizer.init({"w": w})
    kept: Any = tree_flatten(optimizer.state["w"])
    state = sum(x.nbytes for _, x in kept)
    return Cost(w.itemsize, w.itemsize, state / w.size)


def bitsandbytes_cost() -> Cost:
    """The same of bitsandbytes' 8-bit Adagrad, with weights in bf16."""
    import bitsandbytes  # type: ignore[import-not-found]
    import torch  # type: ignore[import-not-found]

    w = torch.nn.Parameter(torch.zeros(LAYER, dtype=torch.bfloat16))
    w.grad = torch.ones_like(w)
    optimizer = bitsandbytes.optim.Adagrad8bit([w], lr=LEARNING_RATE)
    optimizer.step()
    kept = [optimizer.state[w][key] for key in ("state1", "absmax1")]
    return Cost(2, 2, sum(x.nbytes for x in kept) / w.numel())


def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    """Softmax cross-entropy, in fp32 whatever the model's dtype."""
    return nn.losses.cross_entropy(model(x).astype(mx.float32), y, reduction="mean")


def train(kind: Kind, data: Data, seed: int, epochs: int) -> float:
    """The loss on the training data after some epochs, computed in fp32."""
    mx.random.seed(seed)
    model = nn.Sequential(nn.Linear(data.train_x.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    model.set_dtype(kind.dtype)
    optimizer = kind.make(seed)
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    rng, x, y = np.random.default_rng(seed), data.train_x.astype(kind.dtype), data.train_y
    for _ in range(epochs):
        order = mx.array(rng.permutation(len(y)))
        for start in range(0, len(y) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            optimizer.update(model, loss_and_grad(model, x[rows], y[rows])[1])
            mx.eval(model.parameters(), optimizer.state)
    model.update(tree_map(lambda w: w.astype(mx.float32), model.parameters()))
    return loss_fn(model, data.train_x, y).item()  # type: ignore


def main() -> None:
    parser = argparse.ArgumentParser(description="Adagrad's memory, and where training ends, by the way it is kept.")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--epochs", type=int, default=30, help="of each run (default: 30)")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where the picture goes")
    args = parser.parse_args()
    if args.seeds < 1 or args.epochs < 1:
        parser.error("--seeds and --epochs must be positive")
    data, results = load_digits(), {}
    for name, kind in tqdm(KINDS.items(), unit="way"):
        losses = [train(kind, data, seed, args.epochs) for seed in range(args.seeds)]
        results[name] = Result(cost(kind), losses)
    if find_spec("bitsandbytes") and find_spec("torch"):
        results["bf16, bitsandbytes"] = Result(bitsandbytes_cost(), [])
    print(f"digits, {args.seeds} seeds of {args.epochs} epochs; bytes for each parameter\n\n{table(results)}")
    path = args.out / "memory.png"
    draw(results, path)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
