"""Exported steps: what runs from the file, in Python and in C++, is the step that runs here."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from cases import bits, flat
from mlx_adagrad import Adagrad, Quantized, RowWise, SparseEmbedding, export_step, load_step, value_and_grad
from mlx_adagrad.export import step as step_module
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    SkipNonFinite,
)

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6


class LoRALinear(nn.Module):
    """A frozen linear layer, perhaps quantised, with a trained correction of rank 2."""

    def __init__(self, linear: nn.Module, inputs: int, outputs: int):
        super().__init__()
        self.linear = linear
        self.lora_a = mx.random.normal((inputs, 2))
        self.lora_b = mx.zeros((2, outputs))
        self.linear.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + (x @ self.lora_a) @ self.lora_b


def mlp(dtype: mx.Dtype = mx.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm(16), nn.ReLU(), nn.Linear(16, 1))
    model.set_dtype(dtype)
    return model


def lora(quantised: bool) -> nn.Module:
    linear: nn.Module = nn.Linear(64, 32)
    if quantised:
        linear = nn.QuantizedLinear.from_linear(linear)  # type: ignore[arg-type]
    return nn.Sequential(LoRALinear(linear, 64, 32), nn.ReLU(), nn.Linear(32, 1))


def regression(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.mse_loss(model(x), y)


def wrapped(inner: optim.Optimizer) -> optim.Optimizer:
    return SkipNonFinite(ExponentialMovingAverage(GradientAccumulation(ClipByGlobalNorm(inner, 1.0), 2)))


CASES: dict[str, Any] = {
    "mlp": lambda: (mlp(), Adagrad(optim.cosine_decay(0.1, 20), weight_decay=0.01, lr_decay=0.1), 8, "schedule"),
    "bfloat16": lambda: (mlp(mx.bfloat16), Adagrad(0.1), 8, None),
    "bfloat16, stochastic, 8 bits": lambda: (
        mlp(mx.bfloat16),
        Adagrad(0.1, rounding="stochastic", accumulator=Quantized(min_size=1)),
        8,
        None,
    ),
    "bfloat16, compensated": lambda: (mlp(mx.bfloat16), Adagrad(0.1, rounding="compensated"), 8, None),
    "lora": lambda: (lora(False), Adagrad(0.1), 64, None),
    "quantised base": lambda: (lora(True), Adagrad(0.1), 64, None),
    "wrapped": lambda: (mlp(), wrapped(Adagrad(0.1)), 8, None),
    "loss scale": lambda: (mlp(), DynamicLossScale(Adagrad(0.1), initial_scale=8.0), 8, None),
    "stock": lambda: (mlp(), optim.Adam(0.01), 8, None),
    "groups": lambda: (
        mlp(),
        Adagrad(0.1, groups=[{"params": "*.bias", "lr": optim.exponential_decay(0.2, 0.9)}]),
        8,
        "schedule",
    ),
    "table": lambda: (nn.Sequential(SparseEmbedding(50, 4), nn.Linear(4, 1)), Adagrad(0.1), None, None),
    "table, max_norm": lambda: (
        nn.Sequential(SparseEmbedding(50, 4, max_norm=0.05), nn.Linear(4, 1)),
        Adagrad(0.1),
        None,
        None,
    ),
    "table, row-wise": lambda: (
        nn.Sequential(SparseEmbedding(50, 4), nn.Linear(4, 1)),
        Adagrad(0.1, accumulator=RowWise()),
        None,
        None,
    ),
}


def make(case: str) -> tuple[nn.Module, Any, dict[str, mx.array], str | None]:
    mx.random.seed(1)
    model, optimizer, width, rate = CASES[case]()
    dtype = next(w.dtype for _, w in flat(model.trainable_parameters()))
    x = mx.random.randint(0, 50, (STEPS, 4)) if width is None else mx.random.normal((STEPS, 4, width)).astype(dtype)
    y = mx.random.normal((STEPS, 4, 1)).astype(dtype)
    mx.eval(model.parameters(), x, y)
    return model, optimizer, {"x": x, "y": y}, rate


def batch_at(batches: dict[str, mx.array], t: int) -> dict[str, mx.array]:
    return {name: x[t] for name, x in batches.items()}


def trained(folder: Path, batches: dict[str, mx.array]) -> tuple[list[float], dict[str, mx.array]]:
    step = load_step(folder)
    losses = [step(**batch_at(batches, t)).astype(mx.float32).item() for t in range(STEPS)]
    return losses, step.state  # type: ignore[return-value]


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    """The C++ program of the example, built as its Makefile builds it."""
    if shutil.which("make") is None or (shutil.which("g++") or shutil.which("c++")) is None:
        pytest.skip("needs make and a C++ compiler")
    out = tmp_path_factory.mktemp("on_device")
    command = ["make", "-C", ROOT / "examples" / "on_device", f"PYTHON={sys.executable}", f"OUT={out}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "train"


@pytest.mark.parametrize("case", CASES)
def test_python_and_cpp_train_alike_and_as_the_eager_run(case, program, tmp_path, cpu):
    model, optimizer, batches, rate = make(case)
    before = bits([model.parameters(), optimizer.state])
    export_step(tmp_path / "step", model, optimizer, regression, batch_at(batches, 0), learning_rate=rate)
    after = bits([model.parameters(), optimizer.state])
    assert {path: after[path] for path in before} == before  # the live ones are as they were
    losses, state = trained(tmp_path / "step", batches)

    mx.save_safetensors(str(tmp_path / "batches.safetensors"), batches)
    done = subprocess.run(
        [program, tmp_path / "step", tmp_path / "batches.safetensors", tmp_path / "end.safetensors"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert printed == pytest.approx(losses, rel=1e-8)  # nine digits tell every fp32 apart
    assert bits(mx.load(str(tmp_path / "end.safetensors"))) == bits(state)

    grad = value_and_grad(model, lambda **b: optimizer_loss(optimizer, regression(model, **b)))
    eager = []
    for t in range(STEPS):
        eager.append(regression(model, **batch_at(batches, t)).astype(mx.float32).item())
        _, gradients = grad(**batch_at(batches, t))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    # layouts differ, so matrix products round differently
    assert losses == pytest.approx(eager, rel=0.05 if "bfloat16" in case else 1e-4)


def optimizer_loss(optimizer: Any, loss: mx.array) -> mx.array:
    return optimizer.scale_loss(loss) if hasattr(optimizer, "scale_loss") else loss


def test_the_live_run_goes_on_as_if_nothing_had_been_exported(tmp_path):
    def run(exported: bool) -> Any:
        model, optimizer, batches, _ = make("mlp")
        model = nn.Sequential(nn.Dropout(0.5), model)
        grad = nn.value_and_grad(model, regression)
        for t in range(STEPS):
            if exported and t == 2:
                export_step(
                    tmp_path, model, optimizer, regression, batch_at(batches, t), learning_rate="schedule"
                )
            _, gradients = grad(model, **batch_at(batches, t))
            optimizer.update(model, gradients)
        return bits([model.parameters(), optimizer.state])

    assert run(True) == run(False)


def test_an_export_that_fails_changes_nothing(tmp_path):
    model, optimizer, batches, _ = make("bfloat16")
    optimizer.init(model.trainable_parameters())
    before, key = bits([model.parameters(), optimizer.state]), mx.random.state[0].tolist()  # type: ignore[index]

    def failing(model, x, y):
        mx.random.normal((2,))
        raise KeyError("in the loss")

    with pytest.raises(KeyError, match="in the loss"):
        export_step(tmp_path / "new", model, optimizer, failing, batch_at(batches, 0))
    assert bits([model.parameters(), optimizer.state]) == before
    assert mx.random.state[0].tolist() == key  # type: ignore[index]
    assert not (tmp_path / "new").exists()


def test_dropout_draws_a_new_mask_in_each_step_and_the_same_in_each_run(tmp_path):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1))
    optimizer = Adagrad(0.0)
    x, y = mx.ones((4, 64)), mx.zeros((4, 1))
    export_step(tmp_path, model, optimizer, regression, {"x": x, "y": y})
    runs = []
    for _ in range(2):
        step = load_step(tmp_path)
        assert step.manifest["outputs"][-1] == "random"
        runs.append([step(x=x, y=y).item() for _ in range(5)])
    assert runs[0] == runs[1] and len(set(runs[0])) == 5


def test_without_random_numbers_there_is_no_key(tmp_path):
    model, optimizer, batches, _ = make("bfloat16")
    export_step(tmp_path, model, optimizer, regression, batch_at(batches, 0))
    assert "random" not in load_step(tmp_path).state


def test_random_numbers_that_would_repeat_are_refused(tmp_path):
    model, optimizer, batches, _ = make("bfloat16")
    draw = mx.random.normal  # a name of its own

    def noisy(model, x, y):
        return regression(model, x + draw(x.shape).astype(x.dtype), y)

    with pytest.raises(ValueError, match="would repeat them for ever"):
        export_step(tmp_path, model, optimizer, noisy, batch_at(batches, 0))
    assert not list(tmp_path.iterdir())


def test_keys_that_are_named_are_left_alone(tmp_path):
    model = nn.Linear(4, 1)

    def noisy(model, x):
        noise = mx.random.normal(x.shape, key=mx.random.key(3))
        return model(x + noise).sum() + mx.random.split(mx.random.key(1)).sum()

    export_step(tmp_path, model, Adagrad(0.1), noisy, mx.ones((2, 4)))
    assert "random" not in load_step(tmp_path).state


def test_several_shapes_and_a_shape_that_was_not_exported(tmp_path):
    model, optimizer, batches, _ = make("bfloat16")
    short = {name: x[0, :2] for name, x in batches.items()}
    export_step(tmp_path, model, optimizer, regression, [batch_at(batches, 0), (short["x"], short["y"])])
    step = load_step(tmp_path)
    step(**batch_at(batches, 0))
    step(**short)
    before = bits(step.state)
    with pytest.raises(ValueError, match=r"takes a batch of x: bfloat16 \(4, 8\), .*; x: bfloat16 \(2, 8\).* but got"):
        step(**{name: x[0, :3] for name, x in batches.items()})
    with pytest.raises(ValueError, match="but got x: float32"):
        step(x=short["x"].astype(mx.float32), y=short["y"])
    with pytest.raises(TypeError, match="must hold arrays"):
        step(x=1.0, y=2.0)  # type: ignore[arg-type]
    assert bits(step.state) == before


def test_a_rate_that_the_host_sets_and_one_that_lives_in_the_step(tmp_path):
    x, g = mx.ones((1, 1)), mx.ones((1, 1))

    def loss(model, x, g):
        return (model.weight * g * x).sum()

    def weights(folder, rates):
        step = load_step(folder)
        moved = []
        for rate in rates:
            if rate is not None:
                step.state["optimizer.learning_rate"] = mx.array(rate)
            before = step.state["model.weight"]
            step(x=x, g=g)
            moved.append((before - step.state["model.weight"]).item())
        return moved

    def model():
        return nn.Linear(1, 1, bias=False)

    schedule = optim.step_decay(1.0, 0.5, 1)
    expected = [1.0, 0.5 / 2**0.5, 0.25 / 3**0.5]
    with pytest.raises(ValueError, match="has a schedule: 'learning_rate' must say"):
        export_step(tmp_path / "x", model(), Adagrad(schedule), loss, {"x": x, "g": g})
    optimizer = Adagrad(schedule)
    export_step(tmp_path / "schedule", model(), optimizer, loss, {"x": x, "g": g}, learning_rate="schedule")
    assert weights(tmp_path / "schedule", [None, 7.0, None]) == pytest.approx(expected, rel=1e-5)
    export_step(tmp_path / "input", model(), optimizer, loss, {"x": x, "g": g}, learning_rate="input")
    assert weights(tmp_path / "input", [1.0, 0.5, 0.25]) == pytest.approx(expected, rel=1e-5)
    assert callable(optimizer._schedulers["learning_rate"])
    with pytest.raises(ValueError, match="frozen into the step"):
        export_step(
            tmp_path / "x", model(), Adagrad(lambda: 0.1), loss, {"x": x, "g": g}, learning_rate="schedule"
        )
    with pytest.raises(ValueError, match="'schedule' but the optimizer has none"):
        export_step(tmp_path / "x", model(), Adagrad(0.1), loss, {"x": x, "g": g}, learning_rate="schedule")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"shapeless": True}, ValueError, "'shapeless' must be False"),
        ({"device": "tpu"}, ValueError, "'device' must be 'cpu' or 'gpu'"),
        ({"learning_rate": 0.1}, ValueError, "'learning_rate' must be 'schedule' or 'input'"),
        ({"model": {}}, TypeError, "'model' must be an mlx.nn.Module but got dict"),
        ({"optimizer": nn.Linear(1, 1)}, TypeError, "'optimizer' must be an mlx.optimizers.Optimizer"),
        ({"loss_fn": 3}, TypeError, "'loss_fn' must be callable"),
        ({"loss_fn": lambda a, b, c, d: a}, TypeError, "'loss_fn' must take"),
        ({"example_batch": []}, ValueError, "at least one batch"),
        ({"example_batch": 3.0}, TypeError, "'example_batch' must be a dict of arrays"),
        ({"example_batch": {"x": 1.0, "y": 2.0}}, TypeError, "'x' of the batch must be an array"),
        ({"example_batch": {"loss": mx.ones(1), "y": mx.ones(1)}}, ValueError, "may not be named 'loss'"),
        ({"example_batch": [{"x": mx.ones(1)}, {"y": mx.ones(1)}]}, ValueError, "must have the names"),
        ({"example_batch": {0: mx.ones(1)}}, TypeError, "names of a batch must be strings but one is 0"),
    ],
)
def test_bad_arguments(change, error, match, tmp_path):
    arguments: dict[str, Any] = {
        "model": nn.Linear(2, 1),
        "optimizer": Adagrad(0.1),
        "loss_fn": regression,
        "example_batch": {"x": mx.ones((3, 2)), "y": mx.ones((3, 1))},
        **change,
    }
    with pytest.raises(error, match=match):
        export_step(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_model_that_holds_averages_is_refused(tmp_path):
    model, _, batches, _ = make("bfloat16")
    optimizer = ExponentialMovingAverage(Adagrad(0.1))
    optimizer.init(model.trainable_parameters())
    with optimizer.averaged(model), pytest.raises(ValueError, match="'model' holds averages"):
        export_step(tmp_path / "new", model, optimizer, regression, batch_at(batches, 0))
    assert not (tmp_path / "new").exists()


def test_the_same_shape_twice_is_one_shape(tmp_path):
    model, optimizer, batches, _ = make("bfloat16")
    export_step(tmp_path, model, optimizer, regression, [batch_at(batches, 0), batch_at(batches, 1)])
    assert len(load_step(tmp_path).manifest["batches"]) == 1


@pytest.mark.parametrize(
    "value, got",
    [
        (0.5, "float"),
        (mx.array([0.5]), r"float32 \(1,\)"),
        (mx.array(0.5, mx.float16), r"float16 \(\)"),
        (None, "nothing"),
    ],
)
def test_what_the_host_puts_into_the_state_must_fit(value, got, tmp_path):
    model, optimizer, batches, _ = make("bfloat16")
    export_step(tmp_path, model, optimizer, regression, batch_at(batches, 0))
    step = load_step(tmp_path)
    del step.state["optimizer.learning_rate"]
    if value is not None:
        step.state["optimizer.learning_rate"] = value
    with pytest.raises(ValueError, match=rf"'optimizer.learning_rate' .* must be float32 \(\) but got {got}"):
        step(**batch_at(batches, 0))


@pytest.mark.parametrize("options", [{"rounding": "stochastic"}, {"accumulator": Quantized(min_size=0)}])
def test_random_rounding_draws_new_bits_in_each_step(options, tmp_path):
    """Those of the eager run: nothing here but element-wise operations, which round alike everywhere."""

    def loss(model, x):
        return (model.weight.astype(mx.float32) * x).sum()

    model, optimizer = nn.Linear(64, 2, bias=False), Adagrad(0.001, rounding_seed=3, **options)
    model.set_dtype(mx.bfloat16)
    x = mx.random.normal((STEPS, 2, 64))
    export_step(tmp_path, model, optimizer, loss, x[0])
    step, grad = load_step(tmp_path), nn.value_and_grad(model, loss)
    for t in range(STEPS):
        step(x=x[t])
        optimizer.update(model, grad(model, x[t])[1])
        assert bits({"w": step.state["model.weight"]}) == bits({"w": model.weight})
        assert bits({"v": step.state["optimizer.weight.v"]}) == bits({"v": optimizer.state["weight"]["v"]})


def test_arrays_that_the_loss_sets_beside_the_parameters_are_refused_and_put_back(tmp_path):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)
            self._seen = mx.zeros(2)

        def __call__(self, x):
            self._seen = self._seen + x.sum(axis=0)
            self.linear._last = x
            return self.linear(x)

    model = Counting()
    with pytest.raises(ValueError, match=r"sets '(_seen|linear\._last)' of the model, which is no parameter"):
        export_step(tmp_path / "new", model, Adagrad(0.1), lambda model, x: model(x).sum(), mx.ones((3, 2)))
    assert model._seen.tolist() == [0, 0] and "_last" not in model.linear
    assert not (tmp_path / "new").exists()


def test_sums_of_rows_are_exported_once_a_compiled_step_has_made_them(tmp_path):
    model, _, batches, _ = make("table")
    optimizer = GradientAccumulation(Adagrad(0.1), 2)
    with pytest.raises(ValueError, match=r"makes new state, 'optimizer\._mlx_adagrad\.gradients\..*mx\.compile"):
        export_step(tmp_path / "new", model, optimizer, regression, batch_at(batches, 0))
    assert not (tmp_path / "new").exists()
    grad = value_and_grad(model, lambda **batch: regression(model, **batch))
    state = [model.state, optimizer.state]

    def train(x, y):
        loss, gradients = grad(x=x, y=y)
        optimizer.update(model, gradients)
        return loss

    compiled = mx.compile(train, inputs=state, outputs=state)
    mx.eval(compiled(**batch_at(batches, 0)), state)
    export_step(tmp_path, model, optimizer, regression, batch_at(batches, 0))
    losses, _ = trained(tmp_path, batches)
    assert losses == pytest.approx([compiled(**batch_at(batches, t)).item() for t in range(STEPS)], rel=1e-5)


def test_what_mlx_cannot_export_is_refused_in_words(tmp_path):
    identity: Any = mx.custom_function(lambda x: x * 1.0)
    identity.vjp(lambda primal, cotangent, _output: cotangent)

    def loss(model, x):
        return identity(model(x)).sum()

    with pytest.raises(ValueError, match="MLX cannot export this step"):
        export_step(tmp_path / "new", nn.Linear(2, 1), Adagrad(0.1), loss, mx.ones((3, 2)))
    assert not (tmp_path / "new").exists()


def test_paths_that_read_the_same_keep_their_arrays(tmp_path):
    model = nn.Module()
    model.tower = {"a.b": nn.Linear(2, 2, bias=False), "a": {"b": nn.Linear(2, 2, bias=False)}, "0": nn.Linear(2, 2)}

    def loss(model, x):
        return sum((2.0 + i) * layer(x).sum() for i, layer in enumerate(layers(model)))

    def layers(model):
        return model.tower["a.b"], model.tower["a"]["b"], model.tower["0"]

    optimizer = Adagrad(0.1)
    export_step(tmp_path, model, optimizer, loss, mx.ones((1, 2)))
    step = load_step(tmp_path)
    step(x=mx.ones((1, 2)))
    assert sum(name.endswith("'") for name in step.state) == 2  # a weight, and its v
    _, gradients = nn.value_and_grad(model, loss)(model, mx.ones((1, 2)))
    optimizer.update(model, gradients)
    after = {key[0]: step.state[key[1]] for key in (("x", "model.tower.a.b.weight"), ("y", "model.tower.a.b.weight'"))}
    assert {bits({"w": w})["w"] for w in after.values()} == {bits({"w": la.weight})["w"] for la in layers(model)[:2]}


def test_a_run_goes_on_from_saved_state(tmp_path):
    model, optimizer, batches, _ = make("wrapped")
    export_step(tmp_path / "step", model, optimizer, regression, batch_at(batches, 0))
    _, whole = trained(tmp_path / "step", batches)
    first = load_step(tmp_path / "step")
    for t in range(3):
        first(**batch_at(batches, t))
    first.save(tmp_path / "middle.safetensors")
    second = load_step(tmp_path / "step", tmp_path / "middle.safetensors")
    for t in range(3, STEPS):
        second(**batch_at(batches, t))
    assert bits(second.state) == bits(whole)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    model, optimizer, batches, _ = make("bfloat16")
    export_step(tmp_path, model, optimizer, regression, batch_at(batches, 0))
    manifest = (tmp_path / "manifest.json").read_text()
    state = tmp_path / "other.safetensors"
    mx.save_safetensors(str(state), {"w": mx.ones((2,))})
    with pytest.raises(ValueError, match="the arrays of another step"):
        load_step(tmp_path, state)
    shutil.copy(state, tmp_path / "start.safetensors")
    with pytest.raises(ValueError, match="start.safetensors is not the one"):
        load_step(tmp_path)
    for text in ("", "[]", "{}", manifest.replace('"version": 1', '"version": 99')):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="no manifest that this version knows"):
            load_step(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no exported step: manifest.json missing"):
        load_step(tmp_path)


@pytest.mark.parametrize("failing", ["save_safetensors", "exporter"])
def test_a_failed_write_leaves_the_old_export(failing, tmp_path, monkeypatch):
    model, optimizer, batches, _ = make("bfloat16")
    export_step(tmp_path, model, optimizer, regression, batch_at(batches, 0))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(step_module.mx, failing, fail)
    with pytest.raises(OSError, match="the disk is full"):
        export_step(tmp_path, mlp(), Adagrad(0.5), regression, {"x": mx.ones((2, 8)), "y": mx.ones((2, 1))})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def on_cpu(file: bytes) -> bytes:
    """An exported function with its operations back on the CPU."""
    return file.replace(b"\xff\xff\xff\xff\x01\0\0\0\0\0\0\0", b"\0\0\0\0\0\0\0\0\0\0\0\0")


@pytest.mark.skipif(mx.metal.is_available(), reason="a machine with a GPU places operations itself")
def test_a_step_for_a_gpu_is_the_same_step_with_its_operations_there(tmp_path):
    model, _, batches, _ = make("lora")
    export_step(tmp_path / "cpu", model, optim.SGD(0.1), regression, batch_at(batches, 0))
    export_step(tmp_path / "gpu", model, optim.SGD(0.1), regression, batch_at(batches, 0), device="gpu")
    with pytest.raises(ValueError, match="which is for the gpu: "):
        load_step(tmp_path / "gpu")
    file = (tmp_path / "gpu" / "step.mlxfn").read_bytes()
    assert file.count(b"\0\0\0\0\0\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0Add") == 0  # none is left on the CPU
    (tmp_path / "back.mlxfn").write_bytes(on_cpu(file))
    start: Any = mx.load(str(tmp_path / "cpu" / "start.safetensors"))
    batch = batch_at(batches, 0)
    on_gpu = mx.import_function(str(tmp_path / "back.mlxfn"))(**start, **batch)  # type: ignore[operator]
    there = mx.import_function(str(tmp_path / "cpu" / "step.mlxfn"))(**start, **batch)  # type: ignore[operator]
    assert bits(list(on_gpu)) == bits(list(there))


@pytest.mark.skipif(mx.metal.is_available(), reason="a machine with a GPU places operations itself")
@pytest.mark.parametrize("case", ["mlp", "table"])
def test_a_step_for_a_gpu_holds_the_kernels(case, tmp_path):
    model, optimizer, batches, rate = make(case)
    export_step(tmp_path, model, optimizer, regression, batch_at(batches, 0), learning_rate=rate, device="gpu")
    file = (tmp_path / "step.mlxfn").read_bytes()
    assert b"custom_kernel_mlx_adagrad_" in file
    assert json.loads((tmp_path / "manifest.json").read_text())["device"] == "gpu"
    assert optimizer.fused is None


def test_a_file_of_another_form_is_not_touched():
    from mlx_adagrad.export.devices import moved_to_gpu

    with pytest.raises(RuntimeError, match="not known here"):
        moved_to_gpu(b"\0" * 100, ["Add"])


def test_the_example_trains(program, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    example = ROOT / "examples" / "on_device" / "export.py"
    subprocess.run([sys.executable, example, tmp_path, "--device", "cpu"], check=True, env=environment, cwd=tmp_path)
    command = [program, tmp_path, tmp_path / "batches.safetensors", tmp_path / "end.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True)
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 200 and sum(losses[-20:]) < sum(losses[:20]) / 4
    wrong = tmp_path / "wrong.safetensors"
    mx.save_safetensors(str(wrong), {"x": mx.ones((1, 5, 1)), "y": mx.ones((1, 5, 1))})
    done = subprocess.run([program, tmp_path, wrong], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip()


def test_copies_of_a_model_can_be_exported_side_by_side(tmp_path):
    model, optimizer, batches, _ = make("bfloat16")
    twin = copy.deepcopy(model)
    export_step(tmp_path / "a", model, optimizer, regression, batch_at(batches, 0))
    export_step(tmp_path / "b", twin, Adagrad(0.1), regression, batch_at(batches, 0))
    assert trained(tmp_path / "a", batches)[0] == trained(tmp_path / "b", batches)[0]
