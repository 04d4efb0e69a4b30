"""The sandbox against programs that try to pass, leak, stall or stay; and honest ones, which must notice nothing."""

import os
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.rewards import sandbox_process
from megatron_r1.rewards.code import score_code
from megatron_r1.rewards.sandbox import Sandbox, SandboxConfig, SandboxError, available_levels
from megatron_r1.rewards.sandbox_seccomp import filter_code

sys.path.insert(0, str(Path(__file__).parent / "hostile"))
from programs import HONEST, HOSTILE, SLEEP

pytestmark = pytest.mark.slow  # a hundred programs that take what they can, for a minute: make test-slow
REPOSITORY = Path(__file__).parents[2]
SMALL = {"cpu_seconds": 1, "wall_seconds": 1.5, "memory_mib": 256, "output_kib": 64, "file_mib": 8, "processes": 4}
STALLS = [entry for entry in HOSTILE if HOSTILE.index(entry) >= [name for name, *_ in HOSTILE].index("sleeps")]
LEVELS = available_levels()
WORKING = [level for level, reason in LEVELS.items() if reason is None]


def case(level, entry):
    reason = LEVELS[level]
    return pytest.param(level, entry, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


def cases(entries):
    """Every entry at the best level of this machine; what does not take seconds at the other one too."""
    best = WORKING[0] if WORKING else "bubblewrap"
    return [case(level, entry) for level in LEVELS for entry in entries if level == best or entry not in STALLS]


@pytest.fixture(scope="module")
def boxes():
    opened = {}

    def get(level, **limits):
        key = (level, *limits)
        if key not in opened:
            allowed = level == "none"
            opened[key] = Sandbox(SandboxConfig(isolation=level, allow_unisolated=allowed, **{**SMALL, **limits}))
        return opened[key]

    yield get
    for box in opened.values():
        box.close()


class World:
    """What a program could reach if the sandbox leaked: files, a folder, an environment and listening sockets."""

    def __init__(self, folder):
        self.token = "token" + secrets.token_hex(16)
        self.mark = "mark" + secrets.token_hex(8)
        self.outside = folder / "outside"
        self.outside.mkdir(mode=0o777)
        self.secret = folder / "secret.txt"
        self.secret.write_text(self.token)
        for path in (folder, *folder.parents[:2]):
            path.chmod(path.stat().st_mode | 0o755)
        self.secret.chmod(0o644)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", self.port))
        self.path = str(folder / "s")
        self.unix, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.unix.bind(self.path)
        self.abstract.bind("\0" + self.mark)
        self.unix.listen()
        self.abstract.listen()
        for listener in self.sockets:
            listener.setblocking(False)

    @property
    def sockets(self):
        return (self.tcp, self.udp, self.unix, self.abstract)

    def fill(self, program):
        for word, value in {
            "SECRET_FILE": self.secret,
            "OUTSIDE": self.outside,
            "PARENT": os.getpid(),
            "PORT": self.port,
            "SOCKET": self.path,
            "ABSTRACT": self.mark,
            "MARK": self.mark,
            "REPOSITORY": REPOSITORY,
        }.items():
            program = program.replace(f"@{word}@", str(value))
        return program

    def assert_untouched(self):
        assert list(self.outside.iterdir()) == []
        for listener in (self.tcp, self.unix, self.abstract):
            with pytest.raises(BlockingIOError):
                listener.accept()
        with pytest.raises(BlockingIOError):
            self.udp.recv(1)


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = World(tmp_path)
    monkeypatch.setenv("MEGATRON_R1_SECRET", made.token)
    yield made
    for listener in made.sockets:
        listener.close()


def remains(mark):
    """Command lines with `mark`, and of programs in a sandbox of this process, that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
            program = "exec(marshal.loads(posix.pread" in words and "def main" not in words  # not the launcher
            if mark in words or (
                program and os.getpid() in [p.pid for p in psutil.Process(int(path.parts[2])).parents()]
            ):
                found.append(words)
        except (OSError, psutil.Error):  # ended meanwhile
            continue
    return found


@pytest.mark.parametrize(
    ("level", "entry"), cases(HOSTILE), ids=lambda value: value if type(value) is str else value[0]
)
def test_a_hostile_program_gains_nothing(boxes, world, level, entry):
    _, mode, _, text = entry
    program, box = world.fill(text), boxes(level)
    hidden = world.token[::-1]  # the answer: a word of its own, so that it cannot be the secret by another way
    if mode == "main":
        tests = {"inputs": ["7\n"], "outputs": [hidden]}
        good = f"print({hidden!r})"
    else:
        tests = {"asserts": [f"assert f(7) == {hidden!r}"], "entry_point": "f"}
        good = f"def f(x): return {hidden!r}"
    began = time.monotonic()
    verdict = score_code(tests, program, box)
    assert time.monotonic() - began < SMALL["wall_seconds"] + 8  # a busy machine included
    assert (verdict.passed, verdict.total) == (0, 1)
    assert remains(world.mark) == []
    world.assert_untouched()
    shown = [verdict.stderr.encode()]
    if mode == "main" and entry not in STALLS:
        done = box.run(program, "7\n")
        shown += [done.stdout, done.stderr]
    elif mode == "serve":
        for done in box.check(program, "f", f"assert candidate(7) == {hidden!r}")[1:]:  # the program's own process
            shown += [done.stdout, done.stderr]
    for content in shown:
        for word in (world.token.encode(), hidden.encode(), b"ESCAPED", b"WROTE " + str(world.outside).encode()):
            assert word not in content
    world.assert_untouched()
    assert score_code(tests, good, box).correct


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("sleeps", "timeout"),
        ("spins", "timeout"),
        ("child-stays", "exited"),
        ("memory", "memory"),
        ("mmap-bomb", "crashed"),
        ("floods-stdout", "output_limit"),
        ("floods-stderr", "output_limit"),
        ("closes-everything", "timeout"),
        ("syntax-bomb", "crashed"),
    ],
)
@pytest.mark.parametrize("level", ["none", "best"])
def test_the_end_of_a_program_is_named(boxes, name, ending, level):
    if level == "best":
        if not WORKING:
            pytest.skip(str(LEVELS))
        level = WORKING[0]
    elif name in ("spins", "closes-everything"):
        pytest.skip("seconds that show nothing new at this level")
    [program] = [entry[3] for entry in HOSTILE if entry[0] == name]
    mark = "mark" + secrets.token_hex(8)
    done = boxes(level).run(program.replace("@MARK@", mark))
    assert done.ending == ending, done
    assert len(done.stdout) <= SMALL["output_kib"] << 10
    assert remains(mark) == []


@pytest.mark.parametrize("level", ["bubblewrap", "namespaces", "none"])
@pytest.mark.parametrize("name", [name for name, *_ in HONEST])
def test_an_honest_program_passes(boxes, level, name):
    if LEVELS.get(level) is not None:
        pytest.skip(str(LEVELS[level]))
    [(_, program, given, wanted)] = [entry for entry in HONEST if entry[0] == name]
    box = boxes(level, wall_seconds=30.0, cpu_seconds=10, output_kib=512)  # a busy machine may be slow
    verdict = score_code({"inputs": [given], "outputs": [wanted]}, program, box)
    assert verdict.outcomes == ("passed",), verdict


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_passes_from_one_program_to_the_next(boxes, level):
    if LEVELS[level] is not None:
        pytest.skip(str(LEVELS[level]))
    box = boxes(level)
    word = secrets.token_hex(16)
    assert (
        box.run(f"open('kept', 'w').write({word!r}); open('/tmp/kept', 'w').write({word!r})", word).ending == "exited"
    )
    seen = box.run(
        "import os, gc, sys\nprint(os.listdir('.'), os.listdir('/tmp'), os.environ, sys.orig_argv, os.getpid())\n"
        "for d in range(64):\n    try: print(d, os.pread(d, 1 << 20, 0))\n    except OSError: pass"
    )
    assert seen.ending == "exited" and word.encode() not in seen.stdout and b"kept" not in seen.stdout
    assert seen.stdout.startswith(b"[] [] ")


@pytest.mark.parametrize("level", LEVELS)
def test_a_program_has_no_privilege(boxes, level):
    if LEVELS[level] is not None:
        pytest.skip(str(LEVELS[level]))
    done = boxes(level).run(
        "import os, ctypes, resource\nc = ctypes.CDLL(None)\nhead = (ctypes.c_uint32 * 2)(0x20080522, 0)\n"
        "sets = (ctypes.c_uint32 * 6)()\nc.capget(ctypes.byref(head), ctypes.byref(sets))\n"
        "print(os.getuid() == 0, list(sets), [c.prctl(23, n, 0, 0, 0) for n in range(41)], c.prctl(39, 0, 0, 0, 0), "
        "c.prctl(21, 0, 0, 0, 0), os.getpid(), os.getsid(0), os.path.exists('/proc/self'))\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NPROC))"
    )
    no_bounding_set = str([0] * 41)
    assert done.stdout.decode().splitlines() == [
        f"False {[0] * 6} {no_bounding_set} 1 2 1 1 False",
        "(0, 0) (4, 4)",
    ], done


def test_programs_run_at_the_same_time(boxes):
    box = boxes(WORKING[0] if WORKING else "none")
    done = []
    threads = [
        threading.Thread(target=lambda n=n: done.append((n, box.run(f"print(int(input()) + {n})", "1").stdout)))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == [(n, f"{n + 1}\n".encode()) for n in range(6)]


def test_a_dead_launcher_is_reported_and_replaced():
    mark = "mark" + secrets.token_hex(8)
    with Sandbox(SandboxConfig(allow_unisolated=True, **SMALL)) as box:
        [launcher] = box._idle
        launcher._process.kill()
        launcher._process.wait()
        assert box.run("print(1)").stdout == b"1\n"
        [launcher] = box._idle
        process = psutil.Process(launcher._process.pid)
        if box.level == "bubblewrap":
            [process] = process.children()
        timer = threading.Timer(0.3, process.kill)
        timer.start()
        with pytest.raises(SandboxError, match="died"):
            box.run(f"import sys, os\nos.execv(sys.executable, [sys.executable, '-c', '{SLEEP} # {mark}'])")
        assert box.run("print(2)").stdout == b"2\n"
    deadline = time.monotonic() + 20
    while remains(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert remains(mark) == []


def test_closing_ends_the_launchers_and_refuses_more():
    box = Sandbox(SandboxConfig(allow_unisolated=True, **SMALL))
    [launcher] = box._idle
    box.close()
    assert launcher._process.poll() is not None
    with pytest.raises(ValueError, match="closed"):
        box.run("print(1)")


def test_a_killed_scorer_leaves_nothing():
    mark = "mark" + secrets.token_hex(8)
    code = (
        "from megatron_r1.rewards.sandbox import *\n"
        "box = Sandbox(SandboxConfig(allow_unisolated=True, wall_seconds=300.0))\n"
        "print('ready', flush=True)\n"
        f'box.run(\'import os, sys; os.execv(sys.executable, [sys.executable, "-c", "import time; '
        f"time.sleep(300) # {mark}\"])')\n"
    )
    scorer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert scorer.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 20
    while len(remains(mark)) < 2 and time.monotonic() < deadline:  # the scorer's own words hold the mark as well
        time.sleep(0.05)
    assert len(remains(mark)) == 2
    scorer.kill()
    scorer.wait()
    scorer.stdout.close()
    while remains(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert remains(mark) == []


def test_without_isolation_is_refused_unless_allowed(monkeypatch):
    with pytest.raises(ConfigError, match="allow_unisolated=True"):
        SandboxConfig(isolation="none")

    def refuse(level):
        if level != "none":
            raise SandboxError(f"{level} is forbidden here")
        return []

    monkeypatch.setattr(sandbox_process, "_prefix", refuse)
    with pytest.raises(ConfigError) as caught:
        Sandbox(SandboxConfig(**SMALL))
    message = str(caught.value)
    for words in ("bubblewrap is forbidden", "namespaces is forbidden", "apt-get install", "allow_unisolated"):
        assert words in message
    with Sandbox(SandboxConfig(allow_unisolated=True, **SMALL)) as box:
        assert box.level == "none"
        assert box.run("print(1)").stdout == b"1\n"


def test_bad_limits_are_named_together():
    with pytest.raises(ConfigError) as caught:
        SandboxConfig(cpu_seconds=0, wall_seconds=float("nan"), memory_mib=1, processes=0, isolation="jail")
    assert len(caught.value.faults) == 5


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_way_through_the_filter_ends(machine):
    code = list(struct.iter_unpack("=HBBI", filter_code(machine)))
    assert [step[3] for step in code[-4:]] == [0x7FFF0000, 0x00050001, 0x00050026, 0x80000000]
    for here, (operation, true, false, _) in enumerate(code[:-4]):
        assert here + 1 + max(true, false) < len(code)
        assert operation in (0x20, 0x15, 0x35, 0x45)


@pytest.mark.skipif(not Path("/usr/include/asm-generic/unistd.h").exists(), reason="no kernel headers here")
def test_call_numbers_are_those_of_the_kernel_headers():
    from megatron_r1.rewards.sandbox_seccomp import REFUSED

    text = "#include <asm-generic/unistd.h>\n" + "\n".join(f"{name} __NR_{name}" for name in REFUSED)
    done = subprocess.run(["cpp", "-P", "-D__BITS_PER_LONG=64", "-"], input=text, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(done.stderr)
    found = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
    for name, (_, number) in REFUSED.items():
        if number is not None and found[name].isdigit():
            assert int(found[name]) == number, name


def test_another_machine_is_refused():
    with pytest.raises(ConfigError, match="riscv64"):
        filter_code("riscv64")
