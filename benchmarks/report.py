"""What every benchmark script shares: its options, the header that names the machine, tables and files."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_adagrad

ROOT = Path(__file__).resolve().parents[1]

# Memory bandwidth in GB/s by MLX's device name; where the versions of a chip differ, by number of CPU cores. From
# Apple's announcements and technical specifications (apple.com/newsroom, support.apple.com/specs); M1: 128 bits of
# LPDDR4X-4266. An M5 Max with a 32-core GPU has less, 460, which neither its name nor its CPU cores tell.
BANDWIDTH: dict[str, float | dict[int, float]] = {
    "Apple M1": 68.25,
    "Apple M1 Pro": 200,
    "Apple M1 Max": 400,
    "Apple M1 Ultra": 800,
    "Apple M2": 100,
    "Apple M2 Pro": 200,
    "Apple M2 Max": 400,
    "Apple M2 Ultra": 800,
    "Apple M3": 100,
    "Apple M3 Pro": 150,
    "Apple M3 Max": {14: 300, 16: 400},
    "Apple M3 Ultra": 819,
    "Apple M4": 120,
    "Apple M4 Pro": 273,
    "Apple M4 Max": {14: 410, 16: 546},
    "Apple M5": 153,
    "Apple M5 Pro": 307,
    "Apple M5 Max": 614,
}


def options(description: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a benchmark script: ``quick``, ``seconds`` and ``out``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes and 3 rounds: does it run at all?")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each comparison in s (default: 10)")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of the results (default: out)")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    return chosen


def on_gpu() -> bool:
    """Whether MLX computes on a Metal GPU now."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


def has_torch() -> bool:
    """Whether torch can be imported."""
    return importlib.util.find_spec("torch") is not None


def machine() -> dict[str, str]:
    """What a reader must know to compare these figures with his own; nothing that names the machine's owner."""
    facts = {
        "CPU": f"{_cpu_model()}, {cores()} cores, {memory_bytes() / 2**30:.0f} GiB",
        "MLX device": f"{mx.default_device()}, {mx.device_info(mx.default_device())['device_name']}",
        "load before the run": f"{os.getloadavg()[0]:.2f} (above about 0.5 something else was at work too)",
        "OS": platform.platform(),
        "Python": platform.python_version(),
        "mlx": mx.__version__,  # type: ignore[attr-defined]
        "mlx_adagrad": f"{mlx_adagrad.__version__}, commit {_commit()}",
    }
    if bandwidth() is not None:
        facts["memory bandwidth"] = f"{bandwidth():g} GB/s (Apple's figure)"
    if has_torch():
        import torch  # type: ignore[import-not-found]

        facts["torch"] = f"{torch.__version__}, {torch.get_num_threads()} threads"
    return facts


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bandwidth() -> float | None:
    """The memory bandwidth of this Mac's chip in GB/s, or None where it is not known."""
    if not on_gpu():
        return None
    known = BANDWIDTH.get(str(mx.device_info(mx.gpu)["device_name"]))
    return known.get(os.cpu_count() or 0) if isinstance(known, dict) else known


def _cpu_model() -> str:
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return (commit or "unknown") + (" with changes" if changed else "")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(facts: dict[str, str]) -> str:
    """A Markdown list of facts."""
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the results as JSON, every measured figure in it."""
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
