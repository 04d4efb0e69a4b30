"""What may go wrong between a trainer and a server that take turns: each time the server serves the policy's weights in
the end, with a real vLLM server and two trainer ranks."""

from __future__ import annotations

from functools import cache

import pytest
from oracles import save_model, write_tokenizer
from ranks import run_launches

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]  # a server that starts five times
CASES = (
    "push_while_asleep",
    "woken_out_of_turn",
    "dies_asleep",
    "wake_fails",
    "wake_fails_without_a_sync",
    "sleep_refused",
)


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    @cache
    def of() -> tuple[list[str], str]:
        root = tmp_path_factory.mktemp("turns") / "model"
        save_model("deepseek_v3", root, mtp_layers=1)
        write_tokenizer(root)
        failures = run_launches("colocation.py", {2: [str(root), *CASES]}, timeout_seconds=2800)
        file = root / "passed"
        return file.read_text().split() if file.exists() else [], failures.get(2, "")

    return of


@pytest.mark.parametrize("case", CASES)
def test_the_server_serves_the_policy_in_the_end(passed, case):
    done, said = passed()
    assert case in done, said
