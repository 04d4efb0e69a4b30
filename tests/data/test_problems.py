"""Where problems come from, what is refused, what is held out, and that a restart continues exactly."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_r1.config.schema import DataConfig
from megatron_r1.data.jsonl import read_problems
from megatron_r1.data.problems import load_problems, normalised_text, split_problems
from megatron_r1.data.stream import ProblemStream
from megatron_r1.data.tasks import TaskProblems, parse_task
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.types import Problem

SUMS = "basic_arithmetic:min_terms=2,max_terms=2,min_digits=2,max_digits=2,operators=+,allow_parentheses=False"


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def named(count, text=str):
    return [
        Problem(id=str(i), domain="d", messages=({"role": "user", "content": text(i)},), answer="1")
        for i in range(count)
    ]


def test_jsonl_styles(tmp_path):
    path = write(
        tmp_path / "set.jsonl",
        '{"question": "2 \\u2028 eggs?", "answer": "thought <<1+1=2>>2 #### no\\n#### 1,018"}',
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": 7, "id": "x"}',
        '{"question": "q", "answer": "Paris", "grader": "exact", "domain": "geo", "language": "fr", "x": 3}',
    )
    gsm, chat, exact = read_problems([path])
    assert (gsm.id, gsm.answer, gsm.grader, gsm.domain) == ("set:1", "1,018", "math", "math")
    assert gsm.messages == ({"role": "user", "content": "2 \u2028 eggs?"},)
    assert (chat.id, chat.answer, [m["role"] for m in chat.messages]) == ("x", "7", ["system", "user"])
    assert (exact.grader, exact.domain, exact.language) == ("exact", "geo", "fr")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "empty line"),
        ("{oops", "not valid JSON"),
        ("[1]", "a JSON list"),
        ('{"answer": "1"}', "expected exactly one of question and messages"),
        ('{"question": " ", "answer": "1"}', "question is ' '; expected non-empty text"),
        ('{"question": "q"}', "answer is missing"),
        ('{"question": "q", "answer": true}', "answer is True"),
        ('{"question": "q", "answer": "thought ####"}', "nothing follows '####'"),
        ('{"question": "q", "answer": "1", "grader": 1}', "grader is 1; expected non-empty text"),
        ('{"messages": [], "answer": "1"}', "non-empty list"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "answer": "1"}',
            "the last turn is 'assistant'",
        ),
        ('{"messages": [{"role": "judge", "content": "a"}], "answer": "1"}', "needs a role"),
        ('{"question": "q", "answer": "1", "id": "first"}', "id 'first' was used at"),
    ],
)
def test_malformed_line_is_refused_with_file_line_and_reason(tmp_path, line, reason):
    path = write(tmp_path / "bad.jsonl", '{"question": "q", "answer": "1", "id": "first"}', line, "{}")
    with pytest.raises(DataError) as error:
        read_problems([path])
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert reason in str(error.value)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_problems([tmp_path / "none.jsonl"])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="has no problems"):
        read_problems([tmp_path / "empty.jsonl"])
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "q", "answer": "1"}\n{"question": "\xe9"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_problems([tmp_path / "latin.jsonl"])


def test_files_of_one_name_keep_their_ids_apart(tmp_path):
    (tmp_path / "a").mkdir()
    paths = [write(folder / "s.jsonl", '{"question": "q", "answer": "1"}') for folder in (tmp_path, tmp_path / "a")]
    assert len({p.id for p in read_problems(paths)}) == 2


def test_task_line_is_read_and_checked():
    task = parse_task(SUMS)
    sizes = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
    assert task.arguments == {**sizes, "operators": ["+"], "allow_parentheses": False}
    with pytest.raises(ConfigError, match="'chain_sums' is no reasoning-gym dataset; did you mean chain_sum"):
        parse_task("chain_sums")
    with pytest.raises(ConfigError, match="no argument 'min_term'; did you mean min_terms"):
        parse_task("chain_sum:min_term=2")
    with pytest.raises(ConfigError, match="refuses these arguments: max_terms must be"):
        parse_task("chain_sum:min_terms=9,max_terms=2")
    with pytest.raises(ConfigError, match="seed belongs to the run"):
        parse_task("chain_sum:seed=3")
    with pytest.raises(ConfigError, match="'terms' is not arg=value"):
        parse_task("chain_sum:terms")


def test_task_problems_are_seeded_and_unique():
    task = parse_task(SUMS)
    first, again, other = (TaskProblems(task, seed=s, size=50) for s in (0, 0, 1))
    assert list(first) == list(again)
    assert len({p.id for p in [*first, *other]}) == 100
    shared = {normalised_text(p) for p in first} & {normalised_text(p) for p in other}
    assert len(shared) < 10  # reasoning-gym's own neighbouring seeds would share 49 of 50
    a, b = first[0].messages[0]["content"].removeprefix("Calculate ").removesuffix(".").split(" + ")
    assert first[0].answer == str(int(a) + int(b))
    json.dumps(first[0].metadata)


def test_config_needs_exactly_one_source():
    with pytest.raises(ConfigError, match="exactly one of tasks, files and source"):
        load_problems(DataConfig())
    with pytest.raises(ConfigError, match="exactly one of tasks, files and source"):
        load_problems(DataConfig(tasks=("chain_sum",), files=(Path("x"),)))
    with pytest.raises(ConfigError, match="listed twice"):
        load_problems(DataConfig(tasks=("chain_sum", "chain_sum")))


def test_held_out_questions_never_reach_training():
    config = DataConfig(tasks=("basic_arithmetic:min_terms=2,max_terms=2,max_digits=1,operators=+",), task_size=3000)
    split = load_problems(config)
    again = load_problems(config)
    assert [p.id for p in split.held_out] == [p.id for p in again.held_out]
    assert len(split.held_out) == 100
    held_out = {p.messages[0]["content"] for p in split.held_out}
    assert len(held_out) == 100
    everything = {p.messages[0]["content"] for p in split.sources[0]}
    drawn = {p.messages[0]["content"] for p in ProblemStream(split, seed=0).take(6000)}
    assert not drawn & held_out
    assert drawn == everything - held_out
    assert len([p for p in split.sources[0] if p.messages[0]["content"] in held_out]) > 100  # there were repeats


def test_validation_problems_are_apart_from_both():
    plain = split_problems([named(40)], holdout=5, seed=2)
    split = split_problems([named(40)], holdout=5, validation=7, seed=2)
    assert split.held_out == plain.held_out  # asking for validation problems does not change the judges
    assert len(split.validation) == 7
    drawn = {p.id for p in ProblemStream(split, seed=0).take(28)}
    kept = {p.id for p in (*split.held_out, *split.validation)}
    assert len(drawn) == 28 and len(kept) == 12 and not drawn & kept


def test_unusable_problems_are_neither_drawn_nor_kept():
    odd = lambda problem: int(problem.messages[0]["content"].split()[-1]) % 2 == 1  # noqa: E731
    split = split_problems([named(40, lambda i: f"question {i}")], holdout=5, validation=5, seed=2, usable=odd)
    assert all(odd(problem) for problem in (*split.held_out, *split.validation))
    drawn = ProblemStream(split, seed=0).take(10)
    assert all(odd(problem) for problem in drawn) and len({p.id for p in drawn}) == 10
    with pytest.raises(ConfigError, match="of 20 different questions leaves none"):
        split_problems([named(40, lambda i: f"question {i}")], holdout=15, validation=5, seed=2, usable=odd)


def test_files_are_looked_through_before_the_run(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"question": "x" * (i + 1), "answer": "1"}) + "\n" for i in range(10)))
    short = lambda problem: len(problem.messages[0]["content"]) <= 6  # noqa: E731
    split = load_problems(DataConfig(files=(path,), holdout=2), short)
    assert split.num_unusable == 4
    with pytest.raises(DataError, match="none of the 10 problems leaves room"):
        load_problems(DataConfig(files=(path,), holdout=2), lambda problem: False)


def test_text_that_differs_in_case_and_space_is_the_same_question():
    split = split_problems(
        [named(40, lambda i: f"Question  {i % 4}" if i % 2 else f" question {i % 4} ")], holdout=2, seed=5
    )
    drawn = {normalised_text(p) for p in ProblemStream(split, seed=0).take(50)}
    assert len(drawn) == 2
    assert drawn.isdisjoint(normalised_text(p) for p in split.held_out)


def test_holdout_that_leaves_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"5 .and data.validation 0. of 5 different questions leaves none"):
        split_problems([named(20, lambda i: str(i % 5))], holdout=5, seed=0)
    assert len(split_problems([named(20, lambda i: str(i % 5))], holdout=4, seed=0).held_out) == 4


def test_stream_sees_every_problem_once_an_epoch_in_a_new_order():
    stream = ProblemStream(split_problems([named(7), named(4, lambda i: f"b{i}")], holdout=1, seed=3), seed=9)
    first, second = stream.take(10), stream.take(10)
    texts = lambda problems: [p.messages[0]["content"] for p in problems]  # noqa: E731
    assert len(set(texts(first))) == 10
    assert sorted(texts(first)) == sorted(texts(second))
    assert texts(first) != texts(second)


def test_stream_passes_over_what_is_not_wanted_until_the_next_epoch():
    """7 problems with an answer to train on, 5 without, which are not wanted at first."""
    rows = [dataclasses.replace(p, grader="preference" if i % 3 == 0 else "math") for i, p in enumerate(named(13))]
    split = split_problems([tuple(rows)], holdout=1, seed=2, judged=lambda problem: problem.grader != "preference")
    stream = ProblemStream(split, seed=3)
    early = stream.take(8, lambda problem: problem.grader != "preference")
    assert len({problem.id for problem in early}) == 7 and stream.epoch == 1
    assert not [problem for problem in early if problem.grader == "preference"]
    state = stream.state_dict()
    late = stream.take(12)
    assert any(problem.grader == "preference" for problem in late)
    again = ProblemStream(stream.split, seed=3)
    again.load_state_dict(state)
    assert again.take(12) == late


def test_a_stream_with_nothing_wanted_is_an_error_and_not_an_endless_search():
    stream = ProblemStream(split_problems([named(7)], holdout=1, seed=2), seed=3)
    with pytest.raises(DataError, match="none of the training problems may be drawn at this step; see preference_from"):
        stream.take(1, lambda problem: False)
    last = stream.take(6)[-1]
    assert [problem.id for problem in stream.take(3, lambda problem: problem.id == last.id)] == [last.id] * 3


def test_the_problems_that_only_reward_models_can_score():
    rows = [dataclasses.replace(p, grader="preference" if i < 2 else "math") for i, p in enumerate(named(6))]
    judged = lambda problem: problem.grader != "preference"  # noqa: E731
    split = split_problems([tuple(rows)], holdout=4, seed=2, judged=judged)
    scored = [problem.id for problem in split.known() if problem.grader == "preference"]
    assert sorted(scored) == sorted([rows[0].id, rows[1].id])
    assert not [problem for problem in split.held_out if problem.grader == "preference"], "there is nothing to judge by"
    with pytest.raises(ConfigError, match="leaves none to train on"):
        split_problems([tuple(rows)], holdout=5, seed=2, judged=judged)
    unanswered = [dataclasses.replace(p, answer=None) for p in named(3)]
    assert all(p.answer for p in split_problems([(*unanswered, *named(9)[3:])], holdout=5, seed=2).held_out)


def test_restart_neither_loses_nor_repeats():
    split = split_problems([named(13)], holdout=3, seed=1)
    whole = [p.id for p in ProblemStream(split, seed=4).take(57)]
    ids = []
    state = None
    for count in (1, 9, 10, 0, 17, 20):
        stream = ProblemStream(split, seed=4)
        if state is not None:
            stream.load_state_dict(json.loads(state))
        ids += [p.id for p in stream.take(count)]
        state = json.dumps(stream.state_dict())
    assert ids == whole


def test_state_of_other_data_is_refused():
    split = split_problems([named(13)], holdout=3, seed=1)
    state = ProblemStream(split, seed=4).state_dict()
    with pytest.raises(DataError, match="seed is 4, this run has 5"):
        ProblemStream(split, seed=5).load_state_dict(state)
    with pytest.raises(DataError, match="size is 13, this run has 12"):
        ProblemStream(split_problems([named(12)], holdout=3, seed=1), seed=4).load_state_dict(state)


@pytest.mark.parametrize(
    ("line", "answer", "metadata"),
    [
        ({"question": "q?", "answer": "4", "grader": "math", "tests": {"a": 1}}, "4", {}),
        ({"question": "q?", "answer": "4", "grader": "exact", "instruction_id_list": ["x"]}, "4", {}),
        ({"question": "q?", "answer": "a #### ", "grader": "preference"}, None, {}),
        ({"question": "q?", "answer": {"text": "x"}, "grader": "preference"}, None, {}),
        ({"question": "q?", "answer": "print(1)", "grader": "code", "tests": {"a": 1}}, None, {"tests": {"a": 1}}),
        ({"question": "q?", "grader": "mine.py:grade", "metadata": {"k": 1}}, None, {"k": 1}),
        ({"question": "q?", "grader": "mine.py:grade", "answer": 4, "metadata": {"tests": 1}}, "4", {"tests": 1}),
        ({"prompt": "q?", "answer": "42", "grader": "mine.py:grade", "metadata": {"k": 1}}, "42", {"k": 1}),
        ({"problem": "q?", "answer": "42", "grader": "mine.py:grade", "metadata": {"k": 1}}, "42", {"k": 1}),
    ],
)
def test_what_a_grader_is_told_follows_from_the_grader_not_from_other_columns(tmp_path, line, answer, metadata):
    (tmp_path / "set.jsonl").write_text(json.dumps(line) + "\n")
    (problem,) = read_problems([tmp_path / "set.jsonl"])
    assert (problem.answer, problem.metadata) == (answer, metadata)


@pytest.mark.parametrize("grader", ["math", "exact"])
def test_a_line_that_names_its_grader_needs_its_answer_too(tmp_path, grader):
    (tmp_path / "set.jsonl").write_text(json.dumps({"question": "q?", "anwser": "4", "grader": grader}) + "\n")
    with pytest.raises(DataError, match=r"set.jsonl, line 1: answer is missing \(did you mean answer by 'anwser'"):
        read_problems([tmp_path / "set.jsonl"])
