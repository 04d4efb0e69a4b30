"""Equivalence of written answers in mathematics: what other folders use of it. docs/answers.md says what is equal."""

from megatron_r1.rewards.math.answers import MAX_ANSWER_CHARACTERS, answers_equal, asks_percent

__all__ = ["MAX_ANSWER_CHARACTERS", "answers_equal", "asks_percent"]
