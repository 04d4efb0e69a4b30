"""Which data overlaps which evaluation problem, by hand."""

import json
import tracemalloc

import pytest

from megatron_r1.data.decontaminate import index_files, overlap_of
from megatron_r1.data.words import words_of
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


def test_a_shorter_question_is_found_wherever_it_stands(files):
    index = index_files(files, 8)
    assert index.overlap("what is 3+4") == "sums:1"
    assert index.overlap("What is 3 + 5 ?") == "sums:2"
    assert index.overlap("Now what is 3 + 4?") == "sums:1"
    assert index.overlap("Answer in a box. WHAT IS 3+5? Think step by step, please.") == "sums:2"
    assert index.overlap("what is 3-4") is None
    assert index.overlap("what is 3 + 45") is None
    assert index.overlap("what is 13 + 4") is None
    assert index.overlap("what is the sum 3 + 4") is None
    assert index.overlap("") is None


def test_a_question_that_says_too_little_must_be_all_of_a_turn(tmp_path):
    path = tmp_path / "tiny.jsonl"
    path.write_text(json.dumps({"question": "What is pi?", "answer": "3.14"}) + "\n")
    index = index_files([path], 13)
    assert index.overlap("what is pi") == "tiny:1"
    assert index.overlap("Before we begin, what is pi?") is None


def test_chinese_questions_are_counted_by_characters(tmp_path):
    path = tmp_path / "zh.jsonl"
    rows = [{"question": "三加四等于几？", "answer": "7"}, {"question": "9只兔子有多少条腿？", "answer": "36"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = index_files([path], 13)
    assert index.overlap("请回答：三加四等于几？谢谢") == "zh:1"
    assert index.overlap("题目：9只兔子有多少条腿？") == "zh:2"
    assert words_of("有x只兔子2条腿") == ["有", "x", "只", "兔", "子", "2", "条", "腿"]


@pytest.mark.parametrize("before", ["Question: ", "Solve the following problem step by step.\n\n", "Q1. "])
@pytest.mark.parametrize("after", ["", " Put the answer in \\boxed{}.", "\nA:"])
def test_words_before_and_after_hide_no_question(tmp_path, before, after):
    questions = [r"Compute $\frac{1}{31} \div \frac{1}{93}$.", r"If $x+y=3$, what is $x^2$?", QUESTION]
    path = tmp_path / "exam.jsonl"
    path.write_text("".join(json.dumps({"question": text, "answer": "2"}) + "\n" for text in questions))
    index = index_files([path], 13)
    assert [index.overlap(before + text + after) for text in questions] == ["exam:1", "exam:2", "exam:3"]


def test_turns_are_looked_at_one_by_one_and_instructions_not(files):
    index = index_files(files, 8)
    assert overlap_of(asks("something else"), index) is None
    assert overlap_of(asks("What is 3 + 4?"), index) == "sums:1"
    assert overlap_of((*asks("hello"), {"role": "assistant", "content": f"Once: {QUESTION}"}), index) == "train"


def test_a_thought_is_looked_at_too(files):
    answer = {"role": "assistant", "content": "2", "reasoning_content": f"Once: {QUESTION}"}
    assert overlap_of((*asks("hello"), answer), index_files(files, 8)) == "train"


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
