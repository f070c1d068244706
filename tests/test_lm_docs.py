"""The page on mlx-lm and the folder of its example: what they show runs."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest

import tiny_models
from mlx_adagrad import Adagrad
from mlx_adagrad.lm.options import NO_JSON, SPARSE, WRAPPERS, optimizer_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "fine_tune_with_mlx_lm.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.xdist_group("lm")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_every_wrapper_stands_on_the_page_and_keywords_exist():
    assert {*re.findall(r"^\| `(\w+): ", PAGE, re.MULTILINE)} == {*WRAPPERS, SPARSE}
    sentence = PAGE[PAGE.index("Under `adagrad` stands") : PAGE.index("In place of a `weight_decay_mask`")]
    named = {*re.findall(r"`(\w+)`", sentence)} - {"adagrad", "Adagrad", "RowWise", "lr"}
    assert len(named) > 8 and named <= {*inspect.signature(Adagrad).parameters} - {*NO_JSON}


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https:)(\S+?)\)", PAGE):
        assert (ROOT / "docs" / link).exists()


def test_the_options_on_the_page_make_an_optimizer():
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with mlx-lm")
    table = re.findall(r"^\| `(.*?)`(?:, or `dynamic`)? \|", PAGE, re.MULTILINE)
    for text in (*table, *(f"clip_norm: {given}" for given in re.findall(r"`clip_norm: (\{.*?\})`", PAGE))):
        options = yaml.safe_load(text)
        assert (optimizer_of(options, 0.1, None).learning_rate == 0.1).item()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'mlx-adagrad[lm]'")
    return tiny_models.make_model(tmp_path_factory.mktemp("lm_docs") / "model")


def command(folder: Path, *arguments: object) -> str:
    """What a command prints, run in ``folder`` as a user runs it."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_trains_resumes_and_generates(model, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(ROOT / "examples" / "lora", folder)
    mlx_adagrad: tuple[object, ...] = ("-m", "mlx_adagrad.lm")
    lora = (*mlx_adagrad, "lora", "--config", "lora.yaml", "--model", model, "--num-layers", 2, "--save-every", 3)
    command(folder, *lora, "--iters", 4)
    output = command(folder, *lora, "--iters", 8, "--resume")
    assert "Resuming adapters/resume.safetensors after iteration 4 of 8." in output
    names = {file.name for file in (folder / "adapters").iterdir()}
    assert {"adapters.safetensors", "0000003_adapters.safetensors", "0000006_adapters.safetensors"} < names
    generate = (*mlx_adagrad, "generate", "--model", model, "--adapter-path", "adapters", "--prompt", "9", "-m", 2)
    assert "Generation: 2 tokens" in command(folder, *generate)


def test_the_lines_for_python_resume(model, tmp_path):
    program = ROOT / "examples" / "lora" / "from_python.py"
    arguments = (program, "--model", model, "--out")
    for iters in (30, 60):
        output = command(tmp_path, *arguments, "twice", "--iters", iters)
    assert "after iteration 30 of 60" in output
    command(tmp_path, *arguments, "once", "--iters", 60)
    for name in ("adapters.safetensors", "resume.safetensors"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    lines = next(block for block in blocks("python") if "resume=True" in block).strip().splitlines()
    text = program.read_text(encoding="utf-8")
    assert len(lines) == 3 and all(line in text for line in lines)


def test_the_lines_for_other_trainers_run():
    namespace: dict[str, Any] = {}
    (block,) = (block for block in blocks("python") if "stand_in" in block)
    exec(block, namespace)
    assert isinstance(namespace["optimizer"], Adagrad) and isinstance(optim.AdamW(0.1), optim.AdamW)
    assert mx.allclose(namespace["optimizer"].learning_rate, mx.array(1e-3))
