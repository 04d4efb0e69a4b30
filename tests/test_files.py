"""Files replaced in one piece: readers see the old content or the new, and nothing else is left behind."""

import os
import stat

import pytest

from megatron_r1.files import replacing, write_whole


def test_the_new_content_takes_the_place_of_the_old_with_its_mode(tmp_path):
    path = tmp_path / "roles"
    write_whole(path, "old\n")
    write_whole(path, "new\n", mode=0o600)
    assert path.read_text() == "new\n" and list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_until_the_end_of_the_block_readers_see_the_old(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with replacing(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_an_error_leaves_the_old_and_nothing_else(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_no_hindrance(tmp_path):
    temporary = tmp_path / "records" / "new"
    temporary.parent.mkdir()
    temporary.write_text("half of a record of a process that was killed")
    with replacing(tmp_path / "a.json", temporary=temporary) as file:
        file.write("{}")
    assert (tmp_path / "a.json").read_text() == "{}" and not temporary.exists()


@pytest.mark.parametrize("sync", [True, False])
def test_bytes_are_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch, sync):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("replace"), replace(old, new)))
    write_whole(tmp_path / "a", "a", sync=sync)
    assert order == (["fsync", "replace"] if sync else ["replace"])
