"""The data of the digit examples: scikit-learn's bundled digits, or MNIST from IDX files."""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from sklearn import datasets as bundled

GZIP_MAGIC = b"\x1f\x8b"
UNSIGNED_BYTE = 8  # the type code in an IDX header


@dataclass(frozen=True)
class Data:
    """Rows of pixels in [0, 1] with their labels 0..9, for training and held out."""

    name: str
    train_x: mx.array
    train_y: mx.array
    test_x: mx.array
    test_y: mx.array

    def astype(self, dtype: mx.Dtype) -> "Data":
        """The same rows with pixels in `dtype`."""
        return replace(self, train_x=self.train_x.astype(dtype), test_x=self.test_x.astype(dtype))


def load_digits() -> Data:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn carries; one in five is held out."""
    x, y = bundled.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order] / 16, y[order]
    split = len(y) // 5
    return _data("digits", x[split:], y[split:], x[:split], y[:split])


def load_mnist(folder: Path) -> Data:
    """The four IDX files of MNIST in `folder`, gzipped or plain.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged, or the files do not belong together.
    """
    train_x, train_y = _read_part(folder, "train")
    test_x, test_y = _read_part(folder, "t10k")
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"{folder}: images of {train_x.shape[1]} and of {test_x.shape[1]} pixels")
    return _data("mnist", train_x / 255, train_y, test_x / 255, test_y)


def _data(name: str, train_x, train_y, test_x, test_y) -> Data:
    def pixels(x: np.ndarray) -> mx.array:
        return mx.array(x.astype(np.float32))

    def labels(y: np.ndarray) -> mx.array:
        return mx.array(y.astype(np.int32))

    return Data(name, pixels(train_x), labels(train_y), pixels(test_x), labels(test_y))


def _read_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (one a row) and labels of one part of MNIST, checked against each other."""
    images = read_idx(_find(folder, f"{part}-images", 3), 3)
    labels = read_idx(_find(folder, f"{part}-labels", 1), 1)
    if not 0 < len(images) == len(labels):
        raise ValueError(f"{folder}: {len(images)} {part} images but {len(labels)} labels")
    if labels.max() > 9:
        raise ValueError(f"{folder}: {part} label {labels.max()} is not a digit")
    return images.reshape(len(images), -1), labels


def _find(folder: Path, stem: str, ndim: int) -> Path:
    """The plain or gzipped file; some sites write '.idx' in place of '-idx'."""
    found = sorted(folder.glob(f"{stem}[-.]idx{ndim}-ubyte*"))
    if not found:
        raise FileNotFoundError(f"{folder} has no file {stem}-idx{ndim}-ubyte, plain or .gz")
    return found[0]


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes with `ndim` dimensions.

    Raises:
        ValueError: it is another kind of file, or its size is not what its header says.
    """
    raw = path.read_bytes()
    if raw.startswith(GZIP_MAGIC):
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file: {error}") from error
    start = 4 + 4 * ndim
    if len(raw) < start or raw[:4] != bytes((0, 0, UNSIGNED_BYTE, ndim)):
        raise ValueError(f"{path}: not an IDX file of bytes in {ndim} dimensions")
    shape = struct.unpack(f">{ndim}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise ValueError(f"{path}: the header promises {shape}, but {len(raw) - start:,} bytes follow")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
