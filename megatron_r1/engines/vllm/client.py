"""Token ids in, token ids and logprobs out: the data plane of one vLLM server.

Text never crosses: the prompt is the ids that the trainer will train on, and the completion is the ids that
the engine sampled, so nothing is re-tokenised. One request carries a whole group (n = G), which prefills its
prompt once. Requests that make tokens have no time limit of their own: progress.py watches the server instead. Retries
and scheduling over several engines are in collect.py.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import urllib3

from megatron_r1.config import RolloutConfig, SamplingConfig
from megatron_r1.config.deadlines import stall_seconds, transfer_seconds
from megatron_r1.engines.base import Decode, RequestError, check_room
from megatron_r1.engines.vllm.auth import authorization
from megatron_r1.engines.vllm.progress import ProgressWatch, Wires, count_tokens
from megatron_r1.errors import EngineError
from megatron_r1.types import Completion

HEALTH_TIMEOUT_SECONDS = 5.0
CONNECT_SECONDS = 60.0
CONTROL_SECONDS = 300.0
"""For what the server answers at once; one whose engine shares its process (CPU) ends a step first."""
PAUSED_SECONDS = 0.5
POOLED_CONNECTIONS = 512
START_VERSION = "default"
"""What vLLM calls the weights it was started with."""


class UnavailableError(EngineError):
    """The server takes no requests now (503)."""


class EngineClient:
    """A connection pool to one server; safe to use from many threads (engines.base.Client).

    Errors: EngineError when the server cannot be reached, answers 5xx or nonsense; RequestError when it
    refuses the request (4xx); ValueError for a prompt or sequence that has no room, before anything is sent.
    """

    def __init__(
        self, base_url: str, *, token: str, config: RolloutConfig, model: str = "", weight_bytes: int = 0
    ) -> None:
        """`model`: the name under which the server knows its model. `weight_bytes`: of the folder that it started
        from; a sync's deadlines follow from it."""
        self.base_url = base_url
        self.model = model
        self.config = config
        self.transfer_seconds = transfer_seconds(config, weight_bytes)
        self.headers = {"Content-Type": "application/json", **authorization(token)}
        self.pool = urllib3.PoolManager(maxsize=POOLED_CONNECTIONS, retries=False)
        self.wires = Wires(POOLED_CONNECTIONS)
        self.watch = ProgressWatch(
            stall_seconds=stall_seconds(config), count=self.count_tokens, paused=self.is_paused, cut=self.wires.cut
        )

    def request(self, method: str, path: str, body: object = None, *, timeout: float = CONTROL_SECONDS) -> Any:
        """One HTTP exchange that ends soon; returns the decoded JSON answer (None if it is empty)."""
        return decoded(self.exchange(self.pool, method, path, body, urllib3.Timeout(total=timeout)))

    def work(self, path: str, body: object = None, *, draining: bool = False) -> Any:
        """One POST whose answer waits for tokens, for as long as some move on the server (rollout.stall_seconds).
        `draining`: it waits for other requests' tokens, also while the server is paused."""
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=None)
        with self.watch.work(draining=draining):
            while True:
                try:
                    return decoded(self.exchange(self.wires.pool, "POST", path, body, timeout))
                except UnavailableError:
                    if not self.is_paused():
                        raise
                    time.sleep(PAUSED_SECONDS)  # vLLM 0.33 refuses while it is paused, 0.32 lets requests wait
                except EngineError as error:
                    if self.watch.stalled:
                        raise EngineError(f"POST {path}: {self.watch.explain()}") from error
                    raise

    def exchange(
        self, pool: urllib3.PoolManager, method: str, path: str, body: object, timeout: urllib3.Timeout
    ) -> bytes:
        try:
            answer = pool.request(
                method,
                self.base_url + path,
                body=None if body is None else json.dumps(body),
                headers=self.headers,
                timeout=timeout,
            )
        except urllib3.exceptions.HTTPError as error:
            raise EngineError(f"{method} {path}: the vLLM server did not answer: {error}") from error
        if answer.status == 503:
            raise UnavailableError(f"{method} {path}: the vLLM server takes no requests (503): {answer.data[:2000]!r}")
        if answer.status >= 500:
            pool.clear()  # the server closes this connection after an internal error, maybe not yet
            raise EngineError(f"{method} {path}: the vLLM server answered {answer.status}: {answer.data[:2000]!r}")
        if answer.status >= 400:
            raise RequestError(f"{method} {path}: refused with {answer.status}: {answer.data[:2000]!r}")
        return answer.data

    def count_tokens(self, timeout: float = CONTROL_SECONDS) -> float | None:
        """A number that grows with every token that the server reads or samples; None if it does not say."""
        try:
            data = self.exchange(self.pool, "GET", "/metrics", None, urllib3.Timeout(total=timeout))
        except (EngineError, RequestError):
            return None
        return count_tokens(data.decode(errors="replace"))

    def is_paused(self, timeout: float = CONTROL_SECONDS) -> bool:
        """Whether the server says that it is paused (a weight sync)."""
        try:
            return bool(self.request("GET", "/is_paused", timeout=timeout)["is_paused"])
        except (EngineError, RequestError, ValueError, KeyError, TypeError):
            return False

    def pause(self) -> None:
        """Let running requests finish, admit no more, and drop the KV and prefix caches, which the old weights
        made."""
        self.work("/pause?mode=wait&clear_cache=true", {}, draining=True)

    def healthy(self) -> bool:
        """Whether the server answers and its engine is alive."""
        try:
            self.request("GET", "/health", timeout=HEALTH_TIMEOUT_SECONDS)
        except (EngineError, RequestError):
            return False
        return True

    def sleep(self, level: int) -> None:
        """Give device memory back, once running requests are done: vLLM's sleep levels. Its cache is dropped."""
        self.request("POST", f"/sleep?level={level}&mode=wait", timeout=self.transfer_seconds)

    def wake(self, tag: str) -> None:
        """Take memory again: "weights" (after level 2 they hold nothing) or, last, "kv_cache". With both it serves.

        Raises EngineError if it says afterwards that it sleeps: vLLM answers a wake that it passes over with 200, and
        requests would wait for ever in what looks like a pause."""
        self.request("POST", f"/wake_up?tags={tag}", timeout=self.transfer_seconds)
        if tag == "kv_cache" and self.request("GET", "/is_sleeping")["is_sleeping"]:
            raise EngineError(f"POST /wake_up?tags={tag}: the vLLM server sleeps on; its weights were not woken first")

    def weight_version(self) -> int:
        """The version of the weights that the engine serves now; 0 is the start checkpoint."""
        return parse_version(self.request("GET", "/weight_info")["weight_version"])

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        num_completions: int,
        sampling: SamplingConfig,
        seed: int | None = None,
        decode: Decode | None = None,
    ) -> tuple[Completion, ...]:
        """Sample `num_completions` answers to one prompt.

        Completion i uses random seed `seed + i` (None: the engine's own stream). Logprobs are those of the
        distribution that was sampled from: temperature, top_p and top_k applied (at temperature 0, the plain
        model's). max_new_tokens is cut to the room that rollout.max_model_len leaves. `decode` fills
        Completion.text.
        """
        room = check_room(prompt_ids, self.config.max_model_len)
        parameters: dict[str, object] = {
            "n": num_completions,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": min(sampling.max_new_tokens, room),
            "stop_token_ids": list(sampling.stop_token_ids),
            "logprobs": 0,
            "detokenize": False,
        }
        if seed is not None:
            parameters["seed"] = seed
        body = {"token_ids": [int(token) for token in prompt_ids], "sampling_params": parameters}
        choices = self.work("/inference/v1/generate", body)["choices"]
        if len(choices) != num_completions:
            raise EngineError(f"asked for {num_completions} completions, the vLLM server sent {len(choices)}")
        return tuple(completion(choice, decode) for choice in sorted(choices, key=lambda choice: choice["index"]))

    def score(self, token_ids: Sequence[int]) -> np.ndarray:
        """log p(token i | tokens before i) of the plain model (temperature 1): f32[L], entry 0 zero.

        L must be below rollout.max_model_len, because vLLM insists on sampling one token more.
        """
        check_room(token_ids, self.config.max_model_len)
        parameters = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        body = {"token_ids": [int(token) for token in token_ids], "sampling_params": parameters}
        entries = self.work("/inference/v1/generate", body)["prompt_logprobs"]
        logprobs = np.zeros(len(token_ids), dtype=np.float32)
        for position in range(1, len(token_ids)):
            logprobs[position] = entries[position][str(int(token_ids[position]))]["logprob"]
        return logprobs

    def value(self, token_ids: Sequence[int]) -> float:
        """A reward model's value after the last token, as it is: without its activation, which would squash it into
        (0, 1)."""
        body = {"input": [list(map(int, token_ids))], "task": "classify", "use_activation": False}
        body["encoding_format"] = "base64"  # JSON has no NaN and no infinity, for which the server would answer 500
        body["model"] = self.model
        answer = self.work("/pooling", body)
        try:
            (value,) = np.frombuffer(base64.b64decode(answer["data"][0]["data"]), dtype="<f4")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError(f"{self.base_url}: expected one value, got {answer!r:.300}") from error
        return float(value)


def decoded(answer: bytes) -> Any:
    return json.loads(answer) if answer else None


def completion(choice: dict[str, Any], decode: Decode | None) -> Completion:
    """One choice of vLLM's answer as a Completion, its routes as vLLM sends them. The oldest weights that took part
    give its version."""
    reason = choice["finish_reason"]
    if reason not in ("stop", "length"):
        raise EngineError(f"a completion ended with {reason!r}; expected 'stop' or 'length' (was the engine paused?)")
    entries = choice["logprobs"]["content"]
    return Completion(
        token_ids=np.asarray(choice["token_ids"], dtype=np.int32),
        logprobs=np.asarray([entry["logprob"] for entry in entries], dtype=np.float32),
        finish_reason=reason,
        weight_version=min(parse_version(span["version"]) for span in choice["weight_versions"]),
        text="" if decode is None else decode(choice["token_ids"]),
        routes=None if choice.get("routed_experts") is None else array_of(choice["routed_experts"]),
    )


def array_of(sent: str) -> np.ndarray:
    """An array as vLLM sends it: .npy in base64. EngineError for anything else."""
    try:
        return np.load(io.BytesIO(base64.b64decode(sent)), allow_pickle=False)
    except (ValueError, EOFError, TypeError) as error:
        raise EngineError(f"the vLLM server sent an array that is none: {error}") from error


def parse_version(reported: str) -> int:
    return 0 if reported == START_VERSION else int(reported)
