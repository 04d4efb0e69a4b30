"""A conversation as token ids, and which of them are trained on: the answers and their end tokens.

The prompt is what GRPO would send for the same turns (template.render_prompt makes both), and the answer follows as
the engine would have sampled it: tokenised on its own, verbatim, then the token that ends a turn. So supervised
training and RL see the same tokens. Left out: cutting long examples; files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_r1.data.template import Template, render_prompt
from megatron_r1.data.thoughts import ThoughtForm, thought_form
from megatron_r1.data.tokenizer import TAGS, Tokenizer, turn_end_id
from megatron_r1.data.turns import THOUGHT
from megatron_r1.types import Message, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerEncoder:
    """`end_id` ends every answer; `control_text` matches the text of special tokens (None: there are none);
    `thought_form` says how an answer is written whose thought is given apart."""

    template: Template
    tokenizer: Tokenizer
    end_id: int
    control_text: re.Pattern[str] | None
    thought_form: ThoughtForm

    def has_control_text(self, messages: Sequence[Message]) -> bool:
        """Whether a turn's content spells a special token, which the tokenizer would take for the token itself."""
        pattern = self.control_text
        texts = (text for message in messages for text in (message["content"], message.get(THOUGHT, "")))
        return pattern is not None and any(pattern.search(text) for text in texts)

    def encode(self, messages: Sequence[Message], *, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids i32[L] and the loss mask bool[L] of a conversation that ends with the assistant's turn.

        The last answer is always trained on. An earlier one is if the prompt holds it exactly as it would have been
        sampled: the tokens of its own prompt, then its own tokens, then the end token. (Templates that drop earlier
        thoughts do not, and without the thought it is no answer that the model should learn.) DataError (naming
        `where`) for turns that the template has no place for.
        """
        # Writing, translation and the like are answered without a thought, and so asked without being told of tags.
        tags = "<think>" in self.thought_form.answer(messages[-1], where)
        prompt_ids = self._prompt(messages[:-1], where, tags)
        answer_ids = self._answer(messages[-1], where)
        ids = np.concatenate([prompt_ids, answer_ids])
        mask = np.arange(len(ids)) >= len(prompt_ids)
        for place, message in enumerate(messages[:-1]):
            if message["role"] == "assistant":
                head, turn = self._prompt(messages[:place], where, tags), self._answer(message, where)
                end = len(head) + len(turn)
                if np.array_equal(prompt_ids[:end], np.concatenate([head, turn])):
                    mask[len(head) : end] = True
        return ids, mask

    def _prompt(self, turns: Sequence[Message], where: str, tags: bool) -> np.ndarray:
        problem = Problem(id=where, domain="", messages=tuple(map(self.thought_form.in_prompt, turns)))
        text = render_prompt(problem, self.template, self.tokenizer, tags=tags)
        return self.tokenizer.encode(text, start=self.template != "chat")

    def _answer(self, message: Message, where: str) -> np.ndarray:
        return np.append(self.tokenizer.encode(self.thought_form.answer(message, where)), np.int32(self.end_id))


def answer_encoder(template: Template, tokenizer: Tokenizer) -> AnswerEncoder:
    """The encoder of a model's folder. ConfigError if `template` is "chat" and the folder has no chat template;
    DataError if the model has no row for the token that ends an answer."""
    special = [token.content for token in tokenizer.inner.added_tokens_decoder.values() if token.special]
    texts = sorted(set(special) - set(TAGS), key=len, reverse=True)
    end_id = _chat_end_id(tokenizer) if template == "chat" else tokenizer.eos_id
    tokenizer.check_row(end_id)
    return AnswerEncoder(
        template=template,
        tokenizer=tokenizer,
        end_id=end_id,
        control_text=re.compile("|".join(map(re.escape, texts))) if texts else None,
        thought_form=thought_form(template, tokenizer),
    )


def _chat_end_id(tokenizer: Tokenizer) -> int:
    """The special token with which the chat template ends an answer, where the engine stops too; the tokenizer's own if
    it writes none (Llama 3 and ChatML's base models end turns with one that is not their eos token)."""
    tokenizer.render_chat([{"role": "user", "content": "1 + 1?"}])  # ConfigError if there is no chat template
    found = turn_end_id(tokenizer.inner)
    return tokenizer.eos_id if found is None else found
