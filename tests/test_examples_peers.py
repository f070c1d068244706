"""The examples that go on from other frameworks, and the one that survives a bad batch, run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import continued_run
import from_keras
import from_torch
import skip_nonfinite
from mlx_adagrad import Adagrad, checkpoint

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {"torch": from_torch, "keras": from_keras}


def run(script, *arguments):
    """What an example prints."""
    command = [sys.executable, ROOT / "examples" / script, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("how", [[], ["--recorded"]], ids=["installed or recorded", "recorded"])
def test_a_run_goes_on_here_on_the_same_curve(name, how, tmp_path):
    output = run(f"from_{name}.py", *how, "--out", tmp_path)
    assert float(re.findall(r"largest difference of the losses: (\S+)", output)[0]) < 1e-4
    start, _, end = map(
        float, re.findall(r"loss at the hand-over (\S+), at the end (\S+) there and (\S+) here", output)[0]
    )
    assert end < 0.8 * start
    assert (tmp_path / f"from_{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", EXAMPLES)
def test_without_the_state_the_curve_is_another(name, monkeypatch):
    example = EXAMPLES[name]
    run = example.recorded(continued_run.DATA / f"from_{name}.npz")
    theirs = run.losses[example.HAND_OVER :]
    assert max(abs(a - b) for a, b in zip(example.go_on(run), theirs, strict=True)) < 1e-4
    monkeypatch.setattr(checkpoint, f"import_{name}", lambda *arguments, **options: None)
    assert max(abs(a - b) for a, b in zip(example.go_on(run), theirs, strict=True)) > 1e-3


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_record_is_read_as_it_was_written(name, tmp_path):
    example = EXAMPLES[name]
    run = example.recorded(continued_run.DATA / f"from_{name}.npz")
    example.record(run, tmp_path / "again.npz")
    again = example.recorded(tmp_path / "again.npz")
    assert again.losses == run.losses and example.go_on(again) == example.go_on(run)


def test_a_bad_batch_leaves_the_run_unharmed_and_stock_lost(tmp_path):
    output = run("skip_nonfinite.py", "--out", tmp_path)
    losses = dict(re.findall(r"^(never harmed|stock|ours) +loss before.*at the end: (\S+)$", output, re.MULTILINE))
    assert losses["stock"] == "nan"
    assert float(losses["ours"]) == pytest.approx(float(losses["never harmed"]), rel=0.2)
    assert output.count("a batch was left out") == 1 and "steps skipped: 1 of 60; steps counted: 59" in output
    assert (tmp_path / "skip_nonfinite.png").read_bytes().startswith(b"\x89PNG")


def test_the_bad_batch_is_what_loses_a_run():
    lost = skip_nonfinite.train(Adagrad(skip_nonfinite.LEARNING_RATE))
    bad = skip_nonfinite.BAD_STEP
    assert [bool(mx.isnan(loss)) for loss in map(mx.array, lost)] == [
        step >= bad for step in range(skip_nonfinite.STEPS)
    ]
