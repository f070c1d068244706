"""The recordings load, and a replay of the simple ones in numpy float64 gives what they hold."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import recorded
from recorded import Case

ALL = recorded.cases()


def test_every_case_is_there() -> None:
    assert len(ALL) == len({case.id for case in ALL}) == 127
    assert {case.framework: len(recorded.cases(case.framework)) for case in ALL} == {
        "torch": 34, "keras": 38, "mlx": 7, "optax": 6, "tf_keras": 13, "tf": 4,
        "mindspore": 9, "paddle": 7, "bitsandbytes": 4, "fbgemm": 2, "fbgemm_derived": 3,
    }  # fmt: skip


@pytest.mark.parametrize("case", ALL, ids=str)
def test_case_loads(case: Case) -> None:
    initial = case.initial()
    assert len(case.names) == len(initial) and case.steps in (20, 24)
    assert all(str(array.dtype).endswith(case.dtype) for array in initial)
    for t in range(case.steps):
        assert [array.shape for array in case.params(t)] == [array.shape for array in initial]
        assert len(case.acc(t)) == len(initial)
        if case.sparse:
            indices, values = case.gradients(t)
            assert values.shape == (len(indices), initial[0].shape[1])
        else:
            gradients = case.gradients(t)
            assert [g.shape for g in gradients if g is not None] == [
                w.shape for g, w in zip(gradients, initial, strict=True) if g is not None
            ]
            assert any(gradient is not None for gradient in gradients)
    for kind in {"ema", "gacc"} & set(case.entry["arrays"]):
        values = getattr(case, kind)(case.steps - 1)
        assert [array.shape for array in values] == [array.shape for array in initial]
    if "final" in case.entry["arrays"]:
        assert [array.shape for array in case.final()] == [array.shape for array in initial]
    assert ("lr" in case.entry["arrays"]) == (case.lr is not None)


def test_absent_gradients_and_state_are_none() -> None:
    case = recorded.case("tfk_legacy_none")
    assert case.gradients(0)[2] is None and case.gradients(23)[2] is not None
    assert case.acc(0)[2] is None and case.acc(23)[2] is not None


def test_hyperparameters_are_a_copy() -> None:
    recorded.case("keras_wd_exclude_names").hp.pop("names")
    assert recorded.case("keras_wd_exclude_names").names == ["kernel", "bias", "layer_gamma"]


TORCH = {"lr": 0.01, "eps": 1e-10}
KERAS = {"lr": 0.001, "eps": 1e-7, "initial_accumulator_value": 0.1, "eps_inside_sqrt": True}
MLX = {"eps": 1e-8}
REPLAYS = {
    **dict.fromkeys(("torch_default", "torch_wd", "torch_lr_decay", "torch_none", "torch_sparse"), TORCH),
    **dict.fromkeys(("torch_complex", "torch_steplr"), TORCH),
    **dict.fromkeys(("keras_default", "keras_eps_big", "keras_piecewise", "keras_bf16"), KERAS),
    **dict.fromkeys(("mlx_default_eps", "mlx_mixed", "mlx_expdecay"), MLX),
}
OUR_NAMES = {"learning_rate": "lr", "epsilon": "eps"}


@pytest.mark.parametrize("id", REPLAYS)
def test_replay_in_float64(id: str) -> None:
    case = recorded.case(id)
    options = REPLAYS[id] | {OUR_NAMES.get(key, key): value for key, value in case.hp.items()}
    weights = [_real(w) for w in case.initial()]
    value = options.get("initial_accumulator_value", 0.0)
    states = [np.full_like(w, value) for w in weights]
    counts = [0] * len(weights)
    for t in range(case.steps):
        rate = options["lr"] if case.lr is None else np.ravel(case.lr[t])[0]
        for i, gradient in enumerate(_dense_gradients(case, t)):
            if gradient is not None:
                lr = rate / (1 + counts[i] * options.get("lr_decay", 0.0))
                weights[i], states[i] = _adagrad(weights[i], _real(gradient), states[i], lr, options)
                counts[i] += 1
        recorded.assert_close(case, [_like(w, p) for w, p in zip(weights, case.params(t), strict=True)], case.params(t))
        wanted = case.acc(t)
        recorded.assert_close(case, [_like(v, a) for v, a in zip(states, wanted, strict=True)], wanted)


def _adagrad(w: Any, g: Any, v: Any, lr: float, options: dict[str, Any]) -> tuple[Any, Any]:
    g = g + options.get("weight_decay", 0.0) * w
    v = v + g * g
    root = np.sqrt(v + options["eps"]) if options.get("eps_inside_sqrt") else np.sqrt(v) + options["eps"]
    return w - lr * g / root, v


def _dense_gradients(case: Case, t: int) -> list[Any]:
    if not case.sparse:
        return case.gradients(t)
    indices, values = case.gradients(t)
    table = np.zeros(case.initial()[0].shape)
    np.add.at(table, np.array(indices), np.array(values))
    return [table]


def _real(array: Any) -> np.ndarray:
    """In float64, a complex number as a pair: torch takes its parts for two real numbers."""
    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    array = np.array(array)
    return np.stack([array.real, array.imag]).astype(np.float64) if np.iscomplexobj(array) else array.astype(np.float64)


def _like(array: np.ndarray, other: np.ndarray | None) -> np.ndarray:
    return array[0] + 1j * array[1] if other is not None and np.iscomplexobj(other) else array


@pytest.mark.parametrize("id", ["torch_default", "torch_bf16", "torch_fp16"])
def test_assert_close_sees_a_small_error(id: str) -> None:
    case = recorded.case(id)
    want = case.params(23)
    tolerance = {"float32": 5e-5, "bfloat16": 0.02, "float16": 0.002}[case.dtype]
    recorded.assert_close(case, [w * (1 + 0.9 * tolerance) for w in want], want)
    with pytest.raises(AssertionError, match=id):
        recorded.assert_close(case, [w * (1 + 1.5 * tolerance) + 2e-6 for w in want[:2]] + want[2:], want)
    with pytest.raises(AssertionError, match="arrays for"):
        recorded.assert_close(case, want[1:], want)


@pytest.mark.parametrize("framework", ["torch", "keras", "mlx", "mindspore"])
def test_checkpoints_are_there(framework: str) -> None:
    with np.load(recorded.CHECKPOINTS / f"{framework}_resume.npz") as resume:
        for i, shape in enumerate([(3, 4), (4,), ()]):
            assert resume[f"at/{i}"].shape == shape
            for kind in ("grad", "param", "acc"):
                assert resume[f"{kind}/{i}"].shape == (12, *shape)
    assert any(path.suffix != ".json" for path in recorded.CHECKPOINTS.glob(f"{framework}_[!r]*"))


def test_schedules_are_there() -> None:
    recordings = json.loads((recorded.GOLDEN / "schedules.json").read_text())["schedules"]
    assert {entry["framework"] for entry in recordings} == {"keras", "torch", "mindspore", "optax"}
    assert all(len(entry["steps"]) == len(entry["values"]) for entry in recordings)
