"""Measure a GRPO step beside the bare parts it is made of, in one run.

usage: python tools/benchmark_throughput.py [--recipe tiny] [--json OUT] [--repeats 5]
           [--shape qwen2_5_math_1_5b] [--prompts 64] [--group-size 8] [--new-tokens 1024] [--device cuda]

For each repeat, interleaved so that a busy machine disturbs both sides alike:
  rollout  our collection (prompts encoded, graded, decoded)  against  bare `vllm serve` on the same prompts and seeds
  train    our Policy.step on packed rows                     against  Megatron's forward-backward on the same rows
  sync     our push of all weights                            against  a memcpy of the same bytes
and the step's remaining work: packing, grading that outlasts generation, broadcast, bookkeeping.
Medians of wall-clock seconds; CPU-seconds of this process tree beside them. Trains on one rank.

--shape puts a model of that form, with random weights and the tiny tokenizer, in the place of the recipe's: what a real
model costs is measured without having one. --device cuda trains and serves in bf16 on one GPU that both share.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_r1.config import ParallelConfig, load_shape
from megatron_r1.errors import ConfigError
from megatron_r1.policy.platform import configure_process
from megatron_r1.recipes import RECIPES
from megatron_r1.recipes.tiny import WarmUpThenGRPO
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.faults import validate

SHAPES = Path(__file__).resolve().parent.parent / "megatron_r1" / "recipes"
TOKENIZER = SHAPES / "tiny_v3"
SHARED_FRACTION = 0.45
"""Of a GPU's memory, for the server; the trainer has the rest."""
PROMPT_TOKENS = 64
ROW_TOKENS = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", choices=sorted(RECIPES))
    parser.add_argument("--json", type=Path, help="write the table as JSON too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", help=f"a folder of {SHAPES} with a config.json")
    parser.add_argument("--prompts", type=int, help="of a step (default: the recipe's)")
    parser.add_argument("--group-size", type=int, help="samples of a prompt (default: the recipe's)")
    parser.add_argument("--new-tokens", type=int, help="at most, of a sample (default: the recipe's)")
    arguments = parser.parse_args()
    config = RECIPES[arguments.recipe]()
    if isinstance(config, WarmUpThenGRPO):
        # Random weights cost as much as those of a warm-up.
        config = dataclasses.replace(config.grpo, name=config.name, model=config.warm_up.model)
    if not isinstance(config, GRPOConfig):
        parser.error(f"--recipe {arguments.recipe} has no reinforcement learning of its own; take quickstart or tiny")
    with tempfile.TemporaryDirectory() as scratch:
        config = dataclasses.replace(
            config,
            run_dir=Path(scratch) / "run",
            parallel=ParallelConfig(),
            train=dataclasses.replace(config.train, threads_per_rank=len(os.sched_getaffinity(0))),
        )
        if arguments.shape:
            config = with_shape(config, arguments.shape, Path(scratch))
        config = resized(config, arguments.prompts, arguments.group_size, arguments.new_tokens)
        if arguments.device == "cuda":
            config = on_gpu(config)
        try:
            validate(config)
        except ConfigError as error:
            parser.error(str(error))
        configure_process(
            threads=config.train.threads_per_rank,
            cpu=config.rollout.device == "cpu",
            deterministic=config.train.deterministic,
        )
        result = measure(config, arguments.repeats, Path(scratch))
    print(as_table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def with_shape(config: GRPOConfig, name: str, scratch: Path) -> GRPOConfig:
    """A model of the shape `name` with random weights; its folder is made in `scratch`."""
    folder = scratch / name
    folder.mkdir()
    shutil.copy(SHAPES / name / "config.json", folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder)
    return dataclasses.replace(
        config,
        name=f"{config.name} with the shape {name}",
        model=dataclasses.replace(config.model, path=folder, initialise="random"),
    )


def resized(config: GRPOConfig, prompts: int | None, group_size: int | None, new_tokens: int | None) -> GRPOConfig:
    rollout = config.rollout
    if new_tokens:
        sampling = dataclasses.replace(rollout.sampling, max_new_tokens=new_tokens)
        rollout = dataclasses.replace(rollout, sampling=sampling, max_model_len=new_tokens + PROMPT_TOKENS)
    return dataclasses.replace(
        config,
        rollout=rollout,
        prompts_per_step=prompts or config.prompts_per_step,
        group_size=group_size or config.group_size,
    )


def on_gpu(config: GRPOConfig) -> GRPOConfig:
    """One GPU for both: bf16, weights through the host's memory, CUDA graphs."""
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, dtype="bf16", recompute="full", tokens_per_microbatch=ROW_TOKENS),
        rollout=dataclasses.replace(
            config.rollout,
            device="cuda",
            sync="ipc",
            dtype="bf16",
            memory_fraction=SHARED_FRACTION,
            enforce_eager=False,
            start_timeout_seconds=0.0,
        ),
    )


def measure(config: GRPOConfig, repeats: int, scratch: Path) -> dict[str, Any]:
    import torch

    from megatron_r1.data.problems import load_problems
    from megatron_r1.data.stream import ProblemStream
    from megatron_r1.data.tokenizer import load_tokenizer
    from megatron_r1.engines.vllm.server import start_engines
    from megatron_r1.engines.vllm.sync import WeightSync
    from megatron_r1.policy import topology
    from megatron_r1.rewards.wiring import scorer_for
    from megatron_r1.stages.common.trainer import EXPORT_DTYPE, build_policy, row_layout
    from megatron_r1.stages.grpo.collector import Collector
    from megatron_r1.weights.save import save_hf_folder

    cpu = config.rollout.device == "cpu"
    topology.initialise(config.parallel, seed=0, cpu=cpu)
    shape, tokenizer = load_shape(config.model.path), load_tokenizer(config.model.path)
    policy = build_policy(
        config,
        shape,
        torch.device("cpu" if cpu else "cuda"),
        model=config.model,
        total_steps=100,
        temperature=1.0,
    )
    base = scratch / "base"
    dtype = EXPORT_DTYPE[config.rollout.dtype]
    save_hf_folder(policy.weights(dtype=dtype, include_mtp=True), config.model.path, base)
    split = load_problems(config.data)
    stream = ProblemStream(split, seed=0)
    engines = start_engines(config.rollout, model_path=base, run_dir=config.run_dir)
    source = policy.weights(dtype=dtype)
    sync = WeightSync(config.rollout, source=source, engines=engines, model_path=base)
    with scorer_for(config.rewards, split.known()) as scorer:
        collector = Collector(
            rollout=config.rollout, data=config.data, tokenizer=tokenizer, sync=sync, engines=engines, scorer=scorer
        )
        layout = row_layout(config, tokenizer.pad_id, vocab_size=shape.vocab_size)
        bench = Bench(config, policy, collector, engines[0], sync, source, layout)
        try:
            for repeat in range(repeats + 1):  # the first warms up and is thrown away
                bench.one_repeat(stream.take(config.prompts_per_step), repeat)
        finally:
            sync.close()
            for engine in engines:
                engine.stop()
    topology.finalise()
    shutil.rmtree(config.run_dir, ignore_errors=True)
    return bench.result(config)


class Bench:
    """One step's parts and their floors; every list holds one number a repeat, the first of them warm-up."""

    def __init__(self, config, policy, collector, engine, sync, source, layout) -> None:
        self.config, self.policy, self.collector, self.engine = config, policy, collector, engine
        self.sync, self.source, self.layout = sync, source, layout
        self.seconds: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}
        self.tokens: list[int] = []
        self.trained: list[int] = []
        self.sync_bytes = 0

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        import torch

        cpu, begun = tree_cpu_seconds(), time.perf_counter()
        value = work()
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begun)
        self.cpu.setdefault(name, []).append(tree_cpu_seconds() - cpu)
        return value

    def one_repeat(self, problems, repeat: int) -> None:
        from megatron_r1.data.packing import pack_rank
        from megatron_r1.stages.grpo.loss import policy_loss
        from megatron_r1.stages.grpo.metrics import step_metrics
        from megatron_r1.stages.grpo.mismatch import measure
        from megatron_r1.stages.grpo.sampling import Sampled
        from megatron_r1.stages.grpo.sequences import add_logprobs, to_sequences
        from megatron_r1.stages.grpo.usable import advantages_of

        grpo, algorithm = self.config.grpo, self.config.algorithm
        longest = self.config.rollout.sampling.max_new_tokens
        seed = repeat * 100_000
        if repeat % 2:  # whoever goes second would find warmer caches
            self.timed("bare rollout", lambda: self.bare_rollout(problems, seed))
        rollout = self.timed("rollout", lambda: self.collector.collect(problems, group_size=grpo.group_size, seed=seed))
        if not repeat % 2:
            self.timed("bare rollout", lambda: self.bare_rollout(problems, seed))
        groups = rollout.groups
        sampled = Sampled(groups=groups, kept=groups)
        self.seconds.setdefault("reward after generation", []).append(rollout.reward_seconds)
        advantages = [advantages_of(algorithm, algorithm.rewards(group, longest)) for group in groups]
        part = list(zip(groups, advantages, strict=True))
        rows = self.timed(
            "packing",
            lambda: pack_rank(to_sequences(part, algorithm, longest), self.layout, rank=0, num_ranks=1),
        )
        if self.policy._reference is None:
            self.policy.refresh_reference()
        rows = self.timed("logprob", lambda: add_logprobs(self.policy, [rows], algorithm))[0]
        loss = policy_loss(algorithm, own_is_old=True)
        self.timed("bare train", lambda: self.bare_train(rows))
        found = []

        def inspect(logprobs) -> None:
            found.append(self.timed("of it the mismatch", lambda: measure(rows, logprobs)))

        result = self.timed("train", lambda: self.policy.step(rows, loss, inspect=inspect))
        self.timed(
            "bookkeeping",
            lambda: json.dumps(step_metrics([result], sampled, advantages, algorithm, found[0].metrics(), step=0)),
        )
        report = self.timed("sync", lambda: self.sync.push(repeat + 1))
        self.sync_bytes = report.num_bytes
        self.timed("bare sync", self.bare_copy)
        self.tokens.append(sum(len(c.token_ids) for g in groups for c in g.completions))
        self.trained.append(sum(row.num_tokens for row in rows))

    def bare_rollout(self, problems, seed: int) -> None:
        """The same prompts straight to vLLM's completions route, all at once, nothing done with the answers."""
        import requests
        import requests.adapters

        sampling, group_size = self.collector._sampling(False), self.config.group_size
        prompts = [self.collector.encode(problem).tolist() for problem in problems]
        name = self.engine.client.request("GET", "/v1/models")["data"][0]["id"]
        session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=len(prompts))
        session.mount("http://", adapter)
        headers = {"Authorization": f"Bearer {self.engine.token}"}

        def ask(index: int) -> int:
            body = {
                "model": name,
                "prompt": prompts[index],
                "n": group_size,
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "seed": seed + index * group_size,
                "stop_token_ids": list(sampling.stop_token_ids),
                "logprobs": 0,
                "return_token_ids": True,
            }
            url = f"http://{self.engine.host}:{self.engine.port}/v1/completions"
            return session.post(url, json=body, headers=headers, timeout=600).json()["usage"]["completion_tokens"]

        with ThreadPoolExecutor(len(prompts)) as pool:
            sum(pool.map(ask, range(len(prompts))))

    def bare_train(self, rows) -> None:
        """Megatron's schedule over the same rows with the plainest loss, and its optimizer: no metrics, no GRPO."""
        import torch
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_r1.policy.batch import to_device

        policy = self.policy

        def forward(iterator, model):
            batch = next(iterator)
            scores = model(
                batch.token_ids, batch.position_ids, None, labels=batch.labels, packed_seq_params=batch.packed
            )
            return scores, lambda s: (-(s.logprobs * batch.token_weight).sum(), torch.zeros((), dtype=torch.int), {})

        for chunk in policy.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        policy.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([to_device(row, policy.device) for row in rows]),
            model=policy.chunks[0],
            num_microbatches=len(rows),
            seq_length=rows[0].num_tokens,
            micro_batch_size=1,
            forward_only=False,
        )

    def bare_copy(self) -> None:
        for _, tensor in self.source:
            tensor.clone()

    def result(self, config: GRPOConfig) -> dict[str, Any]:
        median = {name: statistics.median(values[1:]) for name, values in self.seconds.items()}
        cpu = {name: statistics.median(values[1:]) for name, values in self.cpu.items()}
        tokens, trained = statistics.median(self.tokens[1:]), statistics.median(self.trained[1:])
        phases = ("rollout", "logprob", "train", "sync", "packing", "bookkeeping")
        step = sum(median[name] for name in phases)
        rest = median["packing"] + median["bookkeeping"] + median["reward after generation"]
        pairs = {
            name: statistics.median(
                floor / own for own, floor in zip(self.seconds[name][1:], self.seconds[f"bare {name}"][1:], strict=True)
            )
            for name in ("rollout", "train")
        }
        return {
            "recipe": config.name,
            "repeats": len(self.seconds["train"]) - 1,
            "samples_per_step": config.prompts_per_step * config.group_size,
            "completion_tokens": tokens,
            "trained_tokens": trained,
            "seconds": median,
            "cpu_seconds": cpu,
            "step_seconds": step,
            "tokens_per_second": trained / step,
            "rollout_of_bare_vllm": pairs["rollout"],
            "train_of_bare_forward_backward": pairs["train"],
            "rest_of_step": rest / step,
            "sync_milliseconds": median["sync"] * 1e3,
            "sync_megabytes": self.sync_bytes / 1e6,
        }


def tree_cpu_seconds() -> float:
    """CPU-seconds that this process and all its live descendants have used."""
    import psutil

    own = psutil.Process()
    total = 0.0
    for process in [own, *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def as_table(result: dict[str, Any]) -> str:
    seconds, cpu = result["seconds"], result["cpu_seconds"]
    lines = [
        f"recipe {result['recipe']}: {result['samples_per_step']} samples, {result['completion_tokens']:,.0f} sampled, "
        f"{result['trained_tokens']:,.0f} trained tokens per step; medians of {result['repeats']}",
        "",
        "| phase | seconds | CPU-seconds | bare seconds | bare / ours |",
        "| --- | --- | --- | --- | --- |",
    ]
    ratios = {"rollout": result["rollout_of_bare_vllm"], "train": result["train_of_bare_forward_backward"]}
    for name in ("rollout", "logprob", "train", "sync", "packing", "bookkeeping"):
        bare = f"{seconds[f'bare {name}']:.4f}" if f"bare {name}" in seconds else "-"
        ratio = f"{ratios[name]:.2f}" if name in ratios else "-"
        lines.append(f"| {name} | {seconds[name]:.4f} | {cpu[name]:.4f} | {bare} | {ratio} |")
    lines += [
        "",
        f"step {result['step_seconds']:.2f} s, {result['tokens_per_second']:,.0f} tokens/s; rest of the step "
        f"{result['rest_of_step']:.1%}; sync {result['sync_milliseconds']:.0f} ms, {result['sync_megabytes']:.1f} MB",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
