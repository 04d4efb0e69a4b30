"""Weights through the host's shared memory, into a server of two workers.

Oracle: transformers on the folder whose weights were pushed. Layouts with several trainer ranks: test_sync_layouts.py;
the transport without servers: test_peers.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from weight_sources import FolderSource

from megatron_r1.config import RolloutConfig, SamplingConfig
from megatron_r1.engines.vllm.server import LocalEngine, start_engines
from megatron_r1.engines.vllm.shard_channel import ShardChannel
from megatron_r1.engines.vllm.sync import WeightSync

from .conftest import prompt


@pytest.fixture(scope="module")
def pair(config: RolloutConfig, folders: list[Path], tmp_path_factory) -> Iterator[LocalEngine]:
    """A server of two workers that started from folders[0]."""
    shared = dataclasses.replace(config, sync="ipc", tensor_parallel=2, threads=1)
    (engine,) = start_engines(shared, model_path=folders[0], run_dir=tmp_path_factory.mktemp("run"))
    with engine:
        yield engine


@pytest.fixture
def source(folders: list[Path]) -> FolderSource:
    return FolderSource(folders[0])


def mapped_by(engine: LocalEngine) -> list[str]:
    """The trainer's memory files that processes of the server have mapped."""
    import psutil

    processes = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
    return [region.path for each in processes for region in each.memory_maps() if "mr1-weights-" in region.path]


@pytest.mark.slow
def test_both_workers_serve_what_was_pushed(pair, source, folders, oracles):
    sync = WeightSync(pair.config, source=source, engines=(pair,), model_path=folders[0])
    ids = prompt(100, 7)
    for version, which in enumerate((1, 2), start=1):
        source.show(folders[which])
        report = sync.push(version)
        assert report.num_bytes == sum(tensor.nbytes for tensor in source.tensors.values())
        np.testing.assert_allclose(pair.client.score(ids), oracles[which].logprobs(ids), atol=1e-4)
        (completion,) = pair.client.generate(ids, num_completions=1, sampling=SamplingConfig(max_new_tokens=4), seed=0)
        assert completion.weight_version == version
    assert len(mapped_by(pair)) == 2 and not list(Path("/dev/shm").glob("mr1-weights-*"))
    sync.close()
    assert mapped_by(pair) == []


@pytest.mark.slow
def test_a_worker_holds_its_shard_of_one_layer_beside_the_model(pair, source, folders):
    """vLLM's own reload holds a layer's tensors unsharded, on every worker."""
    sync = WeightSync(pair.config, source=source, engines=(pair,), model_path=folders[0])
    sync.push(sync.version + 1)
    sync.close()
    held = [int(found) for found in re.findall(r"at most (\d+) bytes were held", pair.log_path.read_text())]
    layer = sum(tensor.nbytes for name, tensor in source.tensors.items() if name.startswith("model.layers.2."))
    # Half of the experts and of most of attention, all of its down projections, the router and the norms.
    assert held and layer / 2 < max(held) < 0.7 * layer, (held, layer)


@pytest.mark.slow
def test_a_server_sleeps_and_is_woken_in_the_order_of_a_step(pair, source, folders, oracles):
    """On a CPU no memory moves; the routes, their order and what they refuse are vLLM's own."""
    sync = WeightSync(pair.config, source=source, engines=(pair,), model_path=folders[0])
    source.show(folders[1])
    for level in (1, 2):
        pair.client.sleep(level)
        assert pair.client.request("GET", "/is_sleeping") == {"is_sleeping": True}
        pair.client.wake("weights")
        assert pair.client.request("GET", "/is_sleeping") == {"is_sleeping": True}
        sync.push(sync.version + 1)
        pair.client.wake("kv_cache")
        assert pair.client.request("GET", "/is_sleeping") == {"is_sleeping": False}
        ids = prompt(60, level)
        np.testing.assert_allclose(pair.client.score(ids), oracles[1].logprobs(ids), atol=1e-4)
    pair.client.wake("kv_cache")  # one that is awake stays so
    assert np.isfinite(pair.client.score(prompt(20, 1))).all()
    sync.close()


@pytest.mark.slow
def test_tensors_above_a_bucket_and_many_rounds(pair, source, folders, oracles, tmp_path):
    """The embedding has 128 x 64 x 4 = 32,768 bytes, a round at most 30,000."""
    source.show(folders[2])
    channel = ShardChannel(
        (pair,), source, source.metadata(), sync="ipc", rank=0, bucket_bytes=30_000, private_dir=tmp_path
    )
    assert len({message.round for message in channel.plan.messages}) > 20
    assert channel.control is not None
    channel.control.version = 77
    channel.control.pause()
    channel.send()
    channel.control.resume()
    channel.close()
    ids = prompt(100, 7)
    np.testing.assert_allclose(pair.client.score(ids), oracles[2].logprobs(ids), atol=1e-4)


@pytest.mark.slow
def test_a_source_that_fails_in_the_middle_leaves_the_server_able_to_serve(pair, source, folders, oracles):
    sync = WeightSync(pair.config, source=source, engines=(pair,), model_path=folders[0])
    source.show(folders[1])
    sync.push(sync.version + 1)

    class Broken(FolderSource):
        reads = 0

        def read(self, tensor, box):
            self.reads += 1
            if self.reads == 30:
                raise OSError("the disk is gone")
            return super().read(tensor, box)

    broken = WeightSync(pair.config, source=Broken(folders[2]), engines=(pair,), model_path=folders[0])
    with pytest.raises(OSError, match="the disk is gone"):
        broken.push(99)
    broken.close()
    ids = prompt(60, 3)
    assert np.isfinite(pair.client.score(ids)).all()
    sync.disconnect()
    sync.push(sync.version + 1)
    np.testing.assert_allclose(pair.client.score(ids), oracles[1].logprobs(ids), atol=1e-4)
    sync.close()
    assert mapped_by(pair) == []
