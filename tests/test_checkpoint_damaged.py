"""Damaged and hostile files of every kind: a ValueError with nothing changed, or a state that trains on."""

from __future__ import annotations

import json
import math
import resource
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from checkpoint_runs import bits
from damage import damaged
from foreign_checkpoints import (
    KERAS_FILE,
    MINDSPORE_FILE,
    MLX_FILE,
    TORCH,
    TORCH_FILE,
    initialised,
    keras_optimizer,
    layers,
    mindspore_optimizer,
    parameters,
    refused,
    torch_optimizer,
    torch_state,
)
from mlx_adagrad import Adagrad, checkpoint, presets
from mlx_adagrad.checkpoint import import_keras, import_mindspore, import_mlx, import_torch
from mlx_adagrad.wrappers import ExponentialMovingAverage, GradientAccumulation

DAMAGES = 300


def stock(begun: bool) -> Callable[[], Any]:
    return lambda: initialised(presets.mlx(0.5), layers(parameters("mlx"))) if begun else presets.mlx(0.5)


def own_file(path: Path) -> Path:
    optimizer, w = stock(True)(), layers(parameters("mlx"))
    checkpoint.save(path, optimizer, optimizer.apply_gradients(w, w))
    return path


def npz_file(path: Path) -> Path:
    mx.savez(str(path.with_suffix(".npz")), **mx.load(str(MLX_FILE)))  # type: ignore[arg-type]
    return path.with_suffix(".npz")


def load(path: Path, optimizer: Any) -> None:
    checkpoint.load(path, optimizer, layers(parameters("mlx")))


def kind(
    framework: str, function: Callable, make: Callable, source: Any, *, named: bool = True, marks: Any = ()
) -> Any:
    return pytest.param(framework, function, make, source, named, id=function.__name__ + f"-{framework}", marks=marks)


TORCH_ONLY = pytest.mark.skipif(not TORCH, reason="torch is not installed: its own reader of files")
KINDS = [
    kind("keras", import_keras, lambda: initialised(keras_optimizer()), lambda _: KERAS_FILE),
    kind("mindspore", import_mindspore, lambda: initialised(mindspore_optimizer()), lambda _: MINDSPORE_FILE),
    kind("torch", import_torch, lambda: initialised(torch_optimizer()), lambda _: TORCH_FILE, marks=TORCH_ONLY),
    kind("mlx", import_mlx, stock(True), lambda _: MLX_FILE),
    kind("mlx", import_mlx, stock(True), npz_file),
    kind("mlx", load, stock(True), own_file),
    # without a parameter known yet, a name or a shape in the file may be any
    kind("mlx", import_mlx, stock(False), lambda _: MLX_FILE, named=False),
    kind("mlx", import_mlx, stock(False), npz_file, named=False),
    kind("mlx", load, stock(False), own_file, named=False),
]


@pytest.mark.parametrize(("framework", "function", "make", "source", "named"), KINDS)
def test_a_damaged_file_changes_nothing_or_trains_on(
    tmp_path: Path, framework: str, function: Callable, make: Callable, source: Callable, named: bool
) -> None:
    sound, path, accepted = source(tmp_path / "sound").read_bytes(), tmp_path / "x", 0
    place = layers if framework == "mlx" else lambda tree: tree
    for seed in range(DAMAGES):
        path.write_bytes(damaged(sound, seed))
        live = make()
        before = bits(live.state)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's
                function(path, live)
        except ValueError as error:
            assert str(error).startswith(f"[checkpoint] '{path}' cannot be "), seed
            assert len(str(error)) < 5000 and bits(live.state) == before, seed
        else:
            accepted += 1
            trains_on(live, framework, place, named, function is not load, seed)
    assert 0 < accepted < DAMAGES / 2


def trains_on(live: Any, framework: str, place: Callable, named: bool, checked: bool, seed: int) -> None:
    """One more step; the numbers in a file of our own are not checked, as there is nothing that they could not be."""
    before = bits(live.state)
    try:
        w = live.apply_gradients(place(parameters(framework, "grad", 0)), place(parameters(framework)))
    except ValueError:  # the state is of other parameters than these
        assert not named and bits(live.state) == before, seed
    else:
        assert not checked or all(not mx.isnan(leaf).any().item() for _, leaf in tree_flatten(w)), seed  # type: ignore[union-attr]


# Work and memory


def safetensors(arrays: dict[str, list[int]]) -> bytes:
    header, at = {}, 0
    for name, shape in arrays.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def deep(count: int, depth: int) -> dict[str, list[int]]:
    return {f"{'a.' * depth}w{i}.v": [0] for i in range(count)}


SMALL = {
    "index": {"layers.10000000.weight.v": [1]},
    "indices": {f"layers.{i}.{i}.v": [1] for i in range(0, 100_000, 50)},
    "nested": {f"{'50.' * 40}{i}.v": [1] for i in range(3)},
    "long_index": {f"layers.{'9' * 5000}.v": [1]},
    "many_names": {f"w{i}.v": [0] for i in range(10_000)},
    "deep_names": deep(200, 90),
    "long_name": {"w" * 1_000_000 + ".v": [1]},
    "dots": {"." * 100_000 + "v": [1]},
}


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("begun", [True, False])
def test_work_and_memory_are_bounded_by_the_file_and_the_model(tmp_path: Path, case: str, begun: bool) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"step": [], "learning_rate": [], **SMALL[case]}))
    live = Adagrad(0.1)
    if begun:
        live.init({f"w{i}": mx.zeros(1) for i in range(2000)})
    before = bits(live.state)
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        import_mlx(path, live)
    except ValueError as error:
        assert len(str(error)) < 3000 and bits(live.state) == before
    else:
        assert not begun
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # KiB


def test_an_index_far_beyond_the_tensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(safetensors({"step": [], "learning_rate": [], "layers.10000000.weight.v": [1]}))
    refused(
        ValueError,
        "index 10000000 under 'layers' is far beyond its 1 tensors",
        import_mlx,
        tmp_path / "x",
        Adagrad(0.1),
    )
    (tmp_path / "x").write_bytes(safetensors({"step": [], "learning_rate": [], "layers.300.weight.v": [1]}))
    live = Adagrad(0.1)
    import_mlx(tmp_path / "x", live)
    assert len(live.state["layers"]) == 301


# Values that are no numbers of a run


class Huge:
    """A tensor that says it is 10^12 times one element, as torch's expanded ones do; reading it is an error."""

    dtype, shape = np.dtype(np.float32), (10**6, 10**6)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("read, which takes 4 TB")

    def __eq__(self, other: Any) -> Any:
        raise AssertionError("compared, which takes 1 TB")

    __ne__ = __eq__


@pytest.mark.parametrize("option", ["lr", "lr_decay", "eps", "weight_decay", "maximize"])
@pytest.mark.parametrize(
    "value", [Huge(), np.ones(2, np.float32), "x", None, 10**30, [1.0], float("nan"), np.array("x")]
)
def test_hyperparameters_of_torch_that_are_no_numbers_are_refused(option: str, value: Any) -> None:
    state = torch_state()
    state["param_groups"][1][option] = value
    refused(ValueError, f"'{option}'", import_torch, state, initialised(torch_optimizer()))


def test_hyperparameters_of_torch_may_be_tensors() -> None:
    state = torch_state()
    for group in state["param_groups"]:
        group.update(lr=np.array(group["lr"]), lr_decay=np.array([0.05]), maximize=np.array(False))
    live = initialised(torch_optimizer())
    import_torch(state, live)
    assert live.learning_rate.item() == pytest.approx(0.1)
    state["param_groups"][0]["lr_decay"] = np.array(0.25)
    refused(ValueError, "'lr_decay' of 'kernel' is 0.25 in the file", import_torch, state, live)


@pytest.mark.parametrize("value", [10**30, -(10**30), 2**63, 2**64, -1, float("inf"), 1e300, True, 1j, "1", None, [1]])
def test_counts_that_cannot_be_are_refused(value: Any) -> None:
    variables: dict[str, Any] = dict(np.load(KERAS_FILE))
    refused(ValueError, "checkpoint", import_keras, {**variables, "0": value}, initialised(keras_optimizer()))
    state = torch_state()
    state["state"][0]["step"] = value
    refused(ValueError, "checkpoint", import_torch, state, initialised(torch_optimizer()))
    flat = {"step": value, "learning_rate": mx.array(0.1), "w.v": mx.ones(2)}
    refused(ValueError, "checkpoint", import_mlx, flat, Adagrad(0.1))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("-inf")])
def test_what_no_sum_of_squares_can_be_is_refused(value: float) -> None:
    state = torch_state()
    state["state"][1]["sum"] = np.array([1, value, 1, 1], np.float32)
    refused(ValueError, "'bias' is not a sum of squares", import_torch, state, initialised(torch_optimizer()))
    variables = dict(np.load(KERAS_FILE))
    variables["6"] = np.array([1, float("nan"), 1, 1], np.float32)  # a sum of gradients
    refused(ValueError, "'bias' is not finite", import_keras, variables, initialised(keras_optimizer()))


def test_a_v_that_overflowed_in_half_precision_is_taken() -> None:
    flat = {"step": mx.array(3, mx.uint64), "w.v": mx.array([float("inf"), 1.0], mx.float16)}
    live = initialised(Adagrad(0.1), {"w": mx.ones(2, mx.float16)})
    import_mlx(flat, live)
    assert live.state["w"]["v"].tolist() == [float("inf"), 1.0]


def test_an_array_of_numpy_that_runs_backwards_is_read() -> None:
    state = torch_state()
    expected = state["state"][1]["sum"].tolist()
    state["state"][1]["sum"] = np.ascontiguousarray(state["state"][1]["sum"][::-1])[::-1]
    live = initialised(torch_optimizer())
    import_torch(state, live)
    assert live.state["bias"]["v"].tolist() == expected


# A refusal after everything seems to fit


def test_a_predicate_that_fails_leaves_a_new_optimizer_as_it_was() -> None:
    def predicate(path: str, w: mx.array) -> bool:
        raise KeyError(path)

    flat = {"step": mx.array(3, mx.uint64), "learning_rate": mx.array(0.1), "w.v": mx.ones(2)}
    refused(KeyError, "w", import_mlx, flat, Adagrad(0.1, groups=[{"params": predicate, "lr": 0.1}]))
    groups: Any = [{"params": "w", "lr": 0.1}]
    live = ExponentialMovingAverage(GradientAccumulation(Adagrad(0.1, groups=groups), 2), 0.9)
    refused(ValueError, "not a sum of squares", import_mlx, {**flat, "w.v": -mx.ones(2)}, live)


class Layers(nn.Module):
    """Layers, of which one without parameters may be left out, in a list or by name."""

    def __init__(self, *parts: Any, **named: Any):
        super().__init__()
        self.layers = list(parts)
        for name, part in named.items():
            setattr(self, name, part)


def linear() -> nn.Module:
    return nn.Linear(2, 2)


DROPPED = {
    "last": (lambda: Layers(linear(), nn.ReLU()), lambda: Layers(linear()), "model.layers.1"),
    "both": (lambda: Layers(linear(), nn.ReLU(), nn.ReLU()), lambda: Layers(linear()), "model.layers.1"),
    "named": (lambda: Layers(linear(), relu=nn.ReLU()), lambda: Layers(linear()), "model.relu"),
    "inner": (lambda: Layers(Layers(linear(), nn.ReLU())), lambda: Layers(Layers(linear())), "model.layers.0.layers.1"),
    "middle": (lambda: Layers(linear(), nn.ReLU(), linear()), lambda: Layers(linear(), linear()), "model.layers.1"),
    "dict": (lambda: Layers(linear(), t={"a": nn.ReLU()}), lambda: Layers(linear(), t={}), "model.t.a"),
}


@pytest.mark.parametrize("case", DROPPED)
@pytest.mark.parametrize("tree", [False, True])
def test_a_layer_that_is_missing_here_is_refused_before_anything_is_installed(
    tmp_path: Path, case: str, tree: bool
) -> None:
    make, make_without, name = DROPPED[case]
    saved, live = make(), make_without()
    optimizer = Adagrad(0.1)
    optimizer.init(saved.trainable_parameters())
    checkpoint.save(tmp_path / "a", optimizer, saved)
    fresh, target = Adagrad(0.1), live.parameters() if tree else live
    before = bits([fresh.state, live.parameters(), target if tree else None])
    with pytest.raises(ValueError, match=name):
        checkpoint.load(tmp_path / "a", fresh, target)
    assert bits([fresh.state, live.parameters(), target if tree else None]) == before
    checkpoint.load(tmp_path / "a", fresh, make())


def test_a_layer_without_parameters_may_be_added(tmp_path: Path) -> None:
    saved, live = Layers(linear()), Layers(linear(), nn.Dropout(0.1), relu=nn.ReLU())
    optimizer = Adagrad(0.1)
    optimizer.init(saved.trainable_parameters())
    checkpoint.save(tmp_path / "a", optimizer, saved)
    checkpoint.load(tmp_path / "a", Adagrad(0.1), live)
    assert bits(live.layers[0].parameters()) == bits(saved.layers[0].parameters())


def rewritten(path: Path, change: Callable[[Any], Any]) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    structure = json.loads(header["__metadata__"]["structure"])
    change(structure)
    header["__metadata__"]["structure"] = json.dumps(structure)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("hole", [None, [], {}, [{}], {"x": None}])
def test_holes_in_the_structure_of_a_file_change_no_module(tmp_path: Path, hole: Any) -> None:
    live = Layers(linear(), nn.ReLU(), t={"a": nn.ReLU()})
    optimizer = Adagrad(0.1)
    optimizer.init(live.trainable_parameters())
    checkpoint.save(tmp_path / "a", optimizer, live)
    rewritten(tmp_path / "a", lambda structure: structure["model"]["layers"].__setitem__(1, hole))
    rewritten(tmp_path / "a", lambda structure: structure["model"]["t"].update(a=hole))
    before, fresh = bits([live.state, {}]), Adagrad(0.1)
    state = bits(fresh.state)
    try:
        checkpoint.load(tmp_path / "a", fresh, live)
    except ValueError:
        assert bits(fresh.state) == state
    assert bits([live.state, {}]) == before
