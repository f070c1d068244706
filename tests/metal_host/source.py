"""The source that MLX would hand to Metal: taken from MLX, read, and made ready for clang."""

import re
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .errors import HostError

_KERNEL = re.compile(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", re.S)
_BUFFER = re.compile(r"^(const )?(device|constant) (.+?)([*&]) (\w+) \[\[buffer\((\d+)\)\]\]$")
_ATTRIBUTE = re.compile(r"^(uint3?) (\w+) \[\[\w+\]\]$")
_INSTANCE = re.compile(r'^template \[\[host_name\("[^"]*"\)\]\] \[\[kernel\]\] decltype\((.+)\) \1;$', re.M)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<metal_\w+>.*$", re.M)
_LITERAL = re.compile(r"(?<![\w.])((?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(?![\w.])")
_SHARED = re.compile(r"\bthreadgroup[ \t]+([\w:<>, ]+?)[ \t]+(\w+)\s*((?:\[[^\];]*\]\s*)*);")


@dataclass(frozen=True)
class Parameter:
    """One argument of the generated signature: a buffer, or a thread attribute."""

    name: str
    kind: str  # "device", "constant" or "attribute"
    type: str
    reference: str = ""  # "*" or "&"; "" for an attribute
    const: bool = False

    @property
    def is_buffer(self) -> bool:
        """Whether Metal binds a buffer to it."""
        return self.kind != "attribute"


@dataclass(frozen=True)
class Signature:
    """What has to be called, and with what."""

    call: str  # the kernel's name, template arguments included
    parameters: tuple[Parameter, ...]

    @property
    def buffers(self) -> list[Parameter]:
        """The parameters to which Metal binds a buffer, in order."""
        return [p for p in self.parameters if p.is_buffer]


def exported_source(launch: Callable[..., list[mx.array]], inputs: list[mx.array]) -> str:
    """Let MLX record one launch without running it, and return the source in the record."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.mlxfn"
        mx.export_function(str(file), launch, *inputs)
        return _recorded_source(file.read_bytes())


def _recorded_source(record: bytes) -> str:
    """The file holds `u64 length, kernel name, u64 length, source` after the name of the primitive."""
    at = record.find(b"custom_kernel_")
    if at < 8:
        raise HostError("MLX recorded no custom kernel")
    name, at = _string(record, at - 8)
    source, _ = _string(record, at)
    if f"void {name}(" not in source:
        raise HostError("MLX's record of a custom kernel has an unknown layout")
    return source


def _string(record: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", record, at)
    return record[at + 8 : at + 8 + length].decode(), at + 8 + length


def parse(source: str) -> Signature:
    """Read the signature that MLX generated."""
    found = _KERNEL.findall(source)
    if len(found) != 1:
        raise HostError(f"expected one [[kernel]] in the source, found {len(found)}")
    name, text = found[0]
    instance = _INSTANCE.search(source)
    parameters = tuple(_parameter(line.strip()) for line in text.split(",\n"))
    return Signature(instance.group(1) if instance else name, parameters)


def _parameter(text: str) -> Parameter:
    if buffer := _BUFFER.match(text):
        const, space, type_, reference, name, _ = buffer.groups()
        return Parameter(name, space, type_, reference, const is not None)
    if attribute := _ATTRIBUTE.match(text):
        return Parameter(attribute.group(2), "attribute", attribute.group(1))
    raise HostError(f"cannot read the kernel's argument {text!r}")


def for_clang(source: str, signature: Signature) -> str:
    """The source with what clang refuses rewritten, and an entry point behind it.

    The meaning stays, and so do the line numbers: Metal's own headers are not included, attributes on the
    explicit instantiation go, a variable in threadgroup memory becomes a reference to memory of the runner,
    and `0.1` becomes `0.1f` (in Metal they are the same; clang makes the first a double inside a template).
    """
    text = _LITERAL.sub(r"\1f", _INCLUDE.sub("", source))
    text = _INSTANCE.sub(r"template decltype(\1) \1;", text)
    body = _KERNEL.search(text)
    assert body is not None
    text = text[: body.end()] + _share(text[body.end() :])
    return f'#line 1 "source"\n{text}\n#line 1 "entry"\n{_entry(signature)}'


def _share(body: str) -> str:
    site = 0

    def reference(match: re.Match[str]) -> str:
        nonlocal site
        site += 1
        type_, name, dimensions = match.groups()
        alias, lines = f"host_type_{site}", "\n" * match.group(0).count("\n")
        flat = " ".join(dimensions.split())
        return f"typedef {type_} {alias}; HOST_THREADGROUP({site}, {alias}, {name}, {flat});{lines}"

    return _SHARED.sub(reference, body)


def _entry(signature: Signature) -> str:
    arguments, buffer = [], 0
    for p in signature.parameters:
        if p.is_buffer:
            arguments.append(_pointer(p, buffer))
            buffer += 1
        elif p.type == "uint":
            arguments.append(f"ids->{p.name}[0]")
        else:
            arguments.append(f"uint3{{ids->{p.name}[0], ids->{p.name}[1], ids->{p.name}[2]}}")
    return (
        'extern "C" __attribute__((no_sanitize("kernel-address", "undefined")))\n'
        "void host_kernel(thread const ulong* buffers, thread const HostIds* ids) {\n"
        f"  {signature.call}({', '.join(arguments)});\n}}\n"
    )


def _pointer(p: Parameter, index: int) -> str:
    pointer = f"({'const ' if p.const else ''}{p.kind} {p.type}*)buffers[{index}]"
    return f"*{pointer}" if p.reference == "&" else pointer
