"""Replacing a file so that a crash at any moment leaves the old one or the new one, whole."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A stream to a new file beside ``path``, which takes its place once everything has reached the disk.

    A link is followed, the permissions of an old file are kept, and what earlier crashes left beside it is removed.
    After an error in the block, or a full disk, the old file is as it was.

    Raises:
        ValueError: If ``path`` is something other than a file.
        OSError: If the folder does not exist, the file may not be written, or the disk is full.
    """
    target = os.path.realpath(os.fsdecode(path))
    old = _old_status(target)
    _remove_stale(target)
    stream, temporary = _create(target)
    try:
        with stream:
            if old is not None:
                _take_over(stream.fileno(), old)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(temporary, target)
        _sync_folder(os.path.dirname(target))
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _old_status(target: str) -> os.stat_result | None:
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"[checkpoint] '{target}' is not a file and cannot be replaced by one.")
    with open(target, "r+b"):  # replacing needs no permission to write, but to a user that is what read-only means
        return status


def _create(target: str) -> tuple[BinaryIO, str]:
    """A locked file of a new name: the lock ends with the process, however that ends."""
    folder, name = os.path.split(target)
    while True:
        temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(temporary):  # not taken for stale between its making and its lock
            return os.fdopen(descriptor, "wb"), temporary
        os.close(descriptor)


def _remove_stale(target: str) -> None:
    folder, name = os.path.split(target)
    pattern = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.tmp")
    for stale in filter(pattern.fullmatch, os.listdir(folder)):
        with suppress(OSError):
            descriptor = os.open(os.path.join(folder, stale), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if somebody is writing it
                os.unlink(os.path.join(folder, stale))
            finally:
                os.close(descriptor)


def _take_over(descriptor: int, old: os.stat_result) -> None:
    with suppress(PermissionError):
        os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name itself
    finally:
        os.close(descriptor)
