"""Preference pairs: what is read, what stops the run with file and line, and which part of a response is judged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_r1.data.preferences import JudgedEncoder, Pair, judged_text, read_pairs
from megatron_r1.data.tokenizer import character_tokenizer
from megatron_r1.errors import DataError

USER = [{"role": "user", "content": "Which?"}]
GOOD = {"messages": USER, "chosen": "a", "rejected": "b"}


def test_pairs_are_read_in_order_and_other_keys_ignored(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    turns = [{"role": "system", "content": "Be kind."}, *USER, {"role": "assistant", "content": "This."}, *USER]
    rows = [{**GOOD, "domain": "helpful", "judge": {"gap": 3}}, {**GOOD, "messages": turns, "chosen": "c\u2028c"}]
    first.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    second.write_text(json.dumps({"question": "Who?", "chosen": "d", "rejected": "e"}) + "\n")
    pairs = read_pairs([first, second])
    assert [pair.where for pair in pairs] == [f"{first}, line 1", f"{first}, line 2", f"{second}, line 1"]
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("a", "b"), ("c\u2028c", "b"), ("d", "e")]
    assert pairs[1].messages == tuple(turns) and pairs[2].messages == ({"role": "user", "content": "Who?"},)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\n{}", "empty line"),
        (b"{", "not valid JSON"),
        (b"\xff", "not UTF-8 text"),
        (b"[]", "a JSON list; expected an object with messages, chosen and rejected"),
        (b"{}", "chosen is missing"),
        (json.dumps({**GOOD, "chosen": None}).encode(), "chosen is None"),
        (json.dumps({**GOOD, "chosen": ["a"]}).encode(), "chosen is ['a']"),
        (json.dumps({**GOOD, "rejected": " \n"}).encode(), "rejected is ' \\n'; expected non-empty text"),
        (json.dumps({**GOOD, "rejected": "a"}).encode(), "chosen and rejected are the same text"),
        (json.dumps({**GOOD, "chosen": "\ud800"}).encode(), "chosen has an unpaired surrogate"),
        (json.dumps({"chosen": "a", "rejected": "b"}).encode(), "expected exactly one of question and messages"),
        (json.dumps({**GOOD, "question": "Which?"}).encode(), "expected exactly one of question and messages"),
        (json.dumps({**GOOD, "messages": []}).encode(), "non-empty list of turns"),
        (json.dumps({**GOOD, "messages": ["Which?"]}).encode(), "every turn needs a role"),
        (json.dumps({**GOOD, "messages": [{"role": "user", "content": "\udc00"}]}).encode(), "unpaired surrogate"),
        (
            json.dumps({**GOOD, "messages": [*USER, {"role": "assistant", "content": "a"}]}).encode(),
            "the last turn is 'assistant'",
        ),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, reason):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_pairs([path])
    assert str(caught.value).startswith(f"{path}, line 2: ") and reason in str(caught.value)


def test_an_empty_file_is_named(tmp_path):
    good, empty = tmp_path / "good.jsonl", tmp_path / "empty.jsonl"
    good.write_text(json.dumps(GOOD))
    empty.write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl: the file has no pairs"):
        read_pairs([good, empty])
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read"):
        read_pairs([tmp_path / "absent.jsonl"])


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>hm</think><answer> 18 </answer>", "18"),
        ("<think>hm</think>\n\nIt is <answer>18</answer>, I think.", "18"),
        ("<think>hm</think> It is 18.\n", "It is 18."),
        ("<answer>18</answer>", "18"),
        ("It is 18.", "It is 18."),
        ("hm</think>It is 18.", "It is 18."),  # the template opened the thought
        # What the thought calls an answer was not shown to anybody: it must not earn what the answer earns.
        ("<think><answer>how kind of you</answer></think><answer>18</answer>", "18"),
        ("<think><answer>how kind of you</answer></think>It is 18.", "It is 18."),
        ("<think>a</think>b</think>c", "c"),
        ("<think>hm</think><answer>18", "18"),  # cut off
        ("<think>hm</think><answer>18</answer><answer>19</answer>", "18"),
        ("<think>hm</think><answer>a\nb</answer>", "a\nb"),
        ("<think>hm</think><answer></answer>", ""),
        ("<think>hm</think>", ""),
        ("<think>and so it goes on", ""),
        ("<think><answer>18</answer> and so it goes on", ""),
        ("", ""),
    ],
)
def test_the_answer_is_what_the_user_sees(response, answer):
    assert judged_text(response, "answer") == answer
    assert judged_text(response, "response") == response


def test_a_pair_is_prompt_and_judged_part_valued_at_its_last_token(tmp_path):
    tokenizer = character_tokenizer(tmp_path)
    encoder = JudgedEncoder(template="plain", tokenizer=tokenizer, part="answer")
    chosen = "<think>kind</think><answer>Hello</answer>"
    pair = Pair(where="here", messages=({"role": "user", "content": "Hi"},), chosen=chosen, rejected="No.")
    for sequence, text in zip(encoder.pair(pair), ("Hi\nHello", "Hi\nNo."), strict=True):
        assert tokenizer.decode(sequence.token_ids[:-1]) == text
        last = [0.0] * len(text) + [1.0]
        assert sequence.token_weight.tolist() == last and sequence.loss_mask.tolist() == [bool(w) for w in last]
    ids = encoder.encode(pair.messages, chosen, where="here")
    np.testing.assert_array_equal(ids, encoder.pair(pair)[0].token_ids[:-1])
    whole = JudgedEncoder(template="plain", tokenizer=tokenizer, part="response")
    assert tokenizer.decode(whole.encode(pair.messages, chosen, where="here")) == "Hi\n" + chosen


def test_a_template_of_one_turn_refuses_more_and_says_where(tmp_path):
    encoder = JudgedEncoder(template="r1_zero", tokenizer=character_tokenizer(tmp_path), part="answer")
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 7.*use template 'chat'"):
        encoder.pair(Pair(where="pairs.jsonl, line 7", messages=turns, chosen="a", rejected="b"))
