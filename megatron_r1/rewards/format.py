r"""What a response says where: the structure that the paper's template asks for (the format reward), and the answer.

The format reward is rule-based on purpose (paper, section 2.2.2): a learned judge can be fooled. The prompt ends
where the assistant's turn begins, so the response has to open `<think>` itself. Left out: whether the thought or the
answer is any good.
"""

from __future__ import annotations

import re

from megatron_r1.boxed import boxed_spans, final_boxes
from megatron_r1.config.schema import AnswerPlace

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
STRUCTURE = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
NEW_TURN = re.compile(
    r"(?:^|(?<=\s))[*#>]*(?:User|Human|Assistant|用户|人类|助手)\**\s?[:：]"
    r"|(?<=\n\n)[*#> ]{0,4}(?:Question|Problem|Q|问题|题目)[ \t]?\d*[*]*[ \t]?[:：]"
    r"|^[*#> ]{0,4}(?:Question|Problem)[ \t]\d+[*]*[ \t]?[:.：]"
    r"|^#{1,4}[ \t]*(?:Instruction|Human|User)\b"
    r"|<\|(?:im_start|im_end|endoftext|end_of_text|eot_id|start_header_id)\|>|<(?:end|start)_of_turn>|\[/?INST\]|</s>"
    r"|<｜(?:User|Assistant|end▁of▁sentence|begin▁of▁sentence)｜>",
    re.MULTILINE,
)
"""Where a response goes on to ask itself the next question."""


def format_score(response: str) -> float:
    """1.0 if each tag occurs exactly once, in order, with only white space outside the two elements; else
    0.0."""
    once = all(response.count(tag) == 1 for tag in TAGS)
    return float(once and STRUCTURE.fullmatch(response) is not None)


def after_thought(response: str) -> str:
    """What the user sees: the response without its thoughts. Empty where a thought was cut off before anything else. A
    `</think>` without its opening tag ends a thought that the prompt opened."""
    return THOUGHT.sub(" ", response).rpartition("</think>")[2]


def extract_answer(response: str, place: AnswerPlace = "answer") -> str | None:
    r"""The stripped answer of a response, or None where there is none.

    place "answer": the content of the last complete `<answer>...</answer>`; of nested or repeated tags the innermost
    pair counts. "boxed": the content of the last \boxed{...}, or of the last few that only commas, "and" or "or"
    separate, with these. "either": the first of the two that there is. What stands in a thought is no answer, nor what
    follows the beginning of another turn (`User: ...`). Independent of the format score: accuracy and format are
    separate parts.
    """
    shown = after_thought(response)
    if place != "boxed":
        found = _last_element(shown)
        if found or place == "answer":
            return found
    return _last_boxes(shown)


def _last_element(shown: str) -> str | None:
    first = ANSWER.search(shown)
    if first is None:
        return None
    return ANSWER.findall(_this_turn(shown, first.end()))[-1].strip()


def _last_boxes(shown: str) -> str | None:
    spans = boxed_spans(shown)
    return final_boxes(_this_turn(shown, spans[0][1])) if spans else None


def _this_turn(shown: str, start: int) -> str:
    """The text up to the first new turn after `start`."""
    turn = NEW_TURN.search(shown, start)
    return shown if turn is None else shown[: turn.start()]
