"""What may sleep and what may go to the host, and stages in which nothing would."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_r1.config.colocation import colocation_faults
from megatron_r1.config.schema import RolloutConfig, TrainConfig
from megatron_r1.errors import ConfigError
from megatron_r1.recipes import RECIPES
from megatron_r1.stages.evaluate.config import EvaluateConfig, validate_evaluation
from megatron_r1.stages.rejection.config import validate_rejection
from megatron_r1.stages.reward_model.config import validate_reward_model
from megatron_r1.stages.sft.config import validate_sft


@pytest.mark.parametrize(
    ("rollout", "train", "words"),
    [
        ({"sync": "ipc", "sleep_level": 2}, {"offload": ("weights", "gradients", "optimizer")}, []),
        ({"sync": "ipc"}, {}, []),
        ({"sync": "nccl", "sleep_level": 1}, {}, ["rollout.sleep_level is 1", "use 0, or rollout.sync ipc"]),
        ({"sync": "gloo"}, {"offload": ("weights",)}, ["train.offload is weights", "or use rollout.sync ipc"]),
        ({"sync": "ipc", "sleep_level": 2, "draft_tokens": 1}, {}, ["sleep_level is 2", "draft_tokens 1", "level 1"]),
        ({"sync": "ipc", "sleep_level": 1, "draft_tokens": 1}, {}, []),
        ({"sync": "ipc"}, {"offload": ("weights", "weights")}, ["weights weights", "each part once"]),
    ],
)
def test_a_stage_with_trainer_and_servers(rollout, train, words):
    said = colocation_faults(RolloutConfig(**rollout), TrainConfig(**train))
    assert len(said) == bool(words) and all(word in " ".join(said) for word in words)


@pytest.mark.parametrize(
    ("stage", "validate"), [("cold_start", validate_sft), ("helpful", validate_reward_model)], ids=["sft", "reward"]
)
def test_a_stage_without_servers_has_nobody_to_make_room_for(stage, validate):
    config = getattr(RECIPES["r1_671b"](), stage)
    with pytest.raises(ConfigError) as caught:
        validate(dataclasses.replace(config, train=dataclasses.replace(config.train, offload=("optimizer",))))
    assert "train.offload is optimizer; no servers share this stage's GPUs: leave it empty" in caught.value.faults


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sleep_level": 1}, "rollout.sleep_level is 1; no trainer shares this stage's GPUs: use 0"),
        ({"routes": "replay"}, "rollout.routes is replay; nothing is trained on these samples: use off"),
    ],
    ids=["sleep", "routes"],
)
def test_what_only_a_trainer_needs_is_refused_where_there_is_none(tmp_path, fields, said):
    sampling = RECIPES["r1_671b"]().rejection
    with pytest.raises(ConfigError) as caught:
        validate_rejection(
            dataclasses.replace(sampling, rollout=dataclasses.replace(sampling.rollout, sync="ipc", **fields))
        )
    assert said in caught.value.faults
    with pytest.raises(ConfigError) as caught:
        validate_evaluation(
            EvaluateConfig(model=tmp_path, run_dir=tmp_path, rollout=RolloutConfig(sync="ipc", **fields))
        )
    assert said in caught.value.faults
