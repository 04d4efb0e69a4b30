"""The table of what checkpoints cost, by hand."""

import measure_checkpoints as tool


def test_shares_by_hand():
    rows = [{"rollout": 1.0, "train": 1.0, "checkpoint": 0.0, "evaluate": 9.0} for _ in range(6)]
    for number in (2, 4):
        rows[number] |= {"checkpoint": 0.1, "train": 1.2}
    said = tool.report(rows, every=2)
    assert "2 checkpoints in 6 steps, one every 2" in said
    assert "a step: 2.000 s; held up by a checkpoint: 0.100 s, 5.0% of a step" in said
    assert "0.200 of 12.4 s, 1.61%" in said
    assert "a step beside which one is written: 2.200 s; other steps: 2.000 s" in said
