"""The policy: one model on all trainer ranks, that scores sequences and takes optimizer steps.

It owns Megatron's model chunks, gradient buffers and optimizer. It does not know what a reward, a rollout or a stage
is: a loss is a function from token scores to a sum, and all normalisation sits in the batch's token weights.
"""

# Megatron's annotations are narrower than what it takes.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_r1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.model.build import build_model_chunks
from megatron_r1.model.policy_model import TokenScores, TokenValues
from megatron_r1.model.routing import Routing
from megatron_r1.model.transformer_config import PARAMETER_DTYPE, transformer_config
from megatron_r1.policy.batch import DeviceBatch, to_device
from megatron_r1.policy.optimizer import build_optimizer, learning_rate, step_if_finite
from megatron_r1.types import PackedMicrobatch, StepResult
from megatron_r1.weights.export import WeightStream
from megatron_r1.weights.load import load_weights
from megatron_r1.weights.local import LocalTensor, local_tensors
from megatron_r1.weights.table import build_table


@dataclass(frozen=True, slots=True)
class LossOutput:
    """`loss` is this microbatch's part of the step's loss, a plain sum (scalar, differentiable).

    `sums` are detached scalars, each a sum over the trained tokens; the step reports them divided by their number.
    """

    loss: torch.Tensor
    sums: Mapping[str, torch.Tensor]


LossFunction = Callable[[TokenScores, DeviceBatch], LossOutput] | Callable[[TokenValues, DeviceBatch], LossOutput]
Inspect = Callable[[list[np.ndarray]], None]
"""Is told each row's logprobs as `Policy.logprobs` gives them."""


class Policy:
    """A Megatron model with its optimizer. Every method is a collective over all trainer ranks."""

    def __init__(
        self,
        shape: ModelShape,
        *,
        parallel: ParallelConfig,
        train: TrainConfig,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        total_steps: int,
        device: torch.device,
        transformer_engine: bool = False,
        temperature: float = 1.0,
        replay_routes: bool = False,
    ) -> None:
        """`replay_routes`: the routes of rows are used; else they are compared with the model's own only."""
        self.shape, self.device = shape, device
        self.parallel, self.train_config = parallel, train
        self._optimizer_config, self._total_steps = optimizer, total_steps
        self.steps_taken = 0
        self.config = transformer_config(shape, parallel, train, model, transformer_engine=transformer_engine)
        self.table = build_table(shape)
        chunks = build_model_chunks(
            shape,
            self.config,
            transformer_engine=transformer_engine,
            logprob_chunk_tokens=train.logprob_chunk_tokens,
        )
        for chunk in chunks:
            chunk.to(device)
            chunk.temperature = temperature
            chunk.train_mtp = model.train_mtp
            if chunk.mtp_process and not model.train_mtp:
                chunk.mtp.requires_grad_(False)
        self._routing = Routing(chunks, shape) if shape.moe is not None else None
        self._replay: bool | None = replay_routes
        self._tensors = local_tensors(chunks, self.table)
        source = model.load_from or model.path
        self.bytes_read = load_weights(self._tensors, source) if model.initialise == "weights" else 0
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=optimizer.distributed,
            overlap_grad_reduce=False,
        )
        self.chunks = [
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
        # DDP moves parameters into its own buffers; look them up again.
        self._tensors = local_tensors(chunks, self.table)
        if model.initialise == "random":
            for chunk in self.chunks:
                chunk.broadcast_params()
        self.optimizer = build_optimizer(optimizer, self.chunks, PARAMETER_DTYPE[train.dtype])
        self.config.finalize_model_grads_func = _sum_gradients
        self._reference: dict[str, torch.Tensor] | None = None

    # ---- training

    def step(
        self, rows: Sequence[PackedMicrobatch], loss: LossFunction, *, inspect: Inspect | None = None
    ) -> StepResult:
        """One optimizer step on this data-parallel rank's `rows` (every rank passes equally many).

        The step's loss is the sum over all ranks' rows; gradients are summed likewise. A step whose gradient is not
        finite changes nothing and says so. `inspect` is told the logprobs that the gradients were computed with, before
        anything is changed by them; if it raises, on every rank, nothing is.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        # Megatron moves them while it finishes the gradients, before it is known whether the step is taken.
        router_biases = [(bias, bias.clone()) for bias in self._router_biases()]
        updated = False
        try:
            outputs = self._run(rows, loss, forward_only=False)
            if inspect is not None:
                inspect(self._of_whole_rows(rows, outputs))
            rate = learning_rate(self._optimizer_config, self.steps_taken, self._total_steps)
            decay = self._optimizer_config.weight_decay
            updated, grad_norm = step_if_finite(self.optimizer, rate=rate, weight_decay=decay)
        finally:
            if not updated:
                for bias, before in router_biases:
                    bias.copy_(before)
        self.steps_taken += 1
        totals = self._reduce_sums([output["sums"] for output in outputs])
        tokens = max(totals.pop("tokens"), 1.0)
        total_loss = totals.pop("loss")
        return StepResult(
            loss=total_loss,
            grad_norm=grad_norm,
            learning_rate=rate,
            metrics={name: value / tokens for name, value in totals.items()} | {"tokens": tokens},
            skipped=not updated,
        )

    def skip_step(self) -> StepResult:
        """An optimizer step for which there is nothing to train on: it counts in the schedule and changes nothing, not
        even by the momentum of earlier ones. Its result has no metrics."""
        rate = learning_rate(self._optimizer_config, self.steps_taken, self._total_steps)
        self.steps_taken += 1
        return StepResult(loss=0.0, grad_norm=0.0, learning_rate=rate, metrics={}, skipped=True)

    def _router_biases(self) -> list[torch.Tensor]:
        """The score-correction biases that Megatron updates after a step; none if they are frozen."""
        if not self.config.moe_router_enable_expert_bias or not self.config.moe_router_bias_update_rate:
            return []
        return [bias for chunk in self.chunks for name, bias in chunk.named_buffers() if name.endswith("expert_bias")]

    def gradients(self, rows: Sequence[PackedMicrobatch], loss: LossFunction) -> dict[str, torch.Tensor]:
        """The summed gradients of `rows`, by the weight table's names, this rank's shards only. For tests and tools.

        Valid without the distributed optimizer (which keeps each rank only its own part of the reduced gradient).
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._run(rows, loss, forward_only=False)
        return {
            name: local.tensor.main_grad.clone()
            for name, local in self._tensors.items()
            if hasattr(local.tensor, "main_grad")
        }

    # ---- scoring

    def logprobs(self, rows: Sequence[PackedMicrobatch]) -> list[np.ndarray]:
        """Logprob of each row's labels, f32[S] for each of this data-parallel rank's rows, the same on all its ranks
        (position j holds label j: unpack with data.packing). ValueError for a reward model, which has none."""
        if self.shape.reward_head:
            raise ValueError("a reward model gives values(), not logprobs")
        return self._scores(rows)

    def values(self, rows: Sequence[PackedMicrobatch]) -> list[np.ndarray]:
        """A reward model's value at each token, f32[S] for each of this data-parallel rank's rows, the same on all its
        ranks. ValueError for a model that writes text."""
        if not self.shape.reward_head:
            raise ValueError("a model that writes text gives logprobs(), not values")
        return self._scores(rows)

    @torch.no_grad()
    def _scores(self, rows: Sequence[PackedMicrobatch]) -> list[np.ndarray]:
        for chunk in self.chunks:
            chunk.eval()
        return self._of_whole_rows(rows, self._run(rows, None, forward_only=True))

    def _of_whole_rows(self, rows: Sequence[PackedMicrobatch], outputs: Sequence[Mapping]) -> list[np.ndarray]:
        """What `_run` found at each token, f32[S] of each row; the same on all ranks that hold the same data."""
        flat = torch.zeros(sum(row.num_tokens for row in rows), device=self.device)
        start = 0
        if outputs and parallel_state.get_tensor_model_parallel_rank() == 0:
            for row, scored in zip(rows, outputs, strict=True):
                flat[start + scored["positions"].to(self.device)] = scored["tokens"].float()
                start += row.num_tokens
        self._sum_over_model_ranks(flat)
        return [part.cpu().numpy() for part in flat.split([row.num_tokens for row in rows])]

    def _sum_over_model_ranks(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks that hold the same data: tensor, context and pipeline parallel."""
        for group in (
            parallel_state.get_context_parallel_group(),
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
        ):
            if group.size() > 1:
                dist.all_reduce(tensor, group=group)

    def routes_differ(self) -> dict[int, float]:
        """By sparse layer (from 0): of the tokens with routes, in the last pass or step but the reference policy's, the
        share that this model would have sent to other experts; empty without any. A collective."""
        if self._routing is None:
            return {}
        counts = self._routing.counts(self.device)
        dist.all_reduce(counts)
        pairs = zip(self._routing.sparse, counts.tolist(), strict=True)
        return {layer: differing / known for layer, (differing, known) in pairs if known}

    # ---- the reference policy

    def refresh_reference(self) -> None:
        """The reference policy becomes the current one (a copy of this rank's shards in host memory)."""
        self._reference = {name: local.tensor.detach().to("cpu", copy=True) for name, local in self._tensors.items()}

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Within, the model holds the reference policy's weights; after, its own again, bit for bit. The reference
        chooses its experts itself."""
        if self._reference is None:
            raise ValueError("refresh_reference() has not been called")
        own = {name: local.tensor.detach().to("cpu", copy=True) for name, local in self._tensors.items()}
        replay, self._replay = self._replay, None
        try:
            self._copy_in(self._reference)
            yield
        finally:
            self._replay = replay
            self._copy_in(own)

    @torch.no_grad()
    def _copy_in(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            self._tensors[name].tensor.copy_(tensor)

    # ---- state, for checkpoints (policy/checkpoint.py)

    @property
    def tensors(self) -> Mapping[str, LocalTensor]:
        """This rank's parameters and router biases by the weight table's names."""
        return self._tensors

    @property
    def reference(self) -> Mapping[str, torch.Tensor] | None:
        """The reference policy's shards, in host memory; None before refresh_reference()."""
        return self._reference

    def set_reference(self, weights: Mapping[str, torch.Tensor]) -> None:
        """The reference policy becomes `weights`, this rank's shards."""
        self._reference = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}

    def spread_master_weights(self) -> None:
        """The model's weights become those of the optimizer's master weights, on all data-parallel ranks."""
        optimizers = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        for optimizer in optimizers:
            if not optimizer.is_stub_optimizer:
                optimizer._copy_main_params_to_model_params()
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)

    # ---- weights out

    def weights(self, *, dtype: torch.dtype, bucket_bytes: int = 512 << 20, include_mtp: bool = False) -> WeightStream:
        """The model as a stream of (Hugging Face name, tensor); see weights.export."""
        return WeightStream(
            self._tensors, self.table, self.shape, dtype=dtype, bucket_bytes=bucket_bytes, include_mtp=include_mtp
        )

    # ---- Megatron's schedule

    def _run(self, rows: Sequence[PackedMicrobatch], loss: LossFunction | None, *, forward_only: bool) -> list[dict]:
        """Forward (and backward) over all rows. On the last pipeline stage: one dict of tensors for each row."""
        if not rows:
            raise ValueError("no microbatches: every data-parallel rank needs at least one row")
        if self._routing is not None and self._replay is not None:
            self._routing.forget_counts()
        iterators = [iter([to_device(row, self.device, replay=self._replay) for row in rows]) for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=lambda iterator, model: _forward_step(iterator, model, loss),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(rows),
            seq_length=rows[0].num_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _reduce_sums(self, outputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
        """Totals over all rows and ranks, known to every rank (stages before the last have no outputs)."""
        names = sorted(outputs[0]) if outputs else []
        gathered: list[list[str] | None] = [None]
        source = dist.get_world_size() - 1  # the highest rank is always on the last pipeline stage
        gathered[0] = names
        if self.parallel.pipeline_parallel > 1:
            dist.broadcast_object_list(gathered, src=source)
        names = gathered[0] or []
        totals = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        if outputs and parallel_state.get_tensor_model_parallel_rank() == 0:
            for output in outputs:
                totals += torch.stack([output[name].double() for name in names])
        dist.all_reduce(totals)
        return dict(zip(names, totals.tolist(), strict=True))


def _forward_step(
    iterator: Iterator[DeviceBatch], model: torch.nn.Module, loss: LossFunction | None
) -> tuple[object, Callable]:
    batch = next(iterator)
    output = model(
        batch.token_ids,
        batch.position_ids,
        None,
        labels=batch.labels,
        packed_seq_params=batch.packed,
        loss_mask=batch.token_weight,
    )

    def finish(scores: TokenScores | TokenValues) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        # Megatron would divide by the number of tokens; our weights have done so already.
        no_tokens = torch.zeros((), dtype=torch.int, device=batch.labels.device)
        tokens = (scores.values if isinstance(scores, TokenValues) else scores.logprobs).detach().squeeze(0)
        found = {"tokens": tokens, "positions": batch.positions}
        if loss is None:
            return tokens.new_zeros(()), no_tokens, found
        result = loss(scores, batch)
        sums = {"loss": result.loss.detach(), "tokens": batch.loss_mask.sum(), **result.sums}
        return result.loss, no_tokens, found | {"sums": sums}

    return output, finish


def _sum_gradients(chunks: list[torch.nn.Module], num_tokens: object = None, **options: object) -> None:
    """Megatron's gradient reduction without its division by the token count."""
    finalize_model_grads(chunks, None, **options)
