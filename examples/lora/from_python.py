"""A fine-tune with mlx-lm from Python. Stop it whenever you like and run it again: it goes on where it was saved."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_adagrad import Adagrad
from mlx_adagrad.lm import train
from mlx_adagrad.wrappers import ClipByGlobalNorm, ExponentialMovingAverage

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mlx-community/Qwen3-0.6B-4bit")
    parser.add_argument("--out", type=Path, default=Path("adapters"))
    parser.add_argument("--iters", type=int, default=100)
    options = parser.parse_args()

    mx.random.seed(0)  # LoRA layers and dropout
    np.random.seed(0)  # the order of the batches
    loaded: Any = load(options.model)
    model, tokenizer = loaded
    model.freeze()
    linear_to_lora_layers(model, 8, {"rank": 8, "dropout": 0.05, "scale": 20.0})
    data = load_dataset(SimpleNamespace(data=HERE / "data", train=True, test=False, mask_prompt=True), tokenizer)
    train_set, valid_set, _ = map(CacheDataset, data)

    optimizer = ExponentialMovingAverage(ClipByGlobalNorm(Adagrad(1e-3), 1.0), 0.95)
    adapters = str(options.out / "adapters.safetensors")
    args = TrainingArgs(iters=options.iters, steps_per_save=25, steps_per_eval=50, adapter_file=adapters)
    train(model, optimizer, train_set, valid_set, args, resume=True)


if __name__ == "__main__":
    main()
