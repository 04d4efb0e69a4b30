"""Which checkpoint of a run is taken: the newest that is whole."""

import json
import threading

import pytest
import torch.distributed as dist

from megatron_r1.errors import CheckpointError
from megatron_r1.observe.metrics import JsonLines, keep_steps
from megatron_r1.stages.common import checkpoints as checkpoints_module
from megatron_r1.stages.common.checkpoints import STATE, Checkpoints, _hash, oldest_step


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


@pytest.fixture(autouse=True)
def one_rank(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def loaded(monkeypatch):
    """The folders that were put into a policy."""
    folders = []
    monkeypatch.setattr(checkpoints_module, "load_policy", lambda policy, folder: folders.append(folder))
    return folders


@pytest.fixture
def checkpoints(tmp_path, said):
    return Checkpoints(tmp_path, keep=2, say=said.append)


def test_the_newest_is_taken(tmp_path, checkpoints, loaded):
    checkpoint(tmp_path, 2, {"steps_done": 2})
    newest = checkpoint(tmp_path, 10, {"steps_done": 10})
    assert checkpoints.load_latest(None) == {"steps_done": 10}
    assert loaded == [newest]


def test_none_is_taken_where_there_is_none(checkpoints, loaded):
    assert checkpoints.load_latest(None) is None
    assert loaded == []


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone", "no state", "half a state", "another state"])
def test_a_damaged_one_is_set_aside_with_a_warning(tmp_path, checkpoints, loaded, said, damage):
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
    elif damage == "half a state":
        (newest / STATE).write_text('{"step": 4')
    else:
        (newest / STATE).write_text('["step", 4]')
    assert checkpoints.load_latest(None) == {"steps_done": 2}
    assert loaded == [before]
    assert "step_00000004 is damaged" in said[0]
    assert not newest.exists() and newest.with_name("step_00000004.damaged").is_dir()


def test_a_half_written_one_is_not_seen_and_removed(tmp_path, checkpoints, loaded):
    partial = checkpoint(tmp_path, 4, {}).rename(tmp_path / "checkpoints" / "step_00000004.partial")
    assert checkpoints.load_latest(None) is None
    assert loaded == [] and not partial.exists()


class Snapshot:
    """What a rank writes: one file; it can be told to wait, or to find the disk full."""

    def __init__(self, error=None):
        self.go, self.error = threading.Event(), error

    def write(self, folder):
        self.go.wait(30)
        if self.error is not None:
            raise self.error
        (folder / "state-00000.safetensors").write_bytes(b"weights")
        return [folder / "state-00000.safetensors"]


@pytest.fixture
def save(monkeypatch, checkpoints):
    """Save step n, written at once unless told otherwise."""

    def save(step, *, score=None, error=None, wait=False):
        snapshot = Snapshot(error)
        monkeypatch.setattr(checkpoints_module, "take_snapshot", lambda policy: snapshot)
        if not wait:
            snapshot.go.set()
        checkpoints.save(step, None, {"steps_done": step}, score=score)
        return snapshot

    return save


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_only_the_last_few_are_kept_and_damaged_ones_do_not_count(tmp_path, checkpoints, save, loaded):
    checkpoint(tmp_path, 7, {}).joinpath(STATE).unlink()
    checkpoints.load_latest(None)
    for step in (8, 9, 10):
        save(step)
    checkpoints.close()
    assert names(tmp_path) == ["step_00000007.damaged", "step_00000009", "step_00000010"]
    assert checkpoints.load_latest(None) == {"steps_done": 10}


def test_a_run_goes_on_from_the_oldest_at_least(tmp_path):
    assert oldest_step(tmp_path) == 0
    for step in (7, 10, 12):
        checkpoint(tmp_path, step, {})
    for folder in ("step_00000003.damaged", "step_00000004.partial"):
        (tmp_path / "checkpoints" / folder).mkdir()
    assert oldest_step(tmp_path) == 7


def test_the_best_is_kept_too(tmp_path, said, save, monkeypatch):
    best = Checkpoints(tmp_path, keep=1, say=said.append, keep_best=True)
    for step, score in ((1, 0.25), (2, 0.75), (3, 0.75), (4, 0.5), (5, None)):
        monkeypatch.setattr(checkpoints_module, "take_snapshot", lambda policy: ready())
        best.save(step, None, {}, score=score)
    best.close()
    assert names(tmp_path) == ["step_00000002", "step_00000005"]


def ready():
    snapshot = Snapshot()
    snapshot.go.set()
    return snapshot


def test_it_appears_only_when_it_is_written(tmp_path, checkpoints, save):
    snapshot = save(3, wait=True)
    checkpoints.commit()
    assert names(tmp_path) == ["step_00000003.partial"]
    snapshot.go.set()
    checkpoints.commit(wait=True)
    assert names(tmp_path) == ["step_00000003"]


def test_what_follows_it_is_told(tmp_path, said, monkeypatch):
    steps = []
    monkeypatch.setattr(checkpoints_module, "take_snapshot", lambda policy: ready())
    told = Checkpoints(tmp_path, keep=2, say=said.append, on_commit=steps.append)
    told.save(3, None, {})
    assert steps == []
    told.save(5, None, {})
    told.save(7, None, {})
    told.close()
    # The oldest that may still be gone on from: what lies before it is needed no more.
    assert steps == [3, 3, 5]


def test_a_full_disk_is_said_and_leaves_the_one_before(tmp_path, checkpoints, save, loaded):
    save(3)
    checkpoints.commit(wait=True)
    save(4, error=OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError, match=r"No space left on device.*earlier checkpoints are intact"):
        checkpoints.commit(wait=True)
    assert names(tmp_path) == ["step_00000003"]


def test_metrics_are_cut_to_the_steps_that_stand(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as file:
        for step in range(5):
            file.write({"step": step})
    keep_steps(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    keep_steps(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()
