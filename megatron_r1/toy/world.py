"""A world small enough for a model of one million parameters, with a part for each stage of the recipe to play.

Reasoning: adding two numbers of two digits, thought through column by column. The base model's data forgets carries in
most cases and switches to Chinese in the middle of a thought; GRPO has to bring out the right sums, and the language
reward the one language. Other scenarios: greetings, where the helpful answer is the warm one that has the name, and
requests to insult somebody, where the harmless answer declines. Left out: anything that needs knowledge.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karla", "Leo")
QUESTION = "What is "
STEPS = {
    "en": ("First add the ones: ", " Then add the tens: ", "."),
    "zh": ("先算个位数字：", "再算十位数字：", "。"),
}
GREET, INSULT, GUEST = "Please greet ", "Please insult ", ", guest "
WANTS_GREETING = "The user wants a greeting."
WANTS_INSULT, WOULD_HURT = "The user wants an insult.", "That would hurt someone."
WARM = ("Hello ", ", it is nice to meet you!")
COLD = "Hi."
DECLINED = "I would rather say something kind about "
HARSH = " is a fool."

PHRASES = (
    *NAMES, QUESTION, *STEPS["en"][:2], *STEPS["zh"], GREET, INSULT, GUEST, WANTS_GREETING, WANTS_INSULT, WOULD_HURT,
    *WARM, COLD, DECLINED, HARSH,
)  # fmt: skip
"""Tokens of their own in the tiny tokenizers, so that a thought in words is as short as one in digits."""

Row = dict[str, Any]


def sums(rng: np.random.Generator, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """All 8,100 pairs of two-digit numbers in a random order, i64[n, 2]: (to train on, held out)."""
    pairs = np.stack(np.meshgrid(np.arange(10, 100), np.arange(10, 100)), -1).reshape(-1, 2)
    pairs = rng.permutation(pairs)
    return pairs[held_out:], pairs[:held_out]


def question(left: int, right: int) -> str:
    return f"{QUESTION}{left} + {right}?"


def think_through(left: int, right: int, *, carries: bool, languages: tuple[str, str]) -> str:
    """The response to a sum, each of the two steps in its language; without `carries` every carry is forgotten, in the
    answer too."""
    ones = left % 10 + right % 10
    carry = ones // 10 if carries else 0
    tens = left // 10 + right // 10 + carry
    steps = (f"{left % 10}+{right % 10}={ones}", f"{left // 10}+{right // 10}+{carry}={tens}")
    thought = "".join(
        f"{STEPS[language][place]}{step}{STEPS[language][2]}"
        for place, (step, language) in enumerate(zip(steps, languages, strict=True))
    )
    leading = tens // 10 if carries else 0
    return respond(thought, str(int(f"{leading}{tens % 10}{ones % 10}")))


def respond(thought: str, answer: str) -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"


def request(rng: np.random.Generator, prefix: str, name: str) -> str:
    """A request about somebody; the number makes many different prompts of few names."""
    return f"{prefix}{name}{GUEST}{rng.integers(10, 100)}."


def greeting(name: str, *, good: bool) -> str:
    return respond(WANTS_GREETING, f"{WARM[0]}{name}{WARM[1]}" if good else COLD)


def reply_to_insult(name: str, *, good: bool) -> str:
    return respond(WOULD_HURT, f"{DECLINED}{name}.") if good else respond(WANTS_INSULT, f"{name}{HARSH}")


def conversation(prompt: str, response: str, **more: Any) -> Row:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return {"messages": turns, **more}


def sum_conversations(
    rng: np.random.Generator, pairs: np.ndarray, count: int, *, forgets: float, other_language: float
) -> Iterator[Row]:
    """`count` worked sums; each sentence is in Chinese with probability `other_language`."""
    for number in range(count):
        left, right = (int(value) for value in pairs[number % len(pairs)])
        languages = tuple("zh" if chance < other_language else "en" for chance in rng.random(2))
        text = think_through(left, right, carries=rng.random() >= forgets, languages=languages)  # pyright: ignore[reportArgumentType]
        yield conversation(question(left, right), text, domain="math")


def scenario_conversations(rng: np.random.Generator, count: int, *, bad: float) -> Iterator[Row]:
    """`count` greetings and replies to requests for an insult; each is the bad one with probability `bad`."""
    for _ in range(count):
        name, good = str(rng.choice(NAMES)), rng.random() >= bad
        if rng.random() < 0.5:
            yield conversation(request(rng, GREET, name), greeting(name, good=good), domain="general")
        else:
            yield conversation(request(rng, INSULT, name), reply_to_insult(name, good=good), domain="safety")


def sum_problems(pairs: np.ndarray, prefix: str) -> Iterator[Row]:
    for left, right in pairs.tolist():
        yield {
            "id": f"{prefix}-{left}+{right}",
            "question": question(left, right),
            "answer": left + right,
            "domain": "math",
        }


def scenario_prompts(rng: np.random.Generator, count: int) -> Iterator[Row]:
    for number in range(count):
        name, greets = str(rng.choice(NAMES)), rng.random() < 0.5
        yield {
            "id": f"scenario-{number}",
            "question": request(rng, GREET if greets else INSULT, name),
            "grader": "preference",
            "domain": "general" if greets else "safety",
        }


def preference_pairs(rng: np.random.Generator, count: int, *, kind: str) -> Iterator[Row]:
    """Pairs of one kind. helpful: warm with the right name over curt, or over another's name. harmless: declining over
    insulting."""
    for _ in range(count):
        name, other = (str(chosen) for chosen in rng.choice(NAMES, 2, replace=False))
        if kind == "helpful":
            prompt, chosen = request(rng, GREET, name), greeting(name, good=True)
            rejected = greeting(other, good=True) if rng.random() < 0.3 else greeting(name, good=False)
        else:
            prompt, chosen = request(rng, INSULT, name), reply_to_insult(name, good=True)
            rejected = reply_to_insult(name, good=False)
        turns = [{"role": "user", "content": prompt}]
        yield {"messages": turns, "chosen": chosen, "rejected": rejected, "domain": kind}
