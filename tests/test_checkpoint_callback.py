"""Notes beside a run, and the callback that saves one while somebody else's loop trains."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from checkpoint_runs import bits
from mlx_adagrad import Adagrad, checkpoint
from mlx_adagrad.checkpoint import safetensors

NOTES = {"epoch": 3, "batch": [17, None], "text": "é\n\"", "nested": {"rate": 0.1, "on": True}}


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    model.layers[0].freeze()
    return model


def train(model: nn.Module, optimizer: Any, iterations: int, callback: Any, first: int = 1) -> None:
    """A trainer like mlx-lm's: it reports after every second iteration, and counts from 1."""
    x = mx.arange(12.0).reshape(4, 3)
    for iteration in range(1, iterations + 1):
        loss, gradients = nn.value_and_grad(model, lambda x: mx.square(model(x)).mean())(x)
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state, loss)
        if iteration % 2 == 0:
            callback.on_train_loss_report({"iteration": iteration, "train_loss": loss.item()})
    callback.on_val_loss_report({"iteration": iterations, "val_loss": 0.0})


@pytest.mark.parametrize("how", ["save", "snapshot"])
def test_notes_come_back_and_a_file_without_any_has_none(how, tmp_path):
    file, model, optimizer = tmp_path / "run.safetensors", network(), Adagrad(0.1)
    if how == "save":
        checkpoint.save(file, optimizer, model, notes=NOTES)
    else:
        checkpoint.snapshot(optimizer, model, notes=NOTES).save(file)
    assert checkpoint.read_notes(file) == NOTES
    checkpoint.load(file, optimizer, model)
    checkpoint.save(file, optimizer, model)
    assert checkpoint.read_notes(file) == {}


@pytest.mark.parametrize("notes", [{"a": mx.ones(1)}, {"a": {1, 2}}, [1], "text", {("a",): 1}])
def test_notes_that_json_cannot_hold_are_refused_and_nothing_is_written(notes, tmp_path):
    with pytest.raises(TypeError, match=r"\[checkpoint\] 'notes' must be "):
        checkpoint.save(tmp_path / "run.safetensors", Adagrad(0.1), notes=notes)
    assert not list(tmp_path.iterdir())


def test_notes_that_are_none_are_noticed(tmp_path):
    file = tmp_path / "run.safetensors"
    checkpoint.save(file, Adagrad(0.1), notes=NOTES)
    with file.open("rb") as stream:
        entries, metadata = safetensors.read(stream)
        arrays = {name: entry.read() for name, entry in entries.items()}
    for notes, problem in (("{", "its notes is missing or is no JSON"), ("[1]", "its notes are no mapping")):
        with file.open("wb") as stream:
            safetensors.write(stream, arrays, {**metadata, "notes": notes})
        with pytest.raises(ValueError, match=problem):
            checkpoint.read_notes(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be loaded"):
        checkpoint.read_notes(file)


def test_a_run_saved_by_the_callback_goes_on_bit_for_bit(tmp_path):
    whole, whole_optimizer = network(), Adagrad(0.1)
    nothing = checkpoint.Callback(tmp_path / "whole", Adagrad(1), network())
    start: Any = whole.parameters()
    mx.random.seed(5)
    train(whole, whole_optimizer, 10, nothing)
    model, optimizer = network(), Adagrad(0.1)
    model.update(start)
    callback = checkpoint.Callback(tmp_path / "run.safetensors", optimizer, model, every=3)
    assert callback.resume() == 0
    mx.random.seed(5)
    train(model, optimizer, 5, callback)  # reports 2 and 4: one save, and one iteration that is lost
    model, optimizer = network(), Adagrad(0.1)
    model.update({"layers": start["layers"][:1]})  # the base is not in the file
    callback = checkpoint.Callback(tmp_path / "run.safetensors", optimizer, model, every=3)
    done = callback.resume()
    assert done == 4
    train(model, optimizer, 10 - done, callback)
    assert bits([model.parameters(), optimizer.state]) == bits([whole.parameters(), whole_optimizer.state])
    assert checkpoint.read_notes(tmp_path / "run.safetensors") == {"iterations": 10}


def test_it_saves_at_the_first_report_after_every_so_many_iterations_and_hands_on(tmp_path, monkeypatch):
    saved, seen = [], []

    class Wrapped:
        def on_train_loss_report(self, info):
            seen.append(info["iteration"])

        def on_val_loss_report(self, info):
            seen.append(-info["iteration"])

    model, optimizer = network(), Adagrad(0.1)
    file = tmp_path / "run.safetensors"
    callback = checkpoint.Callback(file, optimizer, model, every=3, wrapped=Wrapped())
    real = checkpoint.callback.save

    def save(*args, notes, **given):
        saved.append(notes["iterations"])
        real(*args, notes=notes, **given)

    monkeypatch.setattr(checkpoint.callback, "save", save)
    train(model, optimizer, 12, callback)
    assert saved == [4, 6, 10, 12] and seen == [2, 4, 6, 8, 10, 12, -12]
    with file.open("rb") as stream:
        names = set(safetensors.read(stream)[0])
    assert "model.layers.2.weight" in names and not any(name.startswith("model.layers.0") for name in names)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"every": 0}, ValueError, r"\[Callback\] 'every' must be at least 1 but got 0."),
        ({"every": math.pi}, TypeError, r"\[Callback\] 'every' must be an integer but got 3.14"),
        ({"optimizer": network()}, TypeError, "'optimizer' must be an mlx.optimizers.Optimizer but got Sequential"),
        ({"path": Adagrad(0.1)}, TypeError, "'path' must be a path but got Adagrad"),
    ],
)
def test_wrong_arguments_are_refused(change, error, message):
    arguments: dict[str, Any] = {"path": Path("run"), "optimizer": Adagrad(0.1), "model": network(), **change}
    with pytest.raises(error, match=message):
        checkpoint.Callback(**arguments)
