"""A run that began with torch.optim.Adagrad goes on here, on the same curve. Without torch, from a recorded run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import continued_run
from continued_run import HIDDEN, STEPS, Run, batch
from mlx_adagrad import checkpoint, presets

HAND_OVER = 150
OPTIONS: dict[str, Any] = {"lr": 0.1, "lr_decay": 0.002, "weight_decay": 1e-4}
PATHS = {
    "0.weight": "layers.0.weight",
    "0.bias": "layers.0.bias",
    "2.weight": "layers.2.weight",
    "2.bias": "layers.2.bias",
}


def go_on(run: Run) -> list[float]:
    """The rest of the run: their weights and state, our optimizer."""
    model = continued_run.network()
    model.load_weights([(PATHS[name], mx.array(w)) for name, w in run.weights.items()])
    optimizer = presets.torch(**OPTIONS)  # was: torch.optim.Adagrad(model.parameters(), **OPTIONS)
    optimizer.init(model.parameters())
    checkpoint.import_torch(run.state, optimizer, names=[PATHS[name] for name in run.weights])
    return continued_run.train(model, optimizer, HAND_OVER)


def live() -> Run:
    """The whole run in torch, with weights and ``state_dict`` as they were at the hand-over."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, 1))
    optimizer = torch.optim.Adagrad(model.parameters(), **OPTIONS)
    run = Run([], {}, {}, f"torch {torch.__version__}")
    for step in range(STEPS):
        if step == HAND_OVER:
            run.weights = {name: w.detach().numpy().copy() for name, w in model.state_dict().items()}
            run.state = copied(optimizer.state_dict())
        x, y = map(torch.from_numpy, batch(step))
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
    return run


def copied(state_dict: dict) -> dict:
    """A state dict that further steps leave alone."""
    state = {i: {key: value.numpy().copy() for key, value in own.items()} for i, own in state_dict["state"].items()}
    return {"state": state, "param_groups": state_dict["param_groups"]}


def record(run: Run, file: Path) -> None:
    """Write a run to a file, for those who have no torch."""
    arrays: dict[str, Any] = {"losses": np.array(run.losses), "source": run.source}
    arrays |= {f"weight/{name}": w for name, w in run.weights.items()}
    for i, own in run.state["state"].items():
        arrays |= {f"step/{i}": own["step"], f"sum/{i}": own["sum"]}
    np.savez_compressed(file, **arrays)


def recorded(file: Path) -> Run:
    """The run in a file, its state in the form of a ``state_dict``."""
    with np.load(file) as arrays:
        weights = {name: arrays[f"weight/{name}"] for name in PATHS}
        state = {i: {"step": arrays[f"step/{i}"], "sum": arrays[f"sum/{i}"]} for i in range(len(PATHS))}
        groups = [{**OPTIONS, "eps": 1e-10, "maximize": False, "params": list(state)}]
        source = str(arrays["source"])
        return Run(arrays["losses"].tolist(), weights, {"state": state, "param_groups": groups}, source)


if __name__ == "__main__":
    continued_run.main("torch", live, recorded, record, go_on)
