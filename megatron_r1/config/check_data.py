"""The configuration of megatron-r1 check-data."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.bounds import number_faults
from megatron_r1.config.custom_reward import reward_faults
from megatron_r1.config.schema import DataConfig, RewardConfig
from megatron_r1.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckDataConfig:
    """`megatron-r1 check-data`: read files of problems as a run would, and run the tests of programs against programs
    that do nothing."""

    data: DataConfig = field(default_factory=DataConfig)
    """`files` are checked; the rest means nothing here."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    """`num_workers` programs run at once, in `sandbox`."""
    programs: bool = True
    """Run programs that do nothing: seconds for a thousand tests. Without it tests are only read."""
    constants: bool = False
    """Run programs too that return the same for every argument (True, 0, an empty list, ...): three times as long."""


def validate_check_data(config: CheckDataConfig) -> None:
    """ConfigError for what cannot be checked."""
    faults = number_faults(config) + reward_faults(config.rewards)
    if not config.data.files:
        faults.append("data.files is empty; name the files to check: --data.files FILE ...")
    if faults:
        raise ConfigError(faults)
