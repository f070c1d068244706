"""mlx-lm's command line with ``optimizer: adagrad`` and ``--resume``, on a tiny model that is made here."""

import inspect
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'mlx-adagrad[lm]'")

import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm import load, lora
from mlx_lm.tuner import trainer
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.utils import linear_to_lora_layers

import tiny_models
from mlx_adagrad import Adagrad, SparseEmbedding, checkpoint
from mlx_adagrad.lm import __main__ as command
from mlx_adagrad.lm import known, run_file, train

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.xdist_group("lm")  # one worker imports transformers

CONFIG = {
    "train": True,
    "optimizer": "adagrad",
    "learning_rate": 0.02,
    "num_layers": -1,
    "batch_size": 4,
    "iters": 8,
    "save_every": 3,
    "steps_per_report": 2,
    "steps_per_eval": 5,
    "val_batches": 2,
    "max_seq_length": 64,
    "lora_parameters": {"rank": 2, "dropout": 0.2, "scale": 10.0},
}
WRAPPED = {"clip_norm": 1.0, "ema": 0.8, "skip_non_finite": True, "groups": [{"params": "*lora_a", "lr": 0.01}]}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with two models and data."""
    folder = tmp_path_factory.mktemp("lm")
    tiny_models.make_model(folder / "llama")
    tiny_models.make_model(folder / "llama-4bit", bits=4)
    tiny_models.make_model(folder / "qwen3", "qwen3", "bfloat16")
    tiny_models.make_data(folder / "data")
    return folder


def written(folder: Path, home: Path, options: object = None, **changes: object) -> list[str]:
    """The arguments of a command whose configuration file is CONFIG with ``changes``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"model": str(home / "llama"), "data": str(home / "data"), "adapter_path": str(folder)}
    config = paths | CONFIG | changes
    config.setdefault("optimizer_config", {"adagrad": options})
    file = folder.with_suffix(".yaml")
    file.write_text(json.dumps(config))  # JSON is YAML
    return ["lora", "--config", str(file)]


def run(arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mlx-adagrad", *arguments])
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # which mlx-lm sets for good
    command.main()


def files(folder: Path) -> dict[str, bytes]:
    """Everything that a run leaves, but the configuration, which tells whether it was resumed."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "adapter_config.json"}


class Crash(Exception):
    """The end of a process, as far as its files go."""


def crash_after(saves: int, monkeypatch) -> None:
    """Let the next run die when it has written its state so many times, and nothing after that."""
    real, count = run_file.save, iter(range(1, saves + 1))

    def save(*args):
        real(*args)
        if next(count) == saves:
            monkeypatch.setattr(run_file, "save", real)
            raise Crash

    monkeypatch.setattr(run_file, "save", save)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_moment_and_resumed_it_ends_as_the_run_that_never_stopped(seed, home, tmp_path):
    """The real command, killed with SIGKILL wherever it happens to be."""
    draw = random.Random(seed)
    changes: dict = {"iters": 40, "save_every": 2, "steps_per_report": 1}
    changes |= {"grad_accumulation_steps": 3} if seed == 2 else {}
    command = [sys.executable, "-u", "-m", "mlx_adagrad.lm"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(name: str, *more: str) -> subprocess.Popen:
        arguments = [*command, *written(tmp_path / name, home, WRAPPED, **changes), *more]
        return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole = start("whole")
    for _ in range(2):
        process = start("killed", "--resume")
        saves = draw.randint(1, 7)
        seen = []
        for line in process.stdout or ():
            seen.append(line)
            saves -= "saved" in line
            if saves <= 0 and draw.random() < 0.4:
                break
        process.kill()
        assert process.wait() == -9, "".join(seen)
    last = start("killed", "--resume")
    output, _ = last.communicate()
    assert last.returncode == 0 and "Resuming" in output, output
    assert whole.communicate()[0] and whole.returncode == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


CASES = {
    "lora": ({}, {}),
    "wrapped": (WRAPPED | {"loss_scale": 64}, {}),
    "accumulate": ({"accumulate": 2, "ema": 0.5}, {"save_every": 3}),
    "mlx-lm's accumulation": ({}, {"grad_accumulation_steps": 2}),
    "dora": ({"weight_decay": 0.1}, {"fine_tune_type": "dora"}),
    "full": ({"ema": 0.9}, {"fine_tune_type": "full", "num_layers": 1}),
    "qlora": ({}, {"model": "llama-4bit"}),
    "bfloat16": ({"loss_scale": "dynamic"}, {"model": "qwen3"}),
    "schedule": ({}, {"lr_schedule": {"name": "cosine_decay", "warmup": 3, "arguments": [0.05, 20, 1e-3]}}),
    "sparse embedding": ({"sparse_embedding": True}, {"fine_tune_type": "full", "num_layers": 1}),
    "adam": ({}, {"optimizer": "adam", "learning_rate": 1e-3}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_dies_between_its_two_files_ends_as_the_run_that_never_stopped(case, home, tmp_path, monkeypatch):
    options, changes = CASES[case]
    changes = changes | {"model": str(home / changes.get("model", "llama"))}
    run(written(tmp_path / "whole", home, options, **changes), monkeypatch)
    # the first save is in the middle of a window, if there is one; the second, of the second epoch, of 5 batches
    crash_after(1 if "accumulation" in case else 2, monkeypatch)
    with pytest.raises(Crash):
        run(written(tmp_path / "stopped", home, options, **changes), monkeypatch)
    assert len(files(tmp_path / "stopped")) < len(files(tmp_path / "whole"))
    run([*written(tmp_path / "stopped", home, options, **changes), "--resume"], monkeypatch)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_run_that_has_ended_can_become_longer(home, tmp_path, monkeypatch, capsys):
    """The validation at its end, which the longer run does not have there, draws no random number that counts."""
    run(written(tmp_path / "whole", home, iters=12), monkeypatch)
    run(written(tmp_path / "longer", home, iters=7), monkeypatch)
    run([*written(tmp_path / "longer", home, iters=12), "--resume"], monkeypatch)
    assert files(tmp_path / "longer") == files(tmp_path / "whole")
    capsys.readouterr()
    run([*written(tmp_path / "longer", home, iters=7), "--resume"], monkeypatch)
    assert "after iteration 12 of 7: nothing is left to do." in capsys.readouterr().out
    assert files(tmp_path / "longer") == files(tmp_path / "whole")


def test_it_trains_as_mlx_lm_would_with_the_same_optimizer(home, tmp_path, monkeypatch):
    """Same order of batches, same dropout, same weights; and for its own optimizers the same files."""
    options: dict[str, Any] = {"weight_decay": 0.1, "initial_accumulator_value": 0.01}
    run(written(tmp_path / "ours", home, options), monkeypatch)
    arguments = written(tmp_path / "theirs", home, optimizer="sgd")
    monkeypatch.setattr(optim, "SGD", lambda learning_rate: Adagrad(learning_rate, **options))
    monkeypatch.setattr(sys, "argv", arguments)
    lora.main()
    theirs, ours = (loaded(tmp_path / name / "adapters.safetensors") for name in ("theirs", "ours"))
    assert equal(theirs, ours)
    names = {f.name for f in (tmp_path / "theirs").iterdir()}
    assert {f.name for f in (tmp_path / "ours").iterdir()} == names | {"resume.safetensors"}


def loaded(file: Path) -> Any:
    return mx.load(str(file))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[key], b[key]).item() for key in a)


def test_header_and_adapter_config_say_adagrad(home, tmp_path, monkeypatch, capsys):
    arguments = written(tmp_path / "a", home, {"eps": 1e-6}, optimizer=None, iters=1)
    run([*arguments, "--optimizer", "adagrad"], monkeypatch)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["optimizer"] == "adagrad" and config["optimizer_config"]["adagrad"] == {"eps": 1e-6}
    if hasattr(lora, "print_lora_run_header"):  # from mlx-lm 0.32 on
        assert "adagrad · lr 2.0e-02" in capsys.readouterr().out
    run(["lora", "--model", str(home / "llama"), "--data", str(home / "data"), "--adapter-path", str(tmp_path / "a"),
         "--test", "--test-batches", "1"], monkeypatch)
    assert "Test loss" in capsys.readouterr().out


def test_what_is_evaluated_and_saved_is_the_average(home, tmp_path, monkeypatch, capsys):
    """The weights that go on are beside; what --test says after training is what mlx-lm says of the saved adapters."""
    losses: list[float] = []
    real = trainer.evaluate

    def evaluate(*args, **kwargs):
        losses.append(real(*args, **kwargs))
        return losses[-1]

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    arguments = written(tmp_path / "a", home, {"ema": 0.95}, steps_per_eval=3, iters=9, learning_rate=0.1)
    run([*arguments, "--test"], monkeypatch)
    said = re.findall(r"Test loss [\d.]+", capsys.readouterr().out)
    averaged, raw = loaded(tmp_path / "a" / "adapters.safetensors"), loaded(tmp_path / "a" / "resume.safetensors")
    for name, w in averaged.items():
        assert mx.array_equal(w, raw[f"optimizer._mlx_adagrad.averages./{name.replace('.', '/')}"])
    assert any(not mx.array_equal(w, raw[f"model.{name}"]) for name, w in averaged.items())
    assert equal(averaged, loaded(tmp_path / "a" / "0000009_adapters.safetensors"))
    monkeypatch.setattr(sys, "argv", [*arguments[:1], "--model", str(home / "llama"), "--data", str(home / "data"),
                                      "--adapter-path", str(tmp_path / "a"), "--test", "--batch-size", "4"])
    lora.main()
    assert said == re.findall(r"Test loss [\d.]+", capsys.readouterr().out)
    run([*written(tmp_path / "b", home, {}, steps_per_eval=3, iters=9, learning_rate=0.1)], monkeypatch)
    # iterations 1, 3, 6, 9: the average begins as the weights, and follows them slowly
    assert losses[0] == losses[4] and losses[3] > losses[7]


def test_the_loss_that_is_reported_is_not_scaled(home, tmp_path, monkeypatch):
    said: dict[str, list[float]] = {}
    for name, options in {"plain": {}, "scaled": {"loss_scale": 1024}, "dynamic": {"loss_scale": "dynamic"}}.items():
        seen: list[float] = said.setdefault(name, [])
        real = trainer.train

        class Callback:
            def on_train_loss_report(self, info, seen=seen):
                seen.append(info["train_loss"])

            def on_val_loss_report(self, info, seen=seen):
                seen.append(info["val_loss"])

        callback = Callback()

        def train(*args, real=real, callback=callback, **given):
            real(*args, **{**given, "training_callback": callback})

        train.__signature__ = inspect.signature(real)
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "train", train)
            run(written(tmp_path / name, home, options), patch)
    assert len(said["plain"]) == 7
    assert said["scaled"] == pytest.approx(said["plain"], rel=1e-5)  # powers of two: the same gradients
    assert said["dynamic"] == pytest.approx(said["plain"], rel=1e-5)


def test_an_embedding_is_trained_by_the_rows_that_are_named(home, tmp_path, monkeypatch):
    seen = []
    real = trainer.train

    def train(model, optimizer, **given):
        real_update = optimizer.update

        def update(model, gradients):
            seen.append(type(gradients["model"]["embed_tokens"]["weight"]).__name__)
            real_update(model, gradients)

        monkeypatch.setattr(optimizer, "update", update)
        real(model=model, optimizer=optimizer, **given)
        assert type(model.model.embed_tokens) is SparseEmbedding

    train.__signature__ = inspect.signature(real)
    monkeypatch.setattr(trainer, "train", train)
    value_and_grad = nn.value_and_grad
    arguments = written(tmp_path / "a", home, {"sparse_embedding": True}, fine_tune_type="full", num_layers=1)
    run(arguments, monkeypatch)
    assert set(seen) == {"RowSparse"} and nn.value_and_grad is value_and_grad
    table = loaded(tmp_path / "a" / "adapters.safetensors")["model.embed_tokens.weight"]
    base: Any = load(str(home / "llama"))
    model, tokenizer = base
    changed = np.array((table != model.model.embed_tokens.weight).any(axis=1))
    text = "".join(json.loads(line)["text"] for line in (home / "data" / "train.jsonl").open())
    named = {*tokenizer.encode(text), tokenizer.eos_token_id, 0}  # 0 pads
    assert 5 < changed.sum() and set(np.flatnonzero(changed).tolist()) <= named


@pytest.mark.parametrize(
    "options, changes, message",
    [
        ({"sparse_embedding": True}, {}, "'sparse_embedding' needs fine_tune_type: full"),
        ({"eps": -1}, {}, "[Adagrad] 'eps' should be >0"),
        ([], {"optimizer_config": 3}, "[optimizer_config.adagrad] must be a mapping of options but got 3"),
        ({}, {"learning_rate": -1}, "[Adagrad] 'learning_rate' must be non-negative but got -1.0."),
        ({}, {"lr_schedule": {"name": "cosine"}}, "mlx-lm cannot build the schedule {'name': 'cosine'}"),
        ({}, {"resume": "yes"}, "[lora] 'resume' must be True or False but got 'yes'."),
    ],
)
def test_wrong_options_end_in_a_sentence_before_the_model_is_loaded(options, changes, message, tmp_path, monkeypatch):
    arguments = written(tmp_path / "a", tmp_path / "nowhere", options, **changes)
    with pytest.raises(SystemExit) as ended:
        run(arguments, monkeypatch)
    assert str(ended.value).startswith("mlx-adagrad: ") and message in str(ended.value)
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "qwen3"}, "computes its output with the embedding too"),
        ({"grad_accumulation_steps": 2}, "use 'accumulate' in place of its flag"),
        ({"model": "llama-4bit"}, "the model has no nn.Embedding"),
    ],
)
def test_an_embedding_that_cannot_be_trained_sparsely_is_refused(changes, message, home, tmp_path, monkeypatch):
    changes = changes | {"model": str(home / changes.get("model", "llama"))}
    arguments = written(tmp_path / "a", home, {"sparse_embedding": True}, fine_tune_type="full", **changes)
    with pytest.raises(ValueError, match=message):
        run(arguments, monkeypatch)
    assert nn.value_and_grad.__module__.startswith("mlx.nn")


def test_a_group_that_matches_nothing_is_refused_before_the_first_validation(home, tmp_path, monkeypatch):
    def evaluate(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    options = {"ema": 0.9, "groups": [{"params": "*lora_a", "lr": 0.1}]}
    with pytest.raises(ValueError, match=r"'params' '\*lora_a' matches no parameter"):
        run(written(tmp_path / "a", home, options, fine_tune_type="full"), monkeypatch)


def test_a_run_under_other_options_says_what_differs(home, tmp_path, monkeypatch):
    run(written(tmp_path / "a", home, WRAPPED), monkeypatch)
    before = files(tmp_path / "a")
    other = WRAPPED | {"clip_norm": 2.0, "groups": [{"params": "*lora_a", "lr": 0.5}]}
    lora_parameters = CONFIG["lora_parameters"] | {"rank": 4}
    arguments = written(tmp_path / "a", home, other, batch_size=2, learning_rate=0.5, lora_parameters=lora_parameters)
    with pytest.raises(SystemExit) as ended:
        run([*arguments, "--resume", "--model", str(tmp_path / "nowhere" / "llama")], monkeypatch)
    for line in (
        "'learning_rate' was 0.02 but is 0.5 here",
        "'lora_parameters.rank' was 2 but is 4 here",
        "'batch_size' was 4 but is 2 here",
        "'optimizer_config.adagrad.clip_norm' was 1.0 but is 2.0 here",
        "'optimizer_config.adagrad.groups' was [{'params': '*lora_a', 'lr': 0.01}] but is",
    ):
        assert line in str(ended.value)
    assert "iters" not in str(ended.value) and "model" not in str(ended.value)
    assert files(tmp_path / "a") == before


def test_other_data_is_noticed(home, tmp_path, monkeypatch):
    run(written(tmp_path / "a", home), monkeypatch)
    data = tiny_models.make_data(tmp_path / "data", examples=25)
    with pytest.raises(ValueError, match="'training examples' was 20 but is 25 here"):
        run([*written(tmp_path / "a", home), "--resume", "--data", str(data)], monkeypatch)


def test_without_a_saved_run_it_starts_but_never_over_other_adapters(home, tmp_path, monkeypatch, capsys):
    run([*written(tmp_path / "a", home, iters=2), "--resume"], monkeypatch)
    assert "There is no" in capsys.readouterr().out
    (tmp_path / "a" / "resume.safetensors").unlink()
    before = files(tmp_path / "a")
    with pytest.raises(SystemExit, match="has no resume.safetensors beside it to resume: load its weights with"):
        run([*written(tmp_path / "a", home, iters=2), "--resume"], monkeypatch)
    assert files(tmp_path / "a") == before


def test_a_callback_saves_a_run_of_mlx_lm_itself(home, tmp_path):
    """The adapters, the optimizer and the random state; the base is not in the file."""
    base: Any = load(str(home / "llama-4bit"))
    model, tokenizer = base
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 2, "dropout": 0.2, "scale": 10.0})
    optimizer = Adagrad(0.02)
    sets = load_dataset(SimpleNamespace(data=home / "data", train=True, test=False), tokenizer)
    args = trainer.TrainingArgs(
        iters=5, steps_per_report=2, max_seq_length=64, adapter_file=str(tmp_path / "adapters.safetensors")
    )
    callback: Any = checkpoint.Callback(tmp_path / "run.safetensors", optimizer, model, every=2)
    trainer.train(model, optimizer, CacheDataset(sets[0]), args=args, training_callback=callback)
    saved, adapters = loaded(tmp_path / "run.safetensors"), loaded(tmp_path / "adapters.safetensors")
    trained = {name.removeprefix("model."): w for name, w in saved.items() if name.startswith("model.")}
    assert trained.keys() == adapters.keys() and {name.rsplit(".")[-1] for name in trained} == {"lora_a", "lora_b"}
    assert callback.resume() == 4
    assert equal(trained, dict(tree_flatten(model.trainable_parameters()))) and optimizer.step.item() == 4


def test_train_itself_starts_over_nothing(tmp_path):
    args = trainer.TrainingArgs(adapter_file=str(tmp_path / "adapters.safetensors"))
    (tmp_path / "adapters.safetensors").write_bytes(b"weights")
    with pytest.raises(FileExistsError, match="has no resume.safetensors beside it to resume"):
        train(nn.Linear(2, 1), Adagrad(0.1), [], None, args, resume=True)
    assert files(tmp_path) == {"adapters.safetensors": b"weights"}


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\0" * len(b)])
def test_a_damaged_run_is_refused(damage, home, tmp_path, monkeypatch):
    file = tmp_path / "a" / "resume.safetensors"
    arguments = written(tmp_path / "a", home, iters=2)
    run(arguments, monkeypatch)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SystemExit, match="resume.safetensors' cannot be loaded: "):
        run([*arguments, "--resume"], monkeypatch)


def test_an_adapter_file_to_resume_from_keeps_its_meaning(home, tmp_path, monkeypatch):
    """Its weights, a new optimizer, the first iteration again; and a run that began so can be resumed."""
    run(written(tmp_path / "first", home, iters=4), monkeypatch)
    adapters = tmp_path / "first" / "adapters.safetensors"
    seen: list[Any] = []
    real = trainer.train

    def train(**given):
        seen.append((dict(tree_flatten(given["model"].trainable_parameters())), given["optimizer"].step.item()))
        real(**given)

    train.__signature__ = inspect.signature(real)
    monkeypatch.setattr(trainer, "train", train)
    run([*written(tmp_path / "second", home), "--resume-adapter-file", str(adapters)], monkeypatch)
    ((weights, step),) = seen
    assert step == 0 and equal(weights, loaded(adapters))
    crash_after(1, monkeypatch)
    with pytest.raises(Crash):
        run([*written(tmp_path / "third", home), "--resume-adapter-file", str(adapters)], monkeypatch)
    run([*written(tmp_path / "third", home), "--resume"], monkeypatch)
    assert files(tmp_path / "third") == files(tmp_path / "second")


def test_what_mlx_lm_is_not_known_to_do_is_said_in_one_sentence(home, tmp_path, monkeypatch):
    arguments = written(tmp_path / "a", home, iters=4)

    def train(model, optimizer, data, args):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train", train)
        with pytest.raises(SystemExit) as ended:
            run(arguments, patch)
    assert re.fullmatch(
        r"mlx-adagrad: mlx-lm [\d.]+ is not known here \(mlx_lm.tuner.trainer.train takes "
        r"\(model, optimizer, data, args\), where \(model, .*\) was expected\): install one of 0.31 to 0.32.",
        str(ended.value),
    )
    with monkeypatch.context() as patch:
        patch.delattr(lora, "train_model")
        with pytest.raises(SystemExit, match="mlx_lm.lora.train_model is gone, where"):
            run(arguments, patch)


def test_a_loop_that_counts_in_another_way_is_refused_before_its_first_step():
    with known.counting_from(trainer, 3, 9) as check:
        with pytest.raises(known.NotKnown, match="its loop counts iterations in another way"):
            check()
        counted: Any = vars(trainer)["range"]
        assert list(counted(1, 10)) == list(range(4, 10)) and list(counted(5)) == list(range(5))
        check()
    assert "range" not in vars(trainer)
    with known.counting_from(trainer, 0, 9) as check:
        check()  # a run from the start needs nothing of it


def test_without_mlx_lm_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm.cli", None)
    with pytest.raises(SystemExit, match=re.escape("mlx-lm cannot be imported")) as ended:
        run(["lora", "--help"], monkeypatch)
    assert "pip install 'mlx-adagrad[lm]'" in str(ended.value)


def test_everything_is_as_before_afterwards(home, tmp_path, monkeypatch):
    def names(module):
        return {name: value for name, value in vars(module).items() if not name.startswith("__")}

    before = {module: names(module) for module in (lora, trainer, nn, optim)}
    run(written(tmp_path / "a", home, {"sparse_embedding": True}, fine_tune_type="full", iters=2), monkeypatch)
    with pytest.raises(SystemExit):
        run(written(tmp_path / "b", home, {"eps": -1}), monkeypatch)
    assert {module: names(module) for module in before} == before


def test_the_other_commands_are_those_of_mlx_lm(monkeypatch, capsys):
    run(["--version"], monkeypatch)
    assert re.fullmatch(r"[\d.]+\n", capsys.readouterr().out)
    run([], monkeypatch)
    assert "lora" in capsys.readouterr().out
