"""Reads ``tests/golden``: trajectories of Adagrad as the other frameworks' own code computed them."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

GOLDEN = Path(__file__).parent / "golden"
TRAJECTORIES = GOLDEN / "trajectories"
CHECKPOINTS = GOLDEN / "checkpoints"
HALF_TOLERANCE = {"bfloat16": 0.02, "float16": 0.002}  # times (|w| + 0.1)


@dataclass(frozen=True)
class Case:
    """One recorded run.

    Args:
        id: Name of the case.
        framework: Name of the framework (and of the file with its recordings).
        problem: Name of the problem: initial parameters and gradients.
        hp: Hyperparameters as the framework names them, and what else ``golden/README.md`` lists; a copy.
        dtype: Name of the parameters' and gradients' dtype.
        note: What the case shows.
        entry: All that the manifest says of the case.
    """

    id: str
    framework: str
    problem: str
    hp: dict[str, Any]
    dtype: str
    note: str
    entry: dict[str, Any]

    def __str__(self) -> str:
        return self.id

    @property
    def names(self) -> list[str]:
        """Names of the parameters: those of the recording if it gave any, else p0, p1, ..."""
        return self.entry["hp"].get("names") or [f"p{i}" for i in range(self._count("init"))]

    @property
    def sparse(self) -> bool:
        """Whether the gradients are rows of a table with indices."""
        return "idx" in _arrays("problems", self.problem)

    @property
    def steps(self) -> int:
        """Number of calls of the optimizer that were recorded."""
        return len(_arrays(self.framework, self.id)["param/0"])

    @property
    def lr(self) -> np.ndarray | None:
        """The rate in force at each call, (steps,) or (steps, groups), where it was recorded."""
        return _arrays(self.framework, self.id).get("lr")

    def initial(self) -> list[mx.array]:
        """The parameters before the first call."""
        return [self._cast(_arrays("problems", self.problem)[f"init/{i}"]) for i in range(self._count("init"))]

    def gradients(self, t: int) -> Any:
        """The gradients of call ``t``, None where one is absent; for a sparse problem ``(indices, values)``."""
        arrays = _arrays("problems", self.problem)
        if self.sparse:
            rows = int(arrays["nnz"][t])
            return mx.array(arrays["idx"][t, :rows]), self._cast(arrays["val"][t, :rows])
        absent = arrays["none"][t] if "none" in arrays else np.zeros(self._count("init"), bool)
        return [None if gone else self._cast(arrays[f"grad/{i}"][t]) for i, gone in enumerate(absent)]

    def params(self, t: int) -> list[np.ndarray]:
        """The parameters after call ``t``, in double precision."""
        return [self.recorded(f"param/{i}")[t] for i in range(self._count("init"))]

    def acc(self, t: int) -> list[np.ndarray | None]:
        """The accumulators after call ``t``, None for a parameter that has no state yet."""
        values = [self.recorded(f"acc/{i}")[t] for i in range(self._count("init"))]
        return [None if value.size and np.isnan(value).all() else value for value in values]

    def ema(self, t: int) -> list[np.ndarray]:
        """The averages of the parameters after call ``t`` (Keras with ``use_ema``)."""
        return [self.recorded(f"ema/{i}")[t] for i in range(self._count("init"))]

    def gacc(self, t: int) -> list[np.ndarray]:
        """The sums of the accumulated gradients after call ``t`` (Keras with ``gradient_accumulation_steps``)."""
        return [self.recorded(f"gacc/{i}")[t] for i in range(self._count("init"))]

    def final(self) -> list[np.ndarray]:
        """The parameters after ``finalize_variable_values`` (Keras with ``finalize``)."""
        return [self.recorded(f"final/{i}") for i in range(self._count("init"))]

    def recorded(self, name: str) -> np.ndarray:
        """An array of the recording by its name in the file, in double precision."""
        array = _arrays(self.framework, self.id)[name]
        if array.dtype == np.uint16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)

    def _count(self, prefix: str) -> int:
        return sum(key.startswith(prefix + "/") for key in _arrays("problems", self.problem))

    def _cast(self, array: np.ndarray) -> mx.array:
        return mx.array(array).astype(getattr(mx, self.dtype))


def cases(framework: str | None = None) -> list[Case]:
    """The recorded runs of one framework, or all."""
    return [
        Case(
            entry["id"],
            entry["framework"],
            entry["problem"],
            copy.deepcopy(entry["hp"]),
            entry.get("dtype", "float32"),
            entry.get("note", ""),
            copy.deepcopy(entry),
        )
        for entry in _manifest()["cases"]
        if framework in (None, entry["framework"])
    ]


def case(id: str) -> Case:
    """The recorded run of that name."""
    return next(found for found in cases() if found.id == id)


def assert_close(
    case: Case, got: Sequence[Any], want: Sequence[Any], *, rtol: float | None = None, atol: float | None = None
) -> None:
    """Assert that arrays match those of the recording within its tolerance; what is None in ``want`` is not compared.

    Args:
        case: The recorded run, whose dtype sets the tolerance.
        got: Arrays of MLX or numpy, in the order of the parameters.
        want: What the recording has.
        rtol: Relative tolerance in place of the usual one.
        atol: Absolute tolerance in place of the usual one.
    """
    scale = HALF_TOLERANCE.get(case.dtype)
    usual_rtol, usual_atol = (5e-5, 1e-6) if scale is None else (scale, 0.1 * scale)
    assert len(got) == len(want), f"{case}: {len(got)} arrays for {len(want)}"
    for name, mine, theirs in zip(case.names, got, want, strict=True):
        if theirs is None:
            continue
        mine = mine.astype(mx.float32) if isinstance(mine, mx.array) and mine.dtype == mx.bfloat16 else mine
        np.testing.assert_allclose(
            np.asarray(mine).astype(theirs.dtype),
            theirs,
            rtol=usual_rtol if rtol is None else rtol,
            atol=usual_atol if atol is None else atol,
            err_msg=f"{case}: {name}",
        )
        assert mine.shape == theirs.shape, f"{case}: {name} has shape {mine.shape}, not {theirs.shape}"


@functools.cache
def _manifest() -> dict[str, Any]:
    return json.loads((TRAJECTORIES / "manifest.json").read_text())


@functools.cache
def _file(name: str) -> dict[str, np.ndarray]:
    with np.load(TRAJECTORIES / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@functools.cache
def _arrays(name: str, prefix: str) -> dict[str, np.ndarray]:
    return {key[len(prefix) + 1 :]: array for key, array in _file(name).items() if key.startswith(prefix + "/")}
