"""Problems in their publishers' forms: one row each, written by hand after the real files."""

# ruff: noqa: E501  (rows)

import base64
import json
import pickle
import zlib

import pytest

from megatron_r1.config.schema import RewardConfig
from megatron_r1.data.jsonl import placed_problems, read_problems
from megatron_r1.errors import DataError
from megatron_r1.rewards.wiring import check_problems


def read(tmp_path, *rows, name="set.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_problems([path])


def one(tmp_path, row):
    (problem,) = read(tmp_path, row)
    return problem


OLYMPIAD = {
    "id": 1606,
    "subfield": "Algebra",
    "context": None,
    "question": "Solve.",
    "solution": ["It is 2."],
    "final_answer": ["2"],
    "is_multiple_answer": False,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
}


@pytest.mark.parametrize(
    ("row", "number", "question", "answer"),
    [
        # AIME 2024: Maxwell-Jia, HuggingFaceH4, math-ai, and 1983 to 2024
        ({"ID": "2024-II-4", "Problem": "P?", "Solution": "So 33.", "Answer": 33}, "2024-II-4", "P?", "33"),
        ({"id": 60, "problem": "P?", "solution": "So 1. \\boxed{5}", "answer": "204", "url": "u", "year": "2024"}, "60", "P?", "204"),
        ({"id": 60, "problem": "P?", "solution": "\\boxed{204}", "url": "u"}, "60", "P?", "204"),
        ({"ID": "1983-1", "Year": 1983, "Problem Number": 1, "Question": "P?", "Answer": "60"}, "1983-1", "P?", "60"),
        # AMC 2023, with the question twice as Qwen has it
        ({"id": 0, "problem": "P?", "answer": 27.0, "url": "u"}, "0", "P?", "27"),
        ({"id": 0, "problem": "P?", "question": "P?", "answer": 27.0, "url": "u"}, "0", "P?", "27"),
        ({"id": "0", "question": "P?", "answer": "27", "url": "u"}, "0", "P?", "27"),
        # MATH, MATH-500, Minerva
        ({"problem": "P?", "level": "Level 5", "type": "Algebra", "solution": "$\\boxed{1}$, so $\\boxed{\\frac{1}{2}}$."}, "set:1", "P?", r"\frac{1}{2}"),
        ({"problem": "P?", "solution": "It is $\\boxed{9}$.", "answer": "9", "subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"}, "test/algebra/1.json", "P?", "9"),
        ({"problem": "P?", "type": "Astronomy", "solution": "\\[s=\\boxed{1.6} \\mathrm{~cm}\\]", "idx": 0}, "set:1", "P?", "1.6"),
        # OlympiadBench
        (OLYMPIAD, "1606", "Solve.", "2"),
        ({**OLYMPIAD, "context": "Let $a=1$.", "final_answer": ["$(1,8)$", "$2$"], "is_multiple_answer": True}, "1606", "Let $a=1$.\n\nSolve.", "$(1,8)$, $2$"),
        # word problems
        ({"question": "P?", "answer": "2*9=<<2*9=18>>18\n#### 18", "idx": 0}, "set:1", "P?", "18"),
        ({"ID": "chal-7", "Body": "There are 3.", "Question": "How many?", "Equation": "3", "Answer": 145.0, "Type": "T"}, "chal-7", "There are 3.\nHow many?", "145"),
        ({"body": "There are 9.", "question": "How many?", "answer": "9 (apples)", "idx": 0}, "set:1", "There are 9.\nHow many?", "9"),
        ({"input": "P?", "target": 43.0}, "set:1", "P?", "43"),
        ({"content": "P?", "answer": "b ^ { 2 }", "steps": "s"}, "set:1", "P?", "b ^ { 2 }"),
        ({"grade": 1, "question": "P?", "answer": "9", "reasoning_step": 1}, "set:1", "P?", "9"),
        ({"passage": None, "question": "P?", "options": None, "label": None, "answer": "2", "other": {}}, "set:1", "P?", "2"),
        ({"idx": 0, "question": "P?", "answer": "C. x", "choice_answer": "C"}, "set:1", "P?", "C"),
        ({"idx": 0, "question": "P?", "answer": "6", "choice_answer": ""}, "set:1", "P?", "6"),
        # sets to train on
        ({"prompt": "P?", "answer": "4"}, "set:1", "P?", "4"),
        ({"question": "P?", "solution": "so \\boxed{4}"}, "set:1", "P?", "4"),
        ({"question": "P?", "solution": "so 5", "answer": "4"}, "set:1", "P?", "4"),
        ({"problem": "P?", "expected_answer": "4"}, "set:1", "P?", "4"),
        ({"prompt": [{"role": "user", "content": "P?"}], "reward_model": {"style": "rule", "ground_truth": "34"}, "data_source": "d"}, "set:1", "P?", "34"),
        ({"problem": "P?", "solution": "\\boxed{3}", "messages": [{"role": "user", "content": "P?"}, {"role": "assistant", "content": "a"}]}, "set:1", "P?", "3"),
    ],
)  # fmt: skip
def test_mathematics(tmp_path, row, number, question, answer):
    problem = one(tmp_path, row)
    assert (problem.id, problem.messages[0]["content"], problem.answer) == (number, question, answer)
    assert (problem.grader, problem.domain, problem.language) == ("math", "math", None)


OPTIONS = "P?\n\nA) 5\nB) 6\nC) 7\n\nAnswer with the letter of the right option."


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"passage": None, "question": "P?", "options": {"A": "5", "B": "6", "C": "7"}, "label": "C", "answer": None}, OPTIONS, "C"),
        ({"question": "P?", "options": ["A)5", "B)6", "C)7"], "rationale": "r", "correct": "B"}, OPTIONS, "B"),
        ({"question": "P?", "options": ["(A)5", "(B)6", "(C)7"], "label": "B"}, OPTIONS, "B"),
        ({"id": "0", "question": "P?", "options": "A) 5 B) 6 C) 7", "Answer": "A"}, OPTIONS, "A"),
        ({"id": "0", "question": "P?", "options": "A. 5 B. 6 C. 7", "Answer": "A"}, OPTIONS, "A"),
        ({"question": "P?", "type": "t", "choices": ["5", "6", "7"], "answer": 2}, OPTIONS, "C"),
        ({"question": "P?", "choices": {"text": ["5", "6", "7"], "label": ["A", "B", "C"]}, "answer": "C"}, OPTIONS, "C"),
        ({"question": "P?", "options": ["5", "6", "7"], "answer": "B", "answer_index": 1}, OPTIONS, "B"),
        ({"passage": "Read.", "question": "P?", "options": ["A)5", "B)6", "C)7"], "label": "B"}, "Read.\n\n" + OPTIONS, "B"),
    ],
)  # fmt: skip
def test_choices(tmp_path, row, question, answer):
    problem = one(tmp_path, row)
    assert (problem.messages[0]["content"], problem.answer, problem.grader) == (question, answer, "math")


def test_several_choices_may_be_right(tmp_path):
    problem = one(tmp_path, {"question": "P?", "options": {"A": "5", "B": "6", "C": "7"}, "label": "C A"})
    assert problem.answer == "AC" and "Several options may be right" in problem.messages[0]["content"]


GPQA = {
    "Question": "Which?",
    "Correct Answer": "right",
    "Incorrect Answer 1": "w1",
    "Incorrect Answer 2": "w2",
    "Incorrect Answer 3": "w3",
    "Explanation": "e",
}


def test_gpqa_is_shuffled_by_its_record(tmp_path):
    rows = [{**GPQA, "Record ID": f"rec{i}"} for i in range(40)]
    first, again = read(tmp_path, *rows), read(tmp_path, *rows[::-1])
    assert {p.id: p for p in first} == {p.id: p for p in again}
    assert {p.answer for p in first} == set("ABCD")
    for problem in first:
        lines = problem.messages[0]["content"].split("\n")
        assert lines[0] == "Which?" and f"{problem.answer}) right" in lines
        assert sorted(line[3:] for line in lines[2:6]) == ["right", "w1", "w2", "w3"]


def test_gpqa_is_a_table(tmp_path):
    row = {"Pre-Revision Question": "x", **GPQA, "Record ID": "rec1"}
    path = tmp_path / "gpqa_diamond.csv"
    path.write_text(",".join(row) + "\n" + ",".join(f'"{cell}"' for cell in row.values()) + "\n")
    (problem,) = read_problems([path])
    assert problem == one(tmp_path, row) and problem.id == "rec1"


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef half(x):\n    return x / 2\n\n\ndef f(x: int) -> int:\n    """ Adds one. """\n',
    "entry_point": "f",
    "canonical_solution": "    return x + 1\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1) == 2\n",
}


def test_humaneval(tmp_path):
    problem = one(tmp_path, HUMANEVAL)
    tests = problem.metadata["tests"]
    assert (problem.id, problem.grader, problem.domain, problem.answer) == ("HumanEval/0", "code", "code", None)
    assert HUMANEVAL["prompt"].strip() in problem.messages[0]["content"]
    assert tests["entry_point"] == "f" and tests["prefix"].strip() == HUMANEVAL["prompt"].strip()
    (text,) = tests["asserts"]
    assert "def check(candidate)" in text and "def half(x)" in text and "def f(" not in text


def test_mbpp(tmp_path):
    row = {
        "text": "Write a function to add one.",
        "code": "def g(x):\r\n    return x\r\ndef f(x):\r\n    return g(x) + 1",
        "task_id": 11,
        "test_setup_code": "a = 1",
        "test_list": ["assert f(a) == 2", "assert f(2) == max(3, g(1))"],
        "challenge_test_list": ["assert f(3) == 4"],
    }
    problem = one(tmp_path, row)
    assert (problem.id, problem.grader) == ("11", "code")
    tests = problem.metadata["tests"]
    assert (
        tests["entry_point"] == "f" and len(tests["asserts"]) == 3 and tests["asserts"][0] == "a = 1\nassert f(a) == 2"
    )
    sanitized = {"prompt": "Add.", "task_id": 2, "test_imports": ["import math"], "test_list": ["assert f(1) == 2"]}
    problem = one(tmp_path, sanitized)
    assert problem.metadata["tests"] == {"asserts": ["import math\nassert f(1) == 2"], "entry_point": "f"}
    assert problem.messages[0]["content"].startswith("Add.\n\nThe program must pass these tests")


def packed(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


LIVE = {
    "question_title": "Sum",
    "question_content": "Add two numbers.",
    "question_id": "abc_1",
    "starter_code": "",
    "metadata": "{}",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": packed(json.dumps([{"input": "2 2\n", "output": "4\n", "testtype": "stdin"}])),
}
FUNCTIONAL = {
    **LIVE,
    "starter_code": "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        ",
    "metadata": json.dumps({"func_name": "add"}),
    "public_test_cases": json.dumps([{"input": '1\n[2, "x"]', "output": "[true, null]", "testtype": "functional"}]),
    "private_test_cases": "[]",
}


def test_livecodebench(tmp_path):
    problem = one(tmp_path, LIVE)
    assert (problem.id, problem.grader) == ("abc_1", "code")
    assert problem.metadata["tests"] == {"inputs": ["1 2\n", "2 2\n"], "outputs": ["3\n", "4\n"]}
    tests = one(tmp_path, FUNCTIONAL).metadata["tests"]
    assert tests["entry_point"] == "Solution().add"
    assert "candidate(1, [2, 'x'])" in tests["asserts"][0] and "== [True, None]" in tests["asserts"][0]


class Hostile:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("value", [Hostile(), [Hostile()], {"a": 1}, b"text", "not json", "[1]"])
def test_a_pickle_may_only_hold_a_text(tmp_path, value, capsys):
    with pytest.raises(DataError, match=r"line 1: private_test_cases"):
        one(tmp_path, {**LIVE, "private_test_cases": packed(value)})
    assert capsys.readouterr().out == ""


def test_apps(tmp_path):
    row = {
        "question": "Add.",
        "input_output": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]}),
        "starter_code": "",
    }
    assert one(tmp_path, row).metadata["tests"] == {"inputs": ["1 2\n"], "outputs": ["3\n"]}
    row["input_output"] = json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]})
    assert one(tmp_path, row).metadata["tests"]["entry_point"] == "Solution().add"


def test_ifeval(tmp_path):
    row = {"key": 1000, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    problem = one(tmp_path, row)
    assert (problem.id, problem.grader, problem.messages[0]["content"]) == ("1000", "instructions", "No commas.")
    assert problem.metadata == {"instructions": [("punctuation:no_comma", {})]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"problem": "P?", "solution": "It is 4."}, "solution holds no \\boxed{...}"),
        ({"problem": "P?", "solution": "It is \\boxed{4"}, "solution holds no \\boxed{...}"),
        ({**OLYMPIAD, "final_answer": None}, "there is no answer"),
        ({**OLYMPIAD, "question": "See <img_3362>."}, "a picture"),
        ({"question": "P?", "options": ["5", "6"], "label": "C"}, "label is 'C'; expected one of the 2 options AB"),
        ({"question": "P?", "choices": ["5", "6"], "answer": 2}, "answer is 2; expected one of the 2 options"),
        ({"question": "P?", "options": "5 or 6", "label": "A"}, "is not of the form A) ... B)"),
        ({**GPQA, "Incorrect Answer 2": 3}, "must be texts"),
        ({**HUMANEVAL, "entry_point": 3}, "entry_point is 3"),
        ({"text": "t", "test_list": ["assert 1 == 1"]}, "call no function in common"),
        ({"text": "t", "test_list": "assert f(1)"}, "test_list is"),
        ({**LIVE, "public_test_cases": "[{}]"}, "objects with input and output"),
        ({**LIVE, "metadata": "{"}, "metadata is not valid JSON"),
        ({**FUNCTIONAL, "public_test_cases": json.dumps([{"input": "x y", "output": "1"}])}, "a test's input is not valid JSON"),
        ({"prompt": "P?", "instruction_id_list": ["a", "b"], "kwargs": [{}]}, "lists of one length"),
        ({"question": "q", "anwser": "4"}, "answer is missing (did you mean answer by 'anwser'?)"),
        ({"qestion": "q", "answer": "4"}, "did you mean question by 'qestion'?"),
        ({"id": 1.5, "question": "q", "answer": "4"}, "id is 1.5"),
        ({"id": True, "question": "q", "answer": "4"}, "id is True"),
        ({"id": [1], "question": "q", "answer": "4"}, "id is [1]"),
    ],
)  # fmt: skip
def test_a_broken_row_is_refused_with_its_reason(tmp_path, row, words):
    with pytest.raises(DataError) as caught:
        one(tmp_path, row)
    assert str(caught.value).startswith(f"{tmp_path / 'set.jsonl'}, line 1: ") and words in str(caught.value)


def test_null_is_a_key_that_is_not_there(tmp_path):
    row = {
        "id": None,
        "domain": None,
        "language": None,
        "grader": None,
        "messages": None,
        "question": "q",
        "answer": "1",
    }
    problem = one(tmp_path, row)
    assert (problem.id, problem.domain, problem.language, problem.grader) == ("set:1", "math", None, "math")


def test_our_own_keys_win_over_a_form(tmp_path):
    row = {"problem": "P?", "answer": "4", "grader": "exact", "domain": "d", "language": "fr", "id": "x"}
    problem = one(tmp_path, row)
    assert (problem.grader, problem.domain, problem.language, problem.id) == ("exact", "d", "fr", "x")


def test_numbers_of_two_files_are_kept_apart(tmp_path):
    row = {"id": 7, "problem": "P?", "answer": "1"}
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    both = read_problems([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert [problem.id for problem in both] == ["7", "b:7"]
    with pytest.raises(DataError, match=r"line 2: id '7' was used at .*line 1"):
        read(tmp_path, row, row)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"We add them. So the answer is $\boxed{2}$.", "2"),
        (r"First \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{2}", "2"),
        (r"$\boxed{3}$, $\boxed{5}$", "3, 5"),
        (r"\boxed{3} and \boxed{5}", "3, 5"),
        (r"\fbox{7}", "7"),
        ("a #### \\boxed{2}", "2"),
        (2, "2"),
        (27.0, "27"),
        (0.5, "0.5"),
        (1e22, "1e+22"),
        (10**30, str(10**30)),
    ],
)
def test_a_reference_that_is_a_whole_solution_is_read_as_its_answer(tmp_path, answer, reference):
    assert one(tmp_path, {"question": "q", "answer": answer}).answer == reference


@pytest.mark.parametrize("answer", [r"So \boxed{2", r"So \boxed{}", r"\boxed{1} or \boxed{ }"])
def test_a_box_that_holds_nothing_is_refused(tmp_path, answer):
    with pytest.raises(DataError, match="empty or is never closed"):
        one(tmp_path, {"question": "q", "answer": answer})


def test_faults_are_told_and_the_rest_is_read(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"question": "q", "answer": "1"}\n{\n{"question": "q"}\n\n{"question": "q", "answer": "2"}\n')
    faults = []
    assert [problem.id for _, problem in placed_problems([path], faults.append)] == ["set:1", "set:5"]
    assert [str(fault).split(": ")[0][-6:] for fault in faults] == ["line 2", "line 3", "line 4"]


def test_a_turn_with_more_than_text_is_refused(tmp_path):
    turns = [{"role": "user", "content": "a", "id": 1}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    last = {"role": "user", "content": "d"}
    problem = one(tmp_path, {"messages": [*turns, last], "answer": "5"})
    assert [turn["content"] for turn in problem.messages] == ["a", "b", "d"]
    with pytest.raises(DataError, match="line 1: a turn has 'tool_calls'"):
        one(tmp_path, {"messages": [turns[0], {**turns[1], "tool_calls": [{}]}, last], "answer": "5"})


def test_a_solution_without_a_box_is_no_answer(tmp_path):
    with pytest.raises(DataError, match="problem set:1: answer has 3000 characters"):
        check_problems([one(tmp_path, {"question": "P?", "answer": "x" * 3000})], RewardConfig(), reward_models=False)
    assert one(tmp_path, {"question": "P?", "answer": "x" * 3000, "grader": "exact"}).answer == "x" * 3000
