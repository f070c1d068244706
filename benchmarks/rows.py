"""How do time and memory of a training step grow with the rows of an embedding's table, if it looks up 4,096 of them?

Stock and our dense gradient, our row-sparse one (also with one accumulator per row, and inside the user's own
``mx.compile``), and torch's sparse one if torch is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_adagrad import Dense, RowWise
from report import bullets, machine, memory_bytes, options, save, table
from row_steps import (
    COMPILED,
    DENSE,
    ROW_WISE,
    SPARSE,
    STOCK,
    TORCH,
    TORCH_SINGLE,
    Candidate,
    Problem,
    candidates,
    choose,
    state_bytes,
    torch_peak_extra_bytes,
)
from timing import Comparison, Quartiles, compare

SWEEP = [10**k for k in range(3, 8)]
LARGE, SMALL = 1_000_000, 10_000  # the tables of the targets
TORCHES = (TORCH, TORCH_SINGLE)
BASELINES = (STOCK, *TORCHES)
MEMORY_SHARE = 2 / 3  # of the machine's
NOTES = """Whole steps: look-up, loss, gradient, update, evaluation; fresh ids at every step, uniform over the table.
Times are medians, speed-ups medians (and quartiles) of the ratio within a round. Extra memory is the peak above the
parameters and the state that were there before the step (MLX's own count, torch's by its profiler).
"""
STYLES: dict[str, dict[str, Any]] = {
    STOCK: {"color": "#707070", "marker": "s", "linestyle": "-"},
    DENSE: {"color": "#0b3c6f", "marker": "^", "linestyle": "-"},
    COMPILED: {"color": "#17a2b8", "marker": "v", "linestyle": "--"},
    TORCH: {"color": "#ff7f0e", "marker": "D", "linestyle": "-"},
    TORCH_SINGLE: {"color": "#b2560d", "marker": "d", "linestyle": ":"},
    ROW_WISE: {"color": "#2ca02c", "marker": "x", "linestyle": "--", "zorder": 4},
    SPARSE: {"color": "#1f77b4", "marker": "o", "linestyle": "-", "linewidth": 2.5, "markersize": 9},
}


class Target(NamedTuple):
    """What a measured figure should be, in words; ``holds`` is None where it was not measured."""

    what: str
    wanted: str
    measured: str = "not measured here"
    holds: bool | None = None


def measure(problem: Problem, last: Mapping[str, Any], chosen: argparse.Namespace) -> dict[str, Any]:
    """Compare all candidates on a table of this size, after the next smaller one; the result is ready for JSON."""
    measured, skipped = choose(problem, candidates(problem), last, MEMORY_SHARE * memory_bytes())
    comparison = _compare(measured, chosen)
    extra: dict[str, int | None] = {**comparison.extra_bytes}
    for name in measured.keys() & TORCHES:
        extra[name] = torch_peak_extra_bytes(measured[name].setup())
    return {
        **problem._asdict(),
        "rounds": len(comparison.seconds[SPARSE]),
        "results": {name: _result(name, comparison, extra[name], problem) for name in measured},
        "skipped": skipped,
    }


def _compare(measured: Mapping[str, Candidate], chosen: argparse.Namespace) -> Comparison:
    budget = {"rounds": 3, "warmup": 1} if chosen.quick else {"seconds": chosen.seconds}
    return compare({name: candidate.setup for name, candidate in measured.items()}, **budget)


def _result(name: str, comparison: Comparison, extra: int | None, problem: Problem) -> dict[str, Any]:
    return {
        "seconds": comparison.time(name),
        **{f"speedup over {b}": comparison.speedup(name, b) for b in BASELINES if b in comparison.seconds},
        "extra bytes": extra,
        "extra tables": None if extra is None else extra / problem.table_bytes,
    }


def targets(small: Problem, large: Problem, case: Mapping[str, Any], chosen: argparse.Namespace) -> list[Target]:
    """What the row-sparse update is built for; ``case`` is what was measured with the large table."""
    found, of_small = candidates(large), f"{SPARSE}, {small.rows:,} rows"
    rivals = {name: found[name] for name in (SPARSE, *TORCHES) if name in found}
    comparison = _compare(rivals | {of_small: candidates(small)[SPARSE]}, chosen)
    growth = comparison.speedup(of_small, SPARSE)
    more = 1e3 * float(np.median(np.subtract(comparison.seconds[SPARSE], comparison.seconds[of_small])))
    result = case["results"][SPARSE]
    over_torch = [comparison.speedup(SPARSE, name) for name in TORCHES if name in found]
    buffers = result["extra bytes"] / (4 * large.look_ups * large.columns)
    state = state_bytes(large, RowWise()) / state_bytes(large, Dense())
    step = f"step with {large.rows:,} rows against"
    return [
        Target(
            f"{step} {small.rows:,} rows",
            "at most 1.3x, or 4 ms more",
            f"{_ratio(growth)}, {more:+.2f} ms",
            growth.median <= 1.3 or more <= 4,
        ),
        _faster(f"{step} {STOCK}", 80, result.get(f"speedup over {STOCK}")),
        _faster(f"{step} the faster torch sparse", 1, min(over_torch, key=lambda s: s.median, default=None)),
        Target(
            f"extra memory with {large.rows:,} rows",
            "at most 2% of the table",
            f"{result['extra tables']:.2%}, {buffers:.2f} buffers of {large.look_ups:,} x {large.columns}",
            result["extra tables"] <= 0.02,
        ),
        Target("state with RowWise()", f"1/{large.columns} of dense", f"1/{1 / state:g}", state <= 1 / large.columns),
    ]


def _faster(what: str, wanted: float, speedup: Quartiles | None) -> Target:
    if speedup is None:
        return Target(what, f"at least {wanted}x faster")
    return Target(what, f"at least {wanted}x as fast", _ratio(speedup), speedup.median >= wanted)


def target_table(found: Sequence[Target], quick: bool = False) -> str:
    """The targets in Markdown."""
    title = "Targets" + quick * " (of a table too small to judge by)"
    rows = [[t.what, t.wanted, t.measured, {True: "yes", False: "no", None: ""}[t.holds]] for t in found]
    return f"### {title}\n\n{table(['', 'target', 'measured', 'holds'], rows)}\n"


def sweep_tables(sweep: Sequence[Mapping[str, Any]]) -> str:
    """Times, memory and speed-ups over the rows of the table in Markdown, and why what is missing is missing."""
    names = list(sweep[0]["results"])
    ratios = [b for b in BASELINES if b in names]
    times = _by_rows(sweep, names, lambda r: _figure(1e3 * r["seconds"][1]))
    memory = _by_rows(sweep, names, _memory)
    speedups = [
        [f"{c['rows']:,}", *(_ratio(c["results"][SPARSE].get(f"speedup over {b}")) for b in ratios)] for c in sweep
    ]
    return f"""### Time of a step in ms

{table(["rows", *names], times)}

### {SPARSE.capitalize()}, times as fast

{table(["rows", *(f"vs {b}" for b in ratios)], speedups)}

### Extra memory of a step in MB (in tables)

{table(["rows", *names], memory)}

{_why_missing(sweep)}"""


def _memory(result: Mapping[str, Any]) -> str:
    extra = result["extra bytes"]
    return "" if extra is None else f"{_figure(extra / 1e6)} ({result['extra tables']:.2g})"


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _by_rows(
    sweep: Sequence[Mapping[str, Any]], names: Sequence[str], show: Callable[[dict[str, Any]], str]
) -> list[list[str]]:
    found = ((case["rows"], [case["results"].get(name) for name in names]) for case in sweep)
    return [[f"{rows:,}", *("" if r is None else show(r) for r in results)] for rows, results in found]


def _ratio(speedup: Quartiles | None) -> str:
    return "" if speedup is None else f"{speedup[1]:.3g}x ({speedup[0]:.3g} to {speedup[2]:.3g})"


def _why_missing(sweep: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"- {c['rows']:,} rows, {name}: {why}\n" for c in sweep for name, why in c["skipped"].items())


def picture(sweep: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Time and extra memory of a step over the rows of the table, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6.5), layout="constrained")
    for name in (name for name in STYLES if name in sweep[0]["results"]):
        results = [(case["rows"], case["results"][name]) for case in sweep if name in case["results"]]
        rows, low, median, high = np.array([(v, *r["seconds"]) for v, r in results]).T
        left.plot(rows, 1e3 * median, label=name, **STYLES[name])
        left.fill_between(rows, 1e3 * low, 1e3 * high, color=STYLES[name]["color"], alpha=0.15)
        right.plot(rows, [(r["extra bytes"] or np.nan) / 1e6 for _, r in results], label=name, **STYLES[name])
    rows = np.array([case["rows"] for case in sweep])
    right.plot(rows, 4e-6 * sweep[0]["columns"] * rows, color="0.2", linewidth=1, linestyle=":", label="one table")
    left.set(title="Time of one training step (band: quartiles)", ylabel="ms")
    right.set(title="Extra memory of one training step", ylabel="MB")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel=f"rows of the table, {sweep[0]['columns']} columns of fp32")
        axes.grid(which="major", alpha=0.3)
    right.legend()
    figure.suptitle(f"An embedding with {sweep[0]['look_ups']:,} look-ups a step")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _progress(problems: Sequence[Problem]) -> Iterator[Problem]:
    from tqdm import tqdm

    for problem in (bar := tqdm(problems, desc="rows", unit="comparison")):
        bar.set_postfix_str(f"{problem.rows:,}")
        yield problem


def run(chosen: argparse.Namespace, facts: Mapping[str, str]) -> None:
    """Measure, print the tables, write ``rows.json`` and ``rows.png``."""
    problems = [Problem(rows, 64, 8) for rows in SWEEP[:2]] if chosen.quick else [Problem(rows) for rows in SWEEP]
    sweep: list[dict[str, Any]] = []
    for problem in _progress(problems):
        sweep.append(measure(problem, sweep[-1] if sweep else {}, chosen))
    small, large = (0, 1) if chosen.quick else (SWEEP.index(SMALL), SWEEP.index(LARGE))
    found = targets(problems[small], problems[large], sweep[large], chosen)
    print(f"## A table of which {problems[0].look_ups:,} rows are looked up, fp32: one training step\n")
    print(NOTES)
    print(target_table(found, chosen.quick))
    print(sweep_tables(sweep))
    save(chosen.out / "rows.json", {"machine": facts, "targets": [t._asdict() for t in found], "sweep": sweep})
    picture(sweep, chosen.out / "rows.png")
    print(f"JSON and picture: {chosen.out / 'rows.json'}, {chosen.out / 'rows.png'}")


def main() -> None:
    """Run this script alone."""
    chosen, facts = options(__doc__), machine()
    print(f"{bullets(facts)}\n")
    run(chosen, facts)


if __name__ == "__main__":
    main()
