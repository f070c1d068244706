"""Train a recommender in several processes, row-sparse, over MLX's ring on this machine.

    python examples/distributed.py                  # 2 processes, tables of 10,000 to 1,000,000 rows
    python examples/distributed.py --ranks 1 2 4
    mlx.launch --hosts mac1,mac2 examples/distributed.py --work rows=1000000     # on two Macs

Every process takes its part of each batch; ``average_gradients`` sends the rows that the batch names, and all
processes stay equal to the bit. A line for each process says what it did; the picture of the time of a step over the
rows of the table goes to out/distributed.png.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten

from mlx_adagrad import Adagrad, RowSparse, value_and_grad
from mlx_adagrad.distributed import average_gradients
from recommender import Factors, loss_fn, rmse, split
from recommender_data import generate
from side_by_side import positive

LEARNING_RATE = 0.1
BATCH = 1024  # of all processes together
WARM_UP = 5
ROWS = [10_000, 100_000, 1_000_000]


def work(rows: int, steps: int, draws: int) -> None:
    """What each process does: train on its part of every batch, then tell how it went in one line of JSON."""
    group = mx.distributed.init()
    rank, ranks = group.rank(), group.size()
    (ids, stars), held_out = split(generate(draws), rows)
    model, optimizer = Factors("sparse", rows, float(stars.mean())), Adagrad(LEARNING_RATE)
    grad = value_and_grad(model, lambda ids, stars: loss_fn(model, ids, stars))
    mine = np.arange(rank, BATCH, ranks)
    seconds, sent = [], 0
    for t in range(steps):
        batch = mx.array((t * BATCH + mine) % len(stars))
        start = time.perf_counter()
        _, gradients = grad(ids[batch], stars[batch])
        sent = bytes_of(gradients)
        optimizer.update(model, average_gradients(gradients, group, equal_rows=True))
        mx.eval(model.parameters(), optimizer.state)
        seconds.append(time.perf_counter() - start)
    result = {
        "rank": rank,
        "ranks": ranks,
        "rows": rows,
        "ms": 1e3 * float(np.median(seconds[WARM_UP:])),
        "kilobytes": sent / 1e3 if ranks > 1 else 0.0,
        "dense_kilobytes": 4 * sum(w.size for _, w in arrays(model)) / 1e3,
        "rmse": rmse(model, *held_out),
        "bits": sum(int(mx.sum(w.view(mx.uint32).astype(mx.uint64))) for _, w in arrays(model)) % 2**32,
    }
    print(json.dumps(result), flush=True)


def arrays(model: Any) -> list[tuple[str, mx.array]]:
    """The parameters of a model."""
    return tree_flatten(model.parameters())  # type: ignore[return-value]


def bytes_of(gradients: dict) -> int:
    """What one process hands on to the others of these gradients."""
    table = gradients["table"]["weight"]
    return table.indices.nbytes + table.values.nbytes if isinstance(table, RowSparse) else table.nbytes


def launch(ranks: int, rows: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Let mlx.launch start the processes of one run; what each of them told, by rank."""
    script = [__file__, "--work", f"rows={rows}", f"steps={args.steps}", f"draws={args.draws}"]
    launcher = [Path(sys.executable).with_name("mlx.launch"), "-n", ranks, "--starting-port", args.port, "--python"]
    command = [*(launcher if ranks > 1 else []), sys.executable, *script]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(told) != ranks:
        sys.exit(f"distributed.py: {ranks} processes failed:\n{done.stdout}{done.stderr}")
    return sorted(told, key=lambda result: result["rank"])


def report(results: list[dict[str, Any]]) -> str:
    """A line for each process."""
    return "\n".join(
        f"rank {r['rank']} of {r['ranks']}  {r['rows']:>9,} rows  {r['ms']:7.2f} ms a step  "
        f"{r['kilobytes']:8.1f} kB sent a step (dense: {r['dense_kilobytes']:,.0f})  held-out RMSE {r['rmse']:.4f}"
        for r in results
    )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """The time of a step and what is sent in it, over the rows of the table, a line for each number of processes."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ranks in sorted({r["ranks"] for r in results}):
        runs = [r for r in results if r["ranks"] == ranks and r["rank"] == 0]
        name, x = f"{ranks} process{'es' if ranks > 1 else ''}", [r["rows"] for r in runs]
        left.plot(x, [r["ms"] for r in runs], "o-", label=name)
        if ranks > 1:
            right.plot(x, [r["kilobytes"] for r in runs], "o-", label=f"rows, {name}")
    dense = {r["rows"]: r["dense_kilobytes"] for r in results}
    right.plot(list(dense), list(dense.values()), "k:", label="a dense gradient")
    across = {"xlabel": "rows of the table", "xscale": "log"}
    left.set(title="time of a step", ylabel="ms", ylim=(0, None), **across)
    right.set(title="sent by each process", ylabel="kB a step", yscale="log", **across)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    figure.suptitle(f"Row-sparse training in several processes on one machine, {BATCH} ratings a step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2], help="numbers of processes; default: 1 2")
    parser.add_argument("--rows", type=positive, nargs="+", default=ROWS, help="of the table that ids hash to")
    parser.add_argument("--steps", type=positive, default=150, help="steps of each run; default: 150")
    parser.add_argument("--draws", type=positive, default=60_000, help="ratings to generate; default: 60,000")
    parser.add_argument("--port", type=positive, default=32_323, help="the first port of the ring; default: 32323")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture; default: out")
    parser.add_argument("--work", nargs="+", help="be one of the processes: rows=..., steps=..., draws=...")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.work:
        given = dict(pair.split("=") for pair in args.work)
        work(*(int(given.get(name, getattr(args, name, ROWS[-1]))) for name in ("rows", "steps", "draws")))
        return
    results = []
    for rows in args.rows:
        for ranks in args.ranks:
            told = launch(ranks, rows, args)
            if len({r["bits"] for r in told}) > 1:
                sys.exit("distributed.py: the weights differ between processes")
            results += told
            print(report(told), flush=True)
    path = args.out / "distributed.png"
    draw(results, path)
    print(f"All processes of a run ended with the same bits. Wrote {path}")


if __name__ == "__main__":
    main()
