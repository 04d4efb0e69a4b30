"""Which data overlaps which evaluation problem, by hand."""

import json
import tracemalloc

import pytest

from megatron_r1.data.decontaminate import index_files, overlap_of
from megatron_r1.errors import DataError

QUESTION = "A train leaves the station at noon and travels forty miles an hour to the sea."  # 16 words


@pytest.fixture
def files(tmp_path):
    long, short = tmp_path / "exam.jsonl", tmp_path / "sums.jsonl"
    long.write_text(json.dumps({"question": QUESTION, "answer": "2", "id": "train"}) + "\n")
    rows = [{"question": "What is 3 + 4?", "answer": "7"}, {"question": "What is 3 + 5?", "answer": "8"}]
    short.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [long, short]


def asks(text):
    return ({"role": "system", "content": QUESTION}, {"role": "user", "content": text})


def test_a_shared_run_of_words_is_found_and_named(files):
    index = index_files(files, 8)
    assert index.overlap("Suppose that a TRAIN leaves the station, at noon, and stops.") == "train"
    assert index.overlap("A train leaves the station at noon.") is None, "only seven words"
    assert index.overlap("a train leaves the old station at noon and travels forty yards") is None
    assert index.file_of["train"] == str(files[0])


def test_shorter_questions_must_be_equal(files):
    index = index_files(files, 8)
    assert index.overlap("what is 3+4") == "sums:1"
    assert index.overlap("What is 3 + 5 ?") == "sums:2"
    assert index.overlap("what is 3-4") is None
    assert index.overlap("Now what is 3 + 4?") is None
    assert index.overlap("") is None


def test_turns_are_looked_at_one_by_one_and_instructions_not(files):
    index = index_files(files, 8)
    assert overlap_of(asks("something else"), index) is None
    assert overlap_of(asks("What is 3 + 4?"), index) == "sums:1"
    assert overlap_of((*asks("hello"), {"role": "assistant", "content": f"Once: {QUESTION}"}), index) == "train"


def test_no_evaluation_set_overlaps_nothing():
    assert index_files([], 13).overlap(QUESTION) is None


def test_equal_ids_of_two_files_stay_apart(files, tmp_path):
    other = tmp_path / "more.jsonl"
    other.write_text(json.dumps({"question": "How many days has a leap year?", "answer": "366", "id": "train"}) + "\n")
    index = index_files([*files, other], 8)
    name = index.overlap("how many days has a leap year")
    assert index.file_of[name] == str(other)


def test_a_malformed_evaluation_file_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"bad.jsonl, line 1"):
        index_files([tmp_path / "bad.jsonl"], 8)


def test_memory_does_not_grow_with_the_data(files):
    index = index_files(files, 8)
    text = " ".join(f"word{number}" for number in range(5000))
    tracemalloc.start()
    index.overlap(text)
    before = tracemalloc.get_traced_memory()[0]
    for number in range(50):
        index.overlap(f"{number} {text}")
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 10_000
