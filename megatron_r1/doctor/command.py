"""megatron-r1 doctor [RECIPE]: what is here, and whether the recipe can run."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.doctor.machine import describe_extras, describe_machine, look, read_extras
from megatron_r1.doctor.needs import describe_needs, most_demanding, recipe_needs
from megatron_r1.errors import ConfigError


def doctor(words: Sequence[str]) -> int:
    """Print what is here and whether the recipe (or quickstart) can run: exit status 0, else 1."""
    if len(words) > 1:
        raise ConfigError(f"doctor takes one recipe or none, got {' '.join(words)!r}")
    name = words[0] if words else "quickstart"
    asked = most_demanding(name)
    machine = look()
    print(describe_machine(machine))
    print(describe_extras(machine, read_extras()))
    needs = recipe_needs(asked, machine)
    print(describe_needs(name, needs))
    missing = [need for need in needs if not need.met]
    verdict = f"{name} can run here" if not missing else f"{name} cannot run here: {missing[0].what}"
    print(f"\n{verdict}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
    return 1 if missing else 0
