"""Writes a training step, and batches to train on, for the C++ program beside this file.

    python examples/on_device/export.py out/on_device
    make -C examples/on_device PYTHON=$PWD/.venv/bin/python OUT=$PWD/out/on_device
    out/on_device/train out/on_device out/on_device/batches.safetensors out/on_device/end.safetensors
"""

import argparse
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_adagrad import Adagrad, export_step

STEPS, BATCH = 200, 32


def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    """The mean squared error."""
    return nn.losses.mse_loss(model(x), y)


def main() -> None:
    """Export a small network that learns a sine, with a schedule that lives in the step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="what the step runs on (default: this machine's)")
    chosen = parser.parse_args()
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Dropout(0.05), nn.Linear(64, 1))
    optimizer = Adagrad(optim.cosine_decay(0.1, STEPS), weight_decay=1e-4)
    x = mx.random.uniform(-3, 3, (STEPS, BATCH, 1))
    y = mx.sin(x)
    export_step(
        chosen.folder, model, optimizer, loss_fn, {"x": x[0], "y": y[0]}, learning_rate="schedule", device=chosen.device
    )
    mx.save_safetensors(str(chosen.folder / "batches.safetensors"), {"x": x, "y": y})
    print(f"wrote a step and {STEPS} batches to {chosen.folder}")


if __name__ == "__main__":
    main()
