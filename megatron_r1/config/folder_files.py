"""The files of an input path, wherever links lead."""

from __future__ import annotations

import os
from pathlib import Path


def files_of(path: Path) -> list[Path]:
    """`path` itself if it is a file; else all files below it, through links to folders too, in the order of their
    names. A link back to a folder that it lies in is not followed. Empty if there is nothing."""
    if path.is_file():
        return [path]
    found: list[Path] = []
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [name for name in folders if not _leads_back(os.path.join(folder, name), real)]
        found += [file for name in names if (file := Path(folder, name)).is_file()]
    return sorted(found)


def _leads_back(folder: str, inside: str) -> bool:
    real = os.path.realpath(folder)
    return os.path.islink(folder) and (inside == real or inside.startswith(real + os.sep))
