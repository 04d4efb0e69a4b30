"""Write a conversion's files past the page cache, beside the work that makes their bytes.

A conversion writes more than memory holds and reads none of it again. Through the page cache each page of it has to be
found, copied into and dropped again, while other programs' files are dropped for it; without, the disk takes the bytes
from a buffer while the next ones are made.
"""

from __future__ import annotations

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_BLOCK = mmap.PAGESIZE
"""Direct writes begin and end at multiples of this."""

_BUFFER_BYTES = 4 << 20
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""How file systems say that they take no direct writes, or none of such blocks."""


class WriteBuffers:
    """A worker's two buffers: one is filled while the other is written. One file is written at a time.

    Without `direct` everything goes through the page cache.
    """

    def __init__(self, *, direct: bool) -> None:
        self.direct = direct
        self._filling, self._other = mmap.mmap(-1, _BUFFER_BYTES), mmap.mmap(-1, _BUFFER_BYTES)
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    @property
    def filling(self) -> mmap.mmap:
        return self._filling

    def swap(self, file: FileWriter, base: int, start: int, stop: int) -> None:
        """Write bytes [start, stop) of the filled buffer, whose first byte is the file's byte `base`."""
        self.wait()
        self._writing = self._thread.submit(file.write_buffer, self._filling, base, start, stop)
        self._filling, self._other = self._other, self._filling

    def wait(self) -> None:
        """Until what was filled is written. Raises its OSError."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


class FileWriter:
    """Writes parts of a file, for as long as it is entered. `handle` is then still open, to be synced and closed.

    Blocks that a part covers whole go to the disk directly, its ends (which share a block with a neighbour, maybe of
    another process) through the page cache; no block goes both ways. Where the file system takes no direct writes,
    everything goes through the page cache.
    """

    def __init__(self, path: Path, buffers: WriteBuffers, *, create: bool = False) -> None:
        self.handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0), 0o644)
        self._buffers = buffers
        try:
            self._direct = _open_direct(path) if buffers.direct else None
        except BaseException:
            os.close(self.handle)
            raise
        self._refused = False
        self._base = self._start = self._stop = 0

    def write(self, offset: int, data: memoryview) -> int:
        """Put `data` at `offset`. Parts that follow one another are written together. Returns how many bytes."""
        if self._direct is None:
            write_all(self.handle, offset, data)
            return len(data)
        if offset != self._base + self._stop:
            self._submit()
            self._base = offset - offset % _BLOCK
            self._start = self._stop = offset - self._base
        done = 0
        while done < len(data):
            count = min(len(data) - done, _BUFFER_BYTES - self._stop)
            self._buffers.filling[self._stop : self._stop + count] = data[done : done + count]
            done += count
            self._stop += count
            if self._stop == _BUFFER_BYTES:
                self._submit()
                self._base, self._start, self._stop = self._base + _BUFFER_BYTES, 0, 0
        return done

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """All is the kernel's, or an OSError says that it is not; `handle` stays open, to be synced. After an error
        everything is closed."""
        whole = False
        try:
            if kind is None and self._direct is not None:
                self._submit()
            self._buffers.wait()
            whole = kind is None
        except OSError:
            if kind is None:
                raise
        finally:
            if self._direct is not None:
                os.close(self._direct)
            if not whole:
                os.close(self.handle)

    def write_buffer(self, buffer: mmap.mmap, base: int, start: int, stop: int) -> None:
        """In the buffers' thread."""
        first = min(-(-start // _BLOCK) * _BLOCK, stop)
        last = max(stop // _BLOCK * _BLOCK, first)
        with memoryview(buffer) as data:
            write_all(self.handle, base + start, data[start:first])
            self._write_direct(base + first, data[first:last])
            write_all(self.handle, base + last, data[last:stop])

    def _write_direct(self, offset: int, data: memoryview) -> None:
        assert self._direct is not None
        done = 0
        while done < len(data) and not self._refused:
            try:
                done += os.pwrite(self._direct, data[done:], offset + done)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                self._refused = True
        write_all(self.handle, offset + done, data[done:])

    def _submit(self) -> None:
        if self._stop > self._start:
            self._buffers.swap(self, self._base, self._start, self._stop)


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno not in _NOT_DIRECT:
            raise
        return None


def write_all(handle: int, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], offset + done)
