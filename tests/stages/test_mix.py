"""Other data in proportion to what was kept, never repeated, and never from an evaluation set."""

import json

import pytest

from megatron_r1.data.decontaminate import EvaluationIndex
from megatron_r1.errors import DataError
from megatron_r1.stages.rejection.config import MixSource
from megatron_r1.stages.rejection.mix import check_source, mix, records

NO_INDEX = EvaluationIndex(size=5, owner={}, file_of={})


def write(path, count, question="question {}"):
    turns = [[("user", question.format(n)), ("assistant", f"answer {n}")] for n in range(count)]
    lines = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def shares_of(tmp_path, num_kept, *sources, weight=3.0, seed=0):
    others = [
        check_source(MixSource(file=write(tmp_path / f"{n}.jsonl", count), weight=w), NO_INDEX)
        for n, (count, w) in enumerate(sources)
    ]
    return mix(num_kept, others, weight=weight, seed=seed)


def test_the_papers_proportion(tmp_path):
    """600k : 200k, a thousandth of it."""
    (share,) = shares_of(tmp_path, 600, (500, 1.0))
    assert share.wanted == len(share.taken) == len(set(share.taken)) == 200
    assert share.as_json() == {
        "file": str(tmp_path / "0.jsonl"), "weight": 1.0, "wanted": 200, "written": 200, "available": 500,
        "contaminated": 0,
    }  # fmt: skip


def test_too_little_other_data_is_taken_whole_and_reported(tmp_path):
    plenty, few = shares_of(tmp_path, 30, (100, 1.0), (7, 2.0))
    assert (plenty.wanted, len(plenty.taken)) == (10, 10)
    assert (few.wanted, few.taken) == (20, tuple(range(7)))


def test_the_draw_is_seeded(tmp_path):
    (one,), (same,), (other,) = (shares_of(tmp_path, 60, (100, 1.0), seed=seed) for seed in (4, 4, 5))
    assert one.taken == same.taken != other.taken


def test_nothing_kept_takes_nothing(tmp_path):
    (share,) = shares_of(tmp_path, 0, (5, 1.0))
    assert share.taken == () and list(records(share)) == []


def test_lines_say_where_they_come_from(tmp_path):
    (share,) = shares_of(tmp_path, 6, (5, 1.0))
    found = list(records(share))
    assert len(found) == 2
    for record, line in zip(found, share.taken, strict=True):
        assert record["id"] == f"0:{line + 1}" and record["source"] == "0.jsonl" and record["domain"] == "0"
        assert record["provenance"] == {"file": str(tmp_path / "0.jsonl"), "line": line + 1}
        assert [turn["content"] for turn in record["messages"]] == [f"question {line}", f"answer {line}"]


def test_conversations_that_overlap_an_evaluation_problem_are_left_out(tmp_path):
    index = EvaluationIndex(size=5, owner={"question 2": "exam:1"}, file_of={"exam:1": "exam.jsonl"})
    data = check_source(MixSource(file=write(tmp_path / "a.jsonl", 4), weight=1.0), index)
    assert data.usable == (0, 1, 3) and data.num_contaminated == 1


def test_a_malformed_file_is_found_before_anything_is_sampled(tmp_path):
    path = write(tmp_path / "a.jsonl", 2)
    path.write_text(path.read_text() + '{"messages": []}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 3"):
        check_source(MixSource(file=path, weight=1.0), NO_INDEX)
