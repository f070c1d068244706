"""The examples, run as a user runs them."""

import gzip
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from digits_data import load_digits, load_mnist, read_idx

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = ("Adagrad (ours)", "Adagrad (stock)", "SGD", "RMSProp", "AdaDelta", "Adam")


def run(script: str, *arguments: object, code: int = 0) -> str:
    """What an example prints; its error message where it is to fail with `code`."""
    command = [sys.executable, ROOT / "examples" / script, *arguments]
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def table(output: str, head: str) -> dict[str, list[float]]:
    """The numbers of the table whose first column is `head`, by the name of the row."""
    lines = output[output.index(f"\n{head} ") :].splitlines()[2:]
    rows = (re.match(r"(.+?)\s{2,}(.*)", line) for line in lines[: lines.index("") if "" in lines else None])
    return {row[1]: [float(n.rstrip("%")) for n in row[2].split() if n != "-"] for row in rows if row}


def held_out_accuracy(output: str) -> float:
    return float(re.findall(r"held-out accuracy: ([\d.]+)", output)[0])


def assert_picture(path: Path) -> None:
    head = path.read_bytes()[:24]
    width, height = struct.unpack(">II", head[16:])
    assert head.startswith(b"\x89PNG\r\n\x1a\n") and width > 1000 and height > 400


def write_idx(path: Path, data: np.ndarray) -> None:
    """A well-formed IDX file, gzipped where the name says so."""
    raw = bytes((0, 0, 8, data.ndim)) + struct.pack(f">{data.ndim}I", *data.shape) + data.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_mnist(folder: Path, suffix: str = "") -> None:
    """A small MNIST: one noisy pattern a digit, 28 x 28."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (10, 28, 28))
    for part, size in (("train", 500), ("t10k", 100)):
        labels = rng.integers(0, 10, size).astype(np.uint8)
        images = (patterns[labels] + rng.integers(0, 56, (size, 28, 28))).astype(np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)


def test_quickstart_learns_and_stands_in_the_readme():
    loss = float(run("quickstart.py").split()[-1])
    assert loss < 0.02
    code = (ROOT / "examples" / "quickstart.py").read_text().split('"""')[2].strip()
    assert len([line for line in code.splitlines() if line]) == 12
    assert code in (ROOT / "README.md").read_text(encoding="utf-8")


def test_digits_reach_their_accuracy_and_are_compared(tmp_path):
    output = run("digits.py", "--out", tmp_path)
    assert held_out_accuracy(output) >= 0.95
    rows = table(output, "optimizer")
    assert set(rows) == set(OPTIMIZERS)
    assert all(accuracy >= 0.95 and loss < 0.2 for _, loss, accuracy, *_ in rows.values()), rows
    # The same weights, batches and rule: in fp32 both Adagrads take the same path.
    ours, stock = rows["Adagrad (ours)"], rows["Adagrad (stock)"]
    assert ours[1] == pytest.approx(stock[1], rel=0.01) and ours[2] == pytest.approx(stock[2], abs=0.01)
    assert_picture(tmp_path / "digits_float32.png")


def test_bfloat16_stalls_stock_and_not_ours(tmp_path):
    rows = table(run("digits.py", "--dtype", "bfloat16", "--epochs", 12, "--out", tmp_path), "accumulator")
    assert rows["Adagrad (ours)"][2] > 99.9 and rows["Adagrad (ours)"][5] > 99.9
    assert rows["Adagrad (stock)"][2] < 95 and rows["Adagrad (stock)"][5] < 95
    assert_picture(tmp_path / "digits_bfloat16.png")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_files(tmp_path, suffix):
    write_mnist(tmp_path, suffix)
    output = run("digits.py", "--mnist", tmp_path, "--epochs", 3, "--out", tmp_path / "out")
    assert "mnist: 500 to train on, 100 held out" in output
    assert held_out_accuracy(output) >= 0.9
    assert_picture(tmp_path / "out" / "mnist_float32.png")


def test_pixels_are_scaled_and_nothing_is_held_out_twice(tmp_path):
    write_mnist(tmp_path)
    for data, rows in ((load_digits(), 1797), (load_mnist(tmp_path), 600)):
        assert len(data.train_y) + len(data.test_y) == rows
        assert float(data.train_x.min()) >= 0 and 0.9 < float(data.train_x.max()) <= 1
    train = {row.tobytes() for row in np.array(load_digits().train_x)}
    assert not [row for row in np.array(load_digits().test_x) if row.tobytes() in train]


def test_a_bad_mnist_ends_with_one_clear_line(tmp_path):
    error = run("digits.py", "--mnist", tmp_path, code=1)
    assert error == f"digits.py: {tmp_path} has no file train-images-idx3-ubyte, plain or .gz\n"


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swelled(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def relabelled(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[2] = 0x0D  # the code of 32-bit floats
    path.write_bytes(bytes(raw))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncated, "the header promises (500, 28, 28), but 391,999 bytes follow"),
        (swelled, "the header promises (500, 28, 28), but 392,001 bytes follow"),
        (relabelled, "not an IDX file of bytes in 3 dimensions"),
        (emptied, "not an IDX file of bytes in 3 dimensions"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    write_mnist(tmp_path)
    damage(tmp_path / "train-images-idx3-ubyte")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_mnist(tmp_path)


def test_a_truncated_gzip_is_refused(tmp_path):
    write_mnist(tmp_path, ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged gzip file"):
        read_idx(path, 3)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("train-labels-idx1-ubyte", np.zeros(499, np.uint8), "500 train images but 499 labels"),
        ("train-labels-idx1-ubyte", np.full(500, 10, np.uint8), "train label 10 is not a digit"),
        ("t10k-images-idx3-ubyte", np.zeros((100, 8, 8), np.uint8), "images of 784 and of 64 pixels"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, name, data, message):
    write_mnist(tmp_path)
    write_idx(tmp_path / name, data)
    with pytest.raises(ValueError, match=message):
        load_mnist(tmp_path)
