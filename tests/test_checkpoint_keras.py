"""Files of Keras by path, and files of every other kind told by their first bytes."""

from __future__ import annotations

import functools
import importlib.util
import io
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from checkpoint_runs import bits
from damage import damaged
from foreign_checkpoints import (
    KERAS_FILE,
    MLX_FILE,
    SHAPES,
    TORCH_FILE,
    goes_on_as_recorded,
    initialised,
    keras_optimizer,
    mindspore_optimizer,
    parameters,
    refused,
    torch_optimizer,
    torch_state,
)
from mlx_adagrad import Adagrad, checkpoint, presets
from mlx_adagrad.checkpoint import hdf5_worker, import_keras, import_mindspore, import_mlx, import_torch, kinds
from mlx_adagrad.wrappers import DynamicLossScale
from recorded import CHECKPOINTS

H5PY = importlib.util.find_spec("h5py") is not None
with_h5py = pytest.mark.skipif(not H5PY, reason="h5py is not installed: it reads Keras's files")
FILES = ["keras_adagrad.keras", "keras_adagrad.weights.h5", "keras_adagrad.h5"]
BFLOAT16 = CHECKPOINTS / "keras_bfloat16.weights.h5"


def hdf5(path: Path, *args: Any) -> Any:
    import h5py  # pyright: ignore[reportMissingImports]

    return h5py.File(path, *args)


def put(file: Any, variables: dict[str, Any], where: str = "optimizer/vars") -> None:
    for name, value in variables.items():
        file[f"{where}/{name}"] = value


def stored() -> dict[str, np.ndarray]:
    return dict(np.load(KERAS_FILE))


@with_h5py
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_keras_goes_on_as_recorded(name: str) -> None:
    optimizer = initialised(keras_optimizer())
    import_keras(CHECKPOINTS / name, optimizer)
    assert optimizer.step.item() == 8 // 3
    goes_on_as_recorded("keras", optimizer)


@with_h5py
@pytest.mark.parametrize("form", ["path", "file", "group", "mapping"])
def test_bfloat16_as_keras_writes_it(form: str) -> None:
    expected = {
        name: mx.array(value).astype(mx.bfloat16) for name, value in stored().items() if value.ndim or name > "1"
    }
    with hdf5(BFLOAT16, "r") as file:
        forms = {"path": BFLOAT16, "file": file, "group": file["optimizer/vars"]}
        forms["mapping"] = {name: dataset[()] for name, dataset in file["optimizer/vars"].items()}
        assert forms["mapping"]["2"].dtype.str == "|V2"
        live = initialised(keras_optimizer())
        import_keras(forms[form], live)
    state = live.state["inner"]["inner"]
    for i, path in enumerate(("kernel", "bias", "scale")):
        assert bits(state[path]["v"]) == bits(expected[str(8 + i)].astype(mx.float32)), path
        average = live.state["_mlx_adagrad"]["averages"][f"/{path}"]
        assert bits(average) == bits(expected[str(2 + i)].astype(mx.float32)), path


def test_bfloat16_in_a_mapping_of_numpy() -> None:
    raw = np.array([0x3F80, 0x4000, 0x0001, 0x7F7F], np.uint16)  # 1, 2, the least denormal, the largest number
    live = Adagrad(0.1)
    live.init({"w": mx.ones((4, 1), mx.bfloat16)[::1], "b": mx.ones(())})
    import_keras({"0": 3, "1": 0.1, "2": raw.view("V2").reshape(4, 1), "3": raw[:1].view("V2").reshape(())}, live)
    assert bits(live.state["w"]["v"]) == bits(mx.array(raw).view(mx.bfloat16).astype(mx.float32).reshape(4, 1))
    assert live.state["b"]["v"].item() == 1


@with_h5py
def test_a_loss_scale_optimizer_in_a_file(tmp_path: Path) -> None:
    inner = [np.int32(9), np.float32(0.5), *(np.ones(shape, np.float32) for shape in SHAPES)]
    values = [np.int32(0), np.float32(0), np.int32(5), np.float32(1024), *inner]
    with hdf5(tmp_path / "a.weights.h5", "w") as file:
        put(file, {str(i): value for i, value in enumerate(values)})
        put(file, {str(i): value for i, value in enumerate(inner)}, "optimizer/inner_optimizer/vars")
    live = initialised(DynamicLossScale(presets.keras(0.1)))
    import_keras(tmp_path / "a.weights.h5", live)
    assert live.state["_mlx_adagrad"]["dynamic_scale"].item() == 1024 and live.step.item() == 9


@with_h5py
def test_many_names_are_in_pieces_and_in_their_order(tmp_path: Path) -> None:
    names = ["adagrad/iteration", *(f"adagrad/w{i:02}/accumulator:0" for i in range(30))]
    with hdf5(tmp_path / "a.h5", "w") as file:
        group = file.create_group("optimizer_weights")
        put(group, {name: np.float32(i) for i, name in enumerate(names)}, ".")
        for i in range(0, len(names), 10):
            group.attrs[f"weight_names{i // 10}"] = [name.encode() for name in names[i : i + 10]]
    live = Adagrad(0.1)
    live.init({f"p{i}": mx.ones(()) for i in range(30)})
    import_keras(tmp_path / "a.h5", live)
    assert [live.state[f"p{i}"]["v"].item() for i in range(30)] == list(range(1, 31)) and live.step.item() == 0


@with_h5py
def test_several_optimizers_in_a_file_are_told_apart_by_key(tmp_path: Path) -> None:
    path = tmp_path / "gan.weights.h5"
    with hdf5(path, "w") as file:
        put(file, stored(), "d_optimizer/vars")
        put(file, {**stored(), "1": np.float32(0.25)}, "g_optimizer/vars")
        file["layers/dense/vars/0"] = np.ones(3)
    live = initialised(keras_optimizer())
    refused(ValueError, "it has d_optimizer, g_optimizer: say which with 'key'", import_keras, path, live)
    refused(ValueError, "it has no 'optimizer'", functools.partial(import_keras, key="optimizer"), path, live)
    import_keras(path, live, key="g_optimizer")
    assert live.learning_rate.item() == 0.25


@with_h5py
def test_a_model_without_an_optimizer_is_named(tmp_path: Path) -> None:
    with hdf5(tmp_path / "a.weights.h5", "w") as file:
        file["layers/dense/vars/0"] = np.ones(3)
    refused(ValueError, "no optimizer: the model was", import_keras, tmp_path / "a.weights.h5", Adagrad(0.1))
    with hdf5(tmp_path / "b.weights.h5", "w") as file:
        file.create_group("optimizer/vars")
    refused(ValueError, "no variables: it was saved before", import_keras, tmp_path / "b.weights.h5", Adagrad(0.1))


def test_without_h5py_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    for name in FILES:
        refused(ImportError, r"mlx-adagrad\[keras\]", import_keras, CHECKPOINTS / name, initialised(keras_optimizer()))


# Hostile files of HDF5


def link_out(file: Any, path: Path) -> None:
    import h5py  # pyright: ignore[reportMissingImports]

    file["optimizer/vars/2"] = h5py.ExternalLink(str(path / "secret.h5"), "x")


def link_soft(file: Any, path: Path) -> None:
    import h5py  # pyright: ignore[reportMissingImports]

    file["optimizer/vars/2"] = h5py.SoftLink("/optimizer/vars/8")


def link_group(file: Any, path: Path) -> None:
    import h5py  # pyright: ignore[reportMissingImports]

    del file["optimizer"]
    file["optimizer"] = h5py.ExternalLink(str(path / "secret.h5"), "/")


def bomb(file: Any, path: Path) -> None:
    file.create_dataset("optimizer/vars/2", (3, 4), "f4", chunks=(3, 4), compression="gzip")


def chunked(file: Any, path: Path) -> None:
    file.create_dataset("optimizer/vars/2", (3, 4), "f4", chunks=(3, 4), maxshape=(None, 4))


def virtual(file: Any, path: Path) -> None:
    import h5py  # pyright: ignore[reportMissingImports]

    layout = h5py.VirtualLayout((3, 4), "f4")
    layout[...] = h5py.VirtualSource(str(path / "secret.h5"), "x", (3, 4))
    file.create_virtual_dataset("optimizer/vars/2", layout)


def external(file: Any, path: Path) -> None:
    (path / "raw").write_bytes(bytes(48))
    file.create_dataset("optimizer/vars/2", (3, 4), "f4", external=[(str(path / "raw"), 0, 48)])


def never_written(file: Any, path: Path) -> None:
    file.create_dataset("optimizer/vars/2", (10**6, 10**6), "f4")


def text(file: Any, path: Path) -> None:
    file["optimizer/vars/2"] = "abc"


def nothing(file: Any, path: Path) -> None:
    import h5py  # pyright: ignore[reportMissingImports]

    file["optimizer/vars/2"] = h5py.Empty("f4")


def group(file: Any, path: Path) -> None:
    file.create_group("optimizer/vars/2")


def big_endian(file: Any, path: Path) -> None:
    file["optimizer/vars/2"] = np.ones((3, 4), ">f4")


def overlapping(file: Any, path: Path) -> None:
    for i in range(500):
        file[f"optimizer/vars/{i + 11}"] = file["optimizer/vars/big"]
    del file["optimizer/vars/big"]
    file["optimizer/vars/2"] = np.ones((3, 4), "f4")


HOSTILE: list[tuple[Callable, str]] = [
    (link_out, "is a link, which Keras never writes"),
    (link_soft, "is a link, which Keras never writes"),
    (link_group, "is a link, which Keras never writes"),
    (bomb, "compressed, chunked or in another file"),
    (chunked, "compressed, chunked or in another file"),
    (virtual, "compressed, chunked or in another file"),
    (external, "compressed, chunked or in another file"),
    (never_written, "promises 4000000000000 bytes but has 0"),
    (text, "has the dtype object"),
    (nothing, "is no array"),
    (group, "is no array"),
    (big_endian, "has the dtype >f4"),
    (overlapping, "its variables overlap"),
]


@with_h5py
@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_hostile_hdf5_file_is_refused(tmp_path: Path, change: Callable, message: str) -> None:
    with hdf5(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.ones((3, 4), "f4")
        put(file, stored(), "vars")
    with hdf5(tmp_path / "a.weights.h5", "w") as file:
        put(file, stored())
        if change is overlapping:
            file["optimizer/vars/big"] = np.ones(1000)
        del file["optimizer/vars/2"]
        change(file, tmp_path)
    refused(ValueError, message, import_keras, tmp_path / "a.weights.h5", initialised(keras_optimizer()))


@with_h5py
def test_a_keras_file_that_was_packed_anew_is_refused_in_words(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(CHECKPOINTS / "keras_adagrad.weights.h5", "model.weights.h5")
    refused(ValueError, "unpack it and give the .weights.h5", import_keras, tmp_path / "a.keras", Adagrad(0.1))


@with_h5py
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_keras_changes_nothing_or_trains_on(tmp_path: Path, name: str) -> None:
    sound, path = (CHECKPOINTS / name).read_bytes(), tmp_path / "x"
    w, g = parameters("keras"), parameters("keras", "grad", 0)
    for seed in range(6):
        path.write_bytes(damaged(sound, seed))
        live = initialised(keras_optimizer())
        before = bits(live.state)
        try:
            import_keras(path, live)
        except ValueError as error:
            assert str(error).startswith(f"[checkpoint] '{path}' cannot be imported: ")
            assert bits(live.state) == before, seed
        else:
            assert all(mx.isfinite(leaf).all().item() for leaf in live.apply_gradients(g, w).values()), seed


@with_h5py
def test_a_library_that_breaks_down_is_an_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import os\nos.abort()\n")
    monkeypatch.setattr(hdf5_worker, "__file__", str(worker))
    live = initialised(keras_optimizer())
    refused(ValueError, "h5py breaks down over it", import_keras, CHECKPOINTS / FILES[0], live)


# What else a file may be


def zipped(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


def old_torch(path: Path) -> None:
    magic, protocol = 0x1950A86A20F9469CFC6C, 1001  # as torch's _legacy_save begins
    path.write_bytes(b"".join(pickle.dumps(value, protocol=2) for value in (magic, protocol, {"little_endian": True})))


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())


def folder(path: Path, *names: str) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x")


def written(path: Path) -> None:
    live = initialised(Adagrad(0.1))
    checkpoint.save(path, live)


def copied(source: Path) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(source.read_bytes())


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "keras": (copied(CHECKPOINTS / FILES[0]), "a .keras file: import_keras reads it"),
    "weights_h5": (copied(CHECKPOINTS / FILES[1]), "HDF5 file, as Keras writes them: import_keras reads it"),
    "npz": (copied(KERAS_FILE), "an .npz of numpy: import_keras reads"),
    "npy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\0"), "one array of numpy: give a dict of arrays"),
    "torch": (copied(TORCH_FILE), "a file of torch.save: import_torch reads it"),
    "torch_old": (old_torch, "old format, before torch 1.6.*save it anew: torch.save"),
    "torch_script": (lambda path: zipped(path, "m/constants.pkl", "m/data.pkl"), "a TorchScript archive"),
    "torch_distributed": (lambda path: folder(path, ".metadata", "__0_0.distcp"), "dcp_to_torch_save"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "a pickle, which can run code"),
    "safetensors": (copied(MLX_FILE), "a safetensors file: import_mlx reads the state of stock MLX"),
    "ours": (written, "a checkpoint of mlx_adagrad itself: checkpoint.load reads it"),
    "saved_model": (lambda path: folder(path, "saved_model.pb", "variables/variables.index"), "a SavedModel of Tensor"),
    "tensorflow": (lambda path: folder(path, "checkpoint", "ckpt-1.index"), "a checkpoint of TensorFlow"),
    "index": (lambda path: path.write_bytes(bytes(99) + bytes.fromhex("57fb808b247547db")), "checkpoint of TensorFlow"),
    "checkpoint": (lambda path: path.write_text('model_checkpoint_path: "ckpt-1"\n'), "a checkpoint of TensorFlow"),
    "orbax": (
        lambda path: folder(path, "_CHECKPOINT_METADATA", "default/manifest.ocdbt"),
        "an orbax checkpoint of JAX",
    ),
    "orbax_item": (lambda path: folder(path, "_METADATA", "manifest.ocdbt"), "an orbax checkpoint of JAX"),
    "gguf": (lambda path: path.write_bytes(b"GGUF\3\0\0\0"), "a GGUF file"),
    "tar": (tarred, "a tar archive"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08\0"), "compressed with gzip: unpack it"),
    "zip": (lambda path: zipped(path, "photo.jpg"), "a zip archive of something else"),
    "folder": (lambda path: folder(path, "model.safetensors"), "a folder: give the file in it"),
}
READERS: dict[str, tuple[Callable, Callable[[], Any], tuple[str, ...]]] = {
    "import_keras": (import_keras, keras_optimizer, ("keras", "weights_h5", "npz", "safetensors")),
    "import_torch": (import_torch, torch_optimizer, ("torch",)),
    "import_mindspore": (import_mindspore, mindspore_optimizer, ()),
    "import_mlx": (import_mlx, lambda: Adagrad(0.1), ("safetensors", "npz")),
    "load": (checkpoint.load, lambda: Adagrad(0.1), ("ours", "safetensors")),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_another_kind_is_told_by_its_first_bytes(tmp_path: Path, reader: str, other: str) -> None:
    function, make, readable = READERS[reader]
    write, message = OTHERS[other]
    write(tmp_path / "x")
    if other not in readable:
        refused(ValueError, message, function, tmp_path / "x", initialised(make()))


def test_what_a_tensorflow_checkpoint_is_named_by(tmp_path: Path) -> None:
    folder(tmp_path, "ckpt-1.index", "ckpt-1.data-00000-of-00001")
    for name in ("ckpt-1", "ckpt-1.data-00000-of-00001"):
        refused(ValueError, "a checkpoint of TensorFlow", import_keras, tmp_path / name, Adagrad(0.1))
    with pytest.raises(FileNotFoundError):
        import_keras(tmp_path / "ckpt-2", Adagrad(0.1))


def test_every_kind_is_tried_and_said_in_words() -> None:
    assert all(what and todo for what, todo in kinds.WORDS.values())
    assert len(OTHERS) >= len(kinds.WORDS)


@pytest.mark.parametrize("data", [b"", b"\0", b"PK", b"PK\x03\x04", b"hello world", b"\x80", b"{}", bytes(600)])
def test_what_is_nothing_of_all_is_a_value_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    for function, make, _ in READERS.values():
        if function is not import_torch:  # torch itself may be needed
            refused(ValueError, "cannot be", function, tmp_path / "x", initialised(make()))


# A file of a whole run


RUNS: dict[str, tuple[Callable[[Any], Any], Any, str]] = {
    "optimizer": (
        lambda state: {"model": {"w": np.ones(3)}, "optimizer": state, "epoch": 3},
        "optimizer",
        "'optimizer'",
    ),
    "lightning": (
        lambda state: {"epoch": 1, "state_dict": {"w": np.ones(3)}, "optimizer_states": [state]},
        ("optimizer_states", 0),
        r"\('optimizer_states', 0\)",
    ),
    "several": (lambda state: {"opt_g": state, "opt_d": state}, "opt_d", "key='opt_g', key='opt_d'"),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_whole_run_of_torch_needs_a_key(case: str) -> None:
    make, key, message = RUNS[case]
    live = initialised(torch_optimizer())
    whole = make(torch_state())
    refused(ValueError, f"of a whole run.*give .*{message}", import_torch, whole, live)
    refused(ValueError, "no 'optimiser' in it", functools.partial(import_torch, key="optimiser"), whole, live)
    import_torch(whole, live, key=key)
    goes_on_as_recorded("torch", live)


def test_the_weights_of_a_torch_model_are_told() -> None:
    model = {"fc.weight": np.ones((3, 4)), "fc.bias": np.ones(4)}
    refused(ValueError, "the state_dict of a model", import_torch, model, initialised(torch_optimizer()))
    refused(ValueError, "no state_dict of a torch optimizer", import_torch, {"a": 1}, initialised(torch_optimizer()))
    refused(ValueError, "no state_dict of a torch optimizer", import_torch, {}, initialised(torch_optimizer()))
