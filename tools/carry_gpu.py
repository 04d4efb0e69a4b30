"""Carry everything that GPUs need to a machine without network: pack it here, install it there.

    python3.12 tools/carry_gpu.py pack PARCEL [--vllm 0.32] [--have FROZEN] [--piece-mib 60]
    python3.12 PARCEL/carry_gpu.py install PARCEL TARGET

`pack` makes the folder PARCEL of the wheels of a lock file (requirements/gpu*.txt), the extension that make install-gpu
compiled (build/gpu-wheels), and this checkout's last commit: 5 GB. --have names a file with the other machine's
`pip freeze`: what lies there in the same version is left out, and used from there. --piece-mib cuts the parcel, where
only so much travels at once. `install` says which pieces are missing or damaged, unpacks the checkout into TARGET and
makes TARGET/.venv-gpu; then `make -C TARGET test-gpu`. Python 3.12 at both ends; standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIST = "parcel.json"
COMPILED = "transformer-engine-torch"
BLOCK = 1 << 20
CHECK = """
import importlib.metadata as metadata, torch, megatron.core, transformer_engine.pytorch
for name in ("torch", "megatron-core", "transformer-engine", "vllm"):
    print(f"carry_gpu: {name} {metadata.version(name)}")
if torch.version.cuda is None:
    raise SystemExit("carry_gpu: this torch is built for CPUs; pack again without --have")
print(f"carry_gpu: {torch.cuda.device_count()} GPUs")
"""


class CarryError(Exception):
    """One sentence with its remedy."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="where there is a network")
    pack.add_argument("parcel", type=Path)
    pack.add_argument("--vllm", choices=["0.32", "0.33"], default="0.32", help="which lock file (default 0.32)")
    pack.add_argument("--have", type=Path, help="pip freeze of the other machine")
    pack.add_argument("--piece-mib", type=positive, default=0, help="cut the parcel into pieces of this size")
    install = commands.add_parser("install", help="where there is none")
    install.add_argument("parcel", type=Path)
    install.add_argument("target", type=Path, help="where the checkout goes")
    options = parser.parse_args()
    try:
        if options.command == "pack":
            pack_all(options)
        else:
            install_all(options.parcel, options.target)
    except CarryError as error:
        print(f"carry_gpu: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"carry_gpu: {' '.join(map(str, error.cmd[:6]))} ... failed ({error.returncode})", file=sys.stderr)
        return 1
    return 0


def pack_all(options: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import install_gpu  # beside this file in the checkout; not needed where it is unpacked

    if sys.version_info[:2] != (3, 12):
        raise CarryError("the lock files are for Python 3.12: start this with python3.12")
    options.parcel.mkdir(parents=True, exist_ok=True)
    if any(options.parcel.iterdir()):
        raise CarryError(f"{options.parcel} is not empty: remove it, or name another folder")
    lock = install_gpu.LOCKS[options.vllm]
    torch = install_gpu.version_in(lock, "torch")
    compiled = list((ROOT / "build" / "gpu-wheels" / f"torch-{torch}").glob(f"{COMPILED.replace('-', '_')}-*.whl"))
    if not compiled:
        raise CarryError(f"no {COMPILED} for torch {torch} was compiled here: make install-gpu VLLM={options.vllm}")
    have = parse_pins(options.have.read_text(encoding="utf-8")) if options.have else {}
    wanted = [line for line in wanted_pins(lock.read_text(encoding="utf-8"), have) if not line.startswith(COMPILED)]
    with tempfile.TemporaryDirectory(dir=options.parcel.absolute().parent) as scratch:
        content = Path(scratch)
        wheels = content / "wheels"
        wheels.mkdir()
        say(f"fetching {len(wanted)} wheels of {lock.name}")
        (content / "wanted.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")
        run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-r", content / "wanted.txt", "-w", wheels])
        for wheel in compiled:
            shutil.copy(wheel, wheels)
        run(["git", "-C", ROOT, "archive", "-o", content / "checkout.tar", "HEAD"])
        (content / "settings.json").write_text(json.dumps({"system_site_packages": bool(have)}), encoding="utf-8")
        pieces = make_parcel(content, options.parcel, options.piece_mib << 20)
    shutil.copy(__file__, options.parcel)
    size = sum(piece.stat().st_size for piece in pieces) / 2**30
    say(f"{options.parcel}: {len(pieces)} piece(s), {size:.2f} GiB; there: carry_gpu.py install PARCEL TARGET")


def install_all(parcel: Path, target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        raise CarryError(f"{target} is not empty: remove it, or name another folder")
    if sys.version_info[:2] != (3, 12):
        raise CarryError("the wheels are for Python 3.12: start this with python3.12")
    if sys.prefix != sys.base_prefix:
        raise CarryError(f"this is a virtual environment's python: start it with {sys.base_prefix}/bin/python3.12")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent) as scratch:
        content = Path(scratch)
        open_parcel(parcel, content)
        with tarfile.open(content / "checkout.tar") as checkout:
            checkout.extractall(target, filter="data")
        settings = json.loads((content / "settings.json").read_text(encoding="utf-8"))
        python = make_venv(target / ".venv-gpu", system_site_packages=settings["system_site_packages"])
        say("installing the wheels")
        pip = [python, "-m", "pip", "install", "-q", "--no-compile", "--no-index", "--no-deps"]
        run([*pip, *sorted((content / "wheels").glob("*.whl"))])
        run([*pip, "--no-build-isolation", "-e", target])
    run([python, "-W", "ignore", "-c", CHECK])
    say(f"done: make -C {target} test-gpu")


def make_venv(folder: Path, *, system_site_packages: bool) -> Path:
    """Its python."""
    run([sys.executable, "-m", "venv", *(["--system-site-packages"] if system_site_packages else []), folder])
    return folder / "bin" / "python"


def positive(word: str) -> int:
    if (number := int(word)) < 1:
        raise ValueError(word)
    return number


def parse_pins(text: str) -> dict[str, str]:
    """name: version of `name==version` lines; names as PyPI compares them. A local part of CUDA 13 (+cu130) is left
    out; another one (+cpu) is another build, and stays."""
    found = {}
    for line in text.splitlines():
        name, _, version = line.split("#")[0].split(";")[0].strip().partition("==")
        if version:
            public, _, local = version.partition("+")
            found[re.sub(r"[-_.]+", "-", name).lower()] = public if local.startswith("cu13") else version
    return found


def wanted_pins(lock: str, have: dict[str, str]) -> list[str]:
    """Lines of a lock file that `have` does not hold in the same version."""
    return [f"{name}=={version}" for name, version in parse_pins(lock).items() if have.get(name) != version]


def make_parcel(content: Path, parcel: Path, piece_bytes: int = 0) -> list[Path]:
    """The folder as one tar, in pieces of `piece_bytes` (0: in one), and their list with sha256. Returns the pieces."""
    parcel.mkdir(parents=True, exist_ok=True)
    whole = parcel / "parcel.tar"
    with tarfile.open(whole, "w") as archive:
        for path in sorted(content.iterdir()):
            archive.add(path, arcname=path.name)
    pieces = [whole]
    if piece_bytes:
        pieces = cut(whole, piece_bytes)
        whole.unlink()
    listed = [{"name": piece.name, "bytes": piece.stat().st_size, "sha256": sha256(piece)} for piece in pieces]
    (parcel / LIST).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    return pieces


def cut(whole: Path, piece_bytes: int) -> list[Path]:
    pieces = []
    with whole.open("rb") as source:
        while source.peek(1):
            pieces.append(whole.with_name(f"part-{len(pieces):04d}"))
            with pieces[-1].open("wb") as piece:
                left = piece_bytes
                while left and (block := source.read(min(left, BLOCK))):
                    piece.write(block)
                    left -= len(block)
    return pieces


def open_parcel(parcel: Path, content: Path) -> None:
    """Unpack into `content`. CarryError that names the pieces which are missing or damaged."""
    if not (parcel / LIST).is_file():
        raise CarryError(f"{parcel / LIST} is missing: it is sent with the pieces")
    try:
        pieces = json.loads((parcel / LIST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CarryError(f"{parcel / LIST} is damaged ({error}): send it again") from error
    bad = [piece["name"] for piece in pieces if not is_whole(parcel / piece["name"], piece)]
    if bad:
        raise CarryError(f"missing or damaged: {', '.join(bad)}; send them again")
    joined = Joined([parcel / piece["name"] for piece in pieces])
    with tarfile.open(fileobj=io.BufferedReader(joined, BLOCK), mode="r|") as archive:
        archive.extractall(content, filter="data")


def is_whole(path: Path, piece: dict) -> bool:
    return path.is_file() and path.stat().st_size == piece["bytes"] and sha256(path) == piece["sha256"]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Joined(io.RawIOBase):
    """Files read as one, without a copy on the disk."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = (path.open("rb") for path in paths)
        self.file = next(self.files, None)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.file is not None:
            if count := self.file.readinto(buffer):
                return count
            self.file.close()
            self.file = next(self.files, None)
        return 0


def run(command: Sequence[object]) -> None:
    """Raises CalledProcessError."""
    subprocess.run([str(word) for word in command], check=True)


def say(text: str) -> None:
    print(f"carry_gpu: {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
