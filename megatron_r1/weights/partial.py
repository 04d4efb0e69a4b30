"""The unfinished destination, DST.partial: who may write it, what is done in it, and how it gets its name.

Beside the weights it has a folder of records: the plan (what must be the same when a conversion is resumed) and one
record for each finished task. DST.partial.lock is locked while a conversion runs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.errors import CheckpointError
from megatron_r1.weights.files import fsync, read_json, write_json
from megatron_r1.weights.pieces import TaskRecord

_RECORDS = ".records"
_PLAN = "plan.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def partial_of(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def check_target(source: Path, target: Path) -> Path:
    """`target` as the absolute path of the folder to make. CheckpointError or FileExistsError if that will not do."""
    target = target.resolve() if target.is_symlink() else Path(os.path.abspath(target))
    origin, place, partial = source.resolve(), target.resolve(), partial_of(target).resolve()
    if place == origin:
        raise CheckpointError(f"{target}: is the source itself; choose another folder")
    if place.is_relative_to(origin):
        raise CheckpointError(f"{target}: lies inside the source {source}; choose another folder")
    if partial.is_relative_to(origin) or origin.is_relative_to(partial):
        raise CheckpointError(f"{target}: would be made in {partial}, where the source lies; choose another name")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent}: does not exist; make it first")
    if os.path.ismount(target):
        raise CheckpointError(f"{target}: is a mount point, which cannot be replaced; name a new folder inside it")
    check_absent(target)
    return target


def check_absent(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; choose another name or remove it")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is not empty; choose another folder or remove it")


def check_space(target: Path, needed: int, *, resume: bool) -> None:
    """CheckpointError if the disk has no room for `needed` bytes, less what an earlier try has written."""
    partial = partial_of(target)
    present = 0
    if resume and partial.is_dir():
        present = sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(target.parent).free
    if needed - present > free:
        raise CheckpointError(
            f"{target.parent}: {needed:,} bytes are to be written and {free:,} are free; make room, or choose another "
            "disk"
        )


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The folder while this process owns it. `lock` is the lock's file descriptor: worker processes close it. `sync`:
    whether what is done is waited for until it is on the disk."""

    folder: Path
    target: Path
    lock: int
    sync: bool

    def records(self, num_tasks: int) -> dict[int, TaskRecord]:
        """Finished tasks. A record that cannot be read, or whose data file is not there as it was, does not count."""
        found = {}
        for number in range(num_tasks):
            path = _record_path(self.folder, number)
            if not path.exists():
                continue
            try:
                record = TaskRecord.from_json(read_json(path))
            except ValueError:  # cut by a power failure
                continue
            data = self.folder / record.file
            if data.is_file() and data.stat().st_size == record.size:
                found[number] = record
        return found

    def keep_only(self, records: Collection[int]) -> None:
        """Remove the records of all other tasks: one that outlived the data that it speaks of would be believed when a
        file of the same name and size is there again."""
        folder = self.folder / _RECORDS
        for path in set(folder.glob("[0-9]*.json")) - {_record_path(self.folder, number) for number in records}:
            path.unlink()
        if self.sync:
            fsync(folder)

    def write_json(self, path: Path, value: object) -> None:
        write_json(path, value, temporary=self.folder / _RECORDS / "new", sync=self.sync)

    def keep_record(self, number: int, record: TaskRecord, handle: int) -> None:
        """Record a finished task. With `sync` only when its data is on the disk: --resume may trust it, after a power
        cut too. `handle` is the descriptor that wrote the data; it is closed. (Linux tells of a lost write once to each
        descriptor that was open then: to one that is opened for the fsync, it may have been told before.)"""
        try:
            if self.sync:
                os.fsync(handle)
        finally:
            os.close(handle)
        path = _record_path(self.folder, number)
        write_json(path, record.to_json(), temporary=path.with_suffix(".new"), sync=self.sync, indent=None)

    def publish(self, expected: set[str]) -> None:
        """Give the folder its name. It must hold the files `expected` (relative paths) and no others."""
        present = {path for path in self.folder.rglob("*") if _RECORDS not in path.relative_to(self.folder).parts}
        found = {path.relative_to(self.folder).as_posix() for path in present if not path.is_dir()}
        if found != expected:
            odd = sorted(found ^ expected)[:5]
            raise CheckpointError(
                f"{self.folder}: {', '.join(odd)} should not be there, or should be; remove {self.folder} and convert "
                "again"
            )
        for path in (*present, self.folder) if self.sync else ():
            fsync(path)
        os.rename(self.folder, self.target)  # takes the place of an empty folder
        if self.sync:
            fsync(self.target.parent)
        shutil.rmtree(self.target / _RECORDS, ignore_errors=True)


@contextmanager
def own(target: Path, fingerprint: dict[str, Any], *, resume: bool, sync: bool) -> Iterator[Unfinished]:
    """Make or take over the unfinished folder, and keep other conversions out of it. If it is left by an error before
    any task is finished, it goes. Errors of the disk become CheckpointErrors.

    Without `sync` what was done is trusted only until the machine starts anew.
    """
    partial = partial_of(target)
    if not sync:
        fingerprint = fingerprint | {"unsynced_since_boot": _BOOT_ID.read_text().strip()}
    with _disk_errors(partial), _locked(partial) as lock:
        check_absent(target)  # another conversion may have made it since
        _begin(partial, fingerprint, resume=resume, sync=sync)
        try:
            yield Unfinished(partial, target, lock, sync)
        except BaseException:
            if not _has_records(partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _begin(partial: Path, fingerprint: dict[str, Any], *, resume: bool, sync: bool) -> None:
    plan = partial / _RECORDS / _PLAN
    if os.path.lexists(partial):
        if not resume:
            raise FileExistsError(
                f"{partial} was left by a conversion that did not finish; repeat the command with --resume, or remove "
                "it"
            )
        if partial.is_symlink() or not partial.is_dir():
            raise CheckpointError(f"{partial}: is not what a conversion left; remove it")
        if not plan.is_file() and (_has_records(partial) or any(path.name != _RECORDS for path in partial.iterdir())):
            raise CheckpointError(f"{partial}: holds files but no plan of a conversion; remove it and convert anew")
        if plan.is_file() and _read_plan(plan, partial) != json.loads(json.dumps(fingerprint)):
            raise CheckpointError(
                f"{partial}: was begun from another source, with other options, by another version, or with --no-sync "
                "before the machine's last start; repeat those, or remove it (after a start only that is left)"
            )
    plan.parent.mkdir(parents=True, exist_ok=True)
    write_json(plan, fingerprint, temporary=plan.with_suffix(".new"), sync=sync)


def _read_plan(plan: Path, partial: Path) -> dict[str, Any]:
    try:
        return read_json(plan)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; remove {partial} and convert anew") from None


def _record_path(folder: Path, number: int) -> Path:
    return folder / _RECORDS / f"{number}.json"


def _has_records(folder: Path) -> bool:
    return any((folder / _RECORDS).glob("[0-9]*.json"))


@contextmanager
def _locked(partial: Path) -> Iterator[int]:
    """The lock lies outside the folder, so that it is held until the folder has its name."""
    path = partial.with_name(partial.name + ".lock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise CheckpointError(f"{partial}: another conversion is writing it; wait for it, or stop it") from None
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            break
        os.close(handle)  # its owner has finished and removed it meanwhile
    try:
        yield handle
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def _disk_errors(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # our own, with its own words
            raise
        remedy = "what is done is kept: repeat the command with --resume"
        if error.errno in _FULL:
            remedy = "what is done is kept: make room and repeat the command with --resume"
        elif error.errno in _FORBIDDEN:
            remedy = "choose a destination that can be written"
        raise CheckpointError(f"{error.filename or partial}: {error.strerror}; {remedy}") from error
