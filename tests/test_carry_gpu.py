"""What is carried to a machine without network: chosen, cut, joined and checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import carry_gpu as carry
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def content(tmp_path) -> Path:
    folder = tmp_path / "content"
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels" / "a.whl").write_bytes(bytes(range(256)) * 4000)
    (folder / "settings.json").write_text('{"system_site_packages": true}')
    return folder


def test_what_the_other_machine_has_stays_at_home():
    lock = "# made by uv\ntorch==2.13.0\nnvidia_cudnn-cu13==9.1\nnumpy==2.3.0\nonly-here==1.0 ; python_version > '3'\n"
    have = carry.parse_pins(
        "Torch==2.13.0+cu130\nnvidia-cudnn.cu13==9.1\nnumpy==2.2.0\n-e git+https://x\nbroken @ file:///x\n"
    )
    assert carry.wanted_pins(lock, have) == ["numpy==2.3.0", "only-here==1.0"]


@pytest.mark.parametrize("piece_bytes", [0, 100_000, 1 << 20])
def test_a_parcel_is_opened_as_it_was_packed(content, tmp_path, piece_bytes):
    pieces = carry.make_parcel(content, tmp_path / "parcel", piece_bytes)
    whole = sum(piece.stat().st_size for piece in pieces)
    assert len(pieces) == (-(-whole // piece_bytes) if piece_bytes else 1)
    carry.open_parcel(tmp_path / "parcel", tmp_path / "opened")
    for name in ("wheels/a.whl", "settings.json"):
        assert (tmp_path / "opened" / name).read_bytes() == (content / name).read_bytes()


def test_missing_and_damaged_pieces_are_named_before_anything_is_unpacked(content, tmp_path):
    pieces = carry.make_parcel(content, tmp_path / "parcel", 200_000)
    pieces[1].unlink()
    pieces[3].write_bytes(pieces[3].read_bytes()[:-1] + b"!")
    with pytest.raises(carry.CarryError, match="missing or damaged: part-0001, part-0003; send them again"):
        carry.open_parcel(tmp_path / "parcel", tmp_path / "opened")
    assert not (tmp_path / "opened").exists()
    (tmp_path / "parcel" / carry.LIST).unlink()
    with pytest.raises(carry.CarryError, match=r"parcel\.json is missing"):
        carry.open_parcel(tmp_path / "parcel", tmp_path / "opened")


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="this is the Python that it asks for")
@pytest.mark.parametrize("words", [("pack", "parcel"), ("install", "parcel", "target")])
def test_another_python_is_an_error_of_one_line(tmp_path, words):
    command = [sys.executable, ROOT / "tools" / "carry_gpu.py", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "python3.12" in done.stderr
