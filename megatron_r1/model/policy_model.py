"""Megatron's GPTModel whose last stage returns logprobs and entropies instead of logits, or values.

Only the output side differs: the vocabulary projection runs in bounded chunks (logprob.py), and multi-token-prediction
layers give logprobs of their own so that the caller weighs their loss like any other.
"""

# Megatron's annotations are narrower than what it takes.
# pyright: reportOperatorIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.multi_token_prediction import roll_tensor

from megatron_r1.model.logprob import chunked_logprob_entropy


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per-token results of the last pipeline stage, f32[1, S] for S tokens of this context-parallel rank.

    logprobs[0, j] and entropy[0, j] are of the distribution at position j and its label. mtp_logprobs[k] scores the
    label k + 1 positions further; mtp_weights[k] is the token weight shifted the same way (0 past a segment's end).
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    mtp_logprobs: tuple[torch.Tensor, ...] = ()
    mtp_weights: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenValues:
    """A reward model's results: `values` f32[1, S], one for each token of this context-parallel rank."""

    values: torch.Tensor


class PolicyModel(GPTModel):
    """GPTModel with `labels`: TokenScores on the last pipeline stage; without: logits [B, S, V / tp].

    With a reward head (add_reward_head) it gives TokenValues.
    """

    real_vocab_size: int = 0
    logprob_chunk_tokens: int = 1024
    temperature: float = 1.0
    train_mtp: bool = False
    output_layer: ColumnParallelLinear

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Not a class attribute: that would hide the module of this name.
        self.reward_head: torch.nn.Linear | None = None

    def add_reward_head(self) -> None:
        """Replace the vocabulary's projection by one value, 0 at first. Every tensor-parallel rank has all of it."""
        self.output_layer = None  # pyright: ignore[reportAttributeAccessIssue]
        self.reward_head = torch.nn.Linear(self.config.hidden_size, 1, bias=False, dtype=self.config.params_dtype)
        torch.nn.init.zeros_(self.reward_head.weight)

    def _postprocess(self, hidden_states: torch.Tensor, labels: torch.Tensor | None, **call: object):
        if not self.post_process:
            return hidden_states
        if self.reward_head is not None:
            return TokenValues(self._values(self.reward_head, hidden_states))
        if labels is None:
            logits, _ = self.output_layer(hidden_states, weight=self._head_weight_or_none())
            return logits.transpose(0, 1).contiguous()
        if not (self.mtp_process and self.train_mtp and self.training):
            return TokenScores(*self._score(hidden_states, labels))
        stages = self._run_mtp(hidden_states, call)
        logprobs, entropy = self._score(stages[0], labels)
        weights = call["loss_mask"]
        mtp_logprobs, mtp_weights = [], []
        for stage in stages[1:]:
            roll = {"shifts": -1, "dims": -1, "cp_group": self.cp_group, "packed_seq_params": call["packed_seq_params"]}
            labels, _ = roll_tensor(labels, **roll)
            weights, _ = roll_tensor(weights, **roll)
            mtp_logprobs.append(self._score(stage, labels)[0])
            mtp_weights.append(weights)
        return TokenScores(logprobs, entropy, tuple(mtp_logprobs), tuple(mtp_weights))

    def _run_mtp(self, hidden_states: torch.Tensor, call: dict[str, object]) -> tuple[torch.Tensor, ...]:
        names = ("input_ids", "position_ids", "attention_mask", "packed_seq_params", "sequence_len_offset")
        names += ("rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "inference_params")
        stacked = self.mtp(
            hidden_states=hidden_states, embedding=self.embedding, **{name: call.get(name) for name in names}
        )
        return torch.chunk(stacked, 1 + self.config.mtp_num_layers, dim=0)

    def _head_weight_or_none(self) -> torch.Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def _values(self, head: torch.nn.Linear, hidden_S1H: torch.Tensor) -> torch.Tensor:
        """hidden [S (/ tp when sequence parallel), 1, H] -> f32[1, S], the same on every tensor-parallel rank."""
        if self.config.sequence_parallel:
            # Every rank computes all values, so each takes its own part of the gradient instead of a sum.
            hidden_S1H = gather_from_sequence_parallel_region(
                hidden_S1H, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        # In fp32, as vLLM does: bf16 would round a value of 3 to the next 1/64 and make ties of close pairs.
        return torch.nn.functional.linear(hidden_S1H.squeeze(1).float(), head.weight.float()).T

    def _score(self, hidden_S1H: torch.Tensor, labels_1S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [S (/ tp when sequence parallel), 1, H], labels i64[1, S] -> logprobs, entropy f32[1, S]."""
        weight = self._head_weight_or_none()
        weight = self.output_layer.weight if weight is None else weight
        assert weight is not None
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_S1H, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_S1H, group=group)
        logprobs, entropy = chunked_logprob_entropy(
            hidden.squeeze(1),
            weight,
            labels_1S.squeeze(0),
            vocab_size=self.real_vocab_size,
            chunk_tokens=self.logprob_chunk_tokens,
            temperature=self.temperature,
            vocab_start=group.rank() * weight.shape[0],
            group=group,
        )
        return logprobs.unsqueeze(0), entropy.unsqueeze(0)
