"""What the command line refuses of trackers, before anything is started."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from megatron_r1.__main__ import main
from megatron_r1.config.track import PACKAGES, has_wandb_key


def refused(capsys, *words: str) -> str:
    """What the command line says of a run that it refuses."""
    try:
        status = main(["run", "tiny", "--dry-run", *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    found = capsys.readouterr()
    return found.out + found.err


def test_bad_values_are_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert "prometheus" in refused(capsys, "--track.names", "mlflow")
    assert "name each once" in refused(capsys, "--track.names", "wandb", "wandb")
    prometheus = ("--track.names", "prometheus", "--track.prometheus.port")
    assert "track.prometheus.port is 70000; it must be 0 (a free one) or a port" in refused(
        capsys, *prometheus, "70000"
    )
    offline = ("--track.names", "wandb", "--track.wandb.mode", "offline")
    assert "track.wandb.project is 'a/b'; it must" in refused(capsys, *offline, "--track.wandb.project", "a/b")
    says = refused(capsys, "--track.names", "wandb")
    assert "track.wandb.mode is online, and W&B has no key here: `wandb login`" in says


def test_a_pipeline_is_refused_before_its_first_stage(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    words = ["run", "r1_tiny", "--run-dir", str(tmp_path / "run"), "--final-rl.track.names", "wandb"]
    assert main(words) == 2 and not (tmp_path / "run").exists()
    assert "final_rl.track.wandb.mode is online, and W&B has no key here" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused_before_the_run(capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ("--track.names", "prometheus", "--track.prometheus.port", port)
        says = refused(capsys, *words)
        monkeypatch.setenv("RANK", "1")  # of another machine, perhaps
        assert main(["run", "tiny", "--dry-run", *words]) == 0
    assert f"track.prometheus.port is {port}; it cannot be used (Address already in use)" in says


def test_wandb_finds_its_key_where_it_was_left(tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert has_wandb_key({"NETRC": str(tmp_path / "netrc")}) and has_wandb_key({"WANDB_API_KEY": "0123"})
    other = {"NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": "https://wandb.example.org"}
    assert not has_wandb_key(other) and not has_wandb_key({"NETRC": str(tmp_path / "none")})


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_its_remedy(name, tmp_path):
    """In an interpreter whose path lacks that one distribution's metadata, as if it had never been installed."""
    package = PACKAGES[name]
    code = f"""
import importlib.metadata, sys
from pathlib import Path
found = importlib.metadata.distribution({package!r})
folder = Path(found._path).parent
for entry in folder.iterdir():
    if entry != Path(found._path):
        (Path({str(tmp_path)!r}) / entry.name).symlink_to(entry)
sys.path = [{str(tmp_path)!r} if Path(place).resolve() == folder.resolve() else place for place in sys.path]
from megatron_r1.__main__ import main
status = main(["run", "tiny", "--dry-run", "--track.names", {name!r}, "--track.wandb.mode", "offline"])
assert "torch" not in sys.modules and {package!r} not in sys.modules
raise SystemExit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    assert f"track.names has {name}, and {package} is not installed: pip install '{package}>=" in done.stderr
