"""How a problem becomes a prompt: the paper's R1-Zero template, the model's chat template, or the bare text.

In every template the model writes `<think>` itself, so that the format reward can be earned or lost.
Left out: anything after the prompt; completions are the engine's and demonstrations have their own file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.types import Message, Problem

Template = Literal["r1_zero", "chat", "plain"]

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think>...</think> and "
    "<answer>...</answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> answer "
    "here </answer>. User: {prompt}. Assistant:"
)
"""DeepSeek-R1 (arXiv 2501.12948), Table 1; `{prompt}` is the question."""

SPECIAL_TOKENS = 8
"""More than any tokenizer puts before a text."""

TAGS_INSTRUCTION = (
    "Think about the reasoning process first, then give the answer. Enclose the reasoning in <think> and "
    "</think> and the final answer in <answer> and </answer>, each exactly once, with nothing outside them."
)
"""System prompt of the chat template: a chat model was never told which tags the rewards look for."""


def question_text(problem: Problem) -> str:
    """The problem's only user turn. DataError where there are other turns: the flat templates have no place
    for them."""
    if len(problem.messages) != 1 or problem.messages[0]["role"] != "user":
        roles = [message["role"] for message in problem.messages]
        raise DataError(
            f"problem {problem.id}: its turns are {roles}; templates 'r1_zero' and 'plain' hold one user "
            "turn; use template 'chat'"
        )
    return problem.messages[0]["content"]


def render_prompt(problem: Problem, template: Template, tokenizer: Tokenizer, *, tags: bool = True) -> str:
    """The prompt's text. `tokenizer` is used only by 'chat', whose template belongs to the model; without `tags` the
    model is not told of them, for an answer that has none. ConfigError where a chat template leaves no room for the
    thought."""
    if template == "r1_zero":
        return R1_ZERO.replace("{prompt}", question_text(problem))
    if template == "plain":
        return question_text(problem) + "\n"
    if template == "chat":
        text = tokenizer.render_chat(_with_instruction(problem.messages) if tags else list(problem.messages))
        if text.rstrip().endswith("</think>") and tokenizer.thinking != "off":
            raise ConfigError(
                f"data.thinking is {tokenizer.thinking!r}, and the chat template of {tokenizer.folder} closes the "
                "thought before the answer begins; use 'on' if the template knows `thinking` or `enable_thinking`, "
                "'off' for answers without a thought, or data.template r1_zero"
            )
        return text.rstrip().removesuffix("<think>") if text.rstrip().endswith("<think>") else text
    raise ValueError(f"template: {template!r}; expected 'r1_zero', 'chat' or 'plain'")


def encode_prompt(
    problem: Problem,
    *,
    template: Template,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    max_model_len: int,
) -> np.ndarray:
    """Prompt token ids i32[P]. DataError when P + max_new_tokens exceeds max_model_len (all in tokens)."""
    text = render_prompt(problem, template, tokenizer)
    prompt_ids = tokenizer.encode(text, start=template != "chat")
    if len(prompt_ids) + max_new_tokens > max_model_len:
        raise DataError(
            f"problem {problem.id}: a prompt of {len(prompt_ids)} tokens and an answer of {max_new_tokens} "
            f"(max_new_tokens) exceed max_model_len {max_model_len}; drop the problem, shorten the answer "
            "or raise rollout.max_model_len"
        )
    return prompt_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRoom:
    """Whether a problem's prompt leaves room for an answer. DataError for one that the template cannot hold at all,
    or that has a token that the model does not."""

    template: Template
    tokenizer: Tokenizer
    max_new_tokens: int
    max_model_len: int

    def __call__(self, problem: Problem) -> bool:
        room = self.max_model_len - self.max_new_tokens
        text = render_prompt(problem, self.template, self.tokenizer)
        # No tokenizer makes more tokens than bytes, but for a few special ones; most prompts need not be encoded.
        if self.tokenizer.every_token_has_a_row and len(text.encode()) + SPECIAL_TOKENS <= room:
            return True
        return len(self.tokenizer.encode(text, start=self.template != "chat")) <= room


def _with_instruction(messages: tuple[Message, ...]) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        first = {"role": "system", "content": messages[0]["content"] + "\n\n" + TAGS_INSTRUCTION}
        return [first, *messages[1:]]
    return [{"role": "system", "content": TAGS_INSTRUCTION}, *messages]
