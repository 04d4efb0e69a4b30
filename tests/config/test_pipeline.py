"""Pipelines as data: references between stages, folders and seeds."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_r1.config.paths import input_paths, replace_inputs
from megatron_r1.config.pipeline import PipelineConfig, parent_of, stages_of
from megatron_r1.config.schema import ModelConfig
from megatron_r1.config.sft_data import SFTDataConfig
from megatron_r1.errors import ConfigError
from megatron_r1.stages.sft.config import SFTConfig
from megatron_r1.toy.tiny_world.config import TinyWorldConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Two(PipelineConfig):
    data: TinyWorldConfig | None
    base: SFTConfig


def sft(file="@data/base.jsonl", model="some/model"):
    return SFTConfig(
        name="base",
        run_dir=Path("elsewhere"),
        model=ModelConfig(path=Path(model)),
        data=SFTDataConfig(files=(Path(file), Path("own.jsonl"))),
        seed=5,
    )


def two(**fields):
    given = Two(name="two", run_dir=Path("runs/two"), seed=100, data=TinyWorldConfig(), base=sft())
    return dataclasses.replace(given, **fields)


def test_a_reference_becomes_a_path_in_the_stages_folder():
    stages = stages_of(two())
    assert list(stages) == ["data", "base"]
    assert stages["base"].data.files == (Path("runs/two/data/base.jsonl"), Path("own.jsonl"))
    assert stages["base"].model.path == Path("some/model")


def test_every_stage_has_its_own_folder_and_a_seed_that_the_pipelines_moves():
    stages = stages_of(two())
    assert [stage.run_dir for stage in stages.values()] == [Path("runs/two/data"), Path("runs/two/base")]
    assert [stage.seed for stage in stages.values()] == [100, 105]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"base": sft(file="@nowhere/base.jsonl")}, "base.data.files[0] is @nowhere/base.jsonl"),
        ({"base": sft(model="@base/model")}, "base.model.path is @base/model"),
        ({"data": None}, "use none"),
    ],
)
def test_a_reference_to_a_stage_that_does_not_come_before_is_a_fault(fields, said):
    with pytest.raises(ConfigError) as error:
        stages_of(two(**fields))
    assert said in str(error.value)


def test_inputs_are_all_paths_but_the_stages_own_folder():
    found = input_paths(sft())
    assert found == {
        "model.path": Path("some/model"),
        "data.files[0]": Path("@data/base.jsonl"),
        "data.files[1]": Path("own.jsonl"),
    }
    changed = replace_inputs(sft(), lambda path: Path("there") / path)
    assert input_paths(changed)["data.files[1]"] == Path("there/own.jsonl")
    assert changed.run_dir == Path("elsewhere")


def test_a_path_in_a_stages_folder_is_known_by_its_stage():
    assert parent_of(Path("runs/two/base/model"), Path("runs/two")) == ("base", Path("model"))
    assert parent_of(Path("runs/other/base/model"), Path("runs/two")) is None
    assert parent_of(Path("runs/two"), Path("runs/two")) is None
