"""The rules of the supervised data's configuration."""

import math

import pytest

from megatron_r1.config.packages import has_module
from megatron_r1.config.sft_data import SFTDataConfig, sft_data_faults


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    return path


def test_a_sound_configuration_has_no_faults(file):
    assert sft_data_faults(SFTDataConfig(files=(file,))) == []
    assert sft_data_faults(SFTDataConfig(files=(file,), weights=(3.0,))) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"files": ()}, "sft.data.files is empty"),
        ({"weights": (1.0, 2.0)}, "sft.data.weights has 2 entries for 1 files"),
        ({"weights": (0.0,)}, "each must be above 0"),
        ({"weights": (math.nan,)}, "each must be above 0"),
    ],
)
def test_each_fault_is_named(file, change, fault):
    (found,) = sft_data_faults(SFTDataConfig(**{"files": (file,), **change}), "sft.data")
    assert fault in found


def test_files_must_exist_and_differ(file, tmp_path):
    faults = sft_data_faults(SFTDataConfig(files=(file, file, tmp_path / "b.jsonl")))
    assert "b.jsonl does not exist" in faults[0] and "listed twice" in faults[1]


def test_dali_is_refused_where_it_is_not_installed(file):
    faults = sft_data_faults(SFTDataConfig(files=(file,), reader="dali"))
    assert faults == [] if has_module("nvidia.dali") else "pip install nvidia-dali-cuda130" in faults[0]
