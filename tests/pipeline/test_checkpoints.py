"""Which checkpoint of a run is taken: the newest that is whole."""

import json

import pytest

from megatron_r1.observe.metrics import JsonLines, keep_steps
from megatron_r1.pipeline.checkpoints import STATE, Checkpoints, _hash


def checkpoint(run_dir, step, state):
    """A finished checkpoint as save() leaves it, with one file."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state-00000.safetensors").write_bytes(b"weights %d" % step)
    files = {"state-00000.safetensors": _hash(folder / "state-00000.safetensors")}
    (folder / STATE).write_text(json.dumps({"step": step, "state": state, "files": files}))
    return folder


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    return Checkpoints(tmp_path, keep=2, say=said.append)


def test_the_newest_is_taken(tmp_path, checkpoints, said):
    checkpoint(tmp_path, 2, {"steps_done": 2})
    newest = checkpoint(tmp_path, 10, {"steps_done": 10})
    assert checkpoints._latest() == (newest, {"steps_done": 10})
    assert not said


def test_none_is_taken_where_there_is_none(checkpoints):
    assert checkpoints._latest() is None


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone", "no state", "half a state"])
def test_a_damaged_one_is_left_aside_with_a_warning(tmp_path, checkpoints, said, damage):
    before = checkpoint(tmp_path, 2, {"steps_done": 2})
    newest = checkpoint(tmp_path, 4, {"steps_done": 4})
    file = newest / "state-00000.safetensors"
    if damage == "changed":
        file.write_bytes(b"weights 5")
    elif damage == "shorter":
        file.write_bytes(b"weig")
    elif damage == "gone":
        file.unlink()
    elif damage == "no state":
        (newest / STATE).unlink()
    else:
        (newest / STATE).write_text('{"step": 4')
    assert checkpoints._latest() == (before, {"steps_done": 2})
    assert len(said) == 1 and "step_00000004 is damaged" in said[0]
    assert newest.exists()


def test_a_half_written_one_is_not_seen(tmp_path, checkpoints):
    checkpoint(tmp_path, 4, {}).rename(tmp_path / "checkpoints" / "step_00000004.partial")
    assert checkpoints._latest() is None


def test_only_the_last_few_are_kept(tmp_path, checkpoints):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step, {})
    partial = checkpoint(tmp_path, 4, {}).rename(tmp_path / "checkpoints" / "step_00000004.partial")
    (partial / STATE).unlink()
    checkpoints._finish(partial, tmp_path / "checkpoints" / "step_00000004", 4, {"steps_done": 4})
    assert [path.name for path in checkpoints._all()] == ["step_00000003", "step_00000004"]
    assert checkpoints._latest()[1] == {"steps_done": 4}


def test_metrics_are_cut_to_the_steps_that_stand(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as file:
        for step in range(5):
            file.write({"step": step})
    keep_steps(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    keep_steps(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()
