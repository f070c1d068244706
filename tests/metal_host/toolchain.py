"""Compiles a kernel's source, links it with the runner, and keeps the library on disk.

The kernel goes through clang (from PyPI's `ziglang`) as C++ for OpenCL; g++ compiles the runner and links.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path

from .errors import HostError

_HERE = Path(__file__).parent
_PRELUDE = ("thread_ids.h", "prelude.h", "prelude_group.h")
_UNITS = ("runner", "access", "groups")
_RUNNER = ("thread_ids.h", "runner.h", *(f"{unit}.cpp" for unit in _UNITS))

# Metal knows no double and no generic address space: a bare literal is float, a bare pointer `thread`.
_LANGUAGE = (
    "-x clcpp -cl-std=clc++2021 -cl-no-stdinc -O2 -fPIC -ffp-contract=off "
    "-Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none "
    "-Wno-unknown-attributes -Wno-unknown-pragmas "
    "-Wimplicit-float-conversion "
    "-Xclang -cl-ext=-__opencl_c_generic_address_space,-__opencl_c_pipes,-__opencl_c_device_enqueue,"
    "-__opencl_c_program_scope_global_variables,-cl_khr_fp64,-__opencl_c_fp64 "
    "-cl-single-precision-constant"
).split()
_UNDEFINED = "alignment,array-bounds,integer-divide-by-zero,signed-integer-overflow"
_CHECKS = (
    "-fsanitize=kernel-address -mllvm -asan-instrumentation-with-call-threshold=0 -mllvm -asan-stack=0 "
    "-mllvm -asan-globals=0 -mllvm -asan-kernel-mem-intrinsic-prefix=1 "
    f"-fsanitize={_UNDEFINED} -fno-sanitize-recover={_UNDEFINED}"
).split()
# Metal takes bf16 from fp32 only through a cast; clang merely warns. (Metal converts fp32 to fp16 by itself.)
_NARROWS = re.compile(r"implicit conversion loses floating-point precision: .* to .*(bf16|bfloat)")
_GPP = "g++ -std=c++17 -O2 -fPIC -U_FORTIFY_SOURCE".split()


def cache_folder() -> Path:
    """Where libraries are kept between runs: $XDG_CACHE_HOME, else this user's own temporary folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base else Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    folder = root / "metal_host"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise HostError(f"the cache {folder} belongs to another user")
    return folder


@functools.cache
def load(source: str, checked: bool, contracted: bool = False) -> ctypes.PyDLL:
    """The library that runs this source (as `source.for_clang` made it), built if it is not yet on disk."""
    flags = [*_LANGUAGE, *_machine(), *(_CHECKS if checked else []), *(_contracting() if contracted else [])]
    file = cache_folder() / f"{_digest(source, flags, _version(), _texts(_PRELUDE), _texts(_RUNNER))}.so"
    if not file.exists():
        _build(source, flags, file)
    return ctypes.PyDLL(str(file))  # the runner's state is global: keep the interpreter's lock while it runs


def _build(source: str, flags: list[str], file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        text, kernel, library = (Path(folder) / name for name in ("kernel.cl", "kernel.o", "kernel.so"))
        text.write_text(f'#include "prelude.h"\n#include "prelude_group.h"\n{source}')
        said = _run([*_clang(), *flags, "-I", str(_HERE), "-c", str(text), "-o", str(kernel)], "the kernel")
        if _NARROWS.search(said):
            raise HostError(f"the kernel does not compile:\n{said}")
        link = [*_GPP, "-shared", "-Wl,-u,host_run,-Bsymbolic", str(kernel), str(_runner()), "-lm"]
        _run([*link, "-o", str(library)], "the library")
        os.replace(library, file)


def _runner() -> Path:
    file = cache_folder() / f"{_digest(_texts(_RUNNER), _GPP)}.a"
    if file.exists():
        return file
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        objects = [f"{folder}/{name}.o" for name in _UNITS]
        for name, result in zip(_UNITS, objects, strict=True):
            _run([*_GPP, "-Wall", "-c", str(_HERE / f"{name}.cpp"), "-o", result], "the runner")
        _run(["ar", "rcs", f"{folder}/runner.a", *objects], "the runner")
        os.replace(f"{folder}/runner.a", file)
    return file


def _run(command: list[str], what: str) -> str:
    """What the command wrote to stderr."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise HostError(f"{command[0]} is needed to build {what}: {error}") from error
    if done.returncode:
        raise HostError(f"{what} does not compile:\n{done.stderr}")
    return done.stderr


def _clang() -> list[str]:
    package = importlib.util.find_spec("ziglang")
    if package is None or package.origin is None:
        raise HostError("PyPI's ziglang is needed to compile kernels")
    return [str(Path(package.origin).parent / "zig"), "clang"]


def _contracting() -> list[str]:
    """a * b + c in one rounding wherever the source has it, as Metal's default math mode allows."""
    return ["-ffp-contract=fast", *(["-mfma"] if platform.machine() == "x86_64" else [])]


def _machine() -> list[str]:
    """Conversions of fp16 in hardware: older libgcc has none in software."""
    return ["-mf16c"] if platform.machine() == "x86_64" else []


def _version() -> str:
    return importlib.metadata.version("ziglang") + platform.machine()


@functools.cache
def _texts(names: tuple[str, ...]) -> str:
    return "".join((_HERE / name).read_text() for name in names)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
