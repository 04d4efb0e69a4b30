"""The dry run's text: derived numbers of a run and every field of its configuration."""

import dataclasses
from pathlib import Path

from megatron_r1.config import load_shape
from megatron_r1.planning.summary import describe_fields
from megatron_r1.recipes import RECIPES
from megatron_r1.stages.grpo.stage import STAGE as GRPO


def test_the_671b_recipe_in_numbers():
    config = RECIPES["grpo_671b"]()
    lines = GRPO.describe(config, GRPO.needs(config), load_shape(Path(__file__).parent / "deepseek_v3.json"))
    assert lines[0] == (
        "grpo_671b: deepseek_v3, 671.03B parameters, 37.55B active per token, 11.61B more in MTP layers"
    )
    assert lines[1].startswith("trainer: 512 rank(s), PP16 EP32, data parallel 32, bf16; 29.2 GiB for weights")
    assert lines[2].startswith("rollout: 8 ") and lines[2].endswith("TP32, bf16, cuda")
    # 512 questions x 16 answers = the paper's 8,192 outputs a rollout, in 16 minibatches.
    assert lines[3].startswith("step: 512 prompts x 16 = 8,192 samples, at most 276,824,064 tokens, 16 optimizer")


def test_one_rank_has_no_layout():
    config = RECIPES["grpo_smollm2"]().grpo
    text = "\n".join(GRPO.describe(config, GRPO.needs(config), load_shape(RECIPES["tiny"]().model.path)))
    assert "1 rank(s), one rank, data parallel 1, fp32" in text


def test_every_field_is_listed_by_its_path():
    config = RECIPES["tiny"]()
    lines = describe_fields(config).splitlines()
    assert "  algorithm.kl.coef = 0.001" in lines
    assert "  rollout.sampling.temperature = 1.0" in lines

    def leaves(value):
        if not dataclasses.is_dataclass(value):
            return 1
        return sum(leaves(getattr(value, field.name)) for field in dataclasses.fields(value))

    assert len(lines) == leaves(config)
