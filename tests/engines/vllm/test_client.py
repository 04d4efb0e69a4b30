"""Token ids in, token ids and logprobs out, against a running server and transformers."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
from weight_sources import FolderSource

from megatron_r1.config import SamplingConfig
from megatron_r1.config.schema import RunningServerConfig
from megatron_r1.engines.base import RequestError
from megatron_r1.engines.vllm.client import EngineClient
from megatron_r1.engines.vllm.running import RunningServer
from megatron_r1.engines.vllm.server import LocalEngine
from megatron_r1.engines.vllm.sync import WeightSync
from megatron_r1.errors import ConfigError, EngineError

from .conftest import EOS, MAX_MODEL_LEN, Oracle, prompt


@pytest.fixture(autouse=True)
def start_weights(sync: WeightSync, weights: FolderSource, folders) -> None:
    weights.show(folders[0])
    sync.push(sync.version)


def test_logprobs_of_samples_agree_with_transformers(engine: LocalEngine, oracles: list[Oracle], sync) -> None:
    ids = prompt(40, 1)
    group = engine.client.generate(ids, num_completions=4, sampling=SamplingConfig(max_new_tokens=30), seed=5)
    assert len({tuple(completion.token_ids.tolist()) for completion in group}) == 4
    for completion in group:
        assert completion.token_ids.dtype == np.int32 and completion.logprobs.dtype == np.float32
        assert completion.weight_version == sync.version
        whole = ids + completion.token_ids.tolist()
        np.testing.assert_allclose(completion.logprobs, oracles[0].logprobs(whole)[len(ids) :], atol=1e-4)
        np.testing.assert_allclose(engine.client.score(whole), oracles[0].logprobs(whole), atol=1e-4)


def test_logprobs_are_those_of_the_sampling_temperature(engine: LocalEngine, oracles: list[Oracle]) -> None:
    ids, sampling = prompt(10, 2), SamplingConfig(max_new_tokens=20, temperature=0.7)
    (completion,) = engine.client.generate(ids, num_completions=1, sampling=sampling, seed=5)
    expected = oracles[0].logprobs(ids + completion.token_ids.tolist(), temperature=0.7)[len(ids) :]
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_same_seed_same_samples_and_neighbours_differ(engine: LocalEngine) -> None:
    ids, sampling = prompt(40, 3), SamplingConfig(max_new_tokens=20)
    first, again, other = (
        [
            completion.token_ids.tolist()
            for completion in engine.client.generate(ids, num_completions=3, sampling=sampling, seed=seed)
        ]
        for seed in (100, 100, 101)
    )
    assert first == again
    assert first[1:] == other[:2] and first[0] != other[2]  # completion i of seed s is completion 0 of seed s + i


def test_many_long_seeded_prompts_at_once_do_not_kill_the_engine(engine: LocalEngine) -> None:
    """vLLM 0.32 on CPU dies when a seeded prompt is split over steps."""
    ids = prompt(MAX_MODEL_LEN - 10, 4)
    group = engine.client.generate(ids, num_completions=60, sampling=SamplingConfig(max_new_tokens=2), seed=1)
    assert len(group) == 60


def test_answers_stop_at_a_stop_token_at_eos_and_at_the_limit(engine: LocalEngine) -> None:
    ids = prompt(20, 5)
    group = engine.client.generate(
        ids,
        num_completions=32,
        sampling=SamplingConfig(max_new_tokens=60, stop_token_ids=(9, 10, 11)),
        seed=1,
    )
    reasons = {completion.finish_reason for completion in group}
    assert reasons == {"stop", "length"}
    for completion in group:
        *body, last = completion.token_ids.tolist()
        assert not {9, 10, 11, EOS} & set(body)
        assert (last in (9, 10, 11, EOS)) == (completion.finish_reason == "stop") or len(body) == 59


def test_greedy_takes_the_likeliest_token(engine: LocalEngine, oracles: list[Oracle]) -> None:
    ids, sampling = prompt(15, 6), SamplingConfig(max_new_tokens=10, temperature=0.0)
    (completion,) = engine.client.generate(ids, num_completions=1, sampling=sampling)
    for position, token in enumerate(completion.token_ids.tolist()):
        before = ids + completion.token_ids.tolist()[:position]
        assert token == oracles[0].likeliest(before)


def test_an_answer_is_cut_to_the_room_that_is_left(engine: LocalEngine) -> None:
    ids = prompt(MAX_MODEL_LEN - 3, 8)
    (completion,) = engine.client.generate(ids, num_completions=1, sampling=SamplingConfig(), seed=3)
    assert len(completion.token_ids) <= 3


@pytest.mark.parametrize("length", [0, MAX_MODEL_LEN, MAX_MODEL_LEN + 5])
def test_a_prompt_without_room_is_refused_before_it_is_sent(config, length: int) -> None:
    nowhere = EngineClient("http://127.0.0.1:9", token="", config=config)
    with pytest.raises(ValueError, match=r"leaves no room|empty"):
        nowhere.generate(prompt(length, 0), num_completions=1, sampling=SamplingConfig())
    with pytest.raises(ValueError, match=r"leaves no room|empty"):
        nowhere.score(prompt(length, 0))


def test_refused_requests_and_dead_servers_are_told_apart(engine: LocalEngine, config) -> None:
    with pytest.raises(RequestError, match="temperature"):
        engine.client.generate([5], num_completions=1, sampling=SamplingConfig(temperature=-1.0))
    with pytest.raises(EngineError, match="did not answer"):
        EngineClient("http://127.0.0.1:9", token="", config=config).weight_version()
    stranger = EngineClient(engine.client.base_url, token="no", config=dataclasses.replace(config))
    with pytest.raises(RequestError, match="401"):
        stranger.weight_version()


def test_tokens_are_counted_and_a_real_paused_server_is_not_stuck(engine: LocalEngine, config) -> None:
    before = engine.client.count_tokens()
    group = engine.client.generate(prompt(20, 11), num_completions=3, sampling=SamplingConfig(max_new_tokens=9), seed=1)
    sampled = sum(len(completion.token_ids) for completion in group)
    after = engine.client.count_tokens()
    # Each of the three choices counts the prompt and its own end.
    assert before is not None and after is not None and after == before + 3 * 20 + sampled + 3
    engine.client.score(prompt(30, 12))
    assert engine.client.count_tokens() == after + 30 + 1 + 1

    hasty = EngineClient(
        engine.client.base_url, token=engine.token, config=dataclasses.replace(config, stall_seconds=2.0)
    )
    hasty.pause()
    assert hasty.is_paused()
    answers: list[object] = []

    def ask() -> None:
        answers.append(hasty.generate([5], num_completions=1, sampling=SamplingConfig(max_new_tokens=2)))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(6.0)
    assert not answers and thread.is_alive()
    hasty.request("POST", "/resume", {})
    thread.join(60)
    assert len(answers) == 1


def test_text_is_what_decode_makes_of_the_ids(engine: LocalEngine) -> None:
    (completion,) = engine.client.generate(
        [5, 6],
        num_completions=1,
        sampling=SamplingConfig(max_new_tokens=4),
        decode=lambda ids: repr(list(ids)),
    )
    assert completion.text == repr(completion.token_ids.tolist())


@pytest.fixture
def running(engine: LocalEngine, folders, tmp_path) -> RunningServerConfig:
    """The shared server, as somebody else would name it."""
    token = tmp_path / "token"
    token.write_text(engine.token + "\n")
    return RunningServerConfig(url=f"http://{engine.host}:{engine.port}/v1", model=str(folders[0]), token_file=token)


def test_a_server_that_already_runs_gives_the_same_samples(engine: LocalEngine, config, running) -> None:
    theirs = RunningServer(running, config)
    ids, sampling = prompt(20, 9), SamplingConfig(max_new_tokens=12, temperature=0.8, stop_token_ids=(EOS,))
    ours = engine.client.generate(ids, num_completions=3, sampling=sampling, seed=4)
    found = theirs.client.generate(ids, num_completions=3, sampling=sampling, seed=4, decode=lambda ids: f"{len(ids)}")
    assert [one.token_ids.tolist() for one in found] == [one.token_ids.tolist() for one in ours]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in ours]
    assert [one.text for one in found] == [f"{len(one.token_ids)}" for one in ours]
    theirs.stop()
    assert engine.client.healthy()  # it is not ours to stop
    with pytest.raises(EngineError, match="not ours to start again"):
        theirs.restart()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "other"}, "server.model is 'other'; .* has .*model-0"),
        ({"token_file": None}, "does not answer as a vLLM server does .*401"),
        ({"url": "http://127.0.0.1:9"}, "does not answer as a vLLM server does"),
    ],
)
def test_a_wrong_name_token_or_address_is_said_at_once(config, running, change, said) -> None:
    with pytest.raises(ConfigError, match=said):
        RunningServer(dataclasses.replace(running, **change), config)
