"""How long does one update of dense parameters take, and how much memory beside the old and the new state?

Stock ``mlx.optimizers.Adagrad`` and ours, each eager and inside the user's own ``mx.compile``, and torch's three forms
if torch is installed. On a Mac's GPU ``ours`` is the Metal kernel, with the operations (``fused=False``) beside it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from report import bandwidth, bullets, machine, memory_bytes, options, save, table
from steps import Candidate, Shape, candidates
from timing import Comparison, Quartiles, compare

CASES: tuple[list[Shape], ...] = (
    [(4000, 4000)],
    [(1024, 1024)] * 12 + [(1024,)] * 24 + [(8000, 512)],
    [(400, 400)] * 100,
    [(100, 100)] * 300,
    [(8, 512)] * 448,
)
SWEEP = [round(10 ** (k / 2)) for k in range(6, 17)]
BASELINES = ("stock eager", "stock compiled")
NOTES = """Times are medians, speed-ups medians (and quartiles) of the ratio within a round. Extra memory is MLX's peak
above the old parameters and state. B/element is what the operations ask of memory, GB/s that over the time; data that
stays in a cache can lift it above what the memory gives.
"""


def describe(shapes: Sequence[Shape]) -> str:
    """``12 of 1024 x 1024, 24 of 1024``: the shapes and how many there are of each."""
    counts = Counter(" x ".join(map(str, shape)) for shape in shapes)
    return ", ".join(f"{n} of {shape}" if n > 1 else shape for shape, n in counts.items())


def measure(shapes: Sequence[Shape], chosen: argparse.Namespace) -> dict[str, Any]:
    """Compare all candidates on parameters of these shapes; the result is ready for JSON."""
    found = candidates(shapes)
    budget = {"rounds": 3, "warmup": 1} if chosen.quick else {"seconds": chosen.seconds}
    comparison = compare({name: candidate.setup for name, candidate in found.items()}, **budget)
    elements = sum(map(prod, shapes))
    return {
        "case": describe(shapes),
        "elements": elements,
        "tensors": len(shapes),
        "rounds": len(comparison.seconds[BASELINES[0]]),
        "results": {name: _result(name, comparison, found[name], elements) for name in found},
    }


def _result(name: str, comparison: Comparison, candidate: Candidate, elements: int) -> dict[str, Any]:
    seconds = comparison.time(name)
    rate = candidate.bytes_per_element * elements / seconds.median / 1e9
    peak = bandwidth()
    return {
        "seconds": seconds,
        **{f"speedup over {baseline}": comparison.speedup(name, baseline) for baseline in BASELINES},
        "extra copies of the parameters": None if "torch" in name else comparison.extra_bytes[name] / (4 * elements),
        "bytes per element": candidate.bytes_per_element,
        "GB/s": rate,
        "share of bandwidth": None if peak is None else rate / peak,
    }


def case_table(case: dict[str, Any]) -> str:
    """The results of one case in Markdown."""
    header = ["", "ms", *(f"vs {b}" for b in BASELINES), "extra memory", "B/element", "GB/s"]
    rows = []
    for name, r in case["results"].items():
        extra, share = r["extra copies of the parameters"], r["share of bandwidth"]
        rows.append(
            [
                name,
                f"{1e3 * r['seconds'][1]:.3g}",
                *(_ratio(r[f"speedup over {b}"]) for b in BASELINES),
                "" if extra is None else f"{extra:.2f} copies",
                f"{r['bytes per element']:.3g}",
                f"{r['GB/s']:.3g}" + ("" if share is None else f" ({share:.0%})"),
            ]
        )
    return f"### {case['case']} ({case['elements']:,} elements, {case['rounds']} rounds)\n\n{table(header, rows)}\n"


def _ratio(speedup: Quartiles) -> str:
    return f"{speedup[1]:.2f}x ({speedup[0]:.2f} to {speedup[2]:.2f})"


def sweep_table(sweep: Sequence[dict[str, Any]]) -> str:
    """Times over the number of elements in Markdown."""
    names = list(sweep[0]["results"])
    header = ["elements", *(f"{name}, ms" for name in names), *(f"ours eager vs {b}" for b in BASELINES)]
    rows = []
    for case in sweep:
        results = case["results"]
        times = [f"{1e3 * results[name]['seconds'][1]:.3g}" for name in names]
        ratios = [_ratio(results["ours eager"][f"speedup over {b}"]) for b in BASELINES]
        rows.append([f"{case['elements']:,}", *times, *ratios])
    return f"### One tensor of many sizes\n\n{table(header, rows)}\n"


def picture(cases: Sequence[dict[str, Any]], sweep: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-ups over stock eager, and time per element over the number of elements, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6.5), width_ratios=(1, 1.1), layout="constrained")
    names = list(sweep[0]["results"])
    styles = {name: _style(name) for name in names}
    for i, name in enumerate(names):
        colour = styles[name]["color"]
        ratios = np.array([case["results"][name][f"speedup over {BASELINES[0]}"] for case in cases])
        rows = np.arange(len(cases)) + 0.8 * ((i + 0.5) / len(names) - 0.5)
        errors = np.abs(ratios[:, [0, 2]] - ratios[:, [1]]).T
        left.barh(rows, ratios[:, 1], 0.8 / len(names), xerr=errors, color=colour, ecolor="0.4")
        times = [(case["elements"], *case["results"][name]["seconds"]) for case in sweep]
        elements, low, median, high = np.array(times).T
        right.plot(elements, 1e9 * median / elements, label=name, markersize=5, **styles[name])
        right.fill_between(elements, 1e9 * low / elements, 1e9 * high / elements, color=colour, alpha=0.15)
    left.set_yticks(range(len(cases)), [case["case"].replace(", ", "\n") for case in cases])
    left.invert_yaxis()
    left.axvline(1, color="0.2", linewidth=1)
    left.set_xlabel(f"times faster than {BASELINES[0]} (line: quartiles of the rounds)")
    left.set_title("Speed of one step")
    right.set(xscale="log", yscale="log", xlabel="elements in one fp32 tensor", ylabel="ns per element")
    right.set_title("Time of one step")
    right.grid(which="major", alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _style(name: str) -> dict[str, Any]:
    families = {"stock": ("#9a9a9a", "#505050"), "ours": ("#1f77b4", "#17becf", "#0b3c6f")}
    colours = families.get(name.split()[0], ("#fdbf6f", "#ff7f0e", "#b2560d"))
    variants = ("eager", "compiled", "fused=False") if name.split()[0] in families else ("single", "foreach", "fused")
    index = max(i for i, variant in enumerate(variants) if variant in name)
    return {"color": colours[index], "marker": "os^"[index], "linestyle": ("-", "--", ":")[index]}


def _tiny(shapes: Sequence[Shape]) -> list[Shape]:
    return 2 * [tuple(min(d, 32) for d in shape) for shape in dict.fromkeys(shapes)]


def _sweep_sizes(quick: bool) -> list[int]:
    # per candidate w and v, besides the gradients, the starting point and what stock's step holds for a while
    arrays = 2 * 8 + 4 + 3
    return [n for n in SWEEP if n <= 10_000 or not quick and 4 * n * arrays < memory_bytes() / 2]


def _progress(work: Sequence[list[Shape]]) -> Iterator[list[Shape]]:
    from tqdm import tqdm

    for shapes in (bar := tqdm(work, desc="dense", unit="comparison")):
        bar.set_postfix_str(describe(shapes))
        yield shapes


def run(chosen: argparse.Namespace, facts: Mapping[str, str]) -> None:
    """Measure, print the tables, write ``dense.json`` and ``dense.png``."""
    cases = [_tiny(shapes) for shapes in CASES] if chosen.quick else CASES
    sizes = [[(n,)] for n in _sweep_sizes(chosen.quick)]
    measured = [measure(shapes, chosen) for shapes in _progress([*cases, *sizes])]
    table_cases, sweep = measured[: len(cases)], measured[len(cases) :]
    print("## Dense parameters, fp32: one step\n")
    print(NOTES)
    print("\n".join(map(case_table, table_cases)))
    print(sweep_table(sweep))
    save(chosen.out / "dense.json", {"machine": facts, "cases": table_cases, "sweep": sweep})
    picture(table_cases, sweep, chosen.out / "dense.png")
    print(f"JSON and picture: {chosen.out / 'dense.json'}, {chosen.out / 'dense.png'}")


def main() -> None:
    """Run this script alone."""
    chosen, facts = options(__doc__), machine()
    print(f"{bullets(facts)}\n")
    run(chosen, facts)


if __name__ == "__main__":
    main()
