"""Reward models beside the rollouts: one engine each, asked for the value of a response."""

from __future__ import annotations

import json
import math
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

from megatron_r1.config.schema import PreferenceConfig
from megatron_r1.config.shape import load_shape
from megatron_r1.data.preferences import JudgedEncoder, Part
from megatron_r1.data.template import Template
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.engines.base import Engine
from megatron_r1.errors import ConfigError, EngineError
from megatron_r1.types import Problem

REQUESTS_AT_ONCE = 64
CHOICES = {"part": get_args(Part), "template": get_args(Template)}


class RewardModelServer:
    """A reward model and its server. Start it with `engine.start()`, wait with `engine.wait_ready()`, close it."""

    def __init__(self, config: PreferenceConfig, engine: Engine) -> None:
        """`engine`: of config.model, not started. Raises ConfigError for a folder that is no reward model stage's."""
        self.config = config
        if not load_shape(config.model).reward_head:
            raise ConfigError(
                f"rewards.preferences: {config.model} has no reward head; it must be the model of a reward model stage"
            )
        if not any(config.model.glob("*.safetensors")):
            raise ConfigError(f"rewards.preferences: {config.model} holds no weights (*.safetensors)")
        self.scale = read_scale(config.model)
        self.encoder = JudgedEncoder(
            template=self.scale["template"], tokenizer=load_tokenizer(config.model), part=self.scale["part"]
        )
        self.engine = engine
        self._pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix=f"reward-{config.name}")
        self._restart = threading.Lock()
        self._closed = False

    def submit(self, problem: Problem, response: str) -> Future[float]:
        """Start scoring one response; the result is in standard deviations from the mean of the validation pairs.

        EngineError past the restarts of the server."""
        return self._pool.submit(self._score, problem, response)

    def _score(self, problem: Problem, response: str) -> float:
        token_ids = self.encoder.encode(problem.messages, response, where=problem.id).tolist()
        # What is longer than the server takes is judged by its end, as the value is the last token's.
        token_ids = token_ids[-(self.engine.config.max_model_len - 1) :]
        with self._restart:  # while it is restarted nothing can be asked, and would be taken for another failure
            starts = self.engine.starts
        try:
            value = self.engine.client.value(token_ids)
        except EngineError:
            with self._restart:
                if self._closed:
                    raise
                if self.engine.starts == starts:  # nobody else has restarted it meanwhile
                    self.engine.restart()
            value = self.engine.client.value(token_ids)
        return (value - self.scale["value_mean"]) / self.scale["value_std"]

    def close(self) -> None:
        """Stop the server; scores that were not reached are abandoned."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.engine.stop()  # which ends a restart's waiting
        with self._restart:
            self.engine.stop()  # what a restart has started meanwhile


def read_scale(folder: Path) -> dict[str, Any]:
    """What a reward model stage wrote beside its weights. ConfigError if it is not there or incomplete."""
    file = folder / "megatron_r1.json"
    try:
        scale = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"rewards.preferences: {file} cannot be read ({error}); it must be a reward model stage's"
        ) from error
    found = scale if isinstance(scale, dict) else {}
    wrong = [f"{key} among {', '.join(choices)}" for key, choices in CHOICES.items() if found.get(key) not in choices]
    mean, deviation = (_number(found.get(key)) for key in ("value_mean", "value_std"))
    wrong += ["a value_mean that is a number"] if not math.isfinite(mean) else []
    wrong += ["a value_std above 0"] if not 0 < deviation < math.inf else []
    if wrong:
        raise ConfigError(f"rewards.preferences: {file} lacks {' and '.join(wrong)}; it must be a reward model stage's")
    return found


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
