"""Checkpoints on a real disk: crashes, full disks, links, permissions, other writers; and files that lie."""

from __future__ import annotations

import json
import os
import re
import resource
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint_runs import bits
from mlx_adagrad import Adagrad, checkpoint
from mlx_adagrad.checkpoint import atomic

TESTS = Path(__file__).parent


def optimizer_after(steps: int, size: int = 4) -> Adagrad:
    optimizer, w = Adagrad(0.1), {"layers": [{"w": mx.ones(size)}, {}], "b": mx.ones((2, 2))}
    for t in range(steps):
        w = optimizer.apply_gradients(w, w)
        mx.eval(w, optimizer.state, t)
    return optimizer


def left_over(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".tmp"))


# Kills itself before each line that replacing a file runs. Without MLX, whose threads do not survive a fork.
KILLED_AT_EACH_LINE = """
import importlib.util, os, signal, sys

folder, path = sys.argv[2], os.path.join(sys.argv[2], "run.safetensors")
spec = importlib.util.spec_from_file_location("atomic", sys.argv[1])
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
old, new = b"old" * 10_000, b"new" * 20_000

def save(kill_at=None):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = 0
    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename != sys.argv[1] and frame.f_code.co_name != "write":
            return None
        if event == "line":
            if lines == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            lines += 1
        return trace
    def write():
        with atomic.replacing(path) as stream:
            stream.write(new[:30_000])
            stream.flush()
            stream.write(new[30_000:])
    sys.settrace(trace)
    write()
    os._exit(0)

def read():
    with open(path, "rb") as stream:
        return stream.read()

seen, littered, status = [], 0, -signal.SIGKILL
while status == -signal.SIGKILL:
    for name, content in (("run.safetensors", old), (".run.safetensors.0123456789abcdef.tmp", b"stale")):
        with open(os.path.join(folder, name), "wb") as stream:
            stream.write(content)
    status = save(kill_at=len(seen))
    assert read() in (old, new), f"neither the old file nor the new after line {len(seen)}"
    seen.append(read() == new)
    littered += len(os.listdir(folder)) > 1
    assert save() == 0 and read() == new and os.listdir(folder) == ["run.safetensors"]
assert status == 0 and seen == sorted(seen), "the new file was replaced by the old one"
print(len(seen), littered, sum(seen))
"""

# Saves one run after the other, for ever.
SAVING = """
import sys
import mlx.core as mx
from mlx_adagrad import Adagrad, checkpoint

optimizer, w = Adagrad(0.1), {"w": mx.ones((500, 500)), "b": mx.ones((1000,))}
while True:
    w = optimizer.apply_gradients(w, w)
    checkpoint.save(sys.argv[1], optimizer, w)
    print(flush=True)
"""


def in_python(program: str, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_kill_at_any_line_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    process = in_python(KILLED_AT_EACH_LINE, atomic.__file__, tmp_path)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    lines, littered, new = map(int, output.split())
    assert lines > 40 and littered > 20 and new > 5, output


@pytest.mark.parametrize("seconds", [0.0, 0.003, 0.01, 0.05])
def test_a_killed_run_can_be_resumed(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "a"
    process = in_python(SAVING, path)
    assert process.stdout is not None
    assert process.stdout.readline() == "\n", process.communicate()[1]
    time.sleep(seconds)
    process.kill()
    process.communicate()
    loaded, w = Adagrad(0.1), {"w": mx.zeros((500, 500)), "b": mx.zeros((1000,))}
    checkpoint.load(path, loaded, w)
    assert loaded.step.item() >= 1
    checkpoint.save(path, loaded, w)
    assert os.listdir(tmp_path) == ["a"]


def test_everything_is_on_the_disk_before_the_old_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        folder = stat.S_ISDIR(status.st_mode)
        events.append("fsync folder" if folder else f"fsync file of {status.st_size}")

    def replace(source: str, target: str) -> None:
        events.append("replace")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(atomic.os, "fsync", fsync)
    monkeypatch.setattr(atomic.os, "replace", replace)
    checkpoint.save(tmp_path / "a", optimizer_after(1))
    size = (tmp_path / "a").stat().st_size
    assert events == [f"fsync file of {size}", "replace", "fsync folder"]


@contextmanager
def limited_to(size: int) -> Iterator[None]:
    """Files cannot grow beyond ``size``, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, room: int) -> None:
    path = tmp_path / "a"
    checkpoint.save(path, optimizer_after(1))
    before = path.read_bytes()
    with limited_to(room), pytest.raises(OSError, match="File too large"):
        checkpoint.save(path, optimizer_after(2, size=10_000))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a"]
    with limited_to(room), pytest.raises(OSError, match="File too large"):
        checkpoint.save(tmp_path / "new", optimizer_after(2, size=10_000))
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "latest"
    link.symlink_to(Path("disk") / "real")
    for steps in (1, 2):  # a link to nothing, then to a file
        checkpoint.save(link, optimizer_after(steps))
        assert link.is_symlink() and os.listdir(tmp_path / "disk") == ["real"]
        loaded = Adagrad(0.1)
        checkpoint.load(link, loaded)
        assert loaded.step.item() == steps


def test_permissions_are_those_of_any_new_file_or_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    mask = os.umask(0o027)
    try:
        checkpoint.save(path, optimizer_after(1))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    checkpoint.save(path, optimizer_after(2))
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_a_read_only_file_is_not_replaced() -> None:
    with tempfile.TemporaryDirectory() as folder:  # that others can enter
        os.chmod(folder, 0o777)
        refused_read_only(Path(folder) / "a")


def refused_read_only(path: Path) -> None:
    checkpoint.save(path, optimizer_after(1))
    before = path.read_bytes()
    path.chmod(0o444)
    root = os.geteuid() == 0  # whom permissions do not stop
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            checkpoint.save(path, optimizer_after(2))
    finally:
        if root:
            os.seteuid(0)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["a"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(ValueError, match="is not a file"):
            checkpoint.save(tmp_path / name, optimizer_after(1))
    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path / "nowhere" / "a", optimizer_after(1))
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_what_a_crash_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    stale = tmp_path / ".a.0123456789abcdef.tmp"
    digits = "0123456789abcdef"
    others = [".a.tmp", f".b.{digits}.tmp", f"a.{digits}.tmp", f".a.{digits.upper()}.tmp", ".a.0.tmp", "xa"]
    for name in (stale.name, *others):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".a.fedcba9876543210.tmp").symlink_to(tmp_path / "xa")
    checkpoint.save(tmp_path / "a", optimizer_after(1))
    assert not stale.exists() and (tmp_path / ".a.fedcba9876543210.tmp").is_symlink()
    assert all((tmp_path / name).read_bytes() == b"x" for name in others)


def test_another_writer_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic.replacing(path) as stream:
        stream.write(b"half ")
        checkpoint.save(path, optimizer_after(1))
        assert len(left_over(tmp_path)) == 1
        stream.write(b"whole")
    assert path.read_bytes() == b"half whole" and os.listdir(tmp_path) == ["a"]


def test_many_writers_never_fail_and_a_reader_always_sees_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    optimizers = [optimizer_after(steps) for steps in (1, 2, 3)]
    checkpoint.save(path, optimizers[0])
    failures: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(60):
                with atomic.replacing(path) as stream:
                    stream.write(content)
        except BaseException as error:
            failures.append(error)

    contents = [path.read_bytes()]
    for optimizer in optimizers[1:]:
        checkpoint.save(path, optimizer)
        contents.append(path.read_bytes())
    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        loaded = Adagrad(0.1)
        checkpoint.load(path, loaded)
        assert loaded.step.item() in (1, 2, 3)
    assert failures == [] and os.listdir(tmp_path) == ["a"]


def test_saving_over_the_file_that_the_arrays_came_from(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, optimizer_after(2), {"w": mx.arange(5)})
    lazy: Any = mx.load(str(path))
    checkpoint.save(path, optimizer_after(3), {"w": lazy["model.w"] + 1})
    again: Any = mx.load(str(path))
    assert again["model.w"].tolist() == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "a"
    checkpoint.save(path, optimizer_after(2), {"w": mx.ones((3, 2)), "e": mx.zeros((0, 2))})
    return path.read_bytes()


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def try_to_load(path: Path, data: bytes) -> str | None:
    """What loading ``data`` says; if it is refused, an optimizer in use and a new one must be as before."""
    message = None
    for live in (optimizer_after(1), Adagrad(0.1)):
        model = {"w": mx.zeros((3, 2)), "e": mx.zeros((0, 2))}
        before = bits([live.state, model])
        path.write_bytes(data)
        try:
            checkpoint.load(path, live, model)
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"[checkpoint] '{path}' cannot be loaded: ")
            assert bits([live.state, model]) == before
    return message


def change(name: str, **entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[name].update(entries)


NESTS = ["[" * n + "]" * n for n in (450, 900, 100_000)]
DEEP = "recursion|no JSON|does not know|in the file but"
V = "optimizer.layers.0.w.v"  # 16 bytes of 4 floats
LIES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (change(V, shape=[5]), "cannot lie in the bytes"),
    (change(V, shape=[2**40, 2**40]), "impossible shape"),
    (change(V, shape=[-2, -2]), "impossible shape"),
    (change(V, shape=[4.0]), "impossible shape"),
    (change(V, shape=[True, 4]), "impossible shape"),
    (change(V, shape="4"), "impossible shape"),
    (change(V, shape=[1] * 40 + [4]), "impossible shape"),
    (change(V, shape=[2**31 - 1] * 30), "cannot lie in the bytes"),
    (change(V, dtype="F8_E4M3"), "which MLX does not know"),
    (change(V, dtype=["F32"]), "which MLX does not know"),
    (change(V, dtype="F16"), "cannot lie in the bytes"),
    (change(V, dtype="I32"), "is int32"),
    (change(V, shape=[2, 2]), "float32 .2, 2. in the file but float32 .4,. here"),
    (change(V, data_offsets=[0, 16]), "overlap or leave a hole"),
    (change(V, data_offsets=[10**18, 10**18 + 16]), "overlap or leave a hole"),
    (change(V, data_offsets=[-16, 0]), "impossible data_offsets"),
    (change(V, data_offsets=[0, 8, 16]), "impossible data_offsets"),
    (change(V, data_offsets=[16, 0]), "cannot lie in the bytes"),
    (change(V, extra=1), "must have dtype, shape and data_offsets"),
    (lambda header: header.update({V: [1]}), "must have dtype, shape and data_offsets"),
    (lambda header: header.pop(V), "overlap or leave a hole"),
    (lambda header: header.update(x={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), "not know the tensor 'x'"),
    (lambda header: header.update(__metadata__=None), "no checkpoint of mlx_adagrad"),
    (lambda header: header.update(__metadata__=[]), "no checkpoint of mlx_adagrad"),
    (lambda header: header.update(__metadata__="format"), "not a table of strings"),
    (change("__metadata__", version=1), "not a table of strings"),
    (change("__metadata__", version="2"), "version '2'"),
    (change("__metadata__", config="{"), "config is missing or is no JSON"),
    (change("__metadata__", config="[" * 100_000), "config is missing or is no JSON"),
    (lambda header: header["__metadata__"].pop("config"), "config is missing or is no JSON"),
    (change("__metadata__", config="[]"), "in the file but"),
    (change("__metadata__", structure="{}"), "must have an optimizer and a model"),
    (change("__metadata__", structure='{"optimizer": 3, "model": null}'), "names 3, which is no tensor"),
    (
        change("__metadata__", structure='{"optimizer": "optimizer.step", "model": "optimizer.step"}'),
        "or names it twice",
    ),
    # too deep for one step of reading or the other, as Python's version has it
    *[(change("__metadata__", structure=f'{{"optimizer": {nest}, "model": null}}'), DEEP) for nest in NESTS],
    *[(change("__metadata__", config=f'{{"class": {nest}}}'), DEEP) for nest in NESTS],
]


@pytest.mark.parametrize(("lie", "message"), LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, sound: bytes, lie: Callable, message: str) -> None:
    header, body = split(sound)
    lie(header)
    assert re.search(message, try_to_load(tmp_path / "a", joined(header, body)) or "loaded")


HEADERS = [
    (b"", "cannot hold a header"),
    (b"12345678", "cannot hold a header"),
    (struct.pack("<Q", 2**63) + b"{}", "cannot hold a header"),
    (struct.pack("<Q", 2**64 - 1) + b"{}", "cannot hold a header"),
    (struct.pack("<Q", 3) + b"{}", "cannot hold a header"),
    (joined(b"[]", b""), "not a table"),
    (joined(b"{]", b""), "cannot be read"),
    (joined(b'{"a": \xff}', b""), "cannot be read"),
    (joined(b"[" * 200_000, b""), "cannot be read"),
    (joined(b'{"a": ' + b"9" * 10_000 + b"}", b""), "cannot be read"),
    (joined(b'{"a": 1, "a": 2}', b""), "given twice"),
    (joined(b'{"\\ud800": 1}', b""), "must have dtype"),
    (joined(b"{}", b"x"), "promises 10 bytes but the file has 11"),
]


@pytest.mark.parametrize(("data", "message"), HEADERS)
def test_what_is_no_header_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    assert message in (try_to_load(tmp_path / "a", data) or "loaded")


def test_a_truncated_file_is_refused(tmp_path: Path, sound: bytes) -> None:
    for length in {*range(0, len(sound), 7), *range(len(sound) - 70, len(sound)), *range(16)}:
        assert try_to_load(tmp_path / "a", sound[:length]), f"{length} of {len(sound)} bytes were loaded"
    assert try_to_load(tmp_path / "a", sound + b"\0")
    assert try_to_load(tmp_path / "a", sound) is None


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_a_damaged_file_is_refused_or_harmless(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    try_to_load(tmp_path / "a", bytes(damaged))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([V, "model.w"]),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(data=st.data())
def test_a_header_of_anything_is_refused_or_harmless(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    header, body = split(sound)
    metadata = header["__metadata__"]
    place: Any = data.draw(st.sampled_from([header, header[V], metadata, "structure", "config"]))
    value = data.draw(JSON)
    if isinstance(place, str):
        inner = json.loads(metadata[place])
        inner[data.draw(st.sampled_from(sorted(inner)))] = value
        metadata[place] = json.dumps(inner)
    else:
        place[data.draw(st.sampled_from(sorted(place)))] = value
    try_to_load(tmp_path / "a", joined(header, body))


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, sound: bytes, monkeypatch: Any) -> None:
    path = tmp_path / "a"
    read = checkpoint.state.trees.read

    def shrink(tree: Any) -> Any:
        os.truncate(path, len(sound) - 8)
        return read(tree)

    monkeypatch.setattr(checkpoint.state.trees, "read", shrink)
    assert "became shorter" in (try_to_load(path, sound) or "loaded")
