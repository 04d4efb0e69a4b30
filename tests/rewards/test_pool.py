"""The pool's promise: an answer costs at most its own limit, and the workers stay light."""

import json
import os
import resource
import subprocess
import sys
import time

import psutil
import pytest

from megatron_r1.rewards import gym, math_grader
from megatron_r1.rewards import pool as pool_module
from megatron_r1.rewards.grader import WorkerFunction
from megatron_r1.rewards.pool import GradingPool, Verdict, WorkerStartError, read_reply

MATH, GYM = math_grader.GRADER.worker, gym.GRADER.worker
MISSING = WorkerFunction(name="math", function="megatron_r1.rewards.no_such_grader:grade")


def grade_all(pool, answers, reference="18"):
    return [future.result(60) for future in [pool.submit("math", a, reference=reference) for a in answers]]


def children():
    return [p for p in psutil.Process().children() if "megatron_r1.rewards.worker" in p.cmdline()]


IN_THE_WORKERS_PLACE = """
import json, sys, time
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[-3]))
connection.send_bytes(b"ready")
while True:
    job = json.loads(connection.recv_bytes())
    if job["answer"] == "spin":
        while True: pass
    if job["answer"] == "never":
        time.sleep(3600)
    if job["answer"] == "late":
        time.sleep(2.0)
    connection.send_bytes(json.dumps({"id": job["id"], "score": float(job["answer"] != "wrong")}).encode())
"""


@pytest.fixture
def odd_workers(tmp_path, monkeypatch):
    """Workers that hang in ways that no grader of ours does: the limits are for what nobody foresaw."""
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{IN_THE_WORKERS_PLACE}")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


@pytest.fixture(scope="module")
def pool():
    with GradingPool(num_workers=2, timeout_seconds=3.0, functions=(MATH,)) as made:
        yield made


def test_results_come_in_order(pool):
    verdicts = grade_all(pool, ["18", "17", "18.0", "19", "36/2"])
    assert [v.correct for v in verdicts] == [True, False, True, False, True]


def test_an_answer_costs_only_its_own_limit(odd_workers):
    with GradingPool(num_workers=2, timeout_seconds=0.5, functions=(MATH,)) as pool:
        started = time.monotonic()
        verdicts = grade_all(pool, ["spin", "right", "spin", "spin", "right", "wrong"])
        assert [v.correct for v in verdicts] == [False, True, False, False, True, False]
        assert [v.timed_out for v in verdicts] == [True, False, True, True, False, False]
        assert time.monotonic() - started < 30
        assert (pool.counts().graded, pool.counts().timeouts) == (6, 3)


def test_the_limit_is_processor_time(odd_workers):
    """A worker that waits for the processor, as on a busy machine, is no slow answer."""
    with GradingPool(num_workers=1, timeout_seconds=0.5, functions=(MATH,)) as pool:
        verdict = grade_all(pool, ["late"])[0]
        assert verdict.correct and not verdict.timed_out


def test_a_worker_that_does_nothing_is_ended_all_the_same(odd_workers, monkeypatch):
    monkeypatch.setattr(pool_module, "MOST_WAITING", 3.0)
    with GradingPool(num_workers=1, timeout_seconds=0.3, functions=(MATH,)) as pool:
        begun = time.monotonic()
        assert grade_all(pool, ["never"])[0].timed_out
        assert time.monotonic() - begun < 20


def test_workers_are_light_and_have_no_torch(pool):
    grade_all(pool, ["18.0", "36/2"])
    for child in children():
        assert child.memory_info().rss < 200 << 20
        assert not any("torch" in os.path.basename(m.path) for m in child.memory_maps())


def test_dead_worker_is_reported_and_replaced():
    others = {c.pid for c in children()}
    with GradingPool(num_workers=1, timeout_seconds=20.0, functions=(MATH,)) as pool:
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
    pool = GradingPool(num_workers=1, timeout_seconds=5.0, functions=(MATH,))
    assert grade_all(pool, ["18.0"])[0].correct
    before = {c.pid for c in children()}
    pool.close()
    assert len(before - {c.pid for c in children()}) == 1
    with pytest.raises(ValueError, match="closed"):
        pool.submit("math", "1", reference="1")


def test_worker_that_cannot_start_is_an_error_of_the_installation():
    with (
        GradingPool(num_workers=1, timeout_seconds=5.0, functions=(MISSING,)) as pool,
        pytest.raises(WorkerStartError, match="exit status 1"),
    ):
        pool.submit("math", "18.0", reference="18").result(60)


def test_workers_die_with_a_killed_parent():
    script = (
        "import os, signal\nfrom megatron_r1.rewards.compose import LANGUAGE\n"
        "from megatron_r1.rewards.math_grader import GRADER\nfrom megatron_r1.rewards.pool import GradingPool\n"
        "import psutil\npool = GradingPool(num_workers=1, timeout_seconds=60, functions=(GRADER.worker, LANGUAGE))\n"
        "pool.submit('math', '18.0', reference='18').result()\n"
        "for _ in range(100): pool.submit('language', 'one word after another ' * 9000, reference='en')\n"
        "import time\ntime.sleep(0.3)\n"  # the worker is at work, with seconds of it left
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


@pytest.fixture
def children_cannot_start(monkeypatch, tmp_path):
    """The system refuses every new worker, as it does when it has no memory or no free process."""
    monkeypatch.setattr(pool_module, "START_RETRY_SECONDS", (0.05, 0.05))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no_python_here"))


def test_refused_process_is_reported_and_the_pool_recovers(children_cannot_start, monkeypatch):
    with GradingPool(num_workers=1, timeout_seconds=20.0, functions=(MATH,)) as pool:
        with pytest.raises(WorkerStartError, match=r"refused a new process .*no_python_here.*lower"):
            pool.check_started()
        for _ in range(2):
            with pytest.raises(WorkerStartError, match="refused a new process"):
                pool.submit("math", "18.0", reference="18").result(20)
        monkeypatch.undo()
        assert grade_all(pool, ["18.0"])[0].correct


def test_check_started_waits_for_the_imports():
    with GradingPool(num_workers=2, timeout_seconds=5.0, functions=(MATH, GYM)) as pool:
        pool.check_started()
        assert all(started.done() for started in pool._started)
    with (
        GradingPool(num_workers=1, timeout_seconds=5.0, functions=(MISSING,)) as pool,
        pytest.raises(WorkerStartError, match="exit status 1"),
    ):
        pool.check_started()


def test_closing_at_once_does_not_wait_for_the_imports_nor_hang_a_waiter():
    started = time.monotonic()
    pool = GradingPool(num_workers=1, timeout_seconds=5.0, functions=(MATH, GYM))
    pool.close()
    assert time.monotonic() - started < 10
    with pytest.raises(WorkerStartError, match="closed"):
        pool.check_started()


def test_worker_sees_no_secret_and_is_limited(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    others = {c.pid for c in children()}
    with GradingPool(num_workers=1, timeout_seconds=20.0, functions=(MATH, GYM)) as pool:
        pool.check_started()
        [child] = [c for c in children() if c.pid not in others]
        environment = child.environ()
        assert "secret" not in environment.values()
        allowed = {*pool_module.PASSED_ON, "PYTHONPATH", "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE"}
        assert set(environment) <= {*allowed, "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
        assert child.rlimit(resource.RLIMIT_FSIZE) == (0, 0)
        assert child.rlimit(resource.RLIMIT_CORE) == (0, 0)
        assert child.rlimit(resource.RLIMIT_NPROC) == (0, 0)
        assert 0 < child.rlimit(resource.RLIMIT_AS)[1] <= 4 << 30
        assert child.memory_info().vms < 2 << 30  # far below its limit once everything is imported
        assert os.readlink(f"/proc/{child.pid}/fd/0") == "/dev/null"


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"no json",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        json.dumps({"score": 1.0}).encode(),
        json.dumps({"id": "other", "score": 1.0}).encode(),
        json.dumps({"id": None, "score": 1.0}).encode(),
        json.dumps({"id": "mine", "score": 1}).encode(),
        json.dumps({"id": "mine"}).encode(),
    ],
)
def test_reply_that_is_not_to_the_job_is_no_verdict(reply):
    assert read_reply(reply, "mine") is None


def test_proper_reply_is_a_verdict():
    assert read_reply(b'{"id": "mine", "score": 1.0}', "mine") == Verdict(score=1.0)
    failed = b'{"id": "mine", "score": 1.0, "error": "ValueError: x"}'
    assert read_reply(failed, "mine") == Verdict(score=0.0, error="ValueError: x")


def test_worker_that_answers_for_another_job_is_ended_and_counted(tmp_path, monkeypatch):
    """A program in the worker's place that always says right, without knowing the job's id."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\nimport sys\nfrom multiprocessing.connection import Connection\n"
        "connection = Connection(int(sys.argv[-3]))\nconnection.send_bytes(b'ready')\n"
        'connection.recv_bytes()\nconnection.send_bytes(b\'{"id": "0", "score": 1.0}\')\n'
        "connection.recv_bytes()\n"
    )
    fake.chmod(0o755)
    before = {c.pid for c in psutil.Process().children()}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(fake))
        pool = GradingPool(num_workers=1, timeout_seconds=20.0, functions=(MATH,))
        pool.check_started()
        [impostor] = [c for c in psutil.Process().children() if c.pid not in before]
    verdict = pool.submit("math", "17.0", reference="18").result(20)
    assert not verdict.correct and "no proper reply" in verdict.error
    assert not impostor.is_running()
    right, wrong = grade_all(pool, ["18.0", "17.0"])
    assert right.correct and not wrong.correct and wrong.error is None
    counts = pool.counts()
    assert (counts.graded, counts.timeouts, counts.errors) == (3, 0, 1)
    pool.close()
