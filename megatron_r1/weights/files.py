"""Small files of model folders: read without trust, written so that a power cut leaves the old one or the new one."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from megatron_r1.config.safetensors import parse_object
from megatron_r1.errors import CheckpointError
from megatron_r1.files import replacing


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError naming the file if it is not there or is anything else."""
    return parse_object(read_file(path), str(path))


def read_file(path: Path) -> bytes:
    if not path.is_file():  # opening a pipe would wait for ever
        raise CheckpointError(f"{path}: does not exist or is not a file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def is_plain_name(name: object) -> bool:
    """Whether `name` names a file of the folder itself: nothing above it, nothing elsewhere."""
    return isinstance(name, str) and "/" not in name and name not in ("", ".", "..")


def write_json(path: Path, value: object, *, temporary: Path, sync: bool = True, indent: int | None = 1) -> None:
    """Write by way of `temporary` (on the same disk): `path` never holds a part, with `sync` after a power cut too.
    Without `indent` it is one line, which is faster."""
    with replacing(path, temporary=temporary, sync=sync) as file:
        file.write(json.dumps(value, indent=indent) + "\n")


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_for_reading(path: str) -> int:
    """A file descriptor. CheckpointError naming the file if there is none to be had."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from error


class OpenFiles:
    """Descriptors of files that are read by turns. The ones used least lately are closed beyond `limit`: a checkpoint
    may have more files than a process may open."""

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._handles: OrderedDict[str, int] = OrderedDict()

    def handle(self, path: str) -> int:
        """Valid until the next call. CheckpointError naming the file if it cannot be opened."""
        if path in self._handles:
            self._handles.move_to_end(path)
        else:
            self._handles[path] = open_for_reading(path)
            if len(self._handles) > self._limit:
                os.close(self._handles.popitem(last=False)[1])
        return self._handles[path]

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


def reserve(handle: int, size: int) -> None:
    """Make an open file `size` bytes long and take their place on the disk now, keeping what the file holds.

    A full disk is found before any work, and writing goes faster than into holes. Where the file system cannot, the
    file gets holes (glibc's posix_fallocate would write every block instead). Raises OSError.
    """
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if fallocate(handle, 0, 0, size) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
    os.ftruncate(handle, size)
