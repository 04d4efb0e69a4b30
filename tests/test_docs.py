"""The pages that are written from the code are what the code says, and what any page names is there."""

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from megatron_r1.algorithms import ALGORITHMS
from megatron_r1.bounds import Count, above
from megatron_r1.config.describe import REQUIRED, fields_of, leaves_of, meaning_of
from megatron_r1.pipeline.kinds import KINDS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("tool", ["make_docs.py", "draw_architecture.py"])
def test_the_written_pages_and_the_picture_are_what_the_code_says(tool):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / tool, "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, f"{done.stderr}\nrun: make docs"


@pytest.mark.parametrize("kind", [kind.config for kind in KINDS], ids=lambda kind: kind.__name__)
def test_every_field_of_a_stage_has_a_meaning(kind):
    assert meaning_of(kind), f"write a docstring for {kind.__name__}"
    without = [leaf.option for leaf in leaves_of(kind) if not leaf.meaning]
    assert without == [], "write a string below each of these fields"


@pytest.mark.parametrize("kind", ALGORITHMS.values(), ids=lambda kind: kind.__name__)
def test_every_field_of_an_algorithm_has_a_meaning(kind):
    assert meaning_of(kind)
    assert [leaf.option for leaf in leaves_of(kind, None, ("algorithm",)) if not leaf.meaning] == []


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One of several."""

    share: Annotated[float, above(0, 1)] = 0.25
    """How
    much."""


@dataclass(frozen=True, kw_only=True)
class Small:
    """A part."""

    max_count: Count
    """Most of them."""
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A whole. With more to say.

    And more."""

    small: Small
    other: Small = field(default_factory=lambda: Small(max_count=3, kind="b"))
    maybe: Small | None = None
    """If there is one."""
    entries: tuple[Entry, ...] = ()
    """Any number."""
    flag: bool = True
    file: Path | None = None


def test_the_walk_gives_paths_types_defaults_bounds_and_meanings():
    found = [(leaf.option, leaf.type, leaf.default, leaf.bound, leaf.meaning) for leaf in leaves_of(Whole)]
    assert found == [
        ("--small.max-count", "whole number", REQUIRED, "at least 1", "Most of them."),
        ("--small.kind", "a or b", "a", "", ""),
        ("--other.max-count", "whole number", "3", "at least 1", "Most of them."),
        ("--other.kind", "a or b", "b", "", ""),
        ("--maybe", "Small or none", "none", "", "If there is one."),
        ("--maybe.max-count", "whole number", REQUIRED, "at least 1", "Most of them."),
        ("--maybe.kind", "a or b", "a", "", ""),
        ("--entries", "any number of: Entry", "empty", "", "Any number."),
        ("entries[].share", "number", "0.25", "above 0 and at most 1", "How much."),
        ("--flag", "yes or no", "yes", "", ""),
        ("--file", "path or none", "none", "", ""),
    ]
    assert meaning_of(Whole) == "A whole. With more to say."


def test_an_object_gives_the_defaults():
    given = Whole(small=Small(max_count=7), flag=False)
    found = {leaf.option: leaf.default for leaf in leaves_of(Whole, given)}
    assert (found["--small.max-count"], found["--flag"]) == ("7", "no")
    assert [part.part for part in fields_of(Whole, given)][:3] == [Small, Small, Small]


PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_of_a_page_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_ours_that_a_page_names_is_there(page):
    """A path in code quotes that begins with a folder of the package or of the repository."""
    places = [ROOT, ROOT / "megatron_r1"]
    folders = {path.name for place in places for path in place.iterdir() if path.is_dir()}
    named = re.findall(r"`((?:[a-z0-9_]+/)+[a-z0-9_]+\.(?:py|sh|md))`", page.read_text())
    ours = [name for name in named if name.split("/")[0] in folders]
    assert [name for name in ours if not any((place / name).exists() for place in places)] == []
