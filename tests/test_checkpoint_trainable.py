"""A run whose file holds what is trained and no more, with the random numbers that it would have drawn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from checkpoint_runs import bits
from mlx_adagrad import Adagrad, checkpoint
from mlx_adagrad.checkpoint import snapshot
from mlx_adagrad.wrappers import ExponentialMovingAverage


class LoRA(nn.Module):
    """A frozen layer beside which a product of two small matrices is trained."""

    def __init__(self, base: nn.Module, dims: int, rank: int = 2):
        super().__init__()
        self.base = base.freeze()
        self.a = mx.random.normal((dims, rank))
        self.b = mx.zeros((rank, dims))
        self.dropout = nn.Dropout(0.5)

    def __call__(self, x: mx.array) -> mx.array:
        return self.base(x) + self.dropout(x) @ self.a @ self.b


class Net(nn.Module):
    """Adapters in a list between layers that are frozen, one of them quantised."""

    def __init__(self, dims: int = 64):
        super().__init__()
        quantised = nn.QuantizedLinear.from_linear(nn.Linear(dims, dims), group_size=32)
        self.layers = [nn.Linear(dims, dims), LoRA(quantised, dims), nn.ReLU(), LoRA(nn.Linear(dims, dims), dims)]
        self.layers[0].freeze()
        self.head = nn.Linear(dims, 1).freeze(keys="weight")

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net(seed: int = 0) -> Net:
    mx.random.seed(seed)
    built = Net()
    mx.random.seed(0)
    mx.eval(built.parameters())
    built.train()
    return built


def make(averaged: bool) -> Any:
    return ExponentialMovingAverage(Adagrad(0.1), 0.9) if averaged else Adagrad(0.1)


def train(optimizer: Any, model: Net, steps: int, compiled: bool) -> list[float]:
    x = mx.random.normal((8, 64), key=mx.random.key(1))
    gradients = nn.value_and_grad(model, lambda m: mx.square(m(x)).mean())
    state = [model.state, optimizer.state, mx.random.state]

    def step() -> mx.array:
        loss, g = gradients(model)
        optimizer.update(model, g)
        return loss

    run = mx.compile(step, inputs=state, outputs=state) if compiled else step
    losses = []
    for _ in range(steps):
        losses.append(run())
        mx.eval(losses, state)
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_goes_on_from_its_trainable_part_and_draws_the_same_numbers(
    tmp_path: Path, compiled: bool, averaged: bool
) -> None:
    optimizer, model = make(averaged), net()
    mx.random.seed(2**40 + 7)
    train(optimizer, model, 3, compiled)
    checkpoint.save(tmp_path / "a", optimizer, model, trainable_only=True, random_state=True)
    expected = train(optimizer, model, 4, compiled)
    end = bits([model.parameters(), optimizer.state])

    resumed, other = make(averaged), net()
    other.layers[1].a, other.head.bias = mx.zeros((64, 2)), mx.ones(1)
    mx.random.seed(5)
    checkpoint.load(tmp_path / "a", resumed, other)
    assert train(resumed, other, 4, compiled) == expected
    assert bits([other.parameters(), resumed.state]) == end


def test_random_numbers_go_on_inside_a_step_that_has_captured_them(tmp_path: Path) -> None:
    draw: Any = mx.compile(lambda: mx.random.uniform(shape=(3,)), inputs=mx.random.state, outputs=mx.random.state)
    draw()
    checkpoint.save(tmp_path / "a", Adagrad(0.1), random_state=True)
    expected = [draw().tolist(), draw().tolist(), mx.random.uniform().item()]
    checkpoint.load(tmp_path / "a", Adagrad(0.1))
    assert [draw().tolist(), draw().tolist(), mx.random.uniform().item()] == expected


def test_the_random_state_is_put_back_only_if_it_is_there_and_wanted(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "with", Adagrad(0.1), random_state=True)
    checkpoint.save(tmp_path / "without", Adagrad(0.1))
    first = mx.random.uniform().item()
    for path, wanted in (("without", None), ("without", False), ("with", False)):
        checkpoint.load(tmp_path / path, Adagrad(0.1), random_state=wanted)
        assert mx.random.uniform().item() != first
    for wanted in (None, True):
        checkpoint.load(tmp_path / "with", Adagrad(0.1), random_state=wanted)
        assert mx.random.uniform().item() == first
    with pytest.raises(ValueError, match="saved without the random state"):
        checkpoint.load(tmp_path / "without", Adagrad(0.1), random_state=True)


def test_the_file_does_not_hold_the_base(tmp_path: Path) -> None:
    model, optimizer = net(), Adagrad(0.1)
    train(optimizer, model, 1, False)
    checkpoint.save(tmp_path / "part", optimizer, model, trainable_only=True)
    checkpoint.save(tmp_path / "whole", optimizer, model)
    snapshot(optimizer, model, trainable_only=True).save(tmp_path / "snapshot")
    arrays: Any = mx.load(str(tmp_path / "part"), format="safetensors")
    names = {f"model.layers.{i}.{name}" for i in (1, 3) for name in "ab"} | {"model.head.bias"}
    assert {name for name in arrays if name.startswith("model.")} == names
    assert os.path.getsize(tmp_path / "part") * 5 < os.path.getsize(tmp_path / "whole")
    assert (tmp_path / "snapshot").read_bytes() == (tmp_path / "part").read_bytes()


def test_a_module_where_more_or_less_is_frozen(tmp_path: Path) -> None:
    model, optimizer = net(), Adagrad(0.1)
    train(optimizer, model, 1, False)
    checkpoint.save(tmp_path / "a", optimizer, model, trainable_only=True)
    frozen = net(1)
    frozen.freeze()
    checkpoint.load(tmp_path / "a", Adagrad(0.1), frozen)  # what is in the file has a place, frozen or not
    assert bits(frozen.layers[3].a) == bits(model.layers[3].a)
    more, fresh = net(1), Adagrad(0.1)
    more.head.unfreeze()
    before = bits([more.parameters(), fresh.state])
    with pytest.raises(ValueError, match="the file lacks 'model.head.weight'"):
        checkpoint.load(tmp_path / "a", fresh, more)
    other = net(1)
    del other.layers[3]["b"]
    with pytest.raises(ValueError, match="the file has 'model.layers.3.b', which is not known here"):
        checkpoint.load(tmp_path / "a", fresh, other)
    assert bits([more.parameters(), fresh.state]) == before


def test_inside_averaged_the_trainable_part_is_that_of_the_run(tmp_path: Path) -> None:
    model, optimizer = net(), make(averaged=True)
    train(optimizer, model, 3, False)
    checkpoint.save(tmp_path / "before", optimizer, model, trainable_only=True)
    with optimizer.averaged(model):
        checkpoint.save(tmp_path / "inside", optimizer, model, trainable_only=True)
    assert (tmp_path / "before").read_bytes() == (tmp_path / "inside").read_bytes()


def test_a_tree_has_nothing_frozen(tmp_path: Path) -> None:
    for model in (None, {"w": mx.ones(2)}):
        with pytest.raises(TypeError, match="'trainable_only' needs a module"):
            checkpoint.save(tmp_path / "a", Adagrad(0.1), model, trainable_only=True)
    assert os.listdir(tmp_path) == []


def test_a_full_file_loads_into_a_module_with_frozen_parts_and_back(tmp_path: Path) -> None:
    model, optimizer, other = net(), Adagrad(0.1), net(1)
    train(optimizer, model, 1, False)
    checkpoint.save(tmp_path / "a", optimizer, model)
    checkpoint.load(tmp_path / "a", Adagrad(0.1), other)
    assert bits(other.parameters()) == bits(model.parameters())


def test_only_the_trainable_part_of_a_full_file_is_loaded_where_it_is_asked_for(tmp_path: Path) -> None:
    model, optimizer, other = net(), Adagrad(0.1), net(1)
    train(optimizer, model, 1, False)
    base = bits(other.layers[0].parameters())
    for partial in (False, True):
        checkpoint.save(tmp_path / "a", optimizer, model, trainable_only=partial)
        other.layers[3].a = mx.zeros((64, 2))
        checkpoint.load(tmp_path / "a", Adagrad(0.1), other, trainable_only=True)
        assert bits(other.layers[3].a) == bits(model.layers[3].a)
        assert bits(other.layers[0].parameters()) == base != bits(model.layers[0].parameters())
    fresh = Adagrad(0.1)
    before = bits(fresh.state)
    with pytest.raises(ValueError, match="saved with the trainable parameters only"):
        checkpoint.load(tmp_path / "a", fresh, other, trainable_only=False)
    with pytest.raises(TypeError, match="'trainable_only' needs a module"):
        checkpoint.load(tmp_path / "a", fresh, other.parameters(), trainable_only=True)
    assert bits(fresh.state) == before
