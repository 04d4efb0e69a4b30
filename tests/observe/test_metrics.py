"""Run files survive full disks, crashes and restarts."""

import errno
import json
import resource
import signal
from contextlib import contextmanager

import numpy as np
import pytest

from megatron_r1.errors import DataError
from megatron_r1.observe.metrics import (
    JsonLines,
    OutputError,
    PhaseTimer,
    keep_steps,
    read_json_lines,
    write_json,
)


@contextmanager
def file_size_limit(size):
    """Caps the size of the files that this process writes, as a full disk would. Lifted before pytest reports:
    its standard output may be a file too."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_lines_are_readable_at_once_and_plain(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as log:
        log.write({"step": np.int64(0), "loss": np.float32(0.5), "bad": float("nan"), "text": "é\n\u2028"})
        assert json.loads(path.read_text(encoding="utf-8")) == {
            "step": 0, "loss": 0.5, "bad": None, "text": "é\n\u2028",
        }  # fmt: skip
        log.write({"step": 1, "seconds": {"train": 1.5}, "steps": (1, 2), "path": tmp_path})
    with JsonLines(path) as log:
        log.write({"step": 2, "broken": "\ud800"})
    assert [r["step"] for r in read_json_lines(path)] == [0, 1, 2]


def test_full_disk_names_file_and_remedy_and_keeps_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    log.write({"step": 0})
    before = path.read_bytes()
    with file_size_limit(len(before) + 20):  # room for half of the next line
        with pytest.raises(OutputError, match=r"metrics\.jsonl: .*intact; free space"):
            log.write({"step": 1, "text": "x" * 100})
        assert path.read_bytes() == before
        log.write({"step": 1})  # a line that fits still works
    assert [r["step"] for r in read_json_lines(path)] == [0, 1]
    log.close()


def test_disk_that_is_full_from_the_start():
    with JsonLines("/dev/full") as log, pytest.raises(OutputError) as error:
        log.write({"step": 0})
    assert error.value.errno == errno.ENOSPC


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"steps": 1})
    with file_size_limit(40), pytest.raises(OutputError, match=r"summary\.json"):
        write_json(path, {"text": "x" * 1000})
    assert json.loads(path.read_text()) == {"steps": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"gone/metrics\.jsonl: No such file"):
        JsonLines(tmp_path / "gone" / "metrics.jsonl")


def test_torn_last_line_is_skipped_and_a_bad_line_inside_is_an_error(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 1')
    assert list(read_json_lines(path)) == [{"step": 0}]
    path.write_text('{"step": 0}\n{oops\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        list(read_json_lines(path))


def test_opening_cuts_a_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"text": "' + "x" * 100_000)
    with JsonLines(path) as log:
        log.write({"step": 1})
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_resume_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 1}\n{"step": 2}\n{"st')
    keep_steps(path, 1)
    assert path.read_text() == '{"step": 0}\n'
    keep_steps(tmp_path / "none.jsonl", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


def test_phases_add_up_and_nested_time_counts_once():
    now = [100.0]
    timer = PhaseTimer(clock=lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    wait(1)
    with timer.phase("rollout"):
        wait(2)
        with timer.phase("reward"):
            wait(4)
        wait(8)
    with timer.phase("rollout"):
        wait(16)
    wait(32)
    assert timer.take() == {"rollout": 26.0, "reward": 4.0, "other": 33.0}
    wait(5)
    assert timer.take() == {"other": 5.0}


def test_phase_that_raises_is_counted():
    timer = PhaseTimer()
    with pytest.raises(KeyError), timer.phase("train"):
        raise KeyError
    with timer.phase("sync"):
        pass
    assert list(timer.take()) == ["train", "sync", "other"]
