"""The pages for those who come from another framework: what they show runs, and what they name exists."""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_adagrad import checkpoint, schedules, wrappers

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "coming_from").glob("*.md"))


def blocks_of(page: Path) -> list[str]:
    """Our lines: ours are marked python, theirs py."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_our_lines_run(page):
    blocks = blocks_of(page)
    assert len(blocks) >= 2
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["optimizer"].step.item() == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_named_exists(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:torch|mindspore|optax|keras)_[a-z_]+(?:_lr|_decay|_schedule)\b", text):
        assert name in schedules.__all__
    for name in re.findall(r"checkpoint\.(\w+)", text):
        assert hasattr(checkpoint, name)
    for name in re.findall(r"\b(ClipBy\w+|DynamicLossScale|GradientAccumulation|SkipNonFinite|MaxNorm)\b", text):
        assert hasattr(wrappers, name)
    for link in re.findall(r"\]\((\S+?)\)", text):
        assert (page.parent / link).exists()
    for name in re.findall(r"examples/\w+\.py", text):
        assert (ROOT / name).exists()


def state_dict(weight_decay: float, *shapes: tuple[int, ...]) -> dict[str, Any]:
    """``torch.optim.Adagrad(lr=0.3).state_dict()`` of parameters of these shapes after two steps."""
    state = {i: {"step": np.float32(2), "sum": np.full(shape, i + 1, np.float32)} for i, shape in enumerate(shapes)}
    group = {"lr": 0.3, "lr_decay": 0, "weight_decay": weight_decay, "eps": 1e-10, "maximize": False}
    return {"state": state, "param_groups": [group | {"params": list(state)}]}


def test_the_page_on_checkpoints_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kernel = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez("optimizer.npz", **{"0": np.int64(5), "1": np.float32(0.2), "2": kernel, "3": np.ones(3, np.float32)})
    filters = np.arange(600, dtype=np.float32).reshape(8, 3, 5, 5)
    namespace: dict[str, Any] = {
        "state_dict": state_dict(0.02, (3, 4), (3,), (1, 3), (1,)),
        "conv_state_dict": state_dict(0, (8, 3, 5, 5), (8,)),
        "train_set": [],
        "args": None,
        "train": lambda *_, training_callback, **__: training_callback.on_train_loss_report({"iteration": 100}),
    }
    namespace["conv_state_dict"]["state"][0]["sum"] = filters
    for block in blocks_of(ROOT / "docs" / "checkpoints.md"):
        exec(block, namespace)
    optimizer, dense, conv = (namespace[name] for name in ("optimizer", "dense", "conv"))
    assert (tmp_path / "run.safetensors").exists()
    assert optimizer.learning_rate.item() == pytest.approx(0.3)
    assert optimizer.state["layers"][2]["weight"]["v"].tolist() == [[3, 3, 3]]
    assert dense.step.item() == 5
    assert np.array_equal(dense.state["dense"]["weight"]["v"], kernel.T)
    assert mx.array_equal(conv.state["conv"]["weight"]["v"], mx.array(filters.transpose(0, 2, 3, 1)))


def test_rates_in_a_list_stay_inside_it():
    namespace: dict[str, Any] = {}
    for block in blocks_of(ROOT / "docs" / "coming_from" / "mindspore.md"):
        exec(block, namespace)
    optimizer = namespace["optimizer"]
    rates = []
    for _ in range(5):
        optimizer.apply_gradients({"w": mx.ones(1)}, {"w": mx.ones(1)})
        rates.append(round(optimizer.learning_rate.item(), 5))
    assert rates == [0.1, 0.05, 0.01, 0.01, 0.01]


def test_there_is_a_page_for_each():
    assert {page.stem for page in PAGES} == {"keras", "mindspore", "mlx", "torch"}
    assert all("## Where we differ on purpose" in page.read_text(encoding="utf-8") for page in PAGES)
