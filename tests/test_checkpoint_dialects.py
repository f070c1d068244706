"""Checkpoints of other frameworks: the recorded ones go on as recorded, and none that is damaged or lies does harm."""

from __future__ import annotations

import binascii
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from checkpoint_runs import bits
from foreign_checkpoints import (
    FUZZ,
    KERAS_FILE,
    MINDSPORE_FILE,
    MLX_FILE,
    PATHS,
    SHAPES,
    Lying,
    goes_on_as_recorded,
    initialised,
    keras_optimizer,
    layers,
    mindspore_optimizer,
    parameters,
    refused,
    torch_state,
    trained,
    try_damaged,
)
from mlx_adagrad import Adagrad, RowWise, presets
from mlx_adagrad.checkpoint import (
    export_mlx,
    import_keras,
    import_mindspore,
    import_mlx,
    import_torch,
    kinds,
)
from mlx_adagrad.wrappers import ClipByNorm, DynamicLossScale, ExponentialMovingAverage, SkipNonFinite


def test_keras_goes_on_within_a_window_of_accumulation() -> None:
    optimizer = initialised(keras_optimizer())
    import_keras(KERAS_FILE, optimizer)
    assert optimizer.step.item() == 8 // 3, "updates, where Keras counts calls"
    goes_on_as_recorded("keras", optimizer)


def test_mindspore_goes_on_with_its_weights() -> None:
    optimizer = initialised(mindspore_optimizer())
    weights = import_mindspore(MINDSPORE_FILE, optimizer)
    assert bits(weights) == bits(parameters("mindspore"))
    goes_on_as_recorded("mindspore", optimizer)


@pytest.mark.parametrize("begun", [False, True])
def test_mlx_goes_on(begun: bool) -> None:
    optimizer = presets.mlx(0.5)
    if begun:
        initialised(optimizer, layers(parameters("mlx")))
    import_mlx(MLX_FILE, optimizer)
    goes_on_as_recorded("mlx", optimizer, layers)


def test_a_compiled_step_goes_on_after_an_import() -> None:
    optimizer = initialised(mindspore_optimizer())
    state, slots, traces = optimizer.state, dict(optimizer.state), 0

    def step(g: Any, w: Any) -> Any:
        nonlocal traces
        traces += 1
        return optimizer.apply_gradients(g, w)

    compiled = mx.compile(step, inputs=state, outputs=state)
    compiled(parameters("mindspore", "grad", 3), parameters("mindspore"))
    import_mindspore(MINDSPORE_FILE, optimizer)
    assert optimizer.state is state and all(state[path] is slots[path] for path in PATHS)
    w = compiled(parameters("mindspore", "grad", 0), parameters("mindspore"))
    assert traces == 1
    recorded = parameters("mindspore", "param", 0)
    assert all(mx.allclose(w[path], recorded[path], rtol=5e-5, atol=1e-6) for path in PATHS)


@pytest.mark.parametrize(
    "names",
    [
        ["layers.0.weight", "layers.0.bias", "scale"],
        {"kernel": "layers.0.weight", "bias": "layers.0.bias", "scale": "scale"},
        {"kernel": ("layers.0.weight", (0, 1)), "bias": ("layers.0.bias", [0]), "scale": ("scale", ())},
    ],
)
def test_names_map_parameters(names: Any) -> None:
    optimizer = initialised(mindspore_optimizer(), layers(parameters("mindspore")))
    weights = import_mindspore(MINDSPORE_FILE, optimizer, names)
    assert bits(tree_unflatten(list(weights.items()))) == bits(layers(parameters("mindspore")))
    goes_on_as_recorded("mindspore", optimizer, layers)


def test_names_turn_axes() -> None:
    w = parameters("keras")
    optimizer = initialised(keras_optimizer(), {"bias": w["bias"], "weight": w["kernel"].T, "scale": w["scale"]})
    import_keras(KERAS_FILE, optimizer, names=[("weight", (1, 0)), "bias", "scale"])
    goes_on_as_recorded("keras", optimizer, lambda t: {"weight": t["kernel"].T, "bias": t["bias"], "scale": t["scale"]})


def test_names_of_mlx_turn_axes() -> None:
    source = optim.Adagrad(0.1)
    source.init({"conv": mx.zeros((2, 3, 4, 5))})
    source.state["conv"]["v"] = mx.arange(120).reshape(2, 3, 4, 5).astype(mx.float32)
    live = initialised(Adagrad(0.1), {"conv2": mx.zeros((2, 4, 5, 3))})
    import_mlx(source.state, live, names={"conv": ("conv2", (0, 2, 3, 1))})
    assert mx.array_equal(live.state["conv2"]["v"], source.state["conv"]["v"].transpose(0, 2, 3, 1))
    back = export_mlx(live, names={"conv": ("conv2", (0, 2, 3, 1))})
    assert mx.array_equal(back["conv.v"], source.state["conv"]["v"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bias", "kernel", "scale"], r"'bias' has shape \(3, 4\) in the file but \(4,\) here"),
        (["kernel", "bias"], r"it has 3 parameters \(kernel, bias, scale\) for 2 here \(kernel, bias\)"),
        (["kernel", "bias", None], "'names' lacks scale"),
        (["kernel", "bias", "bias"], "'names' has 'bias' twice"),
        (["kernel", "bias", "gain"], r"'names' has 'gain', which is no parameter of the optimizer \(kernel,"),
        ({"kernle": "kernel"}, r"'names' has 'kernle', which is no parameter in the file \(kernel, bias, scale\)"),
        ({"kernel": ("kernel", (1, 1)), "bias": "bias", "scale": "scale"}, r"\(1, 1\) is no order of them"),
        ({"kernel": ("kernel", (1, 0)), "bias": "bias", "scale": "scale"}, r"'kernel' has shape \(4, 3\) in the file"),
    ],
)
def test_names_that_do_not_fit_are_refused(names: Any, message: str) -> None:
    refused(ValueError, message, import_mindspore, MINDSPORE_FILE, initialised(mindspore_optimizer()), names)


def test_an_optimizer_without_state_or_adagrad_is_refused() -> None:
    message = r"call optimizer.init\(model.trainable_parameters\(\)\) first"
    for function, source in ((import_torch, torch_state()), (import_mindspore, MINDSPORE_FILE)):
        refused(ValueError, message, function, source, Adagrad(0.1))
    refused(ValueError, "no mlx_adagrad.Adagrad in Adam", import_mlx, MLX_FILE, optim.Adam(0.1))
    refused(ValueError, "no mlx_adagrad.Adagrad in ClipByNorm", import_mlx, MLX_FILE, ClipByNorm(optim.Adam(0.1), 1.0))


@pytest.mark.parametrize(
    ("function", "make", "source"),
    [
        (import_keras, lambda: initialised(keras_optimizer()), KERAS_FILE),
        (import_mindspore, lambda: initialised(mindspore_optimizer()), MINDSPORE_FILE),
        (import_mlx, lambda: presets.mlx(0.1), MLX_FILE),
    ],
)
@FUZZ
@given(data=st.data())
def test_a_damaged_file_is_refused_or_harmless(
    tmp_path: Path, function: Any, make: Any, source: Path, data: st.DataObject
) -> None:
    try_damaged(function, make, source, tmp_path / "x", data)


def npz(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin1") + data


NPY_LIES = [
    (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}", bytes(48)), "promises 400000000000"),
    (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4)}", bytes(44)), "promises 48 bytes but has 44"),
    (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}"), "impossible shape"),
    (npy("{'descr': '<f4', 'fortran_order': False, 'shape': [3, 4]}"), "impossible shape"),
    (npy("{'descr': '|O', 'fortran_order': False, 'shape': ()}", b"cos\nsystem\n"), "dtype that cannot be read"),
    (npy("{'descr': '>f4', 'fortran_order': False, 'shape': ()}", bytes(4)), "dtype that cannot be read"),
    (npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': ()}", bytes(4)), "dtype that cannot be read"),
    (npy("__import__('os').abort()"), "dtype that cannot be read"),
    (npy("(" * 5000), "dtype that cannot be read"),
    (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{}", "no array of numpy"),
    (b"", "no array of numpy"),
]


@pytest.mark.parametrize(("member", "message"), NPY_LIES)
def test_an_array_of_numpy_that_lies_is_refused(tmp_path: Path, member: bytes, message: str) -> None:
    with zipfile.ZipFile(KERAS_FILE) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | {"8.npy": member}
    live = initialised(keras_optimizer())
    refused(ValueError, message, import_keras, npz(tmp_path / "x.npz", members), live)


def test_a_bomb_in_an_archive_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (5000000,)}", bytes(20_000_000))
    with zipfile.ZipFile(KERAS_FILE) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | {"8.npy": member}
    path = npz(tmp_path / "x.npz", members, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    largest = 0

    def read(self: Any, n: int = -1) -> bytes:
        nonlocal largest
        data = unpack(self, n)
        largest = max(largest, len(data))
        return data

    unpack = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", read)
    message = r"shape \(5000000,\) in the file but \(3, 4\)"
    refused(ValueError, message, import_keras, path, initialised(keras_optimizer()))
    assert 0 < largest <= 10_000


def test_arrays_of_numpy_come_in_both_orders_and_every_dtype(tmp_path: Path) -> None:
    variables = dict(np.load(KERAS_FILE))
    variables["8"] = np.asfortranarray(variables["8"])
    for name in ("5", "6", "9"):
        variables[name] = variables[name].astype(np.float64)
    np.savez_compressed(tmp_path / "x.npz", **variables)
    optimizer = initialised(keras_optimizer())
    import_keras(tmp_path / "x.npz", optimizer)
    goes_on_as_recorded("keras", optimizer)


# Keras


def keras_variables(count: int, *, rate: bool = True, outer: bool = False, kinds: int = 1) -> dict[str, Any]:
    head = [np.int64(0), np.float32(0), np.int32(5), np.float32(1024.0)] if outer else []
    head += [np.int64(9), *([np.float32(0.25)] if rate else [])]
    arrays = [np.full(shape, k, np.float32) for k in range(kinds) for shape in SHAPES[:count]]
    return {str(i): array for i, array in enumerate([*head, *arrays])}


@pytest.mark.parametrize("rate", [False, True])
def test_keras_with_and_without_a_rate_of_its_own(rate: bool) -> None:
    live = initialised(presets.keras(0.1))
    import_keras(keras_variables(3, rate=rate), live)
    assert live.step.item() == 9 and live.learning_rate.item() == pytest.approx(0.25 if rate else 0.1)


def test_a_schedule_here_keeps_the_rate() -> None:
    live = initialised(presets.keras(optim.cosine_decay(0.5, 100)))
    import_keras(keras_variables(3), live)
    assert live.step.item() == 9 and live.learning_rate.item() == pytest.approx(0.5)


def test_keras_weights_as_a_list() -> None:
    live = initialised(presets.tf_keras(0.1))
    import_keras(dict(enumerate(keras_variables(3, rate=False).values())), live)
    assert live.step.item() == 9 and live.state["kernel"]["v"].sum().item() == 0


def test_a_loss_scale_optimizer_of_keras() -> None:
    live = initialised(DynamicLossScale(presets.keras(0.1, use_ema=True)))
    import_keras(keras_variables(3, outer=True, kinds=2), live)
    own, average = live.state["_mlx_adagrad"], live.state["inner"]["_mlx_adagrad"]
    assert own["dynamic_scale"].item() == 1024 and own["step_counter"].item() == 5
    assert own["step_counter"].dtype == mx.uint64 and average["calls"].item() == 9
    assert average["averages"]["/kernel"].sum().item() == 0
    assert live.state["inner"]["inner"]["kernel"]["v"].sum().item() == 12
    bad = keras_variables(3, outer=True, kinds=2) | {"3": np.float32(0)}
    refused(ValueError, "the loss scale is 0", import_keras, bad, live)


def test_a_wrapper_that_has_no_state_yet_is_named() -> None:
    live: Any = presets.keras(0.1, use_ema=True)
    initialised(live.optimizer)
    refused(ValueError, "'kernel' has no state here yet: call", import_keras, keras_variables(3, kinds=2), live)


def test_keras_parameters_that_are_left_out() -> None:
    live = Adagrad(0.1)
    live.init({"w": mx.ones((3, 4))})
    import_keras(keras_variables(3), live, ["w", None, None])
    assert live.step.item() == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("8"), "it holds 10 variables, but those of this optimizer are: iteration, learning rate"),
        (lambda v: v.update({"11": np.ones(3)}), "12 variables.*3 averages, 3 sums of gradients, 3 accumulators"),
        (lambda v: v.update({"x": v.pop("0")}), "it holds 11 variables, but"),
        (lambda v: v.update({"0": np.int64(-1)}), "a count of -1 cannot be"),
        (lambda v: v.update({"0": np.ones(3)}), "'iteration' must be one number"),
        (lambda v: v.update({"1": np.float32(np.nan)}), "'learning rate' is nan"),
        (lambda v: v.update({"3": np.ones((3, 4), np.float32)}), r"'bias' has shape \(3, 4\) in the file"),
        (lambda v: v.update({"6": np.ones(4, bool)}), "the gradient of 1 is"),
        (lambda v: v.update({"8": Lying()}), r"'kernel' has shape \(1000000, 1000000\) in the file"),
    ],
)
def test_keras_variables_that_do_not_fit_are_refused(change: Callable, message: str) -> None:
    variables = dict(np.load(KERAS_FILE))
    change(variables)
    refused(ValueError, message, import_keras, variables, initialised(keras_optimizer()))


# MindSpore


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def message(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: str, kind: str, dims: list[int], content: bytes, *, packed: bool = False) -> bytes:
    shape = message(1, b"".join(map(varint, dims))) if packed else b"".join(message(1, n) for n in dims)
    return message(1, message(1, name.encode()) + message(2, shape + message(2, kind.encode()) + message(3, content)))


def floats(count: int) -> bytes:
    return struct.pack(f"<{count}f", *range(count))


STEP = tensor("step_t", "Int32", [], struct.pack("<i", 7))


def test_mindspore_layouts(tmp_path: Path) -> None:
    pieces = [tensor("accum.w", "Float32", [2, 3], floats(6)[:8]), tensor("accum.w", "Float32", [2, 3], floats(6)[8:])]
    scalar = tensor("global_step", "Int32", [0], struct.pack("<i", 300))
    rate = tensor("learning_rate", "Float32", [], struct.pack("<f", 0.5))
    others = [tensor(kind, kind, [1], b"abcdefgh"[:n]) for kind, n in (("UInt8", 1), ("BFloat16", 2), ("UInt64", 8))]
    data = b"".join([*pieces, scalar, rate, tensor("w", "Float32", [2, 3], floats(6), packed=True), *others])
    checksum = b"crc_num" + binascii.crc32(data).to_bytes(10, "big")
    for content in (data, data + checksum):
        live = Adagrad(0.1)
        live.init({"w": mx.zeros((2, 3))})
        (tmp_path / "x.ckpt").write_bytes(content)
        weights = import_mindspore(tmp_path / "x.ckpt", live)
        expected = [[0, 1, 2], [3, 4, 5]]
        assert live.state["w"]["v"].tolist() == weights["w"].tolist() == expected
        assert live.step.item() == 300 and live.learning_rate.item() == 0.5
    (tmp_path / "x.ckpt").write_bytes(data[:20] + b"\x01" + data[21:] + checksum)
    refused(ValueError, "checksum is wrong", import_mindspore, tmp_path / "x.ckpt", live)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is not of an Adagrad"),
        (tensor("accum.w", "Float32", [2], floats(2)), "it is not of an Adagrad"),
        (STEP, "it is not of an Adagrad"),
        (tensor("accum.w", "Float32", [2], floats(2)) + STEP * 2, "'step_t' promises"),
        (tensor("accum.w", "Float32", [2], floats(2)) + tensor("accum.w", "Float32", [3], floats(3)), "given twice"),
        (tensor("accum.w", "Float32", [2**40, 2**40], floats(2)) + STEP, "a shape that cannot be read"),
        (tensor("accum.w", "Float32", [2**31 - 1, 2**31 - 1], floats(2)) + STEP, "promises"),
        (tensor("accum.w", "Float32", [2**63], b"") + STEP, "a shape that cannot be read"),
        (tensor("accum.w", "str", [1], b"os.abort()") + STEP, "has a dtype"),
        (tensor("accum.w", "Int32", [2], floats(2)) + STEP, "the v of 'w' is"),
        (tensor("accum.w", "Float32", [4], floats(4)) + STEP, r"'w' has shape \(4,\) in the file but \(2,\) here"),
        (tensor("accum.w", "Float32", [2], floats(2)) + tensor("step_t", "Int8", [], b"\xfb"), "-5 cannot be"),
        (message(1, message(1, b"\xff")), "other than named"),
        (message(1, message(1, b"\xff") + message(2, message(2, b"Float32"))), "a name that is no text"),
        (b"\x0a" + b"\xff" * 20, "truncated or damaged"),
        (b"\x0a\x7f", "truncated or damaged"),
        (b"\x0d\x00\x00\x00\x00", "encrypted"),
        (message(3, b"x"), "no checkpoint of MindSpore"),
        (message(1, 5), "no checkpoint of MindSpore"),
    ],
)
def test_a_mindspore_file_that_lies_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    live = Adagrad(0.1)
    live.init({"w": mx.zeros(2)})
    (tmp_path / "x.ckpt").write_bytes(data)
    refused(ValueError, message, import_mindspore, tmp_path / "x.ckpt", live)


# MLX


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("form", ["state", "flat", "safetensors", "npz"])
def test_stock_mlx_in_every_form(tmp_path: Path, form: str, dtype: mx.Dtype) -> None:
    stock, _ = trained(optim.Adagrad(0.1), dtype)
    flat: Any = dict(tree_flatten(stock.state))
    source: Any = {"state": stock.state, "flat": flat}.get(form, tmp_path / f"x.{form}")
    if form == "safetensors":
        mx.save_safetensors(str(source), flat)
    elif form == "npz":
        mx.savez(str(source), **flat)
    for live in (presets.mlx(0.5), trained(presets.mlx(0.5), dtype)[0]):
        import_mlx(source, live)
        assert live.step.item() == 3 and live.learning_rate.item() == pytest.approx(0.1)
        v = live.state["layers"][0]["weight"]["v"]
        assert mx.array_equal(v.astype(dtype), stock.state["layers"][0]["weight"]["v"])
        trained(live, dtype)
        assert live.state["layers"][0]["weight"]["v"].dtype == mx.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("step"), "it must have 'step'"),
        (lambda s: s.update({"w.m": mx.ones(2)}), "no state of an Adagrad of MLX: it has 'w.m'"),
        (lambda s: s.update({"w.v": mx.ones(2, mx.int32)}), "the v of 'w' is"),
        (lambda s: s.update({"learning_rate": mx.array(-1.0)}), "learning rate of 'w' is -1"),
        (lambda s: s.update({"a." * 10_000 + "v": mx.ones(2)}), "nested more than 100 levels deep"),
        (lambda s: s.update({"learning_rate": mx.ones(3)}), "'learning_rate' must be one number"),
        (lambda s: s.update({"step": np.uint64(2**63)}), "cannot be"),
    ],
)
def test_an_mlx_state_that_lies_is_refused(change: Callable, message: str) -> None:
    state: dict[str, Any] = {"step": mx.array(3, mx.uint64), "learning_rate": mx.array(0.1), "w.v": mx.ones(2)}
    change(state)
    refused(ValueError, message, import_mlx, state, presets.mlx(0.1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 1e-6), (mx.bfloat16, 0.02)])
def test_stock_mlx_goes_on_from_ours(dtype: mx.Dtype, tolerance: float) -> None:
    ours, w = trained(presets.mlx(0.1), dtype)
    stock = optim.Adagrad(0.5)
    stock.state = tree_unflatten(list(export_mlx(ours, dtype=dtype).items()))
    theirs, mine = dict(tree_flatten(trained(stock, dtype, w=w)[1])), dict(tree_flatten(trained(ours, dtype, w=w)[1]))
    for path, got in theirs.items():
        assert got.dtype == dtype, path
        wide = np.array(mine[path].astype(mx.float32))
        np.testing.assert_allclose(np.array(got.astype(mx.float32)), wide, rtol=tolerance, atol=0.1 * tolerance)
    assert stock.step.item() == 6 and stock.learning_rate.item() == pytest.approx(0.1)


def test_what_stock_mlx_does_not_have_is_refused() -> None:
    refusals = [
        (Adagrad(0.1, lr_decay=0.1, maximize=True), "has no lr_decay=0.1, no maximize=True"),
        (Adagrad(0.1, eps_inside_sqrt=True), "has no eps_inside_sqrt=True"),
        (Adagrad(0.1, accumulator=RowWise()), "has no RowWise"),
        (Adagrad(0.1, groups=[{"params": "*bias", "lr": 0.2}]), "has no groups"),
        (Adagrad(0.1, weight_decay_mask=lambda path, w: True), "has no weight_decay_mask"),
        (ExponentialMovingAverage(Adagrad(0.1)), "has no ExponentialMovingAverage"),
        (presets.paper(), "has no eps of 0"),
    ]
    for optimizer, message in refusals:
        trained(optimizer, steps=1)
        with pytest.raises(ValueError, match=message):
            export_mlx(optimizer)
    with pytest.raises(ValueError, match="no state to export"):
        export_mlx(Adagrad(0.1))
    with pytest.raises(TypeError, match="'names' must map"):
        export_mlx(trained(Adagrad(0.1))[0], names=["a"])  # type: ignore[arg-type]
    export_mlx(trained(SkipNonFinite(ClipByNorm(Adagrad(0.1), 1.0)))[0])




@pytest.mark.parametrize("start", [b"\x80\x04", b"\x80\x02", b"PK", b"\x1f\x8b"], ids=str)
def test_the_length_of_a_header_may_look_like_another_kind_of_file(start, tmp_path):
    length = int.from_bytes(start, "little")
    header = b'{"__metadata__":{"format":"mlx_adagrad"}}'.ljust(length)
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + header)
    assert kinds.expect(tmp_path / "file", kinds.OWN) == kinds.OWN
