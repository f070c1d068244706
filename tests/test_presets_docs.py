"""The pages for those who come from another framework: what they show runs, and what they name exists."""

import re
from pathlib import Path

import pytest

from mlx_adagrad import checkpoint, schedules, wrappers

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "coming_from").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_our_lines_run(page):
    # ours are marked python, theirs py
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
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


def test_there_is_a_page_for_each():
    assert {page.stem for page in PAGES} == {"keras", "mindspore", "mlx", "torch"}
    assert all("## Where we differ on purpose" in page.read_text(encoding="utf-8") for page in PAGES)
