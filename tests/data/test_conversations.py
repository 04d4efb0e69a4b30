"""Reading conversations: what is taken, and what stops the run with file, line and reason."""

import json

import pytest

from megatron_r1.data.conversations import read_conversations
from megatron_r1.errors import DataError


def turns(*roles):
    return [{"role": role, "content": f"{role} says {place}"} for place, role in enumerate(roles)]


def test_conversations_are_read_in_order_and_other_keys_ignored(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"id": "x", "messages": turns("user", "assistant"), "domain": "math", "provenance": {"n": 1}},
        {"messages": turns("system", "user", "assistant", "user", "assistant")},
    ]
    # U+2028 is allowed inside a JSON string and is no line's end
    rows[0]["messages"][0]["content"] = "line\u2028line"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    first, second = read_conversations(path)
    assert first.where == f"{path}, line 1"
    assert first.messages == (
        {"role": "user", "content": "line\u2028line"},
        {"role": "assistant", "content": "assistant says 1"},
    )
    assert [message["role"] for message in second.messages] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\n{}", "empty line"),
        (b"{", "not valid JSON"),
        (b"\xff", "not UTF-8 text"),
        (b"[]", "a JSON list"),
        (b"{}", "has nothing; expected the turns in exactly one of: messages (OpenAI)"),
        (b'{"messages": null}', "messages is None"),
        (b'{"messages": []}', "messages is []"),
        (b'{"messages": ["hi"]}', "every turn needs a role"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "every turn needs a role"),
        (b'{"messages": [{"role": "user"}]}', "content is None"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "expected non-empty text"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "unpaired surrogate"),
        (json.dumps({"messages": turns("user")}).encode(), "ending with the assistant"),
        (json.dumps({"messages": turns("assistant")}).encode(), "ending with the assistant"),
        (json.dumps({"messages": turns("system", "assistant")}).encode(), "in alternation"),
        (json.dumps({"messages": turns("system")}).encode(), "ending with the assistant"),
        (json.dumps({"messages": turns("user", "user", "assistant", "assistant")}).encode(), "in alternation"),
        (json.dumps({"messages": turns("user", "assistant", "system", "assistant")}).encode(), "in alternation"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"messages": turns("user", "assistant")}).encode()
    path.write_bytes(good + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        list(read_conversations(path))
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert reason in str(caught.value)


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"b\.jsonl: cannot be read: No such file"):
        list(read_conversations(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(DataError, match=r"c\.jsonl: the file has no conversations"):
        list(read_conversations(tmp_path / "c.jsonl"))
