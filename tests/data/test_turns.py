# ruff: noqa: E501 - a labelled case stands on one line
"""The forms in which people keep conversations, and what of a line is read, refused by name, or handed back by name."""

import pytest

from megatron_r1.data.turns import REFUSED, read_turns
from megatron_r1.errors import DataError


def asked(*contents, **last):
    """User and assistant in turn; `last` are further fields of the last turn."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    turns[-1] |= last
    return {"messages": turns}


HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
KIND = [{"role": "system", "content": "Be kind."}, *HI]
THOUGHT = [HI[0], {**HI[1], "reasoning_content": "greet"}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": HI}, HI),
        ({"messages": [{"role": "developer", "content": "Be kind."}, *HI]}, KIND),
        ({"system": "Be kind.", "messages": HI}, KIND),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, HI),
        ({"conversations": [{"from": "system", "value": "Be kind."}, {"from": "user", "value": "hi"}, {"from": "assistant", "value": "ho"}]}, KIND),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "Be kind."}, KIND),
        ({"conversations": HI}, HI),
        ({"instruction": "hi", "input": "", "output": "ho"}, HI),
        ({"instruction": "hi", "output": "ho", "system": "Be kind."}, KIND),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, asked("Add.\n\n1, 2", "3")["messages"]),
        ({"prompt": "hi", "completion": "ho"}, HI),
        ({"prompt": "hi", "response": "ho"}, HI),
        ({"prompt": HI[:1], "completion": HI[1:]}, HI),
        ({"prompt": KIND[:2], "completion": "ho"}, KIND),
        ({"prompt": "hi", "messages": HI}, HI),
        ({"messages": [HI[0], {"role": "assistant", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "o"}]}]}, HI),
        (asked("hi", "ho", reasoning_content="greet"), THOUGHT),
        (asked("hi", "ho", reasoning="greet"), THOUGHT),
        (asked("hi", "ho", thinking="greet", reasoning_content=None), THOUGHT),
        (asked("hi", "ho", reasoning_content="greet", reasoning="greet"), THOUGHT),
        ({"messages": [HI[0], {"role": "assistant", "content": [{"type": "thinking", "thinking": "greet"}, {"type": "text", "text": "ho"}]}]}, THOUGHT),
        (asked("hi", "ho", tool_calls=None, function_call=None, name="", images=[], reasoning_content=""), HI),
        (asked("hi", "ho", weight=1, train=True, loss=True), HI),
    ],
)  # fmt: skip
def test_every_form_is_read(row, messages):
    turns = read_turns(row, "x")
    assert list(turns.messages) == messages
    assert turns.not_read == (("prompt",) if "prompt" in row and "messages" in row else ())


def test_fields_that_are_not_read_are_handed_back_by_name():
    row = {"id": 3, "source": "s", "prompt_id": "p", "score": 0.5, "tags": [], **asked("hi", "ho", timestamp=12)}
    assert read_turns(row, "x").not_read == ("prompt_id", "score", "turn.timestamp")


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_what_would_be_lost_is_refused_by_name(field):
    for row in (asked("hi", "ho", **{field: [{"a": 1}]}), {**asked("hi", "ho"), field: {"a": 1}}):
        with pytest.raises(DataError) as caught:
            read_turns(row, "f.jsonl, line 3")
        assert str(caught.value).startswith(f"f.jsonl, line 3: has {field} ({REFUSED[field]})")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "has nothing; expected the turns in exactly one of"),
        ({"messages": HI, "conversations": HI}, "has conversations, messages; expected"),
        ({"text": "hi"}, "has text; expected"),
        ({"messages": "hi"}, "messages is 'hi'"),
        ({"conversations": []}, "conversations is []"),
        ({"instruction": "hi"}, "a assistant turn's content is None"),
        ({"completion": "ho"}, "a user turn's content is None"),
        ({"messages": [HI[0], {"from": "tool", "value": "x"}]}, "every turn needs a role"),
        ({"messages": [HI[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "has tool_calls (a call of a tool)"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, HI[1]]}, "a user turn has a part"),
        (asked("hi", "ho", weight=0), "has weight"),
        (asked("hi", "ho", train=False), "has train"),
        (asked("hi", "ho", reasoning="a", reasoning_content="b"), "several thoughts"),
        (asked("hi", "<think>x</think>ho", reasoning="x"), "a thought in its content and in a field"),
        (asked("hi", "ho", reasoning=["a"]), "a assistant turn's thought is ['a']"),
        (asked("hi", "ho", reasoning="\ud800"), "unpaired surrogate"),
        ({"messages": [{"role": "user", "content": "hi", "reasoning": "x"}, HI[1]]}, "a user turn has a thought"),
        (asked("hi"), "ending with the assistant"),
    ],
)  # fmt: skip
def test_what_is_none_is_named(row, said):
    with pytest.raises(DataError) as caught:
        read_turns(row, "x")
    assert said in str(caught.value)
