"""Writes docs/recorded_cases.md: runs every recorded case and tells which options of which framework it verified."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from recorded import Case, cases  # noqa: E402
from replay import NOT_RUN, replay  # noqa: E402

PAGE = ROOT / "docs" / "recorded_cases.md"
TITLES = {
    "torch": "torch",
    "keras": "Keras 3 (and R keras3)",
    "tf_keras": "tf.keras",
    "mindspore": "MindSpore",
    "mlx": "MLX",
    "optax": "optax",
    "paddle": "PaddlePaddle",
    "tf": "TensorFlow's raw ops",
    "bitsandbytes": "bitsandbytes",
    "fbgemm": "FBGEMM",
    "fbgemm_derived": "FBGEMM, row-wise weight decay",
}
HEAD = """# Recorded cases

What was recorded from each framework's own Adagrad (see `tests/golden/README.md`), and whether the optimizer here goes
the same way through the public API: parameters, accumulators, averages, sums of gradients, learning rates and counters
after every call, fp32 within rtol 5e-5 and atol 1e-6, bf16 within 0.02 (|w| + 0.1), fp16 within 0.002 (|w| + 0.1). Run
on the CPU on Linux. `python tests/recorded_table.py` writes this page; `tests/test_recorded_cases.py` is the run.

"""
# What a case shows besides its hyperparameters.
PROBLEMS = {
    "none": "absent gradients",
    "zeros": "gradients with zeros",
    "mixed": "gradients from 1e-5 to 1e3",
    "sparse": "sparse rows, with duplicates",
    "sparse4": "sparse rows, with duplicates",
    "inf": "gradients with Inf and NaN",
}
SHOWN = 3  # cases named for an option; more are counted
NO_OPTION = ("api", "cls", "legacy", "op", "names", "late_at", "optimizer", "min_8bit_size")
KINDS = {  # frameworks that have more than one Adagrad
    "mindspore": lambda hp: "`mindspore.nn`" if hp["api"] == "nn" else "`experimental.optim`",
    "tf_keras": lambda hp: "2.9 (legacy)" if hp.get("legacy", True) else "2.11 and later",
    "tf": lambda hp: f"`{hp['op']}`",
    "bitsandbytes": lambda hp: f"`{hp['cls']}`",
    "fbgemm": lambda hp: f"`{hp['optimizer']}`",
    "fbgemm_derived": lambda hp: f"`{hp['optimizer']}`",
}


def options(case: Case) -> list[str]:
    """What ``case`` verifies, in the framework's own words."""
    kind = KINDS[case.framework](case.hp) + ": " if case.framework in KINDS else ""
    found = [_option(key, value) for key, value in case.hp.items() if key not in NO_OPTION]
    if case.problem in PROBLEMS:
        found.append(PROBLEMS[case.problem])
    if case.dtype != "float32":
        found.append(case.dtype)
    return [kind + option for option in found or ["defaults"]]


def recorded_with(case: Case) -> str:
    """The packages that computed ``case``."""
    packages = {name: version for name, version in case.entry["version"].items() if name != "numpy"}
    return ", ".join(f"{name} {version}" for name, version in packages.items()) or "computed from its reference code"


def _option(key: str, value: object) -> str:
    if isinstance(value, dict) and key in ("learning_rate", "scheduler"):
        return f"`{key}`: {value.get('name', 'a callable')}"
    if key in ("fused", "foreach"):
        return f"`{key}={value}`"
    if isinstance(value, list) and key == "grad_clip":
        return f"`{key}`: {value[0]}"
    return f"`{key}`"


def page(verified: set[str]) -> str:
    """The page, for the ids of the cases that agreed."""
    found, parts = cases(), [HEAD]
    parts.append("| framework | recorded with | cases | verified | not run |\n|---|---|---|---|---|\n")
    for framework, title in TITLES.items():
        own = [case for case in found if case.framework == framework]
        agreed, skipped = sum(case.id in verified for case in own), sum(case.id in NOT_RUN for case in own)
        parts.append(f"| {title} | {recorded_with(own[0])} | {len(own)} | {agreed} | {skipped} |\n")
    parts.append(f"| all | | {len(found)} | {len(verified)} | {len(NOT_RUN)} |\n\n## Not run\n\n")
    parts += [f"- `{name}`: {reason}.\n" for name, reason in NOT_RUN.items()]
    parts.append("\n## Framework, option, verified\n\n| framework | option | verified | cases |\n|---|---|---|---|\n")
    for framework, title in TITLES.items():
        parts += _rows(title, [case for case in found if case.framework == framework], verified)
    return "".join(parts)


def _rows(title: str, found: list[Case], verified: set[str]) -> list[str]:
    by_option: dict[str, list[str]] = {}
    for case in found:
        for option in options(case):
            by_option.setdefault(option, []).append(case.id)
    rows = []
    for option, ids in sorted(by_option.items(), key=lambda item: item[0].replace("`", "").lower()):
        agreed = [name for name in ids if name in verified]
        shown = ", ".join(f"`{name}`" for name in (agreed or ids)[:SHOWN])
        more = f" and {len(agreed) - SHOWN} more" if len(agreed) > SHOWN else ""
        rows.append(f"| {title} | {option} | {'yes' if agreed else 'no'} | {shown}{more} |\n")
    return rows


def main() -> None:
    verified = set()
    for case in cases():
        if case.id not in NOT_RUN:
            replay(case)
            verified.add(case.id)
    PAGE.write_text(page(verified), encoding="utf-8")
    print(f"{len(verified)} cases agree; wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
