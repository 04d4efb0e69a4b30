"""Algorithms: one file each. An algorithm joins the command line by its line in this table.

Another one need not be here: `--algorithm my_module:MyAlgorithm` names any subclass of base.Algorithm
(docs/extending.md).
"""

from __future__ import annotations

import dataclasses

from megatron_r1.algorithms.base import Algorithm
from megatron_r1.algorithms.cispo import CISPO
from megatron_r1.algorithms.dapo import DAPO
from megatron_r1.algorithms.dr_grpo import DrGRPO
from megatron_r1.algorithms.grpo import GRPO
from megatron_r1.algorithms.gspo import GSPO
from megatron_r1.algorithms.on_policy_distill import OnPolicyDistill
from megatron_r1.errors import ConfigError
from megatron_r1.plugins import import_path_of, imported, is_import_path, told

ALGORITHMS: dict[str, type[Algorithm]] = {
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "on_policy_distill": OnPolicyDistill,
}


def name_of(algorithm: Algorithm) -> str:
    """Its name on the command line and in run.json: that of the table, module:Class or file.py:Class."""
    kind = type(algorithm)
    found = next((name for name, listed in ALGORITHMS.items() if listed is kind), None)
    return found or import_path_of(kind)


def algorithm_named(word: str, field: str = "algorithm") -> Algorithm:
    """The algorithm of that name or import path, with its defaults. ConfigError if it is none."""
    if not is_import_path(word):
        if word not in ALGORITHMS:
            raise ConfigError(
                [f"{field}: no algorithm is called {word!r}; there are {', '.join(ALGORITHMS)}, or module:Class"]
            )
        return ALGORITHMS[word]()
    found = imported(word, field)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ConfigError([f"{field}: {word} is no algorithm; it must be a class that derives from Algorithm"])
    if "__dataclass_fields__" not in vars(found):
        raise ConfigError([f"{field}: {word} is no dataclass; write @dataclass(frozen=True, kw_only=True) above it"])
    if any(part.name == "name" for part in dataclasses.fields(found)):
        raise ConfigError([f"{field}: {word} has a field called name, which run.json has for its path; rename it"])
    try:
        return found()
    except Exception as error:
        raise ConfigError([f"{field}: {word} cannot be made with its defaults{told(error)}"]) from error
