"""Checkpoints and pickles that version 0.1.0 wrote load, and the runs go on to where version 0.1.0 brought them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from cases import RELATIVE, to_numpy
from checkpoint_runs import MAKERS, SAVED, STEPS, Run
from mlx_adagrad import Dense, RowWise, checkpoint
from mlx_adagrad.trees import copied, present
from mlx_adagrad.wrappers import ExponentialMovingAverage, GradientAccumulation

WRITTEN = Path(__file__).parent / "golden" / "version_0.1.0"
OTHERS = ("accumulators", "model", "row_sparse", "schedule")  # pickles of no optimizer
CHECKPOINTS = sorted(path.stem for path in WRITTEN.glob("*.middle"))
PICKLES = sorted(path.stem for path in WRITTEN.glob("*.pickle") if path.stem not in OTHERS)
PICKLES.remove("float64")  # MLX itself makes float32 of a pickled float64 array


def unpickled(name: str) -> Any:
    return pickle.loads((WRITTEN / f"{name}.pickle").read_bytes())


def tree_of(run: Run) -> dict[str, Any]:
    return {"parameters": run.parameters, "state": run.optimizer.state}


def strings(state: Any) -> Any:
    return tree_unflatten(dict(tree_flatten(state)))


def assert_same(got: Any, want: Any, exact: bool = False) -> None:
    """Every array has the recorded value, but for what compilers round in another way."""
    found, recorded = dict(present(got)), dict(present(want))
    assert found.keys() == recorded.keys()
    with mx.stream(mx.cpu):
        for keys, array in found.items():
            assert (array.dtype, array.shape) == (recorded[keys].dtype, recorded[keys].shape), keys
            tolerance = 0 if exact else 10 * RELATIVE.get(array.dtype, 0)
            pair = to_numpy(array), to_numpy(recorded[keys])
            np.testing.assert_allclose(*pair, rtol=tolerance, atol=tolerance, err_msg=str(keys))


def ended(case: str) -> Run:
    run = Run(case, "eager")
    run.load(WRITTEN / f"{case}.end")
    return run


def test_everything_that_was_written_is_here() -> None:
    assert CHECKPOINTS == sorted(MAKERS) == sorted(path.stem for path in WRITTEN.glob("*.end"))
    assert len(PICKLES) == len(MAKERS) - 5 and all((WRITTEN / f"{name}.pickle").exists() for name in OTHERS)


@pytest.mark.parametrize("initialised", [False, True])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_goes_on(case: str, initialised: bool) -> None:
    run = Run(case, "eager")
    if initialised:
        if case in ("keras", "keras_bfloat16", "skip"):
            return  # they average what has no gradient too, and no init makes state for part of that
        run.optimizer.init({key: w for key, w in run.parameters.items() if key != "frozen"})
    run.load(WRITTEN / f"{case}.middle")
    run.train(SAVED, STEPS)
    assert_same(tree_of(run), tree_of(ended(case)))


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_goes_on(case: str) -> None:
    run, saved = Run(case, "eager"), Run(case, "eager")
    pickled = unpickled(case)
    run.optimizer, run.parameters = pickled["optimizer"], pickled["parameters"]
    saved.load(WRITTEN / f"{case}.middle")
    assert_same(tree_of(run), tree_of(saved), exact=True)
    run.train(SAVED, STEPS)
    assert_same(tree_of(run), tree_of(ended(case)))


def test_other_pickles_are_what_they_were() -> None:
    assert unpickled("accumulators") == [Dense(), Dense("parameter"), RowWise()]
    assert unpickled("schedule")(mx.array(5)).item() == pytest.approx(0.1)
    rows = unpickled("row_sparse")
    assert rows.shape == rows.to_dense().shape == (5, 4)
    assert unpickled("model")(mx.array([[0, 1]])).size


def test_averages_that_version_0_1_called_by_keys_with_slashes_and_dots_are_found(tmp_path: Path) -> None:
    w = {"user.id": {"w": mx.ones((2,))}, "a/b": [mx.ones((3,))], "experts": {"0": mx.ones((2,)), "12": mx.ones((2,))}}

    def make() -> Any:
        return ExponentialMovingAverage(GradientAccumulation(MAKERS["adagrad"](), 2), 0.5)

    source, half = make(), w
    for _ in range(3):  # into the second window
        half = source.apply_gradients(w, half)
    new = {("user.id", "w"): "/user.id/w", ("a/b", 0): "/a/b/0", ("experts", "0"): "/experts/0"}
    names = list(new.values()) + ["/experts/12"]

    def as_in_0_1(entries: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(names, entries.values(), strict=True))

    own, inner = source.state["_mlx_adagrad"], source.state["inner"]["_mlx_adagrad"]
    old = {
        "inner": {
            **copied(source.state["inner"]),
            "_mlx_adagrad": {**inner, "gradients": as_in_0_1(inner["gradients"])},
        },
        "_mlx_adagrad": {**own, "averages": as_in_0_1(own["averages"])},
    }
    want = source.apply_gradients(w, half)
    for initialised, state in ((False, old), (True, old), (False, strings(old)), (True, strings(old))):
        run = make()
        if initialised:
            run.init(w)
        run.state = state
        assert_same(run.apply_gradients(w, half), want, exact=True)
        assert_same(run.state, source.state, exact=True)
    run = make()
    run.state["inner"]["inner"].update(old["inner"]["inner"])
    for optimizer, own in ((run, old), (run.optimizer, old["inner"])):
        optimizer.state["_mlx_adagrad"].update(own["_mlx_adagrad"])
    checkpoint.save(tmp_path / "old", run)  # a file with the names of version 0.1
    for initialised in (False, True):
        run = make()
        if initialised:
            run.init(w)
        checkpoint.load(tmp_path / "old", run)
        assert_same(run.apply_gradients(w, half), want, exact=True)
        assert_same(run.state, source.state, exact=True)
