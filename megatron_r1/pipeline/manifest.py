"""manifest.json of a pipeline: for each stage what it was made from, with what, and what it made.

A stage is up to date if its configuration and the content of all its inputs are those of the recorded run, and its
outputs are still what that run left. Content is a hash of every byte; a file whose size and times are those of
an earlier look is not read again. The code's version is recorded, but new code does not make old results invalid: use
`--from` for that.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from megatron_r1.config.folder_files import files_of
from megatron_r1.config.paths import input_paths, read_of, replace_inputs
from megatron_r1.config.pipeline import parent_of
from megatron_r1.config.same import PLACE, as_json, same_computation
from megatron_r1.config.schema import StageConfig
from megatron_r1.config.user_code import code_files
from megatron_r1.errors import DataError
from megatron_r1.observe.metrics import write_json
from megatron_r1.observe.progress import duration
from megatron_r1.observe.run_files import read_object
from megatron_r1.pipeline.kinds import kind_of

MANIFEST = "manifest.json"
MANIFEST_LOCK = ".manifest.lock"
SHOWN_BYTES = 10e9
"""Progress is shown where at least so many bytes must be read."""
MISSING = "missing"
"""Instead of a hash: there is no such file."""


class Manifest:
    """The stages' records, on disk after every change."""

    def __init__(self, run_dir: Path, name: str) -> None:
        """Raises DataError if there is a manifest that cannot be read."""
        self.run_dir = run_dir
        self._file = run_dir / MANIFEST
        self._content: dict[str, Any] = {"pipeline": name, "stages": {}, "looks": {}}
        if self._file.exists():
            found = self._read()
            if found.get("pipeline", name) != name:
                raise DataError(
                    f"{self._file}: of the pipeline {found['pipeline']}, this is {name}; choose another --run-dir"
                )
            self._content |= found

    def record(self, stage: str) -> Mapping[str, Any]:
        """What is known of a stage; empty if it never ran."""
        return self._content["stages"].get(stage, {})

    def is_current(self, stage: str, config: StageConfig) -> bool:
        """Whether the stage was done with this configuration and these inputs, and its outputs are untouched."""
        record = self.record(stage)
        if record.get("state") != "done" or not self.same_origin(stage, config):
            return False
        outputs = {name: known["content"] for name, known in record["outputs"].items()}
        return MISSING not in outputs.values() and outputs == self._outputs(config)

    def same_origin(self, stage: str, config: StageConfig) -> bool:
        """Whether the recorded run, finished or not, had this configuration and these inputs."""
        record = self.record(stage)
        if not record:
            return False
        # The folder may have been moved or be named in another way: the inputs' content is compared, not their paths.
        paths = {field: Path(known["path"]) for field, known in record["inputs"].items()}
        recorded = {path: paths.get(field, path) for field, path in input_paths(config).items()}
        if not same_computation(record["config"], replace_inputs(config, lambda path: recorded[path])):
            return False
        return {field: known["content"] for field, known in record["inputs"].items()} == self._inputs(config)

    def begin(self, stage: str, config: StageConfig) -> None:
        self._put(stage, {"state": "running", **self._origin(config)})

    def finish(self, stage: str, config: StageConfig, *, seconds: float, status: int) -> None:
        """Record how the stage ended: its outputs and metrics (summary.json) if `status` is 0."""
        record = dict(self.record(stage)) | {"seconds": seconds, "state": "done" if status == 0 else "failed"}
        if status == 0:
            record["outputs"] = {name: {"content": content} for name, content in self._outputs(config).items()}
            record["metrics"] = read_object(config.run_dir / "summary.json")
        else:
            record["exit_status"] = status
        self._put(stage, record)

    def _origin(self, config: StageConfig) -> dict[str, Any]:
        contents = self._inputs(config)
        paths = {**input_paths(config), **code_files(config)}
        inputs = {}
        for field, content in contents.items():
            parent = parent_of(paths[field], self.run_dir)
            inputs[field] = {"path": str(paths[field]), "content": content, "stage": parent[0] if parent else None}
        return {"config": computation(config), "code": code_version(), "inputs": inputs}

    def _inputs(self, config: StageConfig) -> dict[str, str]:
        # Not the token of a server: it is a secret, and another one changes nothing that is computed.
        paths = {field: path for field, path in input_paths(config).items() if not field.endswith("token_file")}
        paths |= code_files(config)
        return {field: self.content(read_of(field, path)) for field, path in paths.items()}

    def _outputs(self, config: StageConfig) -> dict[str, str]:
        return {name: self.content(config.run_dir / name) for name in kind_of(config).outputs}

    def content(self, path: Path) -> str:
        """A hash over names and bytes of a file or folder; MISSING if there is none."""
        if not path.exists():
            return MISSING
        files = files_of(path)
        size = sum(file.stat().st_size for file in files if self._known(file) is None)
        done, begun = 0, time.monotonic()
        total = hashlib.sha256()
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else ""
            done += file.stat().st_size if self._known(file) is None else 0
            total.update(f"{name}\0{self._hash(file)}\n".encode())
            if size >= SHOWN_BYTES and done:
                left = (time.monotonic() - begun) / done * (size - done)
                print(f"  reading {path}: {done / size:.0%} of {size / 1e9:,.0f} GB, left {duration(left)}", flush=True)
        return total.hexdigest()

    def _known(self, file: Path) -> str | None:
        """The hash of an earlier look, if the file is as it was."""
        known = self._content["looks"].get(str(file.resolve()))
        return known[-1] if known is not None and known[:-1] == _look(file) else None

    def _hash(self, file: Path) -> str:
        known = self._known(file)
        if known is not None:
            return known
        look = _look(file)
        digest = blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
        self._content["looks"][str(file.resolve())] = [*look, digest]
        return digest

    def _put(self, stage: str, record: Mapping[str, Any]) -> None:
        # On a cluster another stage may have been recorded meanwhile.
        with open(self.run_dir / MANIFEST_LOCK, "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self._read() if self._file.exists() else {}
            self._content["stages"] = self._content["stages"] | found.get("stages", {}) | {stage: record}
            self._content["looks"] = found.get("looks", {}) | self._content["looks"]
            write_json(self._file, self._content)

    def _read(self) -> dict[str, Any]:
        mend = "restore it, or remove it to run every stage again"
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{self._file}: not valid JSON ({error}); {mend}") from error
        if not _is_manifest(found):
            raise DataError(f"{self._file}: not a pipeline's manifest; {mend}")
        return found


def _look(file: Path) -> list[int]:
    stat = file.stat()
    # st_ctime_ns also tells of a change whose time was set back (cp -p, touch -r).
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def computation(config: StageConfig) -> dict[str, Any]:
    """The configuration as JSON without where it runs. Input paths stay; is_current() compares only their content."""
    return {name: value for name, value in as_json(config).items() if name not in PLACE}


def _is_manifest(found: object) -> bool:
    """Whether it has the form that this module writes, as far as is relied on."""
    if not isinstance(found, dict) or not isinstance(found.get("stages"), dict):
        return False
    return isinstance(found.get("looks", {}), dict) and all(
        isinstance(record, dict)
        and {"state", "config", "inputs"} <= record.keys()
        and (record["state"] != "done" or "outputs" in record)
        for record in found["stages"].values()
    )


def code_version() -> dict[str, str]:
    """Version of the package and, in a checkout, the commit and whether files differ from it."""
    found = {"version": importlib.metadata.version("megatron-r1")}
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        for name, command in (("commit", ["rev-parse", "HEAD"]), ("changed", ["status", "--porcelain", "-uno"])):
            done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=False)
            found[name] = done.stdout.strip() if name == "commit" else str(bool(done.stdout.strip()))
    return found
