"""Seeded damage to files: bytes changed, cut, repeated, inserted; also inside an archive, its checksums right."""

from __future__ import annotations

import io
import random
import warnings
import zipfile

NPY_HEADER = 118  # bytes of a member of a .npz that say what it is


def damaged(data: bytes, seed: int) -> bytes:
    """``data`` with one to three changes; of an archive, at odd seeds, those of its members."""
    rng = random.Random(seed)
    if data[:2] == b"PK" and seed % 2:
        return _archive(data, rng)
    for _ in range(rng.randint(1, 3)):
        data = _changed(data, rng)
    return data


def _changed(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b""
    at, n = rng.randrange(len(data)), rng.randint(1, 16)
    other = rng.randrange(len(data))
    kind = rng.choices(["byte", "bit", "less", "more", "end", "fill", "copy"], [9, 3, 2, 2, 2, 1, 1])[0]
    if kind == "end":
        return data[:at]
    new = {
        "byte": bytes([rng.randrange(256)]),
        "bit": bytes([data[at] ^ 1 << rng.randrange(8)]),
        "less": b"",
        "more": rng.randbytes(n) + data[at : at + 1],
        "fill": rng.choice([b"\0", b"\xff"]) * 8,
        "copy": data[other : other + 8],
    }[kind]
    width = {"byte": 1, "bit": 1, "less": n, "more": 1, "fill": 8, "copy": 8}[kind]
    return data[:at] + new + data[at + width :]


def _archive(data: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [[info.filename, archive.read(info)] for info in archive.infolist()]
    for _ in range(rng.randint(1, 2)):
        member, other = rng.choice(members), rng.choice(members)
        kind = rng.choices(["content", "header", "lost", "twice", "name", "swap"], [4, 4, 1, 1, 1, 1])[0]
        if kind == "content":
            member[1] = _changed(member[1], rng)
        elif kind == "header" and member[1]:
            at = rng.randrange(min(len(member[1]), NPY_HEADER))
            member[1] = member[1][:at] + rng.choice("0123456789,()[]-<>|fiubcV {}'").encode() + member[1][at + 1 :]
        elif kind == "lost" and len(members) > 1:
            members.remove(member)
        elif kind == "twice":
            members.append([member[0], other[1]])
        elif kind == "name":
            member[0] = _changed(member[0].encode(), rng).decode("latin1").replace("\0", "0") or "x"
        elif kind == "swap":
            member[1], other[1] = other[1], member[1]
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as archive:
        warnings.simplefilter("ignore")  # a name that is there twice
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()
