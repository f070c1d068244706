"""A run that began with keras.optimizers.Adagrad goes on here, on the same curve, from within a window of accumulated
gradients. Without Keras, from a recorded run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import continued_run
from continued_run import HIDDEN, STEPS, Run, batch
from mlx_adagrad import checkpoint, presets

HAND_OVER = 151  # the second call of a window of three
OPTIONS: dict[str, Any] = {
    "learning_rate": 0.2,
    "weight_decay": 1e-3,
    "global_clipnorm": 1.0,
    "use_ema": True,
    "gradient_accumulation_steps": 3,
}
# A kernel of Keras is (inputs, outputs), a weight of MLX (outputs, inputs).
PATHS = {
    "kernel_0": ("layers.0.weight", (1, 0)),
    "bias_0": "layers.0.bias",
    "kernel_1": ("layers.2.weight", (1, 0)),
    "bias_1": "layers.2.bias",
}


def go_on(run: Run) -> list[float]:
    """The rest of the run: their weights and state, our optimizer."""
    model = continued_run.network()
    for name, path in PATHS.items():
        w = mx.array(run.weights[name])
        model.load_weights([(path, w) if isinstance(path, str) else (path[0], w.transpose(path[1]))], strict=False)
    optimizer = presets.keras(**OPTIONS)  # was: keras.optimizers.Adagrad(**OPTIONS)
    optimizer.init(model.parameters())
    checkpoint.import_keras(run.state, optimizer, names=list(PATHS.values()))
    return continued_run.train(model, optimizer, HAND_OVER)


def live() -> Run:
    """The whole run in Keras, with weights and the optimizer's variables as they were at the hand-over."""
    import keras  # pyright: ignore[reportMissingImports]

    keras.utils.set_random_seed(0)
    layers = [keras.Input((1,)), keras.layers.Dense(HIDDEN, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    optimizer = keras.optimizers.Adagrad(**OPTIONS)
    model.compile(optimizer=optimizer, loss="mse")
    run = Run([], {}, {}, f"Keras {keras.__version__} on {keras.backend.backend()}")
    for step in range(STEPS):
        if step == HAND_OVER:
            run.weights = {name: np.array(w) for name, w in zip(PATHS, model.get_weights(), strict=True)}
            optimizer.save_own_variables(run.state)
            run.state = {key: np.array(value) for key, value in run.state.items()}
        model.reset_metrics()  # else the mean of all losses so far
        run.losses.append(float(model.train_on_batch(*batch(step))))
    return run


def record(run: Run, file: Path) -> None:
    """Write a run to a file, for those who have no Keras."""
    arrays: dict[str, Any] = {"losses": np.array(run.losses), "source": run.source}
    arrays |= {f"weight/{name}": w for name, w in run.weights.items()}
    arrays |= {f"state/{key}": value for key, value in run.state.items()}
    np.savez_compressed(file, **arrays)


def recorded(file: Path) -> Run:
    """The run in a file."""
    with np.load(file) as arrays:
        weights = {name: arrays[f"weight/{name}"] for name in PATHS}
        state = {key.removeprefix("state/"): arrays[key] for key in arrays.files if key.startswith("state/")}
        return Run(arrays["losses"].tolist(), weights, state, str(arrays["source"]))


if __name__ == "__main__":
    continued_run.main("Keras", live, recorded, record, go_on)
