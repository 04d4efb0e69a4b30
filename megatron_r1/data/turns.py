"""The turns of a line of supervised data, whichever of the common forms it has, and what of the line is not read.

Nothing that a model would be trained on is left out silently: a field that carries training content and is not
understood here is refused by name, any other one is handed back by name, so that it can be listed. Forms are a table
(FORMS), and so are fields (REFUSED, HARMLESS). Left out: lines and files (conversations.py), tokens (answers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.errors import DataError
from megatron_r1.types import Message

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
}  # fmt: skip
"""What a turn's speaker is called, and who it is: OpenAI's names and ShareGPT's."""

THOUGHT = "reasoning_content"
"""Key of an assistant message's thought, as DeepSeek's API and chat templates call it."""

THOUGHT_FIELDS = (THOUGHT, "reasoning", "thinking")
SPEAKER, TEXT = ("role", "from"), ("content", "value")

REFUSED = {
    "tool_calls": "a call of a tool", "function_call": "a call of a tool", "tool_call_id": "the answer of a tool",
    "tools": "descriptions of tools", "functions": "descriptions of tools", "documents": "texts for retrieval",
    "weight": "how much a turn counts", "train": "whether a turn counts", "loss": "whether a turn counts",
    "loss_mask": "which turns count", "mask": "which turns count", "label": "whether a response is good",
    "name": "who speaks", "prefix": "the beginning of an answer", "refusal": "an answer of another kind",
    "image": "an image", "images": "images", "image_url": "an image", "video": "a video", "videos": "videos",
    "audio": "sound", "audios": "sound", "chosen": "a preference pair", "rejected": "a preference pair",
    "history": "earlier turns", "chat_template_kwargs": "how the turns are rendered",
}  # fmt: skip
"""Fields of a line or a turn that change what would be trained on, with what they are."""

HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "weight": (1,), "train": (True,), "loss": (True,), "mask": (1, True), "loss_mask": (1, True),
}  # fmt: skip
"""Values of refused fields that say nothing new: every turn counts. Empty ones and null say nothing either."""

FOR_PEOPLE = frozenset(("id", "domain", "source", "provenance", "idx", "index", "uuid"))
"""Fields of a line that nobody expects to be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """`messages`: {"role", "content"} each, an assistant's also THOUGHT where it has one. `not_read`: names of fields,
    those of turns with `turn.` before them."""

    messages: tuple[Message, ...]
    not_read: tuple[str, ...]


def read_turns(row: Mapping[str, Any], where: str) -> Turns:
    """The turns of a line in any of FORMS. DataError (naming `where`) for a line in none or several of them, and for
    what is in it that would be lost."""
    forms = [form for form in FORMS if form in row]
    if len(forms) != 1:
        found = ", ".join(sorted(row)) or "nothing"
        known = "; ".join(f"{form} ({FORMS[form].name})" for form in FORMS)
        raise DataError(f"{where}: has {found}; expected the turns in exactly one of: {known}")
    form = FORMS[forms[0]]
    given = form.turns(row, where)
    if row.get("system"):
        given = [{"role": "system", "content": row["system"]}, *given]
    not_read = dict.fromkeys(_not_read(row, {forms[0], *form.also, "system"}, where))
    messages = []
    for turn in given:
        message, others = _read_turn(turn, where)
        messages.append(message)
        not_read |= dict.fromkeys(f"turn.{name}" for name in others)
    _check_order(messages, where)
    return Turns(messages=tuple(messages), not_read=tuple(name for name in not_read if name not in FOR_PEOPLE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """`also`: the further fields that it has."""

    name: str
    turns: Callable[[Mapping[str, Any], str], list[Any]]
    also: tuple[str, ...] = ()


def _list_at(key: str) -> Callable[[Mapping[str, Any], str], list[Any]]:
    def turns(row: Mapping[str, Any], where: str) -> list[Any]:
        if not isinstance(row[key], list) or not row[key]:
            raise DataError(f"{where}: {key} is {row[key]!r:.80}; expected a non-empty list of turns")
        return list(row[key])

    return turns


def _instruction(row: Mapping[str, Any], where: str) -> list[Any]:
    """Alpaca's: the input stands below the instruction."""
    question = row["instruction"]
    if row.get("input"):
        question = f"{question}\n\n{row['input']}" if question else row["input"]
    return _pair(question, row.get("output"))


def _completion(key: str) -> Callable[[Mapping[str, Any], str], list[Any]]:
    def turns(row: Mapping[str, Any], where: str) -> list[Any]:
        prompt, answer = row.get("prompt"), row[key]
        if isinstance(prompt, list) and isinstance(answer, list):
            return [*prompt, *answer]
        return [*prompt, *_pair("", answer)[1:]] if isinstance(prompt, list) else _pair(prompt, answer)

    return turns


def _pair(question: Any, answer: Any) -> list[Any]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


FORMS: Mapping[str, Form] = {
    "messages": Form(name="OpenAI", turns=_list_at("messages")),
    "conversations": Form(name="ShareGPT", turns=_list_at("conversations")),
    "instruction": Form(name="Alpaca, with input and output", turns=_instruction, also=("input", "output")),
    "completion": Form(name="with prompt", turns=_completion("completion"), also=("prompt",)),
    "response": Form(name="with prompt", turns=_completion("response"), also=("prompt",)),
}
"""By the field that tells the form. `system` may stand beside any of them."""


def _read_turn(turn: Any, where: str) -> tuple[Message, list[str]]:
    """A turn as a message, and the names of fields that were not read."""
    speaker = next((turn[key] for key in SPEAKER if key in turn), None) if isinstance(turn, dict) else None
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(f"{where}: every turn needs a role out of {', '.join(ROLES)}; got {turn!r:.80}")
    others = _not_read(turn, {*SPEAKER, *TEXT, *THOUGHT_FIELDS}, where)
    content, thoughts = _parts(next((turn[key] for key in TEXT if key in turn), None), role, where)
    thoughts += [turn[field] for field in THOUGHT_FIELDS if turn.get(field)]
    message = {"role": role, "content": _text(content, f"a {role} turn's content", where)}
    if len({str(thought) for thought in thoughts}) > 1:
        raise DataError(f"{where}: a turn has several thoughts ({', '.join(THOUGHT_FIELDS)}); give one")
    if thoughts:
        thought = _text(thoughts[0], f"a {role} turn's thought", where)
        if role != "assistant":
            raise DataError(f"{where}: a {role} turn has a thought; only the assistant's may")
        if "<think>" in message["content"] or "</think>" in message["content"]:
            raise DataError(f"{where}: an assistant turn has a thought in its content and in a field; give one of them")
        message[THOUGHT] = thought
    return message, others


def _parts(content: Any, role: str, where: str) -> tuple[Any, list[Any]]:
    """(text, thoughts) of a content that may be a list of parts."""
    if not isinstance(content, list):
        return content, []
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("thinking", "reasoning") and isinstance(part.get(kind, part.get("text")), str):
            thoughts.append(part.get(kind, part.get("text")))
        else:
            raise DataError(f"{where}: a {role} turn has a part {part!r:.80}; only text and thinking are read")
    return "".join(texts), thoughts


def _not_read(given: Mapping[str, Any], known: set[str], where: str) -> list[str]:
    """Fields that are not read and may be left out. DataError for one that may not."""
    others = []
    for name, value in given.items():
        if name in known or value is None or value in ("", [], {}):
            continue
        if name in REFUSED and value not in HARMLESS.get(name, ()):
            raise DataError(
                f"{where}: has {name} ({REFUSED[name]}): {value!r:.60}; it cannot be trained on here: take the field "
                "out, or leave the line out"
            )
        if name not in REFUSED:
            others.append(name)
    return others


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {what} is {value!r:.80}; expected non-empty text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, which no tokenizer takes
        raise DataError(f"{where}: {what} has an unpaired surrogate") from error
    return value


def _check_order(messages: Sequence[Message], where: str) -> None:
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise DataError(
            f"{where}: the turns are {roles}; expected an optional system turn, then user and assistant in "
            "alternation, ending with the assistant"
        )
