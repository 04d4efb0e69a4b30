"""How an answer is written whose thought is given apart (reasoning_content), in the template's own form.

A chat template that knows reasoning_content shows its form when it is asked; of one that does not, the form is that of
the `<think>` with which it opens an answer; flat templates have the paper's tags and nothing between them. Left out:
thoughts that stand in the content already, which stay as they are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_r1.data.template import Template
from megatron_r1.data.tokenizer import PROBE, Tokenizer
from megatron_r1.data.turns import THOUGHT
from megatron_r1.errors import DataError
from megatron_r1.types import Message

PROBE_THOUGHT = "megatron-r1-thought"
QUESTION = {"role": "user", "content": "1 + 1?"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtForm:
    """`before` the thought, and `after` it before the answer: "<think>" and "</think>" with white space. `is_kept`: the
    chat template keeps a thought that stands in an earlier turn's content. `is_known`: it takes reasoning_content of
    earlier turns itself. `allowed`: it leaves room for a thought."""

    before: str = "<think>"
    after: str = "</think>"
    is_kept: bool = False
    is_known: bool = False
    allowed: bool = True

    def answer(self, message: Message, where: str) -> str:
        """An assistant's message as the model would have written it. DataError for a thought where there is none."""
        if not self.allowed and (THOUGHT in message or "<think>" in message["content"]):
            raise DataError(
                f"{where}: an answer has a thought, and data.thinking is off: use on, or take the thoughts out"
            )
        if THOUGHT not in message:
            return message["content"]
        return f"{self.before}{message[THOUGHT].strip()}{self.after}{message['content'].lstrip()}"

    def in_prompt(self, message: Message) -> Message:
        """An earlier turn as the template is given it: with its thought where the template would keep it or decide."""
        if THOUGHT not in message or self.is_known:
            return message
        content = self.answer(message, "an earlier turn") if self.is_kept else message["content"]
        return {"role": message["role"], "content": content}


def thought_form(template: Template, tokenizer: Tokenizer) -> ThoughtForm:
    """The form of a model's folder."""
    if template != "chat":
        return ThoughtForm()
    prompt = tokenizer.render_chat([QUESTION])
    if tokenizer.thinking == "off":
        return ThoughtForm(allowed=False)
    answer = {"role": "assistant", "content": PROBE, THOUGHT: PROBE_THOUGHT}
    whole = tokenizer.render([QUESTION, answer], add_generation_prompt=False)
    before, known, rest = whole.partition(PROBE_THOUGHT)
    after, answered, _ = rest.partition(PROBE)
    if known and answered and "<think>" in before and "</think>" in after:
        return ThoughtForm(before=before[before.rindex("<think>") :], after=after, is_known=True)
    form = ThoughtForm()
    opened = prompt.rfind("<think>", len(prompt.rstrip()) - len("<think>"))
    if opened >= 0:
        before = prompt[opened:]
        form = ThoughtForm(before=before, after="\n</think>\n\n" if before.endswith("\n") else "</think>")
    earlier = {"role": "assistant", "content": form.answer(answer, "a probe")}
    is_kept = PROBE_THOUGHT in tokenizer.render_chat([QUESTION, earlier, QUESTION])
    return dataclasses.replace(form, is_kept=is_kept)
