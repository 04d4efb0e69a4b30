"""Write requirements/*.txt, the exact versions that make installs (make lock; --gpu for make install-gpu's)

The roots are pyproject.toml's dependencies with its [cpu], [track] and [dev] extras, plus ROOTS below. pip resolves
them (`pip install --dry-run --report`) without installing anything; this script then walks the answer from
the roots, and does not walk past what CUT names. The files are installed with --no-deps, so a package that is
cut stays out, and so does all that only it needed. torch itself is pinned in requirements/torch.txt by hand:
where the index offers both a CPU and a CUDA build, the reader chooses.

Pins that exist are kept (they are given to pip as constraints), so a second run changes nothing. --upgrade
forgets them and takes the newest versions that fit together. Needs Python 3.11, the older of the two that are
supported, and the network: a minute or two.

--gpu writes requirements/gpu.txt and gpu-vllm-0.33.txt instead: the [gpu], [track] and [dev] extras for Python 3.12 and
CUDA 13 on Linux, one file for each vLLM that is supported, resolved by uv. GPU_CUT alone is cut from them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TORCH = ROOT / "requirements" / "torch.txt"

GPU_LOCKS = {"gpu": "0.32.0", "gpu-vllm-0.33": "0.33.0"}
"""Name of the file -> vLLM in it, which decides torch."""

GPU_ROOTS = ("transformer-engine-torch==2.20.2", "ninja", "pybind11", "cuda-python>=13")
"""Besides the extras: what is compiled, what it is compiled with, and what uv would pick too old: cuda-python 12 holds
files of its own in the place of cuda-bindings 13's, and which of them stay is chance."""

GPU_CUT = ("cwevals", "distro")
"""The first for the reason in CUT; the second is there for it alone."""

ROOTS = {
    "cpu": ("setuptools", "gguf"),  # builds the editable install; reads GGUF files in tools/make_smollm2.py
    "dev": (),
}

CUT = {
    "triton": "no CPU back end",
    "torchvision": "its wheels do not load on CPU torch and then break `import transformers`",
    "torchaudio": "the same",
    "torchcodec": "the same",
    "intel-openmp": "115 MB; vLLM preloads torch's own libgomp unless told otherwise",
    "intel-cmplr-lib-ur": "came with intel-openmp",
    "opencv-python-headless": "152 MB, for video input only",
    "mistral-common": "56 MB with its country names, for Mistral's own tokenizer files only",
    "anthropic": "vLLM never imports it",
    "mcp": "tool servers; vLLM imports it when asked for one",
    "fastapi-cli": "the `fastapi` command and its deployment client",
    "fastapi-cloud-cli": "the same",
    "cwevals": "a prerelease; wandb never imports it",
}
"""What vLLM or transformers ask for and this project runs without, and why it may go."""

CUT_PREFIXES = ("nvidia-", "cuda-")
"""The libraries of a CUDA build of torch, where the index gives one: they belong to torch, not here."""

HEADER = {
    "gpu": "# Written by `make lock-gpu` (tools/lock_requirements.py) for Python 3.12 and CUDA 13 on Linux x86-64.\n"
    "# make install-gpu installs it; transformer-engine-torch is compiled after torch, all else comes as wheels.\n",
    "cpu": "# Written by `make lock` (tools/lock_requirements.py), which says what is left out and why.\n"
    "# Installed with --no-deps, before torch.txt.\n",
    "dev": "# Written by `make lock`: what tests and checks need besides cpu.txt. Installed with --no-deps\n",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--upgrade", action="store_true", help="forget the pins and take the newest versions")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file would change")
    parser.add_argument("--gpu", action="store_true", help="write the lock files for GPUs instead")
    parser.add_argument("--report", type=Path, help="read pip's report from this file instead of asking pip")
    options = parser.parse_args()
    if options.gpu:
        return int(any([lock_gpu(name, vllm, options) for name, vllm in GPU_LOCKS.items()]) and options.check)
    roots = read_roots(ROOT / "pyproject.toml")
    if options.report:
        report = json.loads(options.report.read_text())
    else:
        report = ask_pip(roots["cpu"] + roots["dev"], keep_pins=not options.upgrade)
    packages: dict[str, Any] = {
        canonicalize_name(entry["metadata"]["name"]): entry["metadata"] for entry in report["install"]
    }
    environment = report["environment"]
    cpu = closure(roots["cpu"], packages, environment)
    dev = closure(roots["dev"], packages, environment) - cpu
    changed = False
    for name, members in (("cpu", cpu), ("dev", dev)):
        target = target_of(name)
        text = HEADER[name] + "".join(
            f"{packages[member]['name']}=={packages[member]['version']}\n" for member in sorted(members)
        )
        changed |= not target.exists() or target.read_text() != text
        if not options.check:
            target.write_text(text)
        print(f"{target.relative_to(ROOT)}: {len(members)} packages")
    return int(options.check and changed)


def lock_gpu(name: str, vllm: str, options: argparse.Namespace) -> bool:
    """Resolve and write one lock file for GPUs; whether it is another than before."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    roots = [*project["dependencies"], *extras["gpu"], *extras["track"], *extras["dev"], *GPU_ROOTS, f"vllm=={vllm}"]
    target = target_of(name)
    command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--no-annotate", "--no-header"]
    command += ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28", "-"]
    command += [word for name in GPU_CUT for word in ("--no-emit-package", name)]
    if target.exists() and not options.upgrade:
        command += ["--constraint", str(target)]
    done = subprocess.run(command, input="\n".join(roots), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{target.name}: uv found no versions that fit together:\n{done.stderr}")
    text = HEADER["gpu"] + done.stdout
    changed = not target.exists() or target.read_text() != text
    if not options.check:
        target.write_text(text)
    print(f"{target.relative_to(ROOT)}: {done.stdout.count('==')} packages")
    return changed


def target_of(name: str) -> Path:
    return ROOT / "requirements" / f"{name}.txt"


def read_roots(pyproject: Path) -> dict[str, list[Requirement]]:
    """What [cpu] and [dev] each start from; [cpu] includes the project's own dependencies."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    asked = {
        "cpu": [*project["dependencies"], *extras["cpu"], *ROOTS["cpu"]],
        "dev": [*extras["dev"], *extras["track"], *ROOTS["dev"]],
    }
    return {name: [Requirement(text) for text in texts] for name, texts in asked.items()}


def ask_pip(roots: Iterable[Requirement], *, keep_pins: bool) -> dict[str, Any]:
    """pip's resolution of `roots`, installed nowhere."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
    ]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "report.json"
        command += ["--report", str(answer), "-r", str(TORCH)]
        pins = [target_of(name) for name in ROOTS if target_of(name).exists()]
        if keep_pins:
            command += [word for file in pins for word in ("--constraint", str(file))]
        subprocess.run([*command, *map(str, roots)], check=True)
        return json.loads(answer.read_text())


def closure(
    roots: Iterable[Requirement], packages: Mapping[str, Mapping[str, Any]], environment: Mapping[str, str]
) -> set[str]:
    """Names of all that `roots` need, each with the extras asked of it, not walking past what is cut.

    torch's own needs belong to the answer although torch does not: installed first, they fix what torch gets.
    Raises KeyError for a package that pip did not resolve (a marker of another Python).
    """
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(root.name), extra) for root in roots for extra in ("", *root.extras)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen or is_cut(name):
            continue
        seen.add((name, extra))
        if name != "torch":
            found.add(name)
        for text in packages[name].get("requires_dist", ()):
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({**environment, "extra": extra}):
                todo += [(canonicalize_name(need.name), wanted) for wanted in ("", *need.extras)]
    return found


def is_cut(name: str) -> bool:
    return name in CUT or name.startswith(CUT_PREFIXES)


if __name__ == "__main__":
    raise SystemExit(main())
