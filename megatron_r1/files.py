"""Files that are replaced in one piece: who reads one, on another node too, sees the old content or the new."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def replacing(path: Path, *, temporary: Path | None = None, sync: bool = True, mode: int = 0o666) -> Iterator[TextIO]:
    """A new text file that takes the place of `path` at the end of the block; after an error `path` is as it was.

    With `sync` its bytes are on the disk before it has the name, so a power cut leaves one or the other whole. `mode`
    is cut by the umask, as ever. `temporary`: where it grows, on the same disk; by default beside `path`, under a name
    that no other process on any node has. Raises OSError.
    """
    partial = temporary or path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str, *, sync: bool = True, mode: int = 0o666) -> None:
    """Replace `path` by `text` in one piece. Raises OSError."""
    with replacing(path, sync=sync, mode=mode) as file:
        file.write(text)
