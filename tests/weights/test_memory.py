"""A conversion's memory does not grow with the checkpoint."""

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from make_checkpoint import make_checkpoint

from megatron_r1.config.shape import load_shape
from megatron_r1.weights.folders import open_checkpoint

TOOL = Path(__file__).parent.parent.parent / "tools" / "convert_checkpoint.py"


def pss(pid):
    """Proportional set size of a process and its descendants in bytes: pages that n of them share count 1/n each."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    except (OSError, psutil.Error):
        return 0  # one of them ended meanwhile
    return total


def peak_of(*words):
    process = subprocess.Popen([sys.executable, str(TOOL), *(str(word) for word in words)])
    peak, stop = [0], threading.Event()

    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], pss(process.pid))
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert process.wait(600) == 0
    finally:
        stop.set()
        thread.join()
        process.kill()
    return peak[0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_peak_memory_of_a_large_fp8_checkpoint(tmp_path):
    """4 GB in 8 files to Megatron (FP8 becomes bf16) and back, 2 workers: twice the largest tensor, and 1 GiB."""
    make_checkpoint(tmp_path / "hf", num_bytes=4e9, num_shards=8, fp8=True)
    reader = open_checkpoint(tmp_path / "hf", load_shape(tmp_path / "hf"))
    bound = 2 * max(info.num_bytes for info in reader.tensors.values()) + (1 << 30)
    reader.close()
    there = peak_of("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron")
    shutil.rmtree(tmp_path / "hf")
    back = peak_of("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    shutil.rmtree(tmp_path / "megatron")
    shutil.rmtree(tmp_path / "back")
    print(f"peak PSS {there / 1e6:.0f} MB to Megatron, {back / 1e6:.0f} MB back; bound {bound / 1e6:.0f} MB")
    assert 0 < there <= bound and 0 < back <= bound
