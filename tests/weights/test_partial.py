"""Conversions that are killed, stopped, doubled or short of disk: nothing half-written gets a name."""

import errno
import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import convert_checkpoint
import psutil
import pytest
import torch
from oracles import save_model
from safetensors.torch import load_file, save_file

from megatron_r1.errors import CheckpointError
from megatron_r1.weights import hf_sink, partial, torch_dist_sink
from megatron_r1.weights.convert import ConvertOptions, convert
from megatron_r1.weights.files import OpenFiles, reserve
from megatron_r1.weights.pieces import task_bytes
from megatron_r1.weights.verify import compare

TO_MEGATRON = ConvertOptions(target="torch_dist", workers=1)
TO_HF = ConvertOptions(target="hf", workers=1)
RESUME = ConvertOptions(target="torch_dist", workers=1, resume=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one shape."""
    folder = tmp_path_factory.mktemp("models")
    save_model("deepseek_v3", folder / "a", mtp_layers=1)
    shutil.copytree(folder / "a", folder / "b")
    file = folder / "b" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    return folder


@pytest.fixture
def hf(models):
    return models / "a"


class Tool:
    """The tool in a process of its own (forked: imports take seconds), in a session of its own like a terminal's."""

    def __init__(self, output, *words, before=lambda: None):
        self.output = output
        self.process = multiprocessing.get_context("fork").Process(
            target=self._run, args=([str(word) for word in words], before)
        )
        self.process.start()

    def _run(self, words, before):
        os.setsid()
        handle = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        before()
        status = convert_checkpoint.main(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def signal(self, number, group=False):
        (os.killpg if group else os.kill)(self.process.pid, number)

    def wait(self):
        """(exit status, output)"""
        self.process.join(60)
        assert not self.process.is_alive()
        return self.process.exitcode, self.output.read_text()

    def workers(self):
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def tool(tmp_path):
    started = []

    def start(*words, before=lambda: None):
        started.append(Tool(tmp_path / f"output-{len(started)}", *words, before=before))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def small_tasks():
    torch_dist_sink.task_bytes = lambda total: 200_000


def slow_first_task(seconds=60):
    """Small tasks; the first one hangs, so that other workers become idle."""
    small_tasks()
    run = torch_dist_sink.TorchDistSink.run

    def slow(self, task, number, *more):
        time.sleep(0 if number else seconds)
        return run(self, task, number, *more)

    torch_dist_sink.TorchDistSink.run = slow


def at_the_end(act):
    """Call `act` when everything is written and the folder has not got its name yet."""
    fsync = partial.fsync

    def hook(path):
        if path.name.endswith(".partial"):
            act()
        fsync(path)

    partial.fsync = hook


def killed_at_the_end(tool, *words):
    one = tool(*words, before=lambda: at_the_end(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert one.wait()[0] == -signal.SIGKILL


def finished(folder):
    """Records of finished tasks."""
    return list((folder.with_name(folder.name + ".partial") / ".records").glob("[0-9]*.json"))


def same_files(a, b):
    files = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    assert all((a / file).read_bytes() == (b / file).read_bytes() for file in files)


# ---- kills and signals


def test_killed_and_resumed_is_the_same_as_undisturbed(hf, tmp_path, tool):
    out = tmp_path / "out"
    undisturbed = tool("hf-to-megatron", hf, tmp_path / "undisturbed", before=small_tasks)
    one = tool("hf-to-megatron", hf, out, before=slow_first_task)
    until(lambda: len(finished(out)) > 3)
    workers = one.workers()
    assert len(workers) == 2
    one.signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive, "workers outlive a killed conversion"
    assert not out.exists()
    with pytest.raises(FileExistsError, match="--resume"):
        convert(hf, out, TO_MEGATRON)
    kept = {path.name: path.stat().st_mtime_ns for path in finished(out)}
    again = tool(
        "hf-to-megatron", hf, out, "--resume", before=lambda: (small_tasks(), at_the_end(lambda: time.sleep(1)))
    )
    until(lambda: len(finished(out)) > len(kept) or out.exists())
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in finished(out)}.items()
    assert again.wait()[0] == 0 and undisturbed.wait()[0] == 0
    same_files(out, tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir() if "output" not in path.name) == ["out", "undisturbed"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_order(hf, tmp_path, tool, number):
    """Ctrl-C reaches the whole group, SIGTERM the process alone. What runs is finished, nobody stays behind."""
    out = tmp_path / "out"
    one = tool("hf-to-megatron", hf, out, before=lambda: slow_first_task(2))
    until(lambda: len(finished(out)) > 3)
    workers = one.workers()
    one.signal(number, group=number == signal.SIGINT)
    status, output = one.wait()
    assert status == 2 and output == "stopped; what is done is kept: repeat the command with --resume\n"
    assert not psutil.wait_procs(workers, timeout=5)[1]
    small = tool("hf-to-megatron", hf, out, "--resume", before=small_tasks)
    assert small.wait()[0] == 0 and compare(hf, out).equal


def test_a_killed_worker_is_said_and_the_rest_is_kept(hf, tmp_path, tool):
    out = tmp_path / "out"
    one = tool("hf-to-megatron", hf, out, before=slow_first_task)
    until(lambda: len(finished(out)) > 3)
    one.workers()[0].kill()
    status, output = one.wait()
    assert status == 2 and "a worker process was killed (is memory short?)" in output and "--resume" in output
    assert "Traceback" not in output and len(finished(out)) > 3


# ---- resuming what is not ours, or damaged


def test_resuming_with_another_source_or_precision_is_refused(models, tmp_path, tool):
    killed_at_the_end(tool, "hf-to-megatron", models / "a", tmp_path / "out")
    with pytest.raises(CheckpointError, match="other options"):
        convert(models / "a", tmp_path / "out", ConvertOptions(target="torch_dist", precision="bf16", resume=True))
    with pytest.raises(CheckpointError, match="another source"):
        convert(models / "b", tmp_path / "out", RESUME)
    convert(models / "a", tmp_path / "out", RESUME)
    assert compare(models / "a", tmp_path / "out").equal and not (tmp_path / "out" / ".records").exists()


def test_a_partial_folder_without_a_plan_is_not_gone_on_with(models, tmp_path, tool):
    small = ("--file-gb", "2e-4")
    killed_at_the_end(tool, "hf-to-hf", models / "a", tmp_path / "out", *small)
    shutil.rmtree(tmp_path / "out.partial" / ".records")
    with pytest.raises(CheckpointError, match=r"out\.partial: holds files but no plan of a conversion; remove it"):
        convert(models / "b", tmp_path / "out", ConvertOptions(target="hf", resume=True))
    assert not (tmp_path / "out").exists()


def test_a_file_that_the_conversion_did_not_write_is_not_published(hf, tmp_path, tool):
    killed_at_the_end(tool, "hf-to-megatron", hf, tmp_path / "out")
    (tmp_path / "out.partial" / "__9_0.distcp").write_bytes(b"stale")
    with pytest.raises(CheckpointError, match=r"__9_0\.distcp should not be there"):
        convert(hf, tmp_path / "out", RESUME)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "{}", '{"file": 3', "[]"])
def test_a_damaged_record_means_the_task_is_done_again(hf, tmp_path, tool, content):
    killed_at_the_end(tool, "hf-to-megatron", hf, tmp_path / "out")
    (tmp_path / "out.partial" / ".records" / "0.json").write_text(content)
    convert(hf, tmp_path / "out", RESUME)
    assert compare(hf, tmp_path / "out").equal


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_damaged_plan_is_an_error(hf, tmp_path, tool, content):
    killed_at_the_end(tool, "hf-to-megatron", hf, tmp_path / "out")
    (tmp_path / "out.partial" / ".records" / "plan.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"plan\.json: .*remove .*out\.partial and convert anew"):
        convert(hf, tmp_path / "out", RESUME)


# ---- two at once


def test_a_second_conversion_is_kept_away_until_the_first_has_its_name(models, tmp_path, tool):
    out = tmp_path / "out"
    waiting = tmp_path / "waiting"

    def linger():
        waiting.touch()
        until(lambda: not waiting.exists())

    first = tool("hf-to-megatron", models / "a", out, before=lambda: at_the_end(linger))
    until(waiting.exists)
    for options in (TO_MEGATRON, RESUME):
        with pytest.raises(CheckpointError, match="another conversion is writing it"):
            convert(models / "b", out, options)
    waiting.unlink()
    assert first.wait()[0] == 0
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        convert(models / "b", out, RESUME)
    assert compare(models / "a", out).equal
    assert not list(tmp_path.glob("out.partial*"))


# ---- destinations that will not do


def test_a_destination_that_exists_is_left_alone(hf, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert convert_checkpoint.main(["hf-to-megatron", str(hf), str(tmp_path / "out")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "file").touch()
    for target, words in (
        (hf / "out", "inside the source"),
        (tmp_path / "no" / "out", "does not exist"),
        (hf, "is the source itself"),
        (tmp_path / "file", "is a file"),
        (Path("/proc"), "is a mount point"),
    ):
        with pytest.raises((CheckpointError, FileExistsError), match=words):
            convert(hf, target, RESUME)


@pytest.mark.parametrize("options", [TO_HF, ConvertOptions(target="hf", resume=True)])
def test_a_source_that_is_called_as_the_partial_folder_is_left_alone(hf, tmp_path, options):
    source = tmp_path / "x.partial"
    shutil.copytree(hf, source)
    with pytest.raises(CheckpointError, match="where the source lies"):
        convert(source, tmp_path / "x", options)
    same_files(source, hf)


def test_links_and_the_current_folder_as_destination(hf, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("elsewhere")
    (tmp_path / "here").mkdir()
    convert(hf, tmp_path / "link", TO_MEGATRON)
    convert(hf, tmp_path / "dangling", TO_MEGATRON)
    monkeypatch.chdir(tmp_path / "here")
    convert(hf, Path("."), TO_MEGATRON)
    for name in ("real", "elsewhere", "here"):
        assert compare(hf, tmp_path / name).equal and not (tmp_path / name).is_symlink()
    assert (tmp_path / "link").is_symlink() and not list(tmp_path.glob("*.partial*"))


# ---- disks


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    """A file with a hole, larger than the disk."""
    hidden = 4096
    rows = int(shutil.disk_usage(tmp_path).free * 1.2) // (hidden * 4)
    source = tmp_path / "large"
    save_model("llama", source)
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": rows, "hidden_size": hidden}
    (source / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.shape for name, tensor in load_file(source / "model.safetensors").items()}
    header, position = {}, 0
    for name, shape in tensors.items():
        shape = [rows if size == 101 else hidden if size == 64 and i in hidden_dims(name) else size
                 for i, size in enumerate(shape)]  # fmt: skip
        end = position + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with open(source / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    for options in (TO_MEGATRON, RESUME, TO_HF):
        with pytest.raises(CheckpointError, match=r"bytes are to be written and [\d,]+ are free; make room"):
            convert(source, tmp_path / "out", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]


def hidden_dims(name):
    """Dimensions of a tiny Llama's tensors that are the hidden size (which its heads' width together is, too)."""
    if "norm" in name:
        return (0,)
    return (0,) if "o_proj" in name or "down_proj" in name else (1,)


def limit_files(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_is_named_and_leaves_no_destination(hf, tmp_path, tool):
    one = tool("hf-to-megatron", hf, tmp_path / "out", before=lambda: (small_tasks(), limit_files(150_000)))
    status, output = one.wait()
    assert status == 2 and "out.partial" in output and "make room" in output and "Traceback" not in output, output
    assert not (tmp_path / "out").exists()
    one = tool("hf-to-megatron", hf, tmp_path / "out", "--resume", before=small_tasks)
    assert one.wait()[0] == 0 and compare(hf, tmp_path / "out").equal


def test_a_disk_that_is_full_at_the_end(hf, tmp_path, tool):
    """Every tensor fits, the manifest does not."""
    words = ("hf-to-hf", hf, tmp_path / "out", "--file-gb", "1e-9")
    one = tool(*words, before=lambda: limit_files(27_000))
    status, output = one.wait()
    assert status == 2 and "out.partial" in output, output
    assert "make room and repeat the command with --resume" in output
    assert len(output.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert tool(*words, "--resume").wait()[0] == 0 and compare(hf, tmp_path / "out").equal


def test_a_source_that_vanishes_is_named_and_not_taken_for_a_full_disk(hf, tmp_path, tool):
    source = tmp_path / "source"
    shutil.copytree(hf, source)
    begun = tmp_path / "begun"
    run = torch_dist_sink.TorchDistSink.run

    def wait_and_run(*arguments):
        begun.touch()
        until(lambda: not begun.exists())
        return run(*arguments)

    def before():
        torch_dist_sink.TorchDistSink.run = wait_and_run

    one = tool("hf-to-megatron", source, tmp_path / "out", before=before)
    until(begun.exists)
    (source / "model.safetensors").unlink()
    begun.unlink()
    status, output = one.wait()
    assert status == 2 and output == f"{source}/model.safetensors: cannot be opened (No such file or directory)\n"


def test_an_error_before_any_task_is_finished_leaves_nothing(hf, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(hf, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.4.embed_tokens.weight"] += 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="differs from"):
        convert(source, tmp_path / "out", TO_MEGATRON)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_reserved_space_is_taken_and_keeps_what_is_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"head")
    with open(path, "r+b") as file:
        reserve(file.fileno(), 1_000_000)
    content = path.read_bytes()
    assert len(content) == 1_000_000
    assert content[:4] == b"head"
    assert not any(content[4:])


def test_a_disk_without_room_for_the_files_is_found_before_any_work(hf, tmp_path, tool):
    """A limit on file sizes stands for the disk: EFBIG is treated as ENOSPC is."""
    convert(hf, tmp_path / "megatron", TO_MEGATRON)
    one = tool("megatron-to-hf", tmp_path / "megatron", tmp_path / "out", before=lambda: limit_files(150_000))
    status, output = one.wait()
    assert status == 2 and "make room" in output and len(output.splitlines()) == 1, output
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("total", "expected"), [(0, 32 << 20), (4 << 30, 64 << 20), (64 << 30, 1 << 30), (1 << 40, 1 << 30)]
)
def test_tasks_are_a_64th_of_the_whole_within_bounds(total, expected):
    assert task_bytes(total) == expected


def test_a_write_that_is_lost_is_told_to_the_task_that_wrote_and_done_again(hf, tmp_path, monkeypatch):
    """Linux tells of a lost write once to each open descriptor: so the one that wrote must be the one that asks."""
    fsync, lost = os.fsync, []

    def lose_the_first(handle):
        writes = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if writes and not lost and os.readlink(f"/proc/self/fd/{handle}").endswith(".safetensors"):
            lost.append(handle)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(handle)

    monkeypatch.setattr(partial.os, "fsync", lose_the_first)
    monkeypatch.setattr(hf_sink, "task_bytes", lambda total: 50_000)
    options = ConvertOptions(target="hf", workers=1)
    with pytest.raises(CheckpointError, match="--resume"):
        convert(hf, tmp_path / "out", options)
    records = {int(path.stem) for path in (tmp_path / "out.partial" / ".records").glob("[0-9]*.json")}
    assert 0 not in records
    monkeypatch.setattr(partial.os, "fsync", fsync)
    convert(hf, tmp_path / "out", replace(options, resume=True))
    assert compare(hf, tmp_path / "out").equal


def test_without_sync_nothing_waits_for_the_disk_and_the_result_is_the_same(hf, tmp_path, monkeypatch):
    convert(hf, tmp_path / "synced", TO_MEGATRON)

    def refuse(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    convert(hf, tmp_path / "out", replace(TO_MEGATRON, sync=False))
    same_files(tmp_path / "out", tmp_path / "synced")
    with pytest.raises(CheckpointError, match="Input/output error"):
        convert(hf, tmp_path / "again", TO_MEGATRON)


def test_unsynced_work_is_trusted_until_the_machine_starts_anew(hf, tmp_path, tool, monkeypatch):
    target = tmp_path / "out"
    stopped = tool("hf-to-megatron", hf, target, "--no-sync", before=slow_first_task)
    until(lambda: finished(target))
    stopped.signal(signal.SIGKILL)
    stopped.process.join()
    other_boot = tmp_path / "boot_id"
    other_boot.write_text("another\n")
    with monkeypatch.context() as patch:
        patch.setattr(partial, "_BOOT_ID", other_boot)
        patch.setattr(torch_dist_sink, "task_bytes", lambda total: 200_000)
        with pytest.raises(CheckpointError, match="--no-sync before the machine's last start"):
            convert(hf, target, replace(RESUME, sync=False))
        with pytest.raises(CheckpointError, match="repeat those"):
            convert(hf, target, RESUME)
    assert tool("hf-to-megatron", hf, target, "--no-sync", "--resume", before=small_tasks).wait()[0] == 0
    assert compare(hf, target).equal


def test_records_do_not_outlive_the_data_that_they_speak_of(hf, tmp_path, monkeypatch):
    """A data file is removed ("make room"), and the resumed conversion that makes it anew fails before it fills it."""
    monkeypatch.setattr(hf_sink, "task_bytes", lambda total: 50_000)
    run, out = hf_sink.HFSink.run, tmp_path / "out"
    options = ConvertOptions(target="hf", workers=1, file_bytes=400_000)

    def fail_at(number_that_fails):
        def run_or_fail(self, task, number, *more):
            if number >= number_that_fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return run(self, task, number, *more)

        monkeypatch.setattr(hf_sink.HFSink, "run", run_or_fail)

    fail_at(6)
    with pytest.raises(CheckpointError, match="make room and repeat the command with --resume"):
        convert(hf, out, options)
    assert len(finished(out)) == 6
    min(partial.partial_of(out).glob("model-00001-*.safetensors")).unlink()
    fail_at(0)
    with pytest.raises(CheckpointError, match="make room"):
        convert(hf, out, replace(options, resume=True))
    monkeypatch.setattr(hf_sink.HFSink, "run", run)
    convert(hf, out, replace(options, resume=True))
    assert compare(hf, out).equal


def test_more_files_than_a_process_may_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    paths = [tmp_path / str(number) for number in range(5)]
    for path in paths:
        path.write_text(path.name)
    files = OpenFiles(limit=2)
    for path in (*paths, *reversed(paths), paths[0]):
        assert os.pread(files.handle(str(path)), 10, 0).decode() == path.name
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_manifest_of_the_first_version_keeps_its_aliases(hf, tmp_path):
    """It has hashes of another kind, which are not compared."""
    convert(hf, tmp_path / "megatron", TO_MEGATRON)
    path = tmp_path / "megatron" / "megatron_r1_manifest.json"
    manifest = json.loads(path.read_text())
    tensors = {name: {**record, "blake3": "0"} for name, record in manifest["tensors"].items()}
    for record in tensors.values():
        del record["xxh3_128"]
    path.write_text(json.dumps({**manifest, "format": 1, "tensors": tensors}))
    convert(tmp_path / "megatron", tmp_path / "back", TO_HF)
    assert compare(hf, tmp_path / "back").equal and manifest["aliases"]
