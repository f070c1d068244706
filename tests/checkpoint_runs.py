"""Runs that are saved in the middle and continued in another process: ``python checkpoint_runs.py <folder>``.

A run is a case (how its optimizer is made) and a mode (eager or compiled); its gradients depend on the step alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_adagrad import Adagrad, Dense, RowWise, checkpoint, presets, schedules
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    LossScale,
    SkipNonFinite,
)

SAVED, STEPS = 7, 13  # 7 is inside a window of 3 calls, and not at an overwriting of averages
MODES = ("eager", "compiled")

GROUPS = [
    {"params": "*.bias", "lr": schedules.keras_exponential_decay(0.2, 5, 0.5)},
    {"params": ["scale"], "lr": 0.3, "weight_decay": 0.0},
    {"params": "layers.0.*", "weight_decay": 0.1},
]
MAKERS: dict[str, Callable[[], Any]] = {
    "adagrad": lambda: Adagrad(0.1),
    "schedule": lambda: Adagrad(
        optim.cosine_decay(0.1, 20), lr_decay=0.1, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "groups": lambda: Adagrad(0.1, lr_decay=0.1, weight_decay=0.05, groups=GROUPS),
    "row_wise": lambda: Adagrad(0.1, accumulator=RowWise()),
    "float16": lambda: Adagrad(0.1, accumulator=Dense("parameter")),
    "bfloat16": lambda: Adagrad(0.1),
    "float64": lambda: Adagrad(0.1),
    "complex64": lambda: Adagrad(0.1),
    "torch": lambda: presets.torch(0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.1),
    "torch_bfloat16": lambda: presets.torch(0.1, lr_decay=0.1, maximize=True),
    "keras": lambda: presets.keras(
        0.1,
        weight_decay=0.02,
        global_clipnorm=1.0,
        use_ema=True,
        ema_overwrite_frequency=2,
        loss_scale_factor=8.0,
        gradient_accumulation_steps=3,
        constraints={"*.bias": "non_neg"},
    ),
    "keras_bfloat16": lambda: presets.keras(0.1, clipnorm=0.5, use_ema=True, gradient_accumulation_steps=3),
    "tf_keras": lambda: presets.tf_keras(0.1, decay=0.1, clipvalue=0.5),
    "mindspore": lambda: presets.mindspore(0.1, lr_decay=0.1, weight_decay=0.1),
    "mindspore_nn": lambda: presets.mindspore_nn(learning_rate=0.1, loss_scale=4.0, weight_decay=0.1),
    "mlx": lambda: presets.mlx(0.1),
    "optax": lambda: presets.optax(optim.exponential_decay(0.1, 0.9)),
    "paper": lambda: presets.paper(),
    "loss_scale": lambda: DynamicLossScale(Adagrad(0.1), initial_scale=4.0, dynamic_growth_steps=3),
    "skip": lambda: SkipNonFinite(
        LossScale(
            Constraint(ExponentialMovingAverage(GradientAccumulation(Adagrad(0.1), 3), 0.9), {"scale": "non_neg"}), 2.0
        )
    ),
    "adam": lambda: ClipByGlobalNorm(optim.Adam(optim.linear_schedule(0.1, 0.01, 10)), 1.0),
    "multi": lambda: GradientAccumulation(
        optim.MultiOptimizer([Adagrad(0.1, lr_decay=0.1), optim.AdamW(0.01)], [lambda path, w: w.ndim > 1]), 3
    ),
}
WITH_NAN = ("loss_scale", "skip")


class Run:
    """A model, its optimizer and a training step, at the beginning of training."""

    def __init__(self, case: str, mode: str):
        kind = case.rsplit("_", 1)[-1]
        self.case = case
        self.dtype = getattr(mx, kind) if kind in ("float16", "bfloat16", "float64", "complex64") else mx.float32
        self.optimizer = MAKERS[case]()
        # a list with a hole, as an adapter's model has one, and a weight that never has a gradient
        self.parameters = {
            "layers": [{"weight": self.random(1, 3, 4), "bias": self.random(2, 4)}, {}, {"lora": self.random(3, 2, 3)}],
            "scale": self.random(4),
            "frozen": self.random(5, 5),
        }
        self.step = self.eager
        self.traces = 0
        if mode == "compiled":
            self.optimizer.init(self.parameters)
            state = [self.parameters, self.optimizer.state]
            self.step = mx.compile(self.eager, inputs=state, outputs=state)

    def random(self, key: int, *shape: int) -> mx.array:
        numbers = mx.random.normal(shape, key=mx.random.key(key))
        with mx.stream(mx.cpu):
            return numbers.astype(self.dtype) * (1 + 0.5j) if self.dtype == mx.complex64 else numbers.astype(self.dtype)

    def gradients(self, t: int) -> dict[str, Any]:
        gradients = {
            "layers": [
                {"weight": self.random(100 + t, 3, 4), "bias": self.random(200 + t, 4)},
                {},
                {"lora": self.random(300 + t, 2, 3)},
            ],
            "scale": self.random(400 + t),
        }
        if self.case in WITH_NAN and t in (2, 8):
            gradients["scale"] = gradients["scale"] * float("nan")
        return gradients

    def eager(self, gradients: dict[str, Any]) -> None:
        self.traces += 1
        new = self.optimizer.apply_gradients(gradients, self.parameters)
        for key, value in new.items():
            self.parameters[key] = value

    def train(self, start: int, stop: int) -> None:
        with mx.stream(mx.cpu):
            for t in range(start, stop):
                gradients = self.gradients(t)
                if self.case.startswith("torch") and t % 3 == 1 and self.step == self.eager:
                    gradients["scale"] = None  # its own step count falls behind
                self.step(gradients)
                mx.eval(self.parameters, self.optimizer.state)

    def save(self, path: Path) -> None:
        checkpoint.save(path, self.optimizer, self.parameters)

    def load(self, path: Path) -> None:
        checkpoint.load(path, self.optimizer, self.parameters)

    def bits(self) -> Any:
        return bits({"parameters": self.parameters, "state": self.optimizer.state})


def bits(tree: Any) -> Any:
    """The tree with (dtype, shape, bytes) in place of every array."""
    if isinstance(tree, dict):
        return {key: bits(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(child) for child in tree]
    if not isinstance(tree, mx.array):
        return tree
    with mx.stream(mx.cpu):
        return tree.dtype, tree.shape, memoryview(mx.contiguous(tree)).tobytes()  # type: ignore[arg-type]


def main(folder: Path) -> None:
    """Continue every run that was saved in the folder, and save where it ends."""
    for saved in sorted(folder.glob("*.middle")):
        case, mode = saved.stem.split("-")
        run = Run(case, mode)
        run.load(saved)
        run.train(SAVED, STEPS)
        run.save(saved.with_suffix(".end"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
