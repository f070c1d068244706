"""What does averaging the gradient of a table across processes cost: its rows, against the table as a dense gradient?

Several processes on this machine, over MLX's ring on 127.0.0.1: the time is that of copies and of cores shared between
the processes, not of a cable. Bytes are what each process hands to ``mx.distributed``, whatever that makes of them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_adagrad import RowSparse
from mlx_adagrad.distributed import average_gradients
from report import bullets, machine, options, save, table

ROWS, COLUMNS, LOOK_UPS = 200_000, 64, 2048
RANKS = (1, 2, 4)
WARM_UP, ROUNDS = 3, 25


def work(rows: int, look_ups: int, rounds: int) -> None:
    """What each process does: average both gradients in turns, and tell the times in one line of JSON."""
    group = mx.distributed.init()
    rng = np.random.default_rng(group.rank())
    indices = mx.array(rng.integers(0, rows, look_ups), mx.int32)
    values, dense = mx.array(rng.normal(size=(look_ups, COLUMNS)), mx.float32), mx.ones((rows, COLUMNS))
    mx.eval(indices, values, dense)

    def average_rows() -> Any:
        gradient = average_gradients({"w": RowSparse(indices, values, rows)}, group, equal_rows=True)["w"].coalesce()
        mx.eval(gradient.indices, gradient.values)

    def average_dense() -> Any:
        mx.eval(nn.average_gradients({"w": dense}, group))

    seconds: dict[str, list[float]] = {"rows": [], "dense": []}
    # all processes take the same turns: one that went by its clock would leave the others waiting
    for turn in range(WARM_UP + rounds):
        for name, average in (("rows", average_rows), ("dense", average_dense)):
            start = perf_counter()
            average()
            if turn >= WARM_UP:
                seconds[name].append(perf_counter() - start)
    sent = {"rows": indices.nbytes + values.nbytes, "dense": dense.nbytes}
    print(json.dumps({"rank": group.rank(), "seconds": seconds, "bytes": sent}), flush=True)


def launch(ranks: int, *arguments: object) -> dict[str, Any]:
    """Start the processes of one run; what the first of them told."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder, "hosts.json")
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(ranks)]))
        command = [sys.executable, __file__, "--work", *map(str, arguments)]
        ring = {"MLX_HOSTFILE": str(hosts)} if ranks > 1 else {}
        environments = [{**os.environ, **ring, "MLX_RANK": str(rank)} for rank in range(ranks)]
        running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in environments]
        told = [process.communicate(timeout=600)[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"a run of {ranks} processes failed")
    return json.loads(told[0].splitlines()[-1])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def run(chosen: argparse.Namespace, facts: Mapping[str, str]) -> None:
    """Measure, print the table and write the figures."""
    rows, look_ups = (1000, 16) if chosen.quick else (ROWS, LOOK_UPS)
    results = {ranks: launch(ranks, rows, look_ups, 3 if chosen.quick else ROUNDS) for ranks in RANKS}
    lines = []
    for ranks, told in results.items():
        for name in ("rows", "dense"):
            sent = told["bytes"][name] / 1e6 if ranks > 1 else 0.0
            ratio = np.median(np.array(told["seconds"]["dense"]) / np.array(told["seconds"][name]))
            lines.append(
                [f"{ranks}, {name}", f"{1e3 * np.median(told['seconds'][name]):.2f}", f"{sent:.2f}", f"{ratio:.1f}x"]
            )
    title = f"## Averaging the gradient of {rows:,} x {COLUMNS}, {look_ups:,} look-ups a process"
    print(f"{title}\n\n{table(['processes', 'ms', 'MB handed over', 'against dense'], lines)}\n", flush=True)
    save(chosen.out / "distributed.json", {"machine": dict(facts), "results": results})


def main() -> None:
    """Be one of the processes, or start them all."""
    if "--work" in sys.argv:
        work(*map(int, sys.argv[sys.argv.index("--work") + 1 :]))
        return
    chosen, facts = options(__doc__), machine()
    print(f"{bullets(facts)}\n")
    run(chosen, facts)


if __name__ == "__main__":
    main()
