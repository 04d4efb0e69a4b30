"""The pool's promise: an answer costs at most its own limit, and the workers stay light."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from megatron_r1.rewards.pool import GradingPool, WorkerStartError

BOMBS = ("10^{10^{10}}", "9^{9^{9^{9}}}", "1000000000!")


def grade_all(pool, answers, reference="18"):
    return [future.result(60) for future in [pool.submit("math", a, reference=reference) for a in answers]]


def children():
    return [p for p in psutil.Process().children() if "megatron_r1.rewards.worker" in p.cmdline()]


@pytest.fixture(scope="module")
def pool():
    with GradingPool(num_workers=2, timeout_seconds=3.0) as made:
        yield made


def test_results_come_in_order(pool):
    verdicts = grade_all(pool, ["18", "17", "18.0", "19", "36/2"])
    assert [v.correct for v in verdicts] == [True, False, True, False, True]


def test_pathological_answers_cost_only_their_own_limit(pool):
    before = pool.counts()
    started = time.monotonic()
    verdicts = grade_all(pool, [*BOMBS, "18.0", "17.0"])
    assert [v.correct for v in verdicts] == [False, False, False, True, False]
    assert time.monotonic() - started < 60  # three limits of 3 s over two workers, and restarts
    after = pool.counts()
    assert after.graded - before.graded == 5
    assert after.timeouts - before.timeouts == sum(v.timed_out for v in verdicts) >= 1


def test_workers_are_light_and_have_no_torch(pool):
    grade_all(pool, ["18.0", "36/2"])
    for child in children():
        assert child.memory_info().rss < 200 << 20
        assert not any("torch" in os.path.basename(m.path) for m in child.memory_maps())


def test_dead_worker_is_reported_and_replaced():
    others = {c.pid for c in children()}
    with GradingPool(num_workers=1, timeout_seconds=20.0) as pool:
        assert grade_all(pool, ["18.0"])[0].correct
        [child] = [c for c in children() if c.pid not in others]
        child.kill()
        child.wait(5)
        dead, alive = grade_all(pool, ["18.0", "18.0"])
        assert not dead.correct and "died" in dead.error
        assert alive.correct
        assert pool.counts().errors == 1


def test_grader_that_raises_is_an_error_not_a_crash(pool):
    future = pool.submit("reasoning_gym", "1", reference="1", metadata={})
    verdict = future.result(60)
    assert not verdict.correct and "KeyError" in verdict.error


def test_close_ends_the_processes_and_refuses_more():
    pool = GradingPool(num_workers=1, timeout_seconds=5.0)
    assert grade_all(pool, ["18.0"])[0].correct
    before = {c.pid for c in children()}
    pool.close()
    assert len(before - {c.pid for c in children()}) == 1
    with pytest.raises(ValueError, match="closed"):
        pool.submit("math", "1", reference="1")


def test_worker_that_cannot_start_is_an_error_of_the_installation():
    with (
        GradingPool(num_workers=1, timeout_seconds=5.0, graders=("no_such_grader",)) as pool,
        pytest.raises(WorkerStartError, match="exit status 1"),
    ):
        pool.submit("math", "18.0", reference="18").result(60)


def test_workers_die_with_a_killed_parent():
    script = (
        "import os, signal\nfrom megatron_r1.rewards.pool import GradingPool\n"
        "import psutil\npool = GradingPool(num_workers=1, timeout_seconds=60)\n"
        "pool.submit('math', '18.0', reference='18').result()\n"
        "pool.submit('math', '9^{9^{9^{9}}}', reference='18')\n"
        "print(psutil.Process().children()[0].pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    psutil.Process(pid).kill()
    raise AssertionError("the worker outlived its parent")
