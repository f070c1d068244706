"""Saved and loaded: every bit, every structure, in place; and what does not fit is refused before anything changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from checkpoint_runs import MAKERS, MODES, SAVED, STEPS, Run, bits
from mlx_adagrad import Adagrad, Dense, RowWise, checkpoint, presets, schedules
from mlx_adagrad.wrappers import Constraint, ExponentialMovingAverage, GradientAccumulation, LossScale, SkipNonFinite

RUNS = [(case, mode) for case in MAKERS for mode in MODES]
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """Where each run ends that never stopped, beside the folder where a fresh process continued its saved middle."""
    folder = tmp_path_factory.mktemp("runs")
    ends: dict[Any, Any] = {"folder": folder}
    for case, mode in RUNS:
        run = Run(case, mode)
        run.train(0, SAVED)
        run.save(folder / f"{case}-{mode}.middle")
        run.train(SAVED, STEPS)
        ends[case, mode] = run.bits()
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    program = [sys.executable, str(TESTS / "checkpoint_runs.py"), str(folder)]
    subprocess.run(program, check=True, env=os.environ | {"PYTHONPATH": paths})
    return ends


@pytest.mark.xdist_group("checkpoint_runs")
@pytest.mark.parametrize(("case", "mode"), RUNS, ids=[f"{case}-{mode}" for case, mode in RUNS])
def test_continued_in_a_fresh_process_equals_never_stopped(ended: dict, case: str, mode: str) -> None:
    end = Run(case, mode)
    end.load(ended["folder"] / f"{case}-{mode}.end")
    assert end.bits() == ended[case, mode]


@pytest.mark.parametrize("case", ["adagrad", "groups", "torch", "keras", "loss_scale", "multi"])
def test_a_compiled_step_goes_on_after_a_load(tmp_path: Path, case: str) -> None:
    path = tmp_path / "run.safetensors"
    run = Run(case, "compiled")
    run.train(0, 4)
    run.save(path)
    run.train(4, 6)
    expected, traces = run.bits(), run.traces
    run.train(6, 8)
    run.load(path)
    run.train(4, 6)
    assert run.bits() == expected
    assert run.traces == traces


def model() -> Any:
    mx.random.seed(1)
    built = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm(4), nn.ReLU(), nn.Linear(4, 2))
    return built.train()


def trained(optimizer: Any, module: Any, steps: int = 3) -> Any:
    x = mx.random.normal((8, 3), key=mx.random.key(0))
    gradients = nn.value_and_grad(module, lambda m: mx.square(m(x)).sum())
    for _ in range(steps):
        optimizer.update(module, gradients(module)[1])
        mx.eval(module.state, optimizer.state)
    return optimizer


def test_a_module_is_saved_and_loaded_in_place(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    module, other = model(), model()
    optimizer = trained(Adagrad(0.1), module)
    other.layers[0].freeze()
    checkpoint.save(path, optimizer, module)
    state, layer, weight = other.state, other.layers[0], bits(optimizer.state)
    fresh = Adagrad(0.1)
    live = fresh.state
    checkpoint.load(path, fresh, other)
    assert bits(other.parameters()) == bits(module.parameters()), "running statistics of BatchNorm included"
    assert bits(fresh.state) == weight
    assert fresh.state is live and other.state is state and other.layers[0] is layer


def mx_load(path: Path) -> Any:
    return mx.load(str(path), format="safetensors", return_metadata=True)


def test_the_file_is_ordinary_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    module = model()
    optimizer = trained(Adagrad(0.1), module)
    checkpoint.save(path, optimizer, module)
    arrays, metadata = mx_load(path)
    assert metadata["format"] == "mlx_adagrad" and metadata["version"] == "1"
    assert bits(arrays["optimizer.layers.3.weight.v"]) == bits(optimizer.state["layers"][3]["weight"]["v"])
    assert bits(arrays["model.layers.0.bias"]) == bits(module.layers[0].bias)
    assert arrays["optimizer.step"].dtype == mx.uint64


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    optimizer = trained(Adagrad(0.1), model())
    checkpoint.save(tmp_path / "a", optimizer)
    fresh = Adagrad(0.1)
    checkpoint.load(tmp_path / "a", fresh)
    checkpoint.save(tmp_path / "b", fresh)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


TREE = {
    "a.b": mx.array([1.0, -0.0, float("nan"), float("inf")]),
    "a": {"b": mx.array(2.0), "0": [mx.array(3, mx.uint64), {}, [], (mx.zeros((0, 3)), None)]},
    "7": {"8": mx.array([True, False])},
    "é\"": mx.array([[1 + 2j]]),
    "half": [mx.array([1.5, 2.5], mx.bfloat16), mx.array(1e-7, mx.float16)],
    "double": mx.array([1 / 3], mx.float64),
    "strided": mx.arange(6).reshape(2, 3).T,
    "": {},
}


def test_every_dtype_and_structure_comes_back(tmp_path: Path) -> None:
    def optimizer(state: dict[str, Any]) -> optim.Optimizer:
        made = optim.SGD(0.1)
        made.state.update(state)
        return made

    with mx.stream(mx.cpu):
        checkpoint.save(tmp_path / "a", optimizer(TREE))
        fresh = optimizer({})
        checkpoint.load(tmp_path / "a", fresh)
    assert {key: bits(fresh.state[key]) for key in TREE} == bits(TREE)


def test_a_state_that_is_no_array_is_refused(tmp_path: Path) -> None:
    optimizer: Any = Adagrad(0.1)
    for value, message in ((1.0, "'optimizer.x' is float"), ({3: mx.array(1.0)}, "must be strings but got 3")):
        optimizer.state["x"] = value
        with pytest.raises(TypeError, match=message):
            checkpoint.save(tmp_path / "a", optimizer)
    assert os.listdir(tmp_path) == []


def test_saving_inside_a_trace_is_refused(tmp_path: Path) -> None:
    run = Run("adagrad", "eager")

    def step(g: mx.array) -> mx.array:
        run.optimizer.apply_gradients({"w": g}, {"w": g})
        checkpoint.save(tmp_path / "a", run.optimizer)
        return g

    with pytest.raises(ValueError, match="during function transformations"):
        mx.compile(step)(mx.ones(3))
    assert os.listdir(tmp_path) == []


def weights(**shapes: Any) -> dict[str, mx.array]:
    return {name: mx.ones(shape) for name, shape in shapes.items()}


def saved(path: Path, optimizer: Any, parameters: dict[str, mx.array]) -> Path:
    optimizer.apply_gradients(parameters, parameters)
    checkpoint.save(path, optimizer, parameters)
    return path


def refused(path: Path, optimizer: Any, parameters: Any = None) -> str:
    """What a load that must fail says; nothing may have changed."""
    before = bits([optimizer.state, parameters])
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        checkpoint.load(path, optimizer, parameters)
    assert bits([optimizer.state, parameters]) == before
    return str(error.value)


def initialised(optimizer: Any, **shapes: Any) -> Any:
    optimizer.init(weights(**shapes))
    return optimizer


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", Adagrad(0.1), weights(w=(2, 3), b=(3,)))
    message = refused(path, initialised(Adagrad(0.1), w=(3, 2), c=(3,)), weights(w=(2, 3), b=(4,)))
    assert "'optimizer.w.v' is float32 (2, 3) in the file but float32 (3, 2) here" in message
    assert "the file has 'optimizer.b', which is not known here" in message
    assert "the file lacks 'optimizer.c'" in message
    assert "'model.b' is float32 (3,) in the file but float32 (4,) here" in message
    assert "model.w" not in message and "step" not in message


def test_another_dtype_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", Adagrad(0.1), weights(w=(2,)))
    half = {"w": mx.ones(2, mx.bfloat16)}
    live = Adagrad(0.1, accumulator=Dense("parameter"))
    live.init(half)
    message = refused(path, live, half)
    assert "'optimizer.w.v' is float32 (2,) in the file but bfloat16 (2,) here" in message
    assert "'model.w' is float32 (2,) in the file but bfloat16 (2,) here" in message
    assert "'accumulator.dtype' is 'float32' in the file but 'parameter' here" in message


def test_a_dict_for_a_list_is_named(tmp_path: Path) -> None:
    optimizer = Adagrad(0.1)
    optimizer.init({"layers": [mx.ones(2)]})
    checkpoint.save(tmp_path / "a", optimizer)
    live = Adagrad(0.1)
    live.init({"layers": {"0": mx.ones(2)}})
    assert "'optimizer.layers' is a list in the file but a dict here" in refused(tmp_path / "a", live)


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", Adagrad(0.1), weights(**{f"w{i}": (2,) for i in range(30)}))
    message = refused(path, initialised(Adagrad(0.1), **{f"w{i}": (3,) for i in range(30)}))
    assert message.count("in the file but") == 10 and "and 20 more" in message


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", Adagrad(0.1))
    assert "saved without a model" in refused(tmp_path / "a", Adagrad(0.1), weights(w=(2,)))


def is_matrix(path: str, w: mx.array) -> bool:
    return w.ndim > 1


def a_schedule(step: mx.array) -> mx.array:
    return 0.1 / (1 + step)


def no_step() -> float:
    return 0.1


HYPERPARAMETERS = [
    (Adagrad(0.1), Adagrad(0.1, lr_decay=0.5), "'rule.lr_decay' is 0.0 in the file but 0.5 here"),
    (Adagrad(0.1), Adagrad(0.1, accumulator=RowWise()), "'accumulator.class' is 'Dense' in the file but 'RowWise'"),
    (Adagrad(0.1), optim.Adagrad(0.1), "the optimizer is Adagrad in the file but mlx.optimizers.Adagrad here.$"),
    (
        Adagrad(0.1),
        Adagrad(optim.cosine_decay(0.1, 10)),
        r"'learning_rate' is None in the file but \{'name': 'cosine_decay', 'config': .*\} here",
    ),
    (
        Adagrad(schedules.keras_exponential_decay(0.2, 5, 0.5)),
        Adagrad(schedules.keras_exponential_decay(0.2, 5, 0.6)),
        "'learning_rate.config.decay_rate' is 0.5 in the file but 0.6 here",
    ),
    (
        Adagrad(schedules.torch_step_lr(0.1, 5)),
        Adagrad(schedules.torch_step_lr(0.2, 5)),
        "'learning_rate.config.lr' is 0.1 in the file but 0.2 here",
    ),
    (
        Adagrad(0.1, groups=[{"params": "w", "eps": 1e-6}]),
        Adagrad(0.1, groups=[{"params": "w", "eps": 1e-5}]),
        r"'groups.groups\[0\].rule.eps' is 1e-06 in the file but 1e-05 here",
    ),
    (
        Adagrad(0.1, groups=[{"params": "w"}]),
        Adagrad(0.1, groups=[{"params": "w"}, {"params": "v"}]),
        "'groups.groups' has 1 entries in the file but 2 here",
    ),
    (
        ExponentialMovingAverage(GradientAccumulation(Adagrad(0.1), 2), 0.9),
        ExponentialMovingAverage(GradientAccumulation(Adagrad(0.1), 3), 0.8),
        "'momentum' is 0.9 in the file but 0.8 here\n  'optimizer.steps' is 2 in the file but 3 here",
    ),
    (
        presets.keras(0.1, weight_decay=0.1),
        presets.keras(0.1, epsilon=1e-6),
        "'epsilon' is 1e-07 in the file but 1e-06 here\n  'weight_decay' is 0.1 in the file but None here",
    ),
    (presets.torch(), presets.mindspore(), "the optimizer is presets.torch in the file but presets.mindspore here.$"),
    (
        SkipNonFinite(LossScale(Adagrad(0.1), 2.0)),
        LossScale(SkipNonFinite(Adagrad(0.1)), 2.0),
        r"is SkipNonFinite\(LossScale\(Adagrad\)\) in the file but LossScale\(SkipNonFinite\(Adagrad\)\) here.$",
    ),
    (
        optim.MultiOptimizer([Adagrad(0.1), optim.SGD(0.1)], [is_matrix]),
        optim.MultiOptimizer([optim.SGD(0.1), Adagrad(0.1)], [is_matrix]),
        r"is mlx.optimizers.MultiOptimizer\(Adagrad, mlx.optimizers.SGD\) in the file but "
        r"mlx.optimizers.MultiOptimizer\(mlx.optimizers.SGD, Adagrad\) here.$",
    ),
    (
        Adagrad(optim.cosine_decay(0.1, 10)),
        Adagrad(optim.cosine_decay(0.1, 20)),
        "'learning_rate.config.decay_steps' is 10 in the file but 20 here",
    ),
    (
        optim.SGD(optim.join_schedules([optim.cosine_decay(0.1, 10), a_schedule], [5])),
        optim.SGD(optim.join_schedules([optim.cosine_decay(0.1, 20), a_schedule], [5])),
        "'learning_rate.*decay_steps' is 10 in the file but 20 here",
    ),
    (
        presets.torch(optim.cosine_decay(0.1, 10), groups=[{"params": is_matrix}]),
        presets.torch(optim.cosine_decay(0.1, 20), groups=[{"params": is_matrix}]),
        "'lr.config.decay_steps' is 10 in the file but 20 here",
    ),
    (
        presets.torch(0.1, groups=[{"params": is_matrix, "eps": 1e-6}, {"params": "b"}]),
        presets.torch(0.1, groups=[{"params": is_matrix, "eps": 1e-5}, {"params": "c"}]),
        r"'groups\[0\].eps' is 1e-06 in the file but 1e-05 here\n  'groups\[1\].params\[0\]' is 'b' in the file",
    ),
    (
        presets.keras(no_step, weight_decay=0.1, exclude_from_weight_decay=["a"]),
        presets.keras(no_step, weight_decay=0.1, exclude_from_weight_decay=["c"]),
        r"'exclude_from_weight_decay\[0\]' is 'a' in the file but 'c' here",
    ),
    (Adagrad(0.1), Adagrad(0.1, lazy=False), "'lazy' is True in the file but False here"),
    (
        presets.keras(0.1, constraints={is_matrix: "non_neg"}),
        presets.keras(0.1, constraints={is_matrix: "unit_norm"}),
        r"'constraints\[0\]\[1\]' is 'non_neg' in the file but 'unit_norm' here",
    ),
    (
        Constraint(Adagrad(0.1), {"w": "non_neg", "*": "unit_norm"}),
        Constraint(Adagrad(0.1), {"*": "unit_norm", "w": "non_neg"}),
        r"'constraints\[0\]\[0\]' is 'w' in the file but '\*' here",
    ),
    (optim.Adam(0.1), optim.Adam(0.1, betas=[0.8, 0.999]), r"'betas\[0\]' is 0.9 in the file but 0.8 here"),
]


@pytest.mark.parametrize(("optimizer", "other", "message"), HYPERPARAMETERS)
def test_other_hyperparameters_are_named(tmp_path: Path, optimizer: Any, other: Any, message: str) -> None:
    checkpoint.save(tmp_path / "a", optimizer)
    checkpoint.load(tmp_path / "a", optimizer)
    assert re.search(message, refused(tmp_path / "a", other))


def with_functions() -> dict[str, Any]:
    """Optimizers that depend on functions, made anew: the functions have other addresses each time."""
    matrix: Any = {"params": lambda path, w: w.ndim > 1, "lr": optim.cosine_decay(0.1, 10)}
    return {
        "constraints": presets.keras(0.1, constraints={lambda path, w: w.ndim > 1: "non_neg", "b": lambda w: abs(w)}),
        "by hand": Constraint(Adagrad(lambda step: 0.1 / step), {lambda path, w: True: "non_neg"}),
        "groups": presets.torch(lambda: 0.1, groups=[matrix]),
        "mask": Adagrad(schedules.torch_lambda_lr(0.1, lambda step: 0.5), weight_decay_mask=lambda path, w: True),
    }


@pytest.mark.parametrize("case", with_functions())
def test_functions_are_compared_by_name(tmp_path: Path, case: str) -> None:
    parameters = weights(w=(2, 2), b=(2,))
    path = saved(tmp_path / "a", with_functions()[case], parameters)
    live = with_functions()[case]
    checkpoint.load(path, live, parameters)
    assert live.step.item() == 1


def test_other_hyperparameters_are_taken_when_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", Adagrad(0.1), weights(w=(2,)))
    live = Adagrad(0.1, lr_decay=0.5)
    checkpoint.load(path, live, strict=False)
    assert live.step.item() == 1 and live.rule.lr_decay == 0.5


def test_the_learning_rate_comes_from_the_file(tmp_path: Path) -> None:
    optimizer = presets.torch(0.1, groups=[{"params": "w", "lr": 0.2}])
    optimizer.learning_rate = 0.05
    optimizer.set_group(0, lr=0.06)
    path = saved(tmp_path / "a", optimizer, weights(w=(2,)))
    live = presets.torch(0.1, groups=[{"params": "w", "lr": 0.2}])
    checkpoint.load(path, live)
    assert live.learning_rate.item() == pytest.approx(0.05)
    assert live.state["_mlx_adagrad"]["groups"][0]["learning_rate"].item() == pytest.approx(0.06)


def test_how_an_update_is_computed_is_no_hyperparameter(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", Adagrad(0.1, differentiable=True), weights(w=(2,)))
    checkpoint.load(path, Adagrad(0.1, fused=False))
    path = saved(tmp_path / "b", SkipNonFinite(Adagrad(0.1), on_skip=print), weights(w=(2,)))
    checkpoint.load(path, SkipNonFinite(Adagrad(0.1)))


def test_what_one_thread_loads_another_uses(tmp_path: Path) -> None:
    path, live = saved(tmp_path / "a", Adagrad(0.1), weights(w=(2,))), Adagrad(0.1)
    thread = threading.Thread(target=checkpoint.load, args=(path, live))
    thread.start()
    thread.join()
    assert (live.state["w"]["v"] + 1).tolist() == [2, 2]


def test_an_optimizer_of_mlx_is_saved_too(tmp_path: Path) -> None:
    module = model()
    optimizer = trained(optim.Adam(0.1), module)
    checkpoint.save(tmp_path / "a", optimizer, module)
    fresh, other = optim.Adam(0.1), model()
    checkpoint.load(tmp_path / "a", fresh, other)
    trained(optimizer, module)
    trained(fresh, other)
    assert bits([fresh.state, other.parameters()]) == bits([optimizer.state, module.parameters()])
