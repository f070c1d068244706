"""The benchmarks: what they measure is what they say, and the scripts run. No figure here depends on the clock."""

import importlib
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(5,), (3, 4)]
WRITTEN = ["dense.json", "dense.png", "distributed.json", "host.json", "rows.json", "rows.png"]
MLX_CANDIDATES = ["stock eager", "stock compiled", "ours eager", "ours compiled"]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of benchmarks/, whose folder is on the path when its scripts run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def mac(monkeypatch, benchmark):
    """The scripts believe that MLX runs on the GPU of an M3 Max with 14 cores."""
    for module in ("report", "steps"):
        monkeypatch.setattr(benchmark(module), "on_gpu", lambda: True)
    report = benchmark("report")
    monkeypatch.setattr(report.mx, "device_info", lambda device=None: {"device_name": "Apple M3 Max"})
    monkeypatch.setattr(report.os, "cpu_count", lambda: 14)
    return report


def leaves(parameters) -> list[np.ndarray]:
    if isinstance(parameters, dict):
        parameters = [layer["weight"] for layer in parameters["layers"]]
    return [np.asarray(p) for p in parameters]


def test_every_candidate_takes_the_same_step(benchmark):
    steps = benchmark("steps")
    found = steps.candidates(SHAPES)
    assert list(found)[:4] == MLX_CANDIDATES
    mx.random.seed(0)
    expected = [np.array(mx.random.normal(shape), np.float64) for shape in SHAPES]
    mx.random.seed(1)
    gradients = [np.array(mx.random.normal(shape), np.float64) for shape in SHAPES]
    sums = [np.zeros(shape) for shape in SHAPES]
    taken = {name: candidate.setup() for name, candidate in found.items()}
    for _ in range(3):
        for w, g, v in zip(expected, gradients, sums, strict=True):
            v += g * g
            w -= steps.LEARNING_RATE * g / (np.sqrt(v) + steps.EPS)
        for name, step in taken.items():
            for got, w in zip(leaves(step()), expected, strict=True):
                np.testing.assert_allclose(got, w, rtol=1e-5, atol=1e-6, err_msg=name)


class Clock:
    """A clock that only steps move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def candidate(self, seconds: float, first: float = 0.0):
        """A candidate whose step takes ``seconds``, and ``first`` more the first four times."""

        def setup():
            pending = 4 * [first]

            def step():
                self.now += seconds + (pending.pop() if pending else 0.0)

            return step

        return setup


def test_compare_times_a_step_and_nothing_else(benchmark, monkeypatch):
    timing, clock = benchmark("timing"), Clock()
    monkeypatch.setattr(timing, "perf_counter", clock)
    candidates = {"slow": clock.candidate(0.02, first=5), "fast": clock.candidate(0.01, first=5)}
    measured = timing.compare(candidates, rounds=6)
    assert measured.seconds == {"slow": pytest.approx([0.02] * 6), "fast": pytest.approx([0.01] * 6)}
    assert measured.time("slow") == pytest.approx((0.02, 0.02, 0.02))


def test_compare_stops_in_time_and_measures_every_candidate_equally_often(benchmark, monkeypatch):
    timing, clock = benchmark("timing"), Clock()
    monkeypatch.setattr(timing, "perf_counter", clock)
    measured = timing.compare({"a": clock.candidate(1.0), "b": clock.candidate(2.0)}, seconds=11.0 * timing.TRIALS)
    # a round takes 6 s: of each candidate a step before the clock runs and one on the clock
    assert [len(times) for times in measured.seconds.values()] == [2 * timing.TRIALS] * 2


def test_speedup_is_the_ratio_within_a_round(benchmark):
    timing = benchmark("timing")
    noisy = timing.Comparison({"slow": [3.0, 10.0, 80.0], "fast": [1.0, 40.0, 20.0]}, {})
    assert noisy.speedup("fast", "slow") == (1.625, 3.0, 3.5)  # the ratios are 3, 1/4 and 4
    assert timing.Comparison({"a": [1.0, 2.0, 3.0, 4.0, 5.0]}, {}).time("a") == (2.0, 3.0, 4.0)


def test_compare_measures_the_peak_above_what_was_held_before(benchmark):
    timing = benchmark("timing")

    def setup(size):
        held = mx.zeros((1 << 18,))
        mx.eval(held)
        return lambda: mx.eval(mx.zeros((size,)), held)

    measured = timing.compare({"small": lambda: setup(1 << 10), "large": lambda: setup(1 << 20)}, rounds=1, warmup=1)
    assert measured.extra_bytes["large"] == pytest.approx(4 << 20, rel=0.01)
    assert 4 << 10 <= measured.extra_bytes["small"] < 4 << 17


def test_shapes_are_described(benchmark):
    assert benchmark("dense").describe([(2, 3)] * 12 + [(3,)] * 24 + [(8, 5)]) == "12 of 2 x 3, 24 of 3, 8 x 5"


def test_bytes_follow_the_path_that_a_tensor_takes(benchmark):
    steps = benchmark("steps")
    large = (steps.IN_PLACE_ELEMENTS,)
    assert steps._operations_bytes([(10,), (3, 4)]) == 20
    assert steps._operations_bytes([large]) == 28
    assert steps._operations_bytes([large, large, (steps.IN_PLACE_ELEMENTS - 1,)]) == pytest.approx(25.33, abs=0.01)


@pytest.mark.parametrize(
    ("chip", "cores", "expected"),
    [
        ("Apple M3 Max", 14, 300),
        ("Apple M3 Max", 16, 400),
        ("Apple M3 Max", 12, None),
        ("Apple M2", 8, 100),
        ("Apple M99", 8, None),
    ],
)
def test_bandwidth_of_a_chip(mac, monkeypatch, chip, cores, expected):
    monkeypatch.setattr(mac.mx, "device_info", lambda device=None: {"device_name": chip})
    monkeypatch.setattr(mac.os, "cpu_count", lambda: cores)
    assert mac.bandwidth() == expected


def test_a_mac_also_measures_the_operations_and_the_share_of_its_bandwidth(mac, benchmark, tmp_path):
    dense = benchmark("dense")
    case = dense.measure(SHAPES, mac.options(None, ["--quick", "--out", str(tmp_path)]))
    assert list(case["results"])[:5] == [*MLX_CANDIDATES, "ours eager, fused=False"]
    result = case["results"]["ours eager"]
    assert result["share of bandwidth"] == pytest.approx(result["GB/s"] / 300)
    assert dense.case_table(case).count("%)") == len(case["results"])
    assert mac.machine()["memory bandwidth"].startswith("300 GB/s")


def rows_in_float64(steps, problem, row_wise: bool, count: int) -> np.ndarray:
    """The table after ``count`` steps of the mean squared distance of its rows from those wanted."""
    block, wanted = (np.array(array, np.float64) for array in steps.arrays(problem))
    w, generator = np.tile(block, (problem.rows // len(block), 1)), np.random.default_rng(0)
    v = np.zeros((problem.rows, 1 if row_wise else problem.columns))
    for _ in range(count):
        ids, g = generator.integers(problem.rows, size=problem.look_ups, dtype=np.int32), np.zeros_like(w)
        np.add.at(g, ids, 2 * (w[ids] - wanted) / wanted.size)
        v += (g * g).mean(axis=1, keepdims=True) if row_wise else g * g
        w -= steps.LEARNING_RATE * g / (np.sqrt(v) + steps.EPS)
    return w


def test_every_candidate_of_rows_takes_the_same_step(benchmark):
    steps = benchmark("row_steps")
    problem = steps.Problem(rows=2000, look_ups=300, columns=4)
    found = steps.candidates(problem)
    assert {steps.SPARSE, steps.ROW_WISE, steps.COMPILED, steps.DENSE, steps.STOCK} <= set(found)
    for name, candidate in found.items():
        step = candidate.setup()
        got = np.asarray([step()["weight"] for _ in range(4)][-1])
        expected = rows_in_float64(steps, problem, name == steps.ROW_WISE, 4)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_rows_measures_what_fits_in_memory_and_in_time(benchmark):
    steps = benchmark("row_steps")
    problem = steps.Problem(1000)
    kinds = {"flat": (2, 0), "copies": (2, 2), "small": (1, 0)}
    found = {name: steps.Candidate(lambda: lambda: None, *tables) for name, tables in kinds.items()}

    def chosen(tables: float, last=None):
        measured, skipped = steps.choose(problem, found, last or {}, tables * problem.table_bytes)
        assert measured.keys() | skipped.keys() == found.keys() and not measured.keys() & skipped.keys()
        return list(measured), skipped

    assert chosen(7) == (["flat", "copies", "small"], {})
    fits_not = {"copies": "does not fit in memory beside the others"}
    assert chosen(6.9) == (["flat", "copies"], {"small": fits_not["copies"]})
    assert chosen(5.9) == (["flat", "small"], fits_not)
    slow = {"rows": 100, "results": {name: {"seconds": (0.1, 0.6, 0.9)} for name in found}, "skipped": {}}
    assert chosen(7, slow) == (["flat", "small"], {"copies": "a step would take about 6 s"})
    assert chosen(7, slow | {"skipped": fits_not}) == (["flat", "small"], fits_not)
    fast = {"rows": 100, "results": {name: {"seconds": (0.1, 0.4, 0.9)} for name in found}, "skipped": {}}
    assert chosen(7, fast) == (["flat", "copies", "small"], {})


@pytest.mark.parametrize(
    ("small", "large", "stock", "torch", "extra", "expected"),
    [
        (100, 129, 80, 130, 0.02, ["yes", "yes", "yes", "yes", "yes"]),
        (10, 13.9, 79, 13.8, 0.021, ["yes", "no", "no", "no", "yes"]),
        (10, 14.1, 81, None, 0.01, ["no", "yes", "", "yes", "yes"]),
        (10, 1000, None, 2000, 0.01, ["no", "", "yes", "yes", "yes"]),
    ],
)
def test_targets_are_judged_by_what_was_measured(benchmark, monkeypatch, small, large, stock, torch, extra, expected):
    rows, steps, timing = (benchmark(name) for name in ("rows", "row_steps", "timing"))
    problems = steps.Problem(1000), steps.Problem(100_000)
    found = [steps.SPARSE, *([] if torch is None else [steps.TORCH, steps.TORCH_SINGLE])]
    monkeypatch.setattr(rows, "candidates", lambda problem: dict.fromkeys(found, steps.Candidate(lambda: None, 2, 0)))
    seconds = {
        steps.SPARSE: [large, large, 3 * large],
        f"{steps.SPARSE}, 1,000 rows": [small, small, 3 * small],
        steps.TORCH: [9000, 9000, 9000],
        steps.TORCH_SINGLE: [torch, torch, torch],
    }
    measured = timing.Comparison({name: [1e-3 * s for s in times if s] for name, times in seconds.items()}, {})
    asked = []
    monkeypatch.setattr(rows, "compare", lambda setups, **budget: asked.append(list(setups)) or measured)
    result = {"extra bytes": extra * problems[1].table_bytes, "extra tables": extra}
    if stock is not None:
        result[f"speedup over {steps.STOCK}"] = timing.Quartiles(stock - 1, stock, stock + 1)
    judged = rows.targets(*problems, {"results": {steps.SPARSE: result}}, rows.options(None, ["--quick"]))
    assert asked == [[*found, f"{steps.SPARSE}, 1,000 rows"]]
    lines = rows.target_table(judged).splitlines()[4:]
    assert [line.split("|")[-2].strip() for line in lines] == expected
    assert f"{large / small:.3g}x" in lines[0] and f"{large - small:+.2f} ms" in lines[0] and "1/64" in lines[4]


def test_run_prints_tables_and_writes_figures_and_a_picture(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--quick", "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "dense.json").read_text())
    assert results["machine"].keys() >= {"CPU", "MLX device", "load before the run", "OS", "mlx", "mlx_adagrad"}
    assert len(results["cases"]) == 5 and len(results["sweep"]) == 3
    for case in results["cases"] + results["sweep"]:
        assert list(case["results"])[:4] == MLX_CANDIDATES and case["rounds"] == 3
        for name, result in case["results"].items():
            low, median, high = result["seconds"]
            assert 0 < low <= median <= high < math.inf
            assert (result["extra copies of the parameters"] is None) == name.startswith("torch")
        assert case["results"]["stock eager"]["speedup over stock eager"] == [1.0, 1.0, 1.0]
        assert f"### {case['case']} " in done.stdout or f"| {case['elements']:,} |" in done.stdout
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert rows["machine"] == results["machine"] and [case["rows"] for case in rows["sweep"]] == [1000, 10_000]
    for case in rows["sweep"]:
        assert case["rounds"] == 3 and not case["skipped"]
        assert f"\n| {case['rows']:,} | {1e3 * case['results']['ours sparse']['seconds'][1]:.3g} | " in done.stdout
        assert all(r["extra bytes"] > 0 < r["seconds"][0] for r in case["results"].values())
    tables = {name: result["extra tables"] for name, result in rows["sweep"][1]["results"].items()}
    assert max(tables["ours sparse"], tables["ours row-wise"]) < 0.05 and tables["stock"] > 2
    assert len(rows["targets"]) == 5 and all(f"| {target['what']} |" in done.stdout for target in rows["targets"])
    host = json.loads((tmp_path / "out" / "host.json").read_text())["microseconds"]
    assert len(host) == 4 and all(time > 0 for times in host.values() for time in times.values())
    assert all(f"| {way} | " in done.stdout for times in host.values() for way in times)
    for name in ("dense.png", "rows.png"):
        png = (tmp_path / "out" / name).read_bytes()
        assert png.startswith(b"\x89PNG") and min(struct.unpack(">II", png[16:24])) > 500
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == WRITTEN


def test_a_mechanism_is_off_only_in_the_steps_without_it(benchmark):
    mechanisms, streams = benchmark("mechanisms"), importlib.import_module("mlx_adagrad.update.streams")
    limit, seen = streams.PARALLEL_ELEMENTS, []

    def setup():
        return lambda: seen.append(streams.PARALLEL_ELEMENTS)

    chosen = benchmark("report").options("", ["--quick"])
    comparison = mechanisms.measure(setup, {"streams": mechanisms.DENSE["streams"]}, chosen)
    assert set(seen) == {limit, 2**62} and streams.PARALLEL_ELEMENTS == limit
    assert [row[0] for row in mechanisms.report("case", comparison)] == ["case, as it is", "case, without streams"]
    assert len(comparison.cpu_seconds["as it is"]) == len(comparison.seconds["as it is"])
