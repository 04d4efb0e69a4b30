"""The step table: aligned, complete, and honest about what is missing."""

import contextlib
import io
import os
import pty

from megatron_r1.observe.progress import HEADER_EVERY, Progress, duration, header, step_line

METRICS = {
    "reward_mean": 1.25, "accuracy": 0.456, "format": 0.9, "length_mean": 22.04, "kl": 0.00123,
    "grad_norm": 0.5, "mismatch": 2.34e-7, "tokens_per_second": 12345.6,
}  # fmt: skip


def test_line_is_aligned_with_its_header():
    assert header(100) == "   step reward correct format  length      KL   grad  mismatch tokens/s   valid.     left"
    line = step_line(7, 100, METRICS, seconds_left=75)
    assert line == "  7/100  1.250   45.6%    90%    22.0  0.0012   0.50   2.3e-07   12,346        -    1m15s"


def test_wide_and_missing_numbers_stay_apart():
    line = step_line(1, 9, {"kl": float("nan"), "length_mean": 12345678.9}, seconds_left=0)
    assert line.split() == ["1/9", "-", "-", "-", "12,345,678.9", "nan", "-", "-", "-", "-", "0s"]


def test_duration():
    assert [duration(s) for s in (0, 59.4, 59.6, 3599, 3600, 90_000)] == [
        "0s",
        "59s",
        "1m00s",
        "59m59s",
        "1h00m",
        "1d01h",
    ]


def test_plain_stream_gets_one_line_a_step_and_repeated_headers():
    stream = io.StringIO()
    with Progress(HEADER_EVERY + 1, stream=stream) as progress:
        for step in range(HEADER_EVERY + 1):
            progress.update(step, METRICS)
        progress.note("held-out accuracy 50.0%")
    lines = stream.getvalue().splitlines()
    assert len(lines) == HEADER_EVERY + 1 + 2 + 1
    assert lines[0] == lines[HEADER_EVERY + 1] == header(HEADER_EVERY + 1)
    assert lines[-2].split()[0] == "21/21" and lines[-2].endswith(" 0s")
    assert "\x1b" not in stream.getvalue()


def test_terminal_gets_the_same_lines_and_a_bar():
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream, Progress(2, stream=stream) as progress:
        progress.update(0, METRICS)
    chunks = []
    with contextlib.suppress(OSError):  # EIO: the other end is closed and all is read
        while chunk := os.read(ours, 65536):
            chunks.append(chunk)
    os.close(ours)
    text = b"".join(chunks).decode()
    assert "45.6%" in text and "1/2" in text and "\x1b[" in text
