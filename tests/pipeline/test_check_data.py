"""megatron-r1 check-data: what it finds in files of problems, and what it leaves alone."""

# ruff: noqa: E501  (programs)

import json

import pytest

from megatron_r1.__main__ import main
from megatron_r1.config.check_data import CheckDataConfig
from megatron_r1.config.sandbox import SandboxConfig
from megatron_r1.config.schema import DataConfig, RewardConfig
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.check_data import check_data

CLASS_TEST = "c = Cache(2)\nc.put(1, 5)\nassert c.get(1) == {}\n"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" if isinstance(row, dict) else row + "\n" for row in rows))
    return path


def program(*asserts, entry_point="f", **more):
    tests = {"asserts": list(asserts), "entry_point": entry_point, **more}
    return {"question": f"Write {asserts}.", "grader": "code", "tests": tests}


def checked(*files, **more):
    rewards = RewardConfig(num_workers=2, sandbox=SandboxConfig(allow_unisolated=True))
    return check_data(CheckDataConfig(data=DataConfig(files=files), rewards=rewards, **more))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        # found by reading the tests
        (program("f(1) == 2"), "has no assertion"),
        (program("assert f is not None"), "has no assertion that can fail"),
        # found by running them
        (program("assert f(1) != 2"), "a program that returns None passes test 1"),
        (program("x = f(1)\nassert x is None or x == 2"), "a program that returns None passes test 1"),
        (program("y = f(1)\nassert str(y)"), "a program that always returns one odd text passes test 1"),
        (program("assert isinstance(f(1), object)"), "a program that returns None passes test 1"),
        (program("assert bool(f(1)) in (True, False)"), "a program that returns None passes test 1"),
        (program("assert f(1) == 2", "assert f(1) == 2 if 0 else True"), "a program that defines nothing passes test 2"),
        (program("for x in range(0):\n    assert f(x) == 2"), "a program that defines nothing passes test 1"),
        (program("def t():\n    assert f(1) == 2\nstart = t if 0 else print\nstart()"), "defines nothing passes test 1"),
        (program("assert any([f(1) == 2, 1])"), "a program that returns None passes test 1"),
        (program("try:\n    ok = f(1) == 2\nexcept Exception:\n    ok = True\nassert ok"), "defines nothing passes test 1"),
        (program("try:\n    f(1)\n    failed = False\nexcept NameError:\n    failed = True\nexcept Exception:\n"
                 "    failed = False\nassert not failed"), "returns None passes test 1"),
        (program("assert f(1) is None", prefix="def f(x): pass"), "a program that returns None passes test 1"),
        (program("c = Cache(2)\nassert c.get(1) != 3", entry_point="Cache"), "a program that returns None passes test 1"),
        ({"question": "q", "grader": "code", "tests": {"inputs": ["1", "2"], "outputs": ["1", "\n"]}},
         "a program that defines nothing passes test 2"),
        ({"prompt": "q", "instruction_id_list": ["no:such"], "kwargs": [{}]}, "instruction 'no:such'"),
        ({"prompt": "q", "instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "are incomplete"),
        ({"question": "q"}, "answer is missing"),
        ('{"question": "q", "answer": NaN}', "NaN is no JSON"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_place(tmp_path, row, words):
    path = write(tmp_path / "set.jsonl", {"question": "first", "answer": "1"}, row)
    report = checked(path)
    assert any(fault.startswith(f"{path}, line 2: ") and words in fault for fault in report.faults), report


@pytest.mark.parametrize(
    "row",
    [
        program("assert f(1) == 2"),
        program("assert f(1) is None", "assert f(2) == 3"),
        program("try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass", "assert f(1) == 2"),
        program(CLASS_TEST.format(5), entry_point="Cache"),
        program("assert Solution().f([1]) == [1, 1]", entry_point="Solution().f"),
        program("xs = [2, 1]\nf(xs)\nassert xs == [1, 2]"),
        {"question": "q", "grader": "code", "tests": {"inputs": ["1"], "outputs": ["1"]}},
        {"prompt": "q", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"question": "q", "grader": "preference"},
    ],
)
def test_sound_problems_have_no_faults(tmp_path, row):
    report = checked(write(tmp_path / "set.jsonl", row), constants=True)
    assert report.faults == () and report.notes == (), report


def test_constants_are_notes_and_only_where_asked_for(tmp_path):
    path = write(tmp_path / "set.jsonl", program("assert f(1)", "assert f(2) == True"), program("assert f(3) == 3"))
    assert checked(path).notes == ()
    report = checked(path, constants=True)
    assert report.faults == () and all(note.startswith(f"{path}, line ") for note in report.notes)
    texts = [note.partition("problem ")[2] for note in report.notes]
    assert "set:1: a program that always returns True passes tests 1, 2" in texts
    assert "set:2: a program that returns its argument passes test 1" in texts


def test_programs_need_not_be_run(tmp_path):
    path = write(tmp_path / "set.jsonl", program("y = f(1)\nassert str(y)"))
    assert checked(path, programs=False).faults == ()


def test_notes(tmp_path):
    path = write(
        tmp_path / "set.jsonl",
        {"question": "Q 1?", "answer": "1", "domian": "x"},
        {"question": "q  1?", "answer": "We add. " * 40},
    )
    report = checked(path)
    assert report.faults == () and report.counts == {"math": 2}
    assert report.forms == {str(path): {"GSM8K and ours": 2}}
    for words in ("the key 'domian' of 1 rows", f"line 2: asks the same as {path}, line 1", "may be a solution"):
        assert any(words in note for note in report.notes)


def test_a_file_of_bad_lines_only(tmp_path):
    path = write(tmp_path / "set.jsonl", "{", "[1")
    assert [fault.partition(": ")[0] for fault in checked(path).faults] == [f"{path}, line 1", f"{path}, line 2"]


def test_the_command(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", {"problem": "P?", "answer": "1"}, {"problem": "R?", "answer": "2"})
    bad = write(tmp_path / "bad.jsonl", {"question": "q"}, "{", {"question": "q", "answer": "1"})
    assert main(["check-data", "--data.files", str(good)]) == 0
    out = capsys.readouterr().out
    assert "2 as AMC 2023, AIME, MATH-500" in out and "2 math problems, no faults" in out
    absent = tmp_path / "absent.jsonl"
    assert main(["check-data", "--data.files", str(absent), str(bad), str(good)]) == 1
    out = capsys.readouterr().out
    for place in (f"{absent}: cannot be read", f"{bad}, line 1: ", f"{bad}, line 2: "):
        assert f"fault  {place}" in out
    assert "3 math problems, 3 faults" in out
    assert main(["check-data"]) == 2
    assert "data.files is empty" in capsys.readouterr().err


def test_a_configuration_without_files_is_refused():
    with pytest.raises(ConfigError, match=r"data\.files is empty"):
        check_data(CheckDataConfig())
