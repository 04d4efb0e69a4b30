"""Worker: a policy and a vLLM server that take turns, with one thing that goes wrong in each case.

usage: colocation.py STORE ROOT CASE...; ROOT is the model's folder. Before each case the server samples. Rank 0 adds a
line to ROOT/passed for each case that ended as it should: the server serves the policy's weights, whose memory is away.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from sync import ROLLOUT, sequences  # noqa: E402

from megatron_r1.config import ModelConfig, OptimizerConfig, ParallelConfig, SamplingConfig, TrainConfig  # noqa: E402
from megatron_r1.config.shape import load_shape  # noqa: E402
from megatron_r1.data.packing import RowLayout, pack, unpack  # noqa: E402
from megatron_r1.engines.vllm.server import LocalEngine, start_engines  # noqa: E402
from megatron_r1.engines.vllm.sync import WeightSync  # noqa: E402
from megatron_r1.errors import EngineError  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402
from megatron_r1.rollout.collect import collect  # noqa: E402
from megatron_r1.stages.grpo.colocation import Colocation, ResidentSource  # noqa: E402
from megatron_r1.stages.grpo.push import push_weights  # noqa: E402
from megatron_r1.stages.sft.loss import sft_loss  # noqa: E402

PARALLEL = ParallelConfig(world_size=2, expert=2)
TURNS = dataclasses.replace(ROLLOUT, sleep_level=2, start_timeout_seconds=600.0, max_restarts=3)
TRAIN = TrainConfig(dtype="fp32", offload=("weights", "gradients", "optimizer"))
LAYOUT = RowLayout(tokens_per_microbatch=128, row_multiple=2)
AWAY = {"weights", "gradients", "optimizer"}


class WatchedEngine:
    """Notes what of the trainer was away whenever the server was started again."""

    def __init__(self, engine: LocalEngine, colocation: Colocation) -> None:
        self.at_restarts: list[set[str]] = []
        restart = engine.restart

        def noted(*arguments: object) -> None:
            self.at_restarts.append(set(colocation.offload.away))
            restart(*arguments)  # pyright: ignore[reportArgumentType]

        engine.restart = noted


class Turns:
    """What the cases share."""

    def __init__(self, root: Path, engines: tuple[LocalEngine, ...]) -> None:
        self.engines, self.said = engines, list[str]()
        self.policy = Policy(
            load_shape(root),
            parallel=PARALLEL,
            train=TRAIN,
            model=ModelConfig(path=root),
            optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-3),
            total_steps=100,
            device=torch.device("cpu"),
        )
        self.colocation = Colocation(TURNS, TRAIN, self.policy, engines, self.said.append)
        self.colocation.started_asleep()
        self.watched = [WatchedEngine(engine, self.colocation) for engine in engines]
        self.sync = WeightSync(
            TURNS,
            source=ResidentSource(self.policy.weights(dtype=torch.float32), self.colocation.offload),
            engines=engines,
            model_path=root,
            rank=dist.get_rank(),
        )

    def train(self) -> None:
        rank, ranks = topology.data_parallel()
        self.policy.step(pack(sequences(self.policy.steps_taken), LAYOUT, num_ranks=ranks)[rank], sft_loss)

    def push(self) -> None:
        push_weights(self.sync, self.colocation, self.sync.version + 1)

    def check(self) -> None:
        """The server samples with the policy's weights, and its memory."""
        assert self.colocation.turn == "sampling" and self.colocation.offload.away == AWAY
        fixed = sequences(99)
        served = [[engine.client.score(one.token_ids) for one in fixed] for engine in self.engines]
        dist.barrier()
        self.colocation.offload.to_device(("weights",))
        rows = pack(fixed, LAYOUT)[0]
        _, ranks = topology.data_parallel()
        own = unpack(rows, self.policy.logprobs(rows * ranks)[: len(rows)], [len(one) for one in fixed])
        self.colocation.offload.to_host(("weights",))
        for scores in served:
            for number, theirs in enumerate(scores):
                np.testing.assert_allclose(own[number], theirs, atol=2e-2)

    def kill(self, *, core_only: bool) -> None:
        for engine in self.engines:
            processes = psutil.Process(engine.pid).children(recursive=True)
            cores = [process for process in processes if "EngineCore" in process.name()]
            assert len(cores) == 1
            for process in cores if core_only else [psutil.Process(engine.pid), *processes]:
                process.send_signal(signal.SIGKILL)
            if not core_only:
                psutil.wait_procs([psutil.Process(engine.pid)], timeout=30)
        dist.barrier()


def push_while_asleep(turns: Turns) -> None:
    """At both levels; nothing goes wrong."""
    for level in (1, 2):
        turns.colocation.level = level
        turns.colocation.for_training()
        turns.train()
        turns.push()
        turns.check()


def woken_out_of_turn(turns: Turns) -> None:
    """A wake that vLLM passes over is an error, and not a rollout that never ends."""
    for engine in turns.engines:
        engine.client.sleep(1)
        try:
            engine.client.wake("kv_cache")
        except EngineError as error:
            assert "sleeps on" in str(error)
        else:
            raise AssertionError("it is said to serve")
        engine.client.wake("weights")  # now both are


def dies_asleep(turns: Turns) -> None:
    turns.colocation.for_training()
    turns.train()
    turns.kill(core_only=False)
    turns.push()
    # A start takes all that a server has when it serves.
    assert all(watched.at_restarts == [AWAY] for watched in turns.watched)


def wake_fails(turns: Turns) -> None:
    """Before a sync: the server's engine is gone, its HTTP process is there and says so."""
    turns.colocation.for_training()
    turns.train()
    turns.kill(core_only=True)
    turns.push()
    assert all("is stopped" in said and "/wake_up?tags=weights" in said for said in turns.said), turns.said
    assert len(turns.said) == len(turns.engines)
    assert all(watched.at_restarts[0] == AWAY for watched in turns.watched)


def wake_fails_without_a_sync(turns: Turns) -> None:
    """Between training and a rollout with the same weights (an export, a checkpoint): the rollout starts it again."""
    turns.colocation.for_training(keep_weights=True)
    turns.kill(core_only=True)
    turns.colocation.for_sampling()
    assert len(turns.said) == len(turns.engines)
    if turns.engines:
        collected = collect(
            turns.engines,
            [sequences(99)[0].token_ids[:8].tolist()],
            group_size=2,
            sampling=SamplingConfig(max_new_tokens=4),
            seed=1,
            resync=lambda engine: turns.sync.push(turns.sync.version, engines=[engine]) and None,
        )
        assert collected.restarts == 1
        assert {completion.weight_version for completion in collected.groups[0]} == {turns.sync.version}
    else:
        turns.sync.push(turns.sync.version)


def sleep_refused(turns: Turns) -> None:
    """vLLM has no level 7: 422. The trainer gets its memory, the server is started again for the sync."""
    turns.colocation.level = 7
    turns.colocation.for_training()
    turns.colocation.level = 2
    assert not any(engine.alive() for engine in turns.engines) and not turns.colocation.offload.away
    assert all("/sleep?level=7" in said for said in turns.said) and len(turns.said) == len(turns.engines)
    turns.train()
    turns.push()


CASES = (push_while_asleep, woken_out_of_turn, dies_asleep, wake_fails, wake_fails_without_a_sync, sleep_refused)


def main(store: str, root: Path, names: list[str]) -> None:
    topology.initialise(PARALLEL, seed=1, cpu=True, store_path=store)
    engines = start_engines(TURNS, model_path=root, run_dir=root / "run") if os.environ["RANK"] == "0" else ()
    try:
        for engine in engines:
            engine.client.sleep(1)
        turns = Turns(root, engines)
        turns.push()
        for case in (case for case in CASES if case.__name__ in names):
            turns.said.clear()
            for watched in turns.watched:
                watched.at_restarts.clear()
            for engine in engines:
                engine.forgive()
            case(turns)
            turns.check()
            if engines:
                with (root / "passed").open("a") as file:
                    file.write(f"{case.__name__}\n")
        turns.sync.close()
    finally:
        for engine in engines:
            engine.stop()
    topology.finalise()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
