"""A reward model's server: what folders it takes, and on the tiny model the values that transformers gives."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import urllib3
from reward_model_folder import SCALE, save_reward_model

from megatron_r1.config import RolloutConfig
from megatron_r1.config.schema import PreferenceConfig, RewardConfig
from megatron_r1.engines.base import EngineSpec
from megatron_r1.engines.vllm.command import server_command
from megatron_r1.engines.vllm.server import LocalEngine
from megatron_r1.errors import ConfigError, EngineError
from megatron_r1.rewards.compose import Scorer
from megatron_r1.rollout.preference import RewardModelServer, read_scale
from megatron_r1.stages.grpo.servers import judging
from megatron_r1.types import Problem


@pytest.fixture(scope="module")
def judge(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(folders[0], tmp_path_factory.mktemp("judge") / "model")


def preference(folder: Path) -> PreferenceConfig:
    return PreferenceConfig(name="helpful", model=folder, domains=("general",))


def made(preference: PreferenceConfig, config: RolloutConfig, run_dir: Path) -> RewardModelServer:
    """With a server on this host, not started."""
    spec = EngineSpec(
        config=config, model_path=preference.model, run_dir=run_dir, name="reward-helpful", reward_model=True
    )
    engine = LocalEngine(spec)
    return RewardModelServer(preference, engine)


def copy_of(folder: Path, target: Path, **files: str | None) -> Path:
    """The folder with the named files replaced (or left out: None); `_` stands for the dot."""
    target.mkdir()
    changed = {name.replace("__", "."): text for name, text in files.items()}
    for file in folder.iterdir():
        if file.name not in changed:
            (target / file.name).symlink_to(file)
    for name, text in changed.items():
        if text is not None:
            (target / name).write_text(text)
    return target


def refusal(folder: Path, config: RolloutConfig, run_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        made(preference(folder), config, run_dir)
    return str(caught.value)


def test_a_model_without_a_head_is_refused(config, folders, tmp_path):
    assert f"{folders[0]} has no reward head" in refusal(folders[0], config, tmp_path)


def test_a_folder_without_weights_is_refused(config, judge, tmp_path):
    """vLLM would be told to make some up."""
    bare = copy_of(judge, tmp_path / "bare", model__safetensors=None)
    assert f"{bare} holds no weights" in refusal(bare, config, tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "megatron_r1.json cannot be read"),
        ("{", "megatron_r1.json cannot be read"),
        ("[]", "lacks part among answer, response"),
        ("{}", "lacks part among answer, response and template among r1_zero, chat, plain and a value_mean"),
        (json.dumps({"step": 3, "stage": "sft"}), "must be a reward model stage's"),
        (json.dumps(SCALE | {"part": "all"}), "lacks part among answer, response;"),
        (json.dumps(SCALE | {"template": None}), "lacks template among"),
        (json.dumps(SCALE | {"value_std": 0.0}), "lacks a value_std above 0;"),
        (json.dumps(SCALE | {"value_std": float("nan")}), "lacks a value_std above 0;"),
        (json.dumps(SCALE | {"value_std": "1"}), "lacks a value_std above 0;"),
        (json.dumps(SCALE | {"value_mean": float("inf")}), "lacks a value_mean that is a number;"),
    ],
)
def test_a_folder_that_does_not_say_how_it_judges_is_refused(config, judge, tmp_path, text, words):
    other = copy_of(judge, tmp_path / "other", megatron_r1__json=text)
    assert words in refusal(other, config, tmp_path)


def test_a_sound_folder_is_taken(config, judge, tmp_path):
    assert read_scale(judge) == SCALE
    server = made(preference(judge), config, tmp_path)
    assert server.engine.name == "reward-helpful" and server.encoder.part == "answer"
    server.close()
    server.close()  # twice does nothing more


def test_the_server_gives_values_and_takes_no_weights(config, judge):
    command = server_command(config, model_path=judge, host="127.0.0.1", port=1, seed=0, reward_model=True)
    assert command[command.index("--runner") + 1] == "pooling"
    assert "--weight-transfer-config" not in command and "--enable-scale-out" not in command
    assert "--no-enable-prefix-caching" in command  # a text's value would depend on what was asked for before


def test_servers_whose_numbers_are_a_reward_or_in_the_loss_have_one_seat_on_cpus(config, judge):
    for device, seats in (("cpu", "1"), ("cuda", str(config.max_num_seqs))):
        judges = judging(dataclasses.replace(config, device=device), tensor_parallel=1)
        for reward_model in (True, False):
            command = server_command(
                judges, model_path=judge, host="127.0.0.1", port=1, seed=0, reward_model=reward_model
            )
            assert command[command.index("--max-num-seqs") + 1] == seats


# ---- one real server


@pytest.fixture(scope="module")
def server(config: RolloutConfig, judge: Path, tmp_path_factory) -> Iterator[RewardModelServer]:
    limited = dataclasses.replace(config, max_model_len=48, max_restarts=2)
    served = made(preference(judge), judging(limited, tensor_parallel=1), tmp_path_factory.mktemp("reward-run"))
    served.engine.start()
    served.engine.wait_ready()
    yield served
    served.close()


class Values:
    """transformers' values of the judge's folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)

    def __call__(self, token_ids) -> float:
        with torch.no_grad():
            return float(self.model(torch.tensor([list(map(int, token_ids))])).logits[0, 0])


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(f"w{number}" for number in rng.integers(3, 128, count))


@pytest.mark.slow
def test_a_value_is_the_same_to_the_bit_whatever_is_asked_beside_it(server: RewardModelServer) -> None:
    """By which a run that goes on has the rewards that it would have had."""
    depends_on_nothing_else(server.engine.client.value)


@pytest.mark.slow
def test_a_teachers_logprobs_are_the_same_to_the_bit_too(config: RolloutConfig, folders, tmp_path) -> None:
    """At this size they are so with more seats too: that there is one is the test above."""
    limited = judging(dataclasses.replace(config, max_model_len=48), tensor_parallel=1)
    engine = LocalEngine(EngineSpec(config=limited, model_path=folders[0], run_dir=tmp_path, name="teacher"))
    try:
        engine.start()
        engine.wait_ready()
        depends_on_nothing_else(lambda text: engine.client.score(text).tolist())
    finally:
        engine.stop()


def depends_on_nothing_else(ask: Callable[[np.ndarray], object]) -> None:
    """Texts asked for one after another, and then all at once in other orders."""
    rng = np.random.default_rng(1)
    begin = rng.integers(3, 128, 36)
    texts = [rng.integers(3, 128, length) for length in rng.integers(2, 47, 60)]
    texts += [np.concatenate([begin, rng.integers(3, 128, length)]) for length in rng.integers(1, 11, 60)]
    alone = [ask(text) for text in texts]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(texts))
        with ThreadPoolExecutor(64) as pool:
            assert list(pool.map(ask, [texts[place] for place in order])) == [alone[place] for place in order]


@pytest.mark.slow
def test_a_served_reward_model(server: RewardModelServer, judge: Path) -> None:
    """Values, scores, the token, restart after a kill: in one test, as the server is what costs."""
    expected, rng = Values(judge), np.random.default_rng(0)
    texts = [rng.integers(3, 128, length) for length in (1, 2, 17, 30, 47)]
    values = [expected(ids) for ids in texts]
    assert np.ptp(values) > 0.5
    before = server.engine.client.count_tokens()
    np.testing.assert_allclose([server.engine.client.value(ids) for ids in texts], values, atol=1e-4)
    after = server.engine.client.count_tokens()
    assert before is not None and after is not None and after >= before + 97  # 1 + 2 + 17 + 30 + 47 tokens are progress

    asked = [Problem(id=str(i), domain="general", messages=({"role": "user", "content": words(rng, 5)},)) for i in "ab"]
    answers = [words(rng, 9), words(rng, 90)]  # the second does not fit: it is judged by its end
    futures = [
        server.submit(problem, f"<think> {words(rng, 4)} </think> <answer> {answer} </answer>")
        for problem, answer in zip(asked, answers, strict=True)
    ]
    encoded = [server.encoder.encode(p.messages, a, where="x") for p, a in zip(asked, answers, strict=True)]
    assert [len(ids) for ids in encoded] == [5 + 9, 5 + 90]
    scores = [(expected(ids[-47:]) - SCALE["value_mean"]) / SCALE["value_std"] for ids in encoded]
    np.testing.assert_allclose([future.result(60) for future in futures], scores, atol=1e-4)

    for header in ({}, {"Authorization": "Bearer wrong"}):
        refused = urllib3.request("POST", server.engine.client.base_url + "/pooling", json={}, headers=header)
        assert refused.status == 401

    family = [psutil.Process(server.engine.pid), *psutil.Process(server.engine.pid).children(recursive=True)]
    os.kill(server.engine.pid, signal.SIGKILL)
    psutil.wait_procs(family, timeout=20)
    # Many at once: whoever comes while it is restarted waits for it instead of restarting it again.
    again = [server.submit(asked[0], answers[0]) for _ in range(100)]
    np.testing.assert_allclose([future.result(180) for future in again], [scores[0]] * 100, atol=1e-4)
    assert server.engine.starts == 2 and server.engine.failures == 1

    os.kill(server.engine.pid, signal.SIGKILL)
    late = server.submit(asked[0], answers[0])
    while server.engine.starts == 2:
        time.sleep(0.05)
    server.close()  # while it is restarted
    with pytest.raises(EngineError):
        late.result(30)
    assert not server.engine.alive() and server.engine.starts == 3
    port = f"--port {server.engine.port}"
    assert not [p for p in psutil.process_iter(["cmdline"]) if port in " ".join(p.info["cmdline"] or [])]


@pytest.mark.slow
def test_a_served_reward_model_whose_head_is_broken(config: RolloutConfig, judge: Path, tmp_path: Path) -> None:
    """A NaN in the head: the server answers with it (base64; JSON has none), and one part without a weight leaves the
    reward as it is, while one with a weight makes it NaN, which training leaves out."""
    from safetensors.torch import load_file, save_file

    broken = copy_of(judge, tmp_path / "broken", model__safetensors=None)
    weights = load_file(judge / "model.safetensors")
    weights["score.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    limited = dataclasses.replace(config, max_model_len=48)
    server = made(preference(broken), limited, tmp_path / "run")
    problem = Problem(
        id="a", domain="general", grader="exact", answer="w7", messages=({"role": "user", "content": "w5"},)
    )
    try:
        server.engine.start()
        server.engine.wait_ready()
        assert np.isnan(server.engine.client.value([5, 9, 12]))
        totals = {}
        for weight in (0.0, 1.0):
            server.config = dataclasses.replace(server.config, weight=weight)
            with Scorer(RewardConfig(num_workers=1), [], preferences=[server]) as scorer:
                reward = scorer.submit(problem, "<think> w4 </think> <answer> w7 </answer>").result(60)
            assert np.isnan(reward.parts["helpful"]) and reward.parts["accuracy"] == 1.0
            totals[weight] = reward.total
        assert totals[0.0] == reward.parts["accuracy"] + reward.parts["format"] and np.isnan(totals[1.0])
        assert server.engine.starts == 1 and server.engine.failures == 0
    finally:
        server.close()
