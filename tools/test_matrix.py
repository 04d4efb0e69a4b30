"""Run the trainer's tests under every minor version of megatron-core that is supported (make test-megatron)

Each version is unpacked into a folder of its own, build/megatron/VERSION, which stands before the installed one on the
tests' path; nothing that is installed changes. From 0.18 megatron-core imports Triton, which the CPU build of torch
does not bring: it is unpacked beside them where it is missing. Prints one line a version; the exit status is 1 if a
test failed. pyproject.toml's range is what this has shown, and a version outside of it is refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
"""The last patch of each minor version."""
TESTS = ("tests/model", "tests/weights", "tests/policy", "tests/gpu_paths")
TABLE = "| megatron-core | passed | failed | skipped | seconds |\n|---|---|---|---|---|"
NEEDS_TRITON = Version("0.18")
MARKERS = "not gpu and not slurm and not slow"


@dataclass(frozen=True, slots=True)
class Outcome:
    version: str
    passed: int
    failed: tuple[str, ...]
    skipped: int
    seconds: float

    @property
    def row(self) -> str:
        return f"| {self.version} | {self.passed} | {len(self.failed)} | {self.skipped} | {self.seconds:.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), help="of megatron-core")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="files or folders")
    parser.add_argument("--markers", default=MARKERS, help="pytest's -m")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "megatron", help="where versions are unpacked")
    options = parser.parse_args()
    required = supported(ROOT / "pyproject.toml")
    if outside := [version for version in options.versions if version not in required.specifier]:
        parser.error(f"--versions {' '.join(outside)}: pyproject.toml asks for {required}; change it first")
    outcomes = []
    for version in options.versions:
        outcomes.append(run(version, options.tests, options.markers, options.folder.resolve()))
        for name in outcomes[-1].failed:
            print(f"{version}: {name} failed", flush=True)
    print(f"Python {sys.version.split()[0]}", TABLE, *(outcome.row for outcome in outcomes), sep="\n")
    return int(any(outcome.failed or not outcome.passed for outcome in outcomes))


def supported(pyproject: Path) -> Requirement:
    """pyproject.toml's requirement of megatron-core."""
    requirements = map(Requirement, tomllib.loads(pyproject.read_text())["project"]["dependencies"])
    return next(found for found in requirements if found.name == "megatron-core")


def run(version: str, tests: Sequence[str], markers: str, folder: Path) -> Outcome:
    """The tests under one version. Their output goes to FOLDER/VERSION.log."""
    path = [unpack(f"megatron-core=={version}", folder / version)]
    if Version(version) >= NEEDS_TRITON and importlib.util.find_spec("triton") is None:
        path.append(unpack("triton", folder / "triton"))
    report, log = folder / f"{version}.xml", folder / f"{version}.log"
    report.unlink(missing_ok=True)
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-m", markers, f"--junitxml={report}", *tests]
    start = time.perf_counter()
    with log.open("w") as output:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if not report.exists():
        return Outcome(version, 0, (f"pytest itself: see {log}",), 0, time.perf_counter() - start)
    return read_report(version, report)


def unpack(requirement: str, folder: Path) -> Path:
    """FOLDER with the package alone in it. From 0.17 it declares Python 3.12; it runs on 3.11 too, as this shows."""
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    words = ["--quiet", "--no-deps", "--no-compile", "--target", str(partial)]
    if requirement.startswith("megatron-core") and sys.version_info < (3, 12):
        words += ["--python-version", "3.12", "--only-binary", ":all:", "--ignore-requires-python"]
    subprocess.run([sys.executable, "-m", "pip", "install", *words, requirement], check=True)
    partial.rename(folder)
    return folder


def read_report(version: str, report: Path) -> Outcome:
    """The counts of pytest's JUnit file."""
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    failed = tuple(
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    )
    skipped = int(suite.get("skipped", 0))
    passed = int(suite.get("tests", 0)) - len(failed) - skipped
    return Outcome(version, passed, failed, skipped, float(suite.get("time", 0.0)))


if __name__ == "__main__":
    sys.exit(main())
