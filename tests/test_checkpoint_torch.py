"""Checkpoints of torch: read without running code, continued as recorded, and written for torch to go on with."""

from __future__ import annotations

import functools
import io
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_runs import bits
from foreign_checkpoints import (
    FUZZ,
    PATHS,
    SHAPES,
    TORCH,
    TORCH_FILE,
    Lying,
    goes_on_as_recorded,
    initialised,
    parameters,
    refused,
    torch_optimizer,
    torch_state,
    trained,
    try_damaged,
)
from mlx_adagrad import Adagrad, presets
from mlx_adagrad.checkpoint import (
    export_torch,
    import_torch,
)


def test_torch_goes_on_from_memory() -> None:
    optimizer = initialised(torch_optimizer())
    import_torch(torch_state(), optimizer)
    assert optimizer.step.item() == 8 and optimizer.state["bias"]["step"].item() == 8
    goes_on_as_recorded("torch", optimizer)


@pytest.mark.skipif(not TORCH, reason="torch is not installed: its own reader of files")
def test_torch_goes_on_from_a_file() -> None:
    optimizer = initialised(torch_optimizer())
    import_torch(TORCH_FILE, optimizer)
    goes_on_as_recorded("torch", optimizer)


def test_names_map_indices_in_any_order() -> None:
    optimizer = torch_optimizer("c", "a", "b")
    w = parameters("torch")
    initialised(optimizer, {"a": w["bias"], "b": w["scale"], "c": w["kernel"]})
    import_torch(torch_state(), optimizer, names={1: "a", 2: "b", 0: "c"})
    goes_on_as_recorded("torch", optimizer, lambda tree: dict(zip("cab", (tree[path] for path in PATHS), strict=True)))


def torch_with(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    state = torch_state()
    change(state)
    return state


def test_torch_hyperparameters_that_differ_are_named() -> None:
    live = initialised(presets.torch(0.1, lr_decay=0.1, weight_decay=0.02))
    message = (
        "'lr_decay' of 'kernel' is 0.05 in the file but 0.1 here\n"
        "  'weight_decay' of 'kernel' is 0.0 in the file but 0.02 here\n"
        "  'lr_decay' of 'bias' is 0.05 in the file but 0.1 here"
    )
    refused(ValueError, message, import_torch, torch_state(), live)
    message = "'kernel' and 'bias' have the learning rates 0.2 and 0.1"
    refused(ValueError, message, functools.partial(import_torch, strict=False), torch_state(), live)
    for group in (state := torch_state())["param_groups"]:
        group["lr"] = 0.3
    import_torch(state, live, strict=False)
    assert live.learning_rate.item() == pytest.approx(0.3) and live.state["bias"]["step"].item() == 8


def test_torch_step_counts_may_differ_where_they_are_counted_apart() -> None:
    def late(state: dict[str, Any]) -> None:
        state["state"][2]["step"] = np.float32(3)

    state = torch_with(late)
    live = initialised(torch_optimizer())
    import_torch(state, live)
    assert [live.state[path]["step"].item() for path in PATHS] == [8, 8, 3] and live.step.item() == 8
    groups = [{"params": "kernel", "lr": 0.1}, {"params": "*", "weight_decay": 0.02}]
    shared = initialised(Adagrad(0.1, 1e-10, lr_decay=0.05, groups=groups))
    refused(ValueError, "only presets.torch counts them apart", import_torch, state, shared)


def test_a_torch_parameter_that_has_not_been_stepped_starts_afresh() -> None:
    state = torch_with(lambda state: state["state"].pop(1))
    live = initialised(torch_optimizer())
    live.state["bias"]["v"] = mx.full(4, 7.0)
    import_torch(state, live)
    assert live.state["bias"]["v"].tolist() == [pytest.approx(0.1)] * 4 and live.state["bias"]["step"].item() == 0


def test_torch_names_of_parameters_are_used() -> None:
    state = torch_state()
    state["param_groups"][0]["param_names"] = ["kernel"]
    state["param_groups"][1]["param_names"] = ["scale", "bias"]
    state["state"][1], state["state"][2] = state["state"][2], state["state"][1]
    live = initialised(torch_optimizer())
    import_torch(state, live)
    goes_on_as_recorded("torch", live)


def test_torch_state_keeps_half_precision() -> None:
    state = torch_state()
    for own in state["state"].values():
        own["sum"] = mx.array(own["sum"]).astype(mx.bfloat16)
    live = torch_optimizer()
    initialised(live, {path: mx.ones(shape, mx.bfloat16) for path, shape in zip(PATHS, SHAPES, strict=True)})
    import_torch(state, live)
    assert bits(live.state["kernel"]["v"]) == bits(state["state"][0]["sum"])
    wide = initialised(torch_optimizer())
    import_torch(state, wide)
    assert wide.state["kernel"]["v"].dtype == mx.float32
    assert bits(wide.state["kernel"]["v"]) == bits(state["state"][0]["sum"].astype(mx.float32))


def test_which_group_a_parameter_is_in_is_not_remembered_from_its_state() -> None:
    def optimizer() -> Any:
        groups = [{"params": lambda path, w: w.dtype == mx.bfloat16, "lr": 0.5}]
        w = {path: mx.ones(shape, mx.bfloat16) for path, shape in zip(PATHS, SHAPES, strict=True)}
        return initialised(presets.torch(0.1, state_dtype="float32", groups=groups), w), w

    live, w = optimizer()
    for group in (state := torch_state())["param_groups"]:
        group["lr"] = 0.1
    import_torch(state, live, strict=False)
    other, _ = optimizer()
    for path, own in live.state.items():
        if path in PATHS:
            other.state[path].update(own)
    other.state["step"] = live.state["step"]
    assert bits(live.apply_gradients(w, w)) == bits(other.apply_gradients(w, w))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("state"), "no state_dict of a torch optimizer"),
        (lambda s: s.update(param_groups={}), "'param_groups' must be a list"),
        (lambda s: s.update(param_groups=[]), "it has no parameters"),
        (lambda s: s["param_groups"].append(3), "'param_groups' must be a list"),
        (lambda s: s["param_groups"][0].pop("lr"), "'param_groups' must be a list"),
        (lambda s: s["param_groups"][0].update(params=[[0]]), "must be lists of numbers and names"),
        (lambda s: s["param_groups"][0].update(param_names=["a", "b"]), "must be lists of numbers and names"),
        (lambda s: s["param_groups"][0].update(params=[1]), "parameter 1 twice"),
        (lambda s: s["param_groups"][0].update(lr=float("nan")), "'lr' is nan"),
        (lambda s: s["param_groups"][0].update(lr=-0.1), "learning rate of 0 is -0.1"),
        (lambda s: s["param_groups"][0].update(lr=1e39), r"learning rate of 0 is 1e\+39"),
        (lambda s: s["param_groups"][0].update(lr="0.1"), "'lr' is no array"),
        (lambda s: s["param_groups"][0].update(lr=np.ones(2)), r"'lr' must be one number but has shape \(2,\)"),
        (lambda s: s["state"][0].update(step=-1), "a step count of -1 cannot be"),
        (lambda s: s["state"][0].update(step=1e300), "cannot be"),
        (lambda s: s["state"][0].update(step=None), "'step' is no array"),
        (lambda s: s["state"][0].pop("sum"), "no 'step' and 'sum': it is not Adagrad's"),
        (lambda s: s["state"].update({0: []}), "no 'step' and 'sum'|it is not Adagrad's"),
        (lambda s: s["state"][0].update(sum="x" * 1000), "'sum' of 0 is no array"),
        (lambda s: s["state"][0].update(sum=np.array([object()])), "'sum' of 0 is no array"),
        (lambda s: s["state"][0].update(sum=np.ones((3, 4), int)), "the v of 0 is"),
        (lambda s: s["state"][0].update(sum=np.ones((3, 4), np.complex64)), "complex64 in the file but"),
        (lambda s: s["state"][0].update(sum=Lying()), r"shape \(1000000, 1000000\) in the file but \(3, 4\) here"),
    ],
)
def test_a_torch_state_that_lies_is_refused(change: Callable, message: str) -> None:
    refused(ValueError, message, import_torch, torch_with(change), initialised(torch_optimizer()))


def fake_torch(monkeypatch: pytest.MonkeyPatch, version: str = "2.6.0") -> list[dict[str, Any]]:
    """Puts a torch in place that only notes how files are read; returns the notes."""
    calls: list[dict[str, Any]] = []

    def load(stream: Any, **options: Any) -> Any:
        calls.append(options)
        return torch_state()

    fake: Any = types.ModuleType("torch")
    fake.__version__, fake.load = version, load
    monkeypatch.setitem(sys.modules, "torch", fake)
    return calls


def test_files_of_torch_are_read_without_running_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_torch(monkeypatch)
    import_torch(str(TORCH_FILE), initialised(torch_optimizer()))
    assert calls == [{"map_location": "cpu", "weights_only": True}]


def test_files_of_torch_need_a_torch_that_can_be_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_torch(monkeypatch, "2.5.1+cpu")
    refused(ImportError, "2.6 or newer is needed", import_torch, TORCH_FILE, initialised(torch_optimizer()))
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(ImportError, "torch, which is not installed", import_torch, TORCH_FILE, initialised(torch_optimizer()))
    assert calls == []


def test_archives_that_torch_never_writes_are_not_shown_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_torch(monkeypatch)
    whole = TORCH_FILE.read_bytes()
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1_000_000))
    for data in (b"", b"\x80\x02}q\x00.", whole[:-100], whole[:500], bomb.getvalue()):
        (tmp_path / "x.pt").write_bytes(data)
        refused(
            ValueError, "damaged archive|never writes", import_torch, tmp_path / "x.pt", initialised(torch_optimizer())
        )
    assert calls == []


@pytest.mark.skipif(not TORCH, reason="torch is not installed: its own reader of files")
@FUZZ
@given(data=st.data())
def test_a_damaged_file_of_torch_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    try_damaged(import_torch, lambda: initialised(torch_optimizer()), TORCH_FILE, tmp_path / "x.pt", data)


@pytest.mark.skipif(not TORCH, reason="torch is not installed: its own reader of files")
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    import torch  # pyright: ignore[reportMissingImports]

    class Hostile:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    torch.save(Hostile(), tmp_path / "x.pt")
    refused(ValueError, "torch refuses it", import_torch, tmp_path / "x.pt", initialised(torch_optimizer()))
    assert not (tmp_path / "ran").exists()


def test_export_to_torch_has_the_form_of_a_state_dict() -> None:
    optimizer = initialised(torch_optimizer())
    import_torch(torch_state(), optimizer)
    exported, recorded = export_torch(optimizer), torch_state()
    assert exported.keys() == {"state", "param_groups"} and exported["state"].keys() == {0, 1, 2}
    for i, own in exported["state"].items():
        assert str(own["step"].dtype).endswith("float32") and own["step"].shape == ()
        assert np.array_equal(np.asarray(own["step"]), recorded["state"][i]["step"])
        assert np.array_equal(np.asarray(own["sum"]), recorded["state"][i]["sum"])
    for group, expected in zip(exported["param_groups"], recorded["param_groups"], strict=True):
        assert group.pop("lr") == pytest.approx(expected.pop("lr"))
        assert group == {**expected, "fused": None, "differentiable": False}


def test_export_to_torch_and_back() -> None:
    optimizer = initialised(torch_optimizer(), {"bias": mx.ones(4), "scale": mx.ones(()), "kernel": mx.ones((4, 3))})
    w: Any = {"bias": mx.ones(4), "scale": mx.ones(()), "kernel": mx.ones((4, 3))}
    w |= optimizer.apply_gradients({"kernel": mx.arange(12).reshape(4, 3).astype(mx.float32), "bias": mx.ones(4)}, w)
    optimizer.apply_gradients(w, w)
    names = [("kernel", (1, 0)), "scale", "bias"]
    exported = export_torch(optimizer, names)
    assert tuple(exported["state"][0]["sum"].shape) == (3, 4), "in torch's order of the axes"
    assert [float(exported["state"][i]["step"]) for i in range(3)] == [2, 1, 2]
    live = initialised(torch_optimizer(), w)
    import_torch(exported, live, names)
    assert bits(live.state) == bits(optimizer.state)


def test_what_torch_does_not_have_is_refused() -> None:
    keras = presets.keras(0.1, weight_decay=0.1, use_ema=True)
    for optimizer, message in [
        (keras, "no eps_inside_sqrt=True, no decoupled_weight_decay=True, no ExponentialMovingAverage"),
        (presets.mindspore_nn(0.1, update_slots=False), "no update_accumulator=False"),
    ]:
        trained(optimizer, steps=1)
        with pytest.raises(ValueError, match=message):
            export_torch(optimizer)


@pytest.mark.skipif(not TORCH, reason="torch is not installed: it goes on from ours")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_goes_on_from_ours(dtype: str) -> None:
    import torch  # pyright: ignore[reportMissingImports]

    ours, kind = torch_optimizer(), getattr(mx, dtype)
    w = {path: p.astype(kind) for path, p in parameters("torch").items()}
    gradients = [{path: g.astype(kind) for path, g in parameters("torch", "grad", t).items()} for t in range(12)]
    for g in gradients[:5]:
        w = ours.apply_gradients(g, w)
    theirs = {
        path: torch.nn.Parameter(torch.tensor(np.array(p.astype(mx.float32))).to(getattr(torch, dtype)))
        for path, p in w.items()
    }
    groups = [{"params": [theirs["kernel"]]}, {"params": [theirs["bias"], theirs["scale"]]}]
    optimizer = torch.optim.Adagrad(groups, lr=0.9, fused=True)
    optimizer.load_state_dict(export_torch(ours))
    for group in optimizer.param_groups:
        group["fused"] = True
    for g in gradients[5:]:
        w = ours.apply_gradients(g, w)
        for path, p in theirs.items():
            p.grad = torch.tensor(np.array(g[path].astype(mx.float32))).to(getattr(torch, dtype))
        optimizer.step()
    rtol, atol = (5e-5, 1e-6) if dtype == "float32" else (2e-2, 2e-3)
    for path, p in theirs.items():
        expected = p.detach().float().numpy()
        np.testing.assert_allclose(np.array(w[path].astype(mx.float32)), expected, rtol=rtol, atol=atol)
