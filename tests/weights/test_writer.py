"""Files that are written past the page cache hold the same bytes as files that are not."""

import errno
import fcntl
import multiprocessing
import os

import numpy as np
import pytest

from megatron_r1.weights import writer
from megatron_r1.weights.writer import FileWriter, WriteBuffers

BLOCK, BUFFER = writer._BLOCK, writer._BUFFER_BYTES


def random_bytes(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


def takes_direct_writes(folder):
    (folder / "probe").touch()
    handle = writer._open_direct(folder / "probe")
    if handle is None:
        return False
    os.close(handle)
    return True


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def written(path, parts, *, direct=True, create=True):
    """Write (offset, bytes) parts in order. The file's content."""
    with FileWriter(path, WriteBuffers(direct=direct), create=create) as file:
        for offset, part in parts:
            assert file.write(offset, memoryview(part)) == len(part)
    os.close(file.handle)
    return path.read_bytes()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("start", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 17])
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, BUFFER - 5, BUFFER, 2 * BUFFER + 3 * BLOCK + 7])
def test_a_part_of_any_place_and_size(path, direct, start, size):
    data = random_bytes(size)
    assert written(path, [(start, data)], direct=direct) == (bytes(start) + data if size else b"")


def test_parts_that_follow_one_another_and_parts_that_do_not(path):
    """As the codes and scales of a quantised tensor: two runs of parts by turns, in one file."""
    rng = np.random.default_rng(1)
    expected, parts, places = bytearray(12 << 20), [], [5, (8 << 20) + 123]
    for number in range(60):
        data = random_bytes(int(rng.integers(1, 200_000)), number)
        run = number % 2
        parts.append((places[run], data))
        expected[places[run] : places[run] + len(data)] = data
        places[run] += len(data)
    assert written(path, parts) == bytes(expected[: places[1]])


def _write_runs(path, data, cuts, mine):
    buffers = WriteBuffers(direct=True)
    for number in mine:
        with FileWriter(path, buffers) as file:
            for start in range(cuts[number], cuts[number + 1], 3000):
                stop = min(start + 3000, cuts[number + 1])
                file.write(start, memoryview(data)[start:stop])
        os.fsync(file.handle)
        os.close(file.handle)


def test_processes_that_share_blocks_do_not_lose_each_others_bytes(path):
    """Runs end within blocks; their neighbours are written by the other process at about the same time."""
    data = random_bytes(8 << 20)
    path.write_bytes(bytes(len(data)))
    rng = np.random.default_rng(2)
    cuts = [0, *sorted(rng.choice(len(data), 600, replace=False).tolist()), len(data)]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_write_runs, args=(path, data, cuts, range(which, len(cuts) - 1, 2))) for which in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert path.read_bytes() == data


def test_whole_blocks_go_past_the_page_cache_and_ends_through_it(path, tmp_path, monkeypatch):
    if not takes_direct_writes(tmp_path):
        pytest.skip(f"the file system of {tmp_path} takes no direct writes")
    seen = []

    def pwrite(handle, data, offset, pwrite=os.pwrite):
        if len(data):
            seen.append((_is_direct(handle), offset, len(data)))
        return pwrite(handle, data, offset)

    monkeypatch.setattr(writer.os, "pwrite", pwrite)
    written(path, [(10, random_bytes(3 * BLOCK))])
    assert seen == [(False, 10, BLOCK - 10), (True, BLOCK, 2 * BLOCK), (False, 3 * BLOCK, 10)]


def _is_direct(handle):
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("refuses", ["open", "write"])
def test_a_file_system_without_direct_writes(path, monkeypatch, refuses, code):
    """Some refuse to open a file so, some to write to it."""
    call, data = getattr(os, refuses if refuses == "open" else "pwrite"), random_bytes(BUFFER + 5000)

    def refuse(what, flags_or_data, *more):
        direct = flags_or_data & os.O_DIRECT if refuses == "open" else _is_direct(what)
        if direct:
            raise OSError(code, os.strerror(code))
        return call(what, flags_or_data, *more)

    monkeypatch.setattr(writer.os, "open" if refuses == "open" else "pwrite", refuse)
    assert written(path, [(7, data)]) == bytes(7) + data


def test_an_error_of_the_disk_is_raised_and_nothing_stays_open(path, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    pwrite = os.pwrite

    def full(handle, data, offset):
        if offset >= BUFFER:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(handle, data, offset)

    monkeypatch.setattr(writer.os, "pwrite", full)
    buffers = WriteBuffers(direct=True)
    for size in (BUFFER + 1, 4 * BUFFER):  # found at the end, found on the way
        with pytest.raises(OSError, match="No space left"), FileWriter(path, buffers, create=True) as file:
            file.write(0, memoryview(bytes(size)))
    with pytest.raises(ZeroDivisionError), FileWriter(path, buffers) as file:
        file.write(0, memoryview(bytes(2 * BUFFER)))
        raise ZeroDivisionError  # the first error counts, not the disk's that is met while cleaning up
    monkeypatch.setattr(writer, "_open_direct", lambda path: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        FileWriter(path, buffers)
    assert len(os.listdir("/proc/self/fd")) == before
