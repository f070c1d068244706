"""The recorded checkpoints of other frameworks, optimizers that go on from them, and ways to break them."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from checkpoint_runs import bits
from mlx_adagrad import presets
from recorded import CHECKPOINTS

TORCH = importlib.util.find_spec("torch") is not None
TORCH_FILE = CHECKPOINTS / "torch_adagrad.pt"
KERAS_FILE = CHECKPOINTS / "keras_own_variables.npz"
MINDSPORE_FILE = CHECKPOINTS / "mindspore_adagrad.ckpt"
MLX_FILE = CHECKPOINTS / "mlx_adagrad.safetensors"
PATHS = ("kernel", "bias", "scale")
SHAPES = ((3, 4), (4,), ())
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def keras_optimizer() -> Any:
    config = json.loads((CHECKPOINTS / "keras_config.json").read_text())["config"]
    config["learning_rate"] = 0.5  # the right one is in the variables
    return presets.keras(**config)


def torch_optimizer(*paths: str) -> Any:
    kernel, bias, scale = paths or PATHS
    groups = [{"params": kernel, "lr": 0.5}, {"params": [bias, scale], "weight_decay": 0.02}]
    return presets.torch(0.5, lr_decay=0.05, initial_accumulator_value=0.1, groups=groups)


def mindspore_optimizer() -> Any:
    return presets.mindspore(0.1, lr_decay=0.05, weight_decay=0.02, initial_accumulator_value=0.1)


def torch_state() -> dict[str, Any]:
    """What the recorded file of torch holds, its raw records read by their order."""
    with zipfile.ZipFile(TORCH_FILE) as archive:
        numbers = [np.frombuffer(archive.read(f"torch_adagrad/data/{i}"), np.float32) for i in range(6)]
    state = {i: {"step": numbers[2 * i].reshape(()), "sum": numbers[2 * i + 1].reshape(SHAPES[i])} for i in range(3)}
    common = {"lr_decay": 0.05, "eps": 1e-10, "initial_accumulator_value": 0.1, "maximize": False, "foreach": None}
    groups = [
        {"params": [0], "lr": 0.2, "weight_decay": 0.0, **common},
        {"params": [1, 2], "lr": 0.1, "weight_decay": 0.02, **common},
    ]
    return {"state": state, "param_groups": groups}


def parameters(framework: str, prefix: str = "at", t: Any = ()) -> dict[str, mx.array]:
    with np.load(CHECKPOINTS / f"{framework}_resume.npz") as file:
        return {path: mx.array(file[f"{prefix}/{i}"][t]) for i, path in enumerate(PATHS)}


def initialised(optimizer: Any, w: Any = None) -> Any:
    optimizer.init(w or {path: mx.ones(shape) for path, shape in zip(PATHS, SHAPES, strict=True)})
    return optimizer


def goes_on_as_recorded(framework: str, optimizer: Any, place: Callable[[Any], Any] = lambda tree: tree) -> None:
    """Twelve more calls, with the gradients that the framework had; ``place`` puts its parameters into our tree."""
    w = place(parameters(framework))
    step = mx.compile(optimizer.apply_gradients, inputs=optimizer.state, outputs=optimizer.state)
    for t in range(12):
        w = (optimizer.apply_gradients if t < 6 else step)(place(parameters(framework, "grad", t)), w)
        recorded = dict(tree_flatten(place(parameters(framework, "param", t))))
        for path, got in tree_flatten(w):
            expected = np.array(recorded[path])
            np.testing.assert_allclose(np.array(got), expected, rtol=5e-5, atol=1e-6, err_msg=f"{path} {t}")


def layers(tree: dict[str, Any]) -> Any:
    return {"layers": [{"weight": tree["kernel"], "bias": tree["bias"]}], "scale": tree["scale"]}


def refused(error: Any, message: str, function: Callable[..., Any], source: Any, optimizer: Any, *rest: Any) -> None:
    before = bits(optimizer.state)
    with pytest.raises(error, match=message):
        function(source, optimizer, *rest)
    assert bits(optimizer.state) == before


class Lying:
    """An array that claims to be too large to exist; to read it is an error of the test."""

    dtype = np.dtype(np.float32)
    shape = (10**6, 10**6)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("read before its shape was checked")


def try_damaged(function: Any, make: Any, source: Path, path: Path, data: st.DataObject) -> None:
    """Cut and change a sound file: it is refused and changes nothing, or it still can be read."""
    damaged = bytearray(source.read_bytes())
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    for _ in range(data.draw(st.integers(0, 6)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    live = make()
    before = bits(live.state)
    try:
        function(path, live)
    except ValueError as error:
        assert str(error).startswith(f"[checkpoint] '{path}' cannot be imported: ")
        assert bits(live.state) == before


def trained(optimizer: Any, dtype: mx.Dtype = mx.float32, steps: int = 3, w: Any = None) -> tuple[Any, Any]:
    w = w or tree_map(lambda p: p.astype(dtype), layers(parameters("mlx")))
    for t in range(steps):
        g = tree_map(lambda p: p.astype(dtype), layers(parameters("mlx", "grad", t)))
        w = optimizer.apply_gradients(g, w)
    return optimizer, w
