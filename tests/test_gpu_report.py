"""The page that `make test-gpu` writes, without a GPU."""

from __future__ import annotations

import re

from gpu_report import Report, commit_of, describe_machine, one_line


def test_a_page_holds_the_machine_the_outcomes_and_the_tables_in_their_order():
    report = Report(outcomes=[("test_a", "passed", 12.4, ""), ("test_b", "skipped", 0.0, "needs | two\nGPUs")])
    report.add("Second", "| a |\n| --- |\n| 1 |")
    report.add("Third", "words\n\n")
    page = report.markdown(command="pytest -m gpu", commit="abc1234", machine={"GPUs": "1 x H100 (80 GiB)"})
    assert page.index("1 x H100") < page.index("| test_a | passed | 12 |  |")
    assert "| test_b | skipped | 0 | needs / two GPUs |" in page
    assert re.search(r"abc1234.*## Tests.*## Second\n\n\| a \|.*## Third\n\nwords\n$", page, re.DOTALL)


def test_a_long_reason_is_cut():
    assert one_line("x" * 300, at_most=10) == "xxxxxxx..."


def test_the_machine_names_what_computes():
    found = describe_machine()
    assert found["torch"].startswith("2.") and "megatron-core" in found


def test_outside_of_a_checkout_the_commit_is_unknown(tmp_path):
    assert commit_of(tmp_path) == "unknown"
