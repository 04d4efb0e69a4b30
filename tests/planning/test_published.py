"""The planner against published step times and throughputs: within the factors that docs/planner.md states."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("published", HERE / "published.py")
assert spec is not None and spec.loader is not None
published = sys.modules["published"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(published)

FACTORS = {"s a step": 3.1, "s a rollout of 8,192": 4.2, "tokens/s/GPU": 2.1}
"""How far the planner may be from a published figure of this unit, either way."""


@pytest.mark.parametrize("each", published.PUBLISHED, ids=lambda each: each.name)
def test_a_published_figure_is_within_the_stated_factor(each):
    assert max(each.factor, 1 / each.factor) <= FACTORS[each.unit]


def test_the_document_has_the_numbers_that_the_code_gives():
    text = (HERE.parents[1] / "docs" / "planner.md").read_text()
    for row in published.table().splitlines():
        assert row in text, f"docs/planner.md is stale: python tests/planning/published.py\n{row}"
    for factor in FACTORS.values():
        assert re.search(rf"\b{factor}\b", text)
