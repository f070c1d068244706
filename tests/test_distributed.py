"""Training in several processes over MLX's ring on this machine equals training in one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

import distributed_runs
from mlx_adagrad import RowSparse, SparseEmbedding, checkpoint, sparse_gradients
from mlx_adagrad.distributed import average_gradients, shard_embedding

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120  # a run that hangs has failed

# one at a time: several rings at once would only wait for each other
pytestmark = pytest.mark.xdist_group("distributed")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(ranks: int, folder: Path, *arguments: object) -> list[subprocess.Popen]:
    """The processes of a run over a ring on 127.0.0.1."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, str(ROOT / "tests" / "distributed_runs.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path, "MLX_HOSTFILE": str(hosts), "PYTHONWARNINGS": "ignore"}
    return [
        subprocess.Popen(
            command,
            env={**environment, "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit code, output) of each process; those that take too long are killed."""
    results = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=SECONDS)
            results.append((process.returncode, output))
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    return results


SCENARIOS = [
    "data_parallel",
    "other_numbers_of_rows",
    "compiled",
    "a_table_with_max_norm",
    "sharded_table",
    "sharded_parameters",
    "a_nan_in_one_rank",
    "one_exchange_for_all",
    "what_cannot_be_right_on_a_part",
    "a_fully_sharded_sparse_table",
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_together_equal_one(ranks, tmp_path):
    for code, output in finish(start(ranks, tmp_path, ",".join(SCENARIOS))):
        assert code == 0 and output.splitlines() == [f"{name} held" for name in SCENARIOS], output


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI")
def test_processes_over_mpi_equal_one():
    scenarios = ["data_parallel", "other_numbers_of_rows", "sharded_table", "sharded_parameters", "a_nan_in_one_rank"]
    script = [sys.executable, str(ROOT / "tests" / "distributed_runs.py"), ",".join(scenarios)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {k: v for k, v in os.environ.items() if k not in ("MLX_HOSTFILE", "MLX_RANK")}
    environment |= {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "MLX_TEST_BACKEND": "mpi"}
    environment.setdefault("MLX_MPI_LIBNAME", "libmpi.so.40")  # MLX asks for the one of the developers' package
    options = ["-n", "2", "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    command = ["mpirun", *options, *script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [done.stdout.count(f"{name} held") for name in scenarios] == [2] * len(scenarios)  # lines may mix


def test_a_sharded_run_is_saved_whole_and_resumed_by_any_number_of_processes(tmp_path):
    for ranks, scenarios in ((2, ["saved_and_resumed", "refused_by_all"]), (4, ["resumed_by_others"])):
        for code, output in finish(start(ranks, tmp_path, ",".join(scenarios), tmp_path)):
            assert code == 0 and output.splitlines() == [f"{name} held" for name in scenarios], output
    alone, optimizer = distributed_runs.both(None), distributed_runs.averaged_stack(None)
    checkpoint.load(tmp_path / "run.safetensors", optimizer, alone)
    assert optimizer.step.item() == 3
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_and_leaves_a_whole_checkpoint(rank, tmp_path):
    """mlx.launch ends the others where one has ended; without it, MLX's ring may leave them waiting."""
    options = ["-n", "2", "--starting-port", str(free_ports(1)[0]), "--python", sys.executable]
    script = [str(ROOT / "tests" / "distributed_runs.py"), "until_killed", str(tmp_path)]
    launcher = subprocess.Popen(
        [str(Path(sys.executable).with_name("mlx.launch")), *options, *script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    timer = threading.Timer(SECONDS, launcher.kill)
    timer.start()
    killed = None
    for line in launcher.stdout:  # type: ignore[union-attr]
        told = re.fullmatch(r"rank (\d) of process (\d+) made step (\d+)\n", line)
        if told and int(told[1]) == rank and int(told[3]) >= 3 and killed is None:
            killed = int(told[2])
            os.kill(killed, signal.SIGKILL)
    assert killed is not None and launcher.wait() is not None and timer.is_alive()
    timer.cancel()
    alone, optimizer = distributed_runs.both(None), distributed_runs.averaged_stack(None)
    checkpoint.load(tmp_path / "run.safetensors", optimizer, alone)
    assert optimizer.step.item() >= 3


def test_one_process_needs_no_exchange():
    tree = {"a": RowSparse(mx.array([1]), mx.ones((1, 2)), 3), "b": mx.ones(2)}
    assert average_gradients(tree) is tree


@pytest.mark.parametrize("change", [{"equal_rows": 1}, {"sharded": 3}, {"group": 2}])
def test_bad_arguments(change):
    with pytest.raises(TypeError, match=f"'{next(iter(change))}' must be"):
        average_gradients({"a": mx.ones(2)}, **change)


def test_a_table_of_one_process_is_whole():
    embedding = SparseEmbedding(5, 3)
    sharded = shard_embedding(embedding)
    x = mx.array([[0, 4], [-1, 5]])
    assert mx.array_equal(sharded(x), embedding(x))
    assert sharded.num_embeddings == 5 and list(sharded.parameters()) == ["weight"]
    with pytest.raises(ValueError, match="as_linear needs the whole table"):
        sharded.as_linear(mx.ones((1, 3)))


def test_what_cannot_be_sharded():
    with pytest.raises(TypeError, match="can be sharded, not QuantizedEmbedding"):
        shard_embedding(nn.QuantizedEmbedding(32, 64))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'group' must be an mlx.core.distributed.Group but got int"):
        shard_embedding(nn.Embedding(4, 2), 2)  # type: ignore[arg-type]


def test_the_example_trains_in_two_processes(tmp_path):
    example = ROOT / "examples" / "distributed.py"
    options = ["--rows", "2000", "--steps", "8", "--draws", "5000", "--port", free_ports(1)[0], "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, example, *map(str, options)], capture_output=True, text=True, env=environment, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line[:11] for line in lines[:3]] == ["rank 0 of 1", "rank 0 of 2", "rank 1 of 2"]
    assert (tmp_path / "distributed.png").stat().st_size > 10_000


def test_stock_average_gradients_refuses_row_sparse_gradients_with_one_process_too():
    gradient = RowSparse(mx.array([1]), mx.ones((1, 2)), 3)
    with pytest.raises(TypeError, match=r"'a\.0' is row-sparse\. .*mlx_adagrad\.distributed\.average_gradients"):
        nn.average_gradients({"a": [gradient]})
    dense = {"a": [mx.ones(2)], "b": None}
    assert nn.average_gradients(dense) is dense
    assert nn.average_gradients(dense["a"][0]) is dense["a"][0]
    with sparse_gradients():  # for trainers that call it by name
        assert nn.average_gradients({"a": [gradient]}) == {"a": [gradient]}
