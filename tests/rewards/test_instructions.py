"""IFEval's 25 kinds of instruction, each followed and not followed by hand-written texts."""

import json

import pytest

from megatron_r1.config.schema import RewardConfig
from megatron_r1.data.jsonl import read_problems
from megatron_r1.errors import DataError
from megatron_r1.rewards.compose import Scorer
from megatron_r1.rewards.instructions import CHECKS, follows

CASES = [
    ("keywords:existence", {"keywords": ["river", "Stone"]}, "A stone in the River.", "A stone in the lake."),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": "at least"}, "Go, go!", "Go!"),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": "less than"}, "Go!", "Go, go!"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A catalogue.", "A cat."),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 3, "let_relation": "at least"}, "Banana", "Bath"),
    ("language:response_language", {"language": "de"}, "Das ist ein ganz einfacher Satz.", "This is a plain sentence."),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}, "One. Two!", "A. B? C."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\none\n***\ntwo\n***", "one\n***\n***\ntwo"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "don"},
        '"Don\'t" go.\n\nBye.',
        "\n\nDon't go.\n\nBye.",
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye. P.S. Write!", "Bye. PS: Write!"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "*\n- one", "*\none"),
    ("detectable_format:title", {}, "<<a > b>>", "<< >>"),
    ("length_constraints:number_words", {"num_words": 4, "relation": "at least"}, "one two three four", "one two"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        "First this.\n\nThen that.",
        "First this.\n\nNow that.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name], of [city]", "Dear [name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Write!", "Bye. No more."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP. P. S. Write!", "Bye.\nP.S. Write!"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", "* one\n* two\n* three"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", "*one* and two"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "A title\ntext"),
    ("combination:two_responses", {}, "one ****** two", "one ****** one"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. Here you are.", "Here you are."),
    ("startend:end_checker", {"end_phrase": "the end"}, "So it was, The End", "The end of it"),
    ("startend:quotation", {}, '"all of it"', '"half" of it'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "THIS is LOUD",
        "THIS is not",
    ),
    ("change_case:english_capital", {}, "THIS IS A PLAIN ENGLISH SENTENCE", "This is a plain English sentence"),
    ("change_case:english_lowercase", {}, "this is a plain english sentence", "This is a plain english sentence"),
    ("punctuation:no_comma", {}, "one and two", "one, two"),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_an_instruction_is_followed_or_not(name, arguments, good, bad):
    assert follows(good, name, arguments)
    assert not follows(bad, name, arguments)


def test_every_kind_has_a_case():
    assert {case[0] for case in CASES} == set(CHECKS) and len(CHECKS) == 25


def test_nothing_follows_no_instruction():
    assert not follows("  ", "punctuation:no_comma", {})


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("no:such", {}, "instruction 'no:such': not one of"),
        ("keywords:existence", {}, "its arguments {} are incomplete"),
        ("keywords:frequency", {"keyword": "a", "frequency": 1, "relation": "about"}, "incomplete"),
    ],
)
def test_an_unknown_or_incomplete_instruction_is_an_error(name, arguments, said):
    with pytest.raises(DataError) as error:
        follows("text", name, arguments)
    assert said in str(error.value)


def test_ifevals_own_lines_are_graded_on_the_answer_only(tmp_path):
    file = tmp_path / "ifeval.jsonl"
    row = {
        "key": 1000,
        "prompt": "Write without commas.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{"num_words": None}, {"num_words": 2, "relation": "at least"}],
    }
    file.write_text(json.dumps(row) + "\n")
    (problem,) = read_problems([file])
    assert problem.grader == "instructions" and problem.messages[0]["content"] == "Write without commas."
    responses = {
        "<think>one, two</think><answer>one two</answer>": 1.0,
        "<think>x</think><answer>one, two</answer>": 0.0,
        "<think>one, two</think>one two": 1.0,
        "one": 0.0,
    }
    with Scorer(RewardConfig(num_workers=1), [problem]) as scorer:
        found = {text: scorer.submit(problem, text).result().parts["accuracy"] for text in responses}
    assert found == responses


@pytest.mark.parametrize("change", [{"kwargs": []}, {"kwargs": [1, 2]}, {"instruction_id_list": "x"}, {"prompt": ""}])
def test_a_malformed_line_is_named(tmp_path, change):
    row = {"prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]} | change
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1"):
        read_problems([file])
