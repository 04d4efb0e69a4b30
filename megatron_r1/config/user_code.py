"""The files of the user's own code that a configuration names: another content makes it another run."""

from __future__ import annotations

from pathlib import Path

from megatron_r1.algorithms import Algorithm, name_of
from megatron_r1.plugins import file_of, import_path_of, imported, is_import_path


def code_files(config: object) -> dict[str, Path]:
    """By the field that names each: its own file, not what that imports. ConfigError if one cannot be imported."""
    found: dict[str, Path | None] = {}
    source = getattr(getattr(config, "data", None), "source", "")
    named = {"data.source": source} if source else {}
    custom = getattr(getattr(config, "rewards", None), "custom", ())
    named |= {f"rewards.custom[{number}]": entry.partition("=")[0] for number, entry in enumerate(custom)}
    graders = getattr(getattr(config, "rewards", None), "graders", ())
    named |= {f"rewards.graders[{number}]": path for number, path in enumerate(graders)}
    engine = getattr(getattr(config, "rollout", None), "engine", "")
    named |= {"rollout.engine": engine} if is_import_path(engine) else {}
    for field, path in named.items():
        imported(path, field)
        found[field] = file_of(path)
    if type(config).__module__.partition(".")[0] != "megatron_r1":
        found["kind"] = file_of(import_path_of(type(config)))
    algorithm = getattr(config, "algorithm", None)
    if isinstance(algorithm, Algorithm) and is_import_path(name_of(algorithm)):
        found["algorithm"] = file_of(name_of(algorithm))
    return {field: file for field, file in found.items() if file is not None}
