"""Records torch's and optax's own schedules into schedules.json and plateau.json: ``python record_schedules.py``.

Needs torch 2.13.0, and optax 0.2.8 with jax; it runs no code of mlx_adagrad. Entries of the cases below are replaced,
all others stay as they are.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import optax
import torch
from torch.optim import lr_scheduler

HERE = Path(__file__).parent
STEPS = [*range(41), 50, 64, 99, 100, 127, 199, 255, 300]

# the last case of a name is also the sample that the laws of all schedules are tried on
TORCH: list[tuple[str, dict[str, Any]]] = [
    ("LinearLR", {"lr": 0.2, "start_factor": 0.25, "end_factor": 0.75, "total_iters": 0}),
    ("ConstantLR", {"lr": 0.2}),
    ("ConstantLR", {"lr": 0.2, "factor": 0.5, "total_iters": 0}),
    ("ConstantLR", {"lr": 0.2, "factor": 0.25, "total_iters": 7}),
    ("PolynomialLR", {"lr": 0.2}),
    ("PolynomialLR", {"lr": 0.2, "total_iters": 0}),
    ("PolynomialLR", {"lr": 0.2, "total_iters": 30, "power": 0.0}),
    ("PolynomialLR", {"lr": 0.2, "total_iters": 30, "power": 2.0}),
    ("MultiplicativeLR", {"lr": 0.2, "lr_lambda": "0.5 if epoch % 7 == 0 else 1.02", "total_steps": 300}),
    ("MultiplicativeLR", {"lr": 0.2, "lr_lambda": "0.95", "total_steps": 300}),
    ("CosineAnnealingWarmRestarts", {"lr": 0.2, "T_0": 10}),
    ("CosineAnnealingWarmRestarts", {"lr": 0.2, "T_0": 5, "T_mult": 3, "eta_min": 0.3}),
    ("CosineAnnealingWarmRestarts", {"lr": 0.2, "T_0": 3, "T_mult": 2, "eta_min": 0.01}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 6, "scale_fn": "1 / (1 + epoch)"}),
    (
        "CyclicLR",
        {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 5, "scale_fn": "0.99 ** epoch", "scale_mode": "iterations"},
    ),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.2}),
    ("CyclicLR", {"base_lr": 0.2, "max_lr": 0.1, "step_size_up": 3, "step_size_down": 8, "mode": "triangular2"}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 4, "mode": "exp_range", "gamma": 0.99}),
    (
        "SequentialLR",
        {"schedulers": [["ConstantLR", {"lr": 0.2}], ["ExponentialLR", {"lr": 0.2, "gamma": 0.9}]], "milestones": [20]},
    ),
    (
        "SequentialLR",
        {
            "schedulers": [
                ["LinearLR", {"lr": 0.2, "start_factor": 0.1, "total_iters": 10}],
                ["CosineAnnealingLR", {"lr": 0.2, "T_max": 20, "eta_min": 0.01}],
                ["StepLR", {"lr": 0.2, "step_size": 6, "gamma": 0.5}],
            ],
            "milestones": [10, 30],
        },
    ),
    (
        "ChainedScheduler",
        {
            "schedulers": [
                ["LinearLR", {"lr": 0.2, "start_factor": 0.1, "total_iters": 10}],
                ["CosineAnnealingLR", {"lr": 0.2, "T_max": 400}],
                ["MultiStepLR", {"lr": 0.2, "milestones": [7, 30], "gamma": 0.5}],
            ]
        },
    ),
    (
        "ChainedScheduler",
        {"schedulers": [["ConstantLR", {"lr": 0.2, "factor": 0.1}], ["ExponentialLR", {"lr": 0.2, "gamma": 0.9}]]},
    ),
]
OPTAX: list[tuple[str, dict[str, Any]]] = [
    ("constant_schedule", {"value": 0.2}),
    ("piecewise_interpolate_schedule", {"interpolate_type": "linear", "init_value": 0.2}),
    (
        "piecewise_interpolate_schedule",
        {"interpolate_type": "linear", "init_value": 0.2, "boundaries_and_scales": {"0": 0.5, "9": 3.0, "30": 0.1}},
    ),
    (
        "piecewise_interpolate_schedule",
        {"interpolate_type": "cosine", "init_value": 0.2, "boundaries_and_scales": {"12": 0.1, "4": 2.0, "100": 0.0}},
    ),
    ("warmup_constant_schedule", {"init_value": 0.1, "peak_value": 0.3, "warmup_steps": 0}),
    ("warmup_constant_schedule", {"init_value": 0.0, "peak_value": 0.3, "warmup_steps": 12}),
    (
        "warmup_exponential_decay_schedule",
        {"init_value": 0.0, "peak_value": 0.3, "warmup_steps": 0, "transition_steps": 5, "decay_rate": 0.8},
    ),
    (
        "warmup_exponential_decay_schedule",
        {
            "init_value": 0.0,
            "peak_value": 0.3,
            "warmup_steps": 8,
            "transition_steps": 5,
            "decay_rate": 0.8,
            "transition_begin": 4,
            "staircase": True,
            "end_value": 0.05,
        },
    ),
    (
        "sgdr_schedule",
        {
            "cosine_kwargs": [
                {"init_value": 0.0, "peak_value": 0.3, "warmup_steps": 3, "decay_steps": 10},
                {"init_value": 0.1, "peak_value": 0.2, "warmup_steps": 0, "decay_steps": 15, "end_value": 0.05},
                {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 5, "decay_steps": 30, "exponent": 2.0},
            ]
        },
    ),
    ("linear_onecycle_schedule", {"transition_steps": 40, "peak_value": 0.5}),
    ("linear_onecycle_schedule", {"transition_steps": 3, "peak_value": 0.5, "pct_start": 0.1, "pct_final": 0.2}),
    (
        "linear_onecycle_schedule",
        {"transition_steps": 33, "peak_value": 0.5, "pct_start": 0.4, "pct_final": 0.6, "div_factor": 5.0},
    ),
    ("cosine_onecycle_schedule", {"transition_steps": 40, "peak_value": 0.5}),
    (
        "cosine_onecycle_schedule",
        {"transition_steps": 33, "peak_value": 0.5, "pct_start": 0.37, "div_factor": 10.0, "final_div_factor": 100.0},
    ),
    (
        "join_schedules",
        {
            "schedules": [
                ["linear_schedule", {"init_value": 0.0, "end_value": 0.3, "transition_steps": 10}],
                ["cosine_decay_schedule", {"init_value": 0.3, "decay_steps": 25, "alpha": 0.1}],
                ["constant_schedule", {"value": 0.01}],
            ],
            "boundaries": [10, 35],
        },
    ),
]
PLATEAU: list[dict[str, Any]] = [
    {"patience": 2},
    {"patience": 1, "factor": 0.5, "threshold": 0.05, "cooldown": 2, "min_lr": 0.02},
    {"patience": 0, "mode": "max", "threshold": 0.2, "threshold_mode": "abs", "factor": 0.25, "eps": 0.001},
    {"patience": 0, "mode": "max", "threshold_mode": "rel", "threshold": 0.1, "min_lr": [0.05, 0.001]},
]
METRICS = [3.0, 2.5, 2.6, 2.45, 2.449, 2.7, 2.8, 2.4, 2.9, 2.9, 2.9, 2.9, 1.0, 1.1, 1.2, 0.95, 1.0, 1.0, 1.0, 1.3, 0.2]


def function(expression: str) -> Any:
    return eval(f"lambda epoch: {expression}")


def torch_scheduler(optimizer: torch.optim.Optimizer, name: str, args: dict[str, Any]) -> Any:
    given = {key: value for key, value in args.items() if key not in ("lr", "total_steps")}
    for key in ("lr_lambda", "scale_fn"):
        if key in given:
            given[key] = function(given[key])
    if "schedulers" in given:
        given["schedulers"] = [torch_scheduler(optimizer, *inner) for inner in given["schedulers"]]
    if name == "CyclicLR":
        given["cycle_momentum"] = False
    before = (optimizer,) if name != "ChainedScheduler" else ()
    return getattr(lr_scheduler, name)(*before, **given)


def torch_values(name: str, args: dict[str, Any]) -> list[float]:
    inner = args.get("schedulers", [[name, args]])
    optimizer = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))], lr=inner[0][1].get("lr", 0.2))
    scheduler = torch_scheduler(optimizer, name, args)
    values = []
    for _ in range(STEPS[-1] + 1):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [values[step] for step in STEPS]


def optax_schedule(name: str, args: dict[str, Any]) -> Any:
    given = dict(args)
    if "schedules" in given:
        given["schedules"] = [optax_schedule(*inner) for inner in given["schedules"]]
    if "boundaries_and_scales" in given:
        given["boundaries_and_scales"] = {int(step): scale for step, scale in given["boundaries_and_scales"].items()}
    return getattr(optax.schedules, name)(**given)


def plateau(options: dict[str, Any]) -> dict[str, Any]:
    """Two groups; the rates and the counters after each epoch."""
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.Adagrad([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.1}], lr=0.4)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    rates, states = [], []
    for metric in METRICS:
        scheduler.step(metric)
        rates.append([group["lr"] for group in optimizer.param_groups])
        state = scheduler.state_dict()
        states.append([state[key] for key in ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")])
    return {"options": options, "metrics": METRICS, "rates": rates, "states": states}


def main() -> None:
    warnings.simplefilter("ignore")
    path = HERE / "schedules.json"
    recorded = json.loads(path.read_text())
    entries = []
    for framework, cases, digits in (("torch", TORCH, 12), ("optax", OPTAX, 9)):
        for name, args in cases:
            if framework == "torch":
                values = torch_values(name, args)
            else:
                schedule = optax_schedule(name, args)
                values = [float(schedule(step)) for step in STEPS]
            values = [float(f"{value:.{digits}g}") for value in values]
            entries.append({"framework": framework, "name": name, "args": args, "steps": STEPS, "values": values})
    new = {(e["framework"], e["name"], json.dumps(e["args"])) for e in entries}
    kept = [e for e in recorded["schedules"] if (e["framework"], e["name"], json.dumps(e["args"])) not in new]
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in kept + entries)
    versions = json.dumps(recorded["recorded_with"])
    path.write_text(f'{{\n"recorded_with": {versions},\n"schedules": [\n{lines}\n]}}\n')
    runs = ",\n".join(json.dumps(plateau(options), separators=(",", ":")) for options in PLATEAU)
    version = json.dumps({"torch": torch.__version__})
    (HERE / "plateau.json").write_text(f'{{\n"recorded_with": {version},\n"runs": [\n{runs}\n]}}\n')


if __name__ == "__main__":
    main()
