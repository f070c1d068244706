"""While averages are swapped in: what is saved is the run, and what would be lost is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

from checkpoint_runs import bits
from mlx_adagrad import Adagrad, checkpoint, presets
from mlx_adagrad.wrappers import (
    ClipByNorm,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    SkipNonFinite,
)

SAVED = 5  # inside a window of accumulation, with averages that are not the weights
MAKERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: ExponentialMovingAverage(Adagrad(0.1), 0.5),
    "wrapped": lambda: SkipNonFinite(
        ClipByNorm(ExponentialMovingAverage(GradientAccumulation(Adagrad(0.1), 2), 0.5), 1.0)
    ),
    "keras": lambda: presets.keras(0.1, use_ema=True, ema_momentum=0.5, constraints={"*.bias": "non_neg"}),
    "constraint": lambda: DynamicLossScale(
        Constraint(ExponentialMovingAverage(Adagrad(0.1), 0.5), {"*.bias": "non_neg"})
    ),
    "twice": lambda: ExponentialMovingAverage(ExponentialMovingAverage(Adagrad(0.1), 0.5), 0.9),
}


class Net(nn.Module):
    """A list of layers, a dict of them, one that occurs twice, one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)]
        self.towers = {"0": nn.Linear(3, 3), "a.b": nn.Linear(3, 3)}
        self.again = self.layers[0]
        self.frozen = nn.Linear(3, 3).freeze()

    def __call__(self, x: mx.array) -> mx.array:
        for layer in (*self.layers, *self.towers.values(), self.again, self.frozen):
            x = layer(x)
        return x


def net() -> Net:
    mx.random.seed(3)
    return Net()


def gradients(model: nn.Module, t: int) -> Any:
    return tree_map(lambda w: mx.sin(mx.arange(w.size) + t).reshape(w.shape), model.trainable_parameters())


def train(optimizer: Any, model: nn.Module, start: int, stop: int) -> None:
    for t in range(start, stop):
        optimizer.update(model, gradients(model, t))
        mx.eval(model.state, optimizer.state)


def trained(case: str) -> tuple[Any, Net]:
    optimizer, model = MAKERS[case](), net()
    train(optimizer, model, 0, SAVED)
    return optimizer, model


def save_module(path: Path, optimizer: Any, model: Net) -> None:
    checkpoint.save(path, optimizer, model)


def save_tree(path: Path, optimizer: Any, model: Net) -> None:
    checkpoint.save(path, optimizer, model.parameters())


def save_while_another_swap_lasts(path: Path, optimizer: Any, model: Net) -> None:
    with optimizer.averaged(model):
        checkpoint.save(path, optimizer, model)
    checkpoint.save(path, optimizer, model)


def save_after_a_compiled_evaluation(path: Path, optimizer: Any, model: Net) -> None:
    evaluate = mx.compile(model, inputs=model.state, outputs=model.state)  # puts new arrays into the model
    mx.eval(evaluate(mx.ones((2, 3))))
    checkpoint.save(path, optimizer, model)


SAVES = [save_module, save_tree, save_while_another_swap_lasts, save_after_a_compiled_evaluation]


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("case", MAKERS)
def test_a_run_saved_with_averages_in_the_model_goes_on_as_if_it_had_not_been(
    tmp_path: Path, case: str, save: Callable
) -> None:
    optimizer, model = trained(case)
    before = bits(model.parameters())
    with optimizer.averaged(model):
        assert bits(model.parameters()) != before
        save(tmp_path / "a", optimizer, model)
    assert bits(model.parameters()) == before
    train(optimizer, model, SAVED, 9)
    resumed, other = MAKERS[case](), net()
    checkpoint.load(tmp_path / "a", resumed, other)
    train(resumed, other, SAVED, 9)
    assert bits([other.parameters(), resumed.state]) == bits([model.parameters(), optimizer.state])


def test_a_part_and_a_whole_of_the_model_are_saved_as_they_are_trained(tmp_path: Path) -> None:
    optimizer, model = trained("plain")
    whole, part = bits(model.parameters()), bits(model.layers[2].parameters())
    outer = nn.Sequential(nn.Linear(2, 3), model)
    with optimizer.averaged(model):
        checkpoint.save(tmp_path / "outer", optimizer, outer)
        checkpoint.save(tmp_path / "part", optimizer, model.layers[2])
        checkpoint.save(tmp_path / "other", optimizer, nn.Linear(3, 3))
    saved = outer.parameters()
    checkpoint.load(tmp_path / "outer", MAKERS["plain"](), outer)
    assert bits(outer.parameters()) == bits(saved) and bits(outer.layers[1].parameters()) == whole
    layer = nn.Linear(3, 3)
    checkpoint.load(tmp_path / "part", MAKERS["plain"](), layer)
    assert bits(layer.parameters()) == part


def test_averages_are_saved_on_purpose_by_the_model_itself(tmp_path: Path) -> None:
    optimizer, model, other = MAKERS["plain"](), nn.Linear(3, 2), nn.Linear(3, 2)
    train(optimizer, model, 0, SAVED)
    with optimizer.averaged(model):
        averages = bits(model.parameters())
        model.save_weights(str(tmp_path / "a.safetensors"))
    other.load_weights(str(tmp_path / "a.safetensors"))
    assert bits(other.parameters()) == averages != bits(model.parameters())


@pytest.mark.parametrize("case", MAKERS)
@pytest.mark.parametrize("whole", [True, False])
def test_what_would_be_lost_is_refused_and_nothing_has_changed(tmp_path: Path, case: str, whole: bool) -> None:
    optimizer, model = trained(case)
    checkpoint.save(tmp_path / "a", optimizer, model)
    before = bits([model.parameters(), optimizer.state])
    with optimizer.averaged(model):
        swapped = bits(model.parameters())
        target: Any = model if whole else model.parameters()
        with pytest.raises(ValueError, match="'model' holds averages: leave"):
            checkpoint.load(tmp_path / "a", optimizer, target)
        with pytest.raises(ValueError, match="update inside 'averaged' would be of the averages"):
            optimizer.apply_gradients(gradients(model, 3), target)
        with pytest.raises(ValueError, match="holds the averages already"):
            optimizer.finalize_variable_values(model)
        assert bits(model.parameters()) == swapped
    assert bits([model.parameters(), optimizer.state]) == before
    checkpoint.load(tmp_path / "a", optimizer, model)
    train(optimizer, model, 3, 4)
    optimizer.finalize_variable_values(model)
    train(optimizer, model, 4, 5)


@pytest.mark.parametrize("traced_before", [True, False])
def test_a_compiled_step_is_noticed_at_the_end(traced_before: bool) -> None:
    optimizer, model = trained("plain")
    state = [model.state, optimizer.state]
    step = mx.compile(lambda g: optimizer.update(model, g), inputs=state, outputs=state)
    if traced_before:
        step(gradients(model, 0))
    before = bits(model.parameters())
    with pytest.raises(RuntimeError, match="a step inside 'averaged' advanced the optimizer"):
        with optimizer.averaged(model):
            step(gradients(model, 0))
    assert bits(model.parameters()) == before
    with pytest.raises(KeyError), optimizer.averaged(model):  # the user's own exception is not hidden
        step(gradients(model, 0))
        raise KeyError
    assert bits(model.parameters()) == before


def test_other_models_and_other_threads_train_meanwhile() -> None:
    optimizer, model = trained("plain")
    other_optimizer, other = trained("wrapped")

    with optimizer.averaged(model):
        train(other_optimizer, other, 3, 5)
        thread = threading.Thread(target=train, args=(other_optimizer, other, 5, 6))
        thread.start()
        thread.join()
        other_optimizer.finalize_variable_values(other)
        optimizer.finalize_variable_values({"w": mx.ones(3)})


def test_a_change_of_the_model_that_is_no_step_is_taken_back() -> None:
    optimizer, model = trained("plain")
    before = bits(model.trainable_parameters())
    with optimizer.averaged(model):
        model.set_dtype(mx.bfloat16)
    assert bits(model.trainable_parameters()) == before


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_no_trace(tmp_path: Path, error: type[BaseException]) -> None:
    optimizer, model = trained("plain")
    before = bits(model.parameters())
    with pytest.raises(error), optimizer.averaged(model), optimizer.averaged(model):
        raise error
    assert bits(model.parameters()) == before
    train(optimizer, model, 3, 4)
    after = bits(model.parameters())
    checkpoint.save(tmp_path / "a", optimizer, model)
    checkpoint.load(tmp_path / "a", optimizer, model)
    assert bits(model.parameters()) == after != before
