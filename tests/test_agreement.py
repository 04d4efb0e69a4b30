"""What fails on one trainer rank fails on all, with the same error."""

from __future__ import annotations

import json

import pytest
from ranks import run_ranks

RAISED = {
    "rank 1": [["RuntimeError", "ValueError: of rank 1"], ["ValueError", "of rank 1"]],
    "both": [["EngineError", "of rank 0"]] * 2,
    # That rank 1 left is what came of its error.
    "a server's and another": [["RuntimeError", "KeyError: 'of rank 1'"], ["KeyError", "'of rank 1'"]],
    "local": [["LocalError", "of rank 0"], ["RuntimeError", "LocalError: of rank 0"]],
    "quantising": [["OSError", "no such weights"]] * 2,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("agreement")
    run_ranks("agreement.py", str(folder), ranks=2, timeout_seconds=60)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", RAISED)
def test_all_ranks_raise_what_one_had(found, case):
    assert [of_rank.get(case) for of_rank in found] == RAISED[case]
