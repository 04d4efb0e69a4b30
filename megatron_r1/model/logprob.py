"""Log probability and entropy of a vocabulary split over tensor-parallel ranks, a bounded chunk of tokens at a time.

With V = 129,280 and 32,768 tokens, fp32 logits are 17 GB. Here at most `chunk_tokens` rows of [tokens, V / tp] exist in
fp32 at once: each chunk's projection is recomputed in the backward pass.

Shapes: T tokens of the row, C tokens of a chunk, H hidden, V this rank's vocabulary rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class _LogprobEntropy(torch.autograd.Function):
    """From vocabulary-parallel logits: l_t = z_t[y_t] - lse_t and H_t = lse_t - sum_v p_tv z_tv.

    Gradients: dl/dz_v = 1[v = y] - p_v ; dH/dz_v = -p_v (z_v - sum_u p_u z_u).
    """

    @staticmethod
    def forward(ctx, logits_CV, labels_C, vocab_start, group):
        peak_C = logits_CV.amax(-1)
        _reduce(peak_C, dist.ReduceOp.MAX, group)
        shifted_CV = logits_CV - peak_C[:, None]
        exp_CV = shifted_CV.exp()
        local_C = labels_C - vocab_start
        mine_C = (local_C >= 0) & (local_C < logits_CV.shape[1])
        local_C = local_C.clamp(0, logits_CV.shape[1] - 1)
        label_C = shifted_CV.gather(1, local_C[:, None]).squeeze(1).masked_fill(~mine_C, 0.0)
        # exp of a masked (padding) column is 0 and its logit -inf; their product must count as 0.
        weighted_C = (exp_CV * shifted_CV.masked_fill(exp_CV == 0, 0.0)).sum(-1)
        sums_3C = torch.stack([exp_CV.sum(-1), label_C, weighted_C])
        _reduce(sums_3C, dist.ReduceOp.SUM, group)
        total_C, label_C, weighted_C = sums_3C
        log_total_C = total_C.log()
        mean_C = weighted_C / total_C
        ctx.save_for_backward(exp_CV.div_(total_C[:, None]), shifted_CV, mean_C, local_C, mine_C)
        return label_C - log_total_C, log_total_C - mean_C

    @staticmethod
    def backward(ctx, grad_logprob_C, grad_entropy_C):
        probability_CV, shifted_CV, mean_C, local_C, mine_C = ctx.saved_tensors
        centred_CV = shifted_CV.masked_fill(probability_CV == 0, 0.0) - mean_C[:, None]
        grad_CV = -probability_CV * (grad_logprob_C[:, None] + grad_entropy_C[:, None] * centred_CV)
        grad_CV.scatter_add_(1, local_C[:, None], (grad_logprob_C * mine_C)[:, None])
        return grad_CV, None, None, None


def _reduce(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)


def logprob_entropy(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, *, vocab_start: int = 0, group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprob of each label and entropy of each row, natural log, both f32[C], differentiable.

    logits_CV f32, this rank's columns [vocab_start, vocab_start + V); labels_C i64, global ids. With a group the
    collectives run over it and every rank gets the same result.
    """
    return _LogprobEntropy.apply(logits_CV, labels_C, vocab_start, group)


def chunked_logprob_entropy(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    vocab_size: int,
    chunk_tokens: int,
    temperature: float = 1.0,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logprob_entropy` of hidden_TH @ weight_VH^T / temperature, f32[T] each.

    Columns at or past `vocab_size` (padding of the vocabulary) get no probability. The gradient of hidden_TH is this
    rank's part of the sum over vocabulary shards: the caller reduces it (Megatron's copy or gather does).
    """
    padding = vocab_start + weight_VH.shape[0] - vocab_size

    def one_chunk(
        hidden_CH: torch.Tensor, weight_VH: torch.Tensor, labels_C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_CV = F.linear(hidden_CH, weight_VH).float()
        if temperature != 1.0:
            logits_CV = logits_CV / temperature
        if padding > 0:
            columns = torch.arange(weight_VH.shape[0], device=logits_CV.device) + vocab_start
            logits_CV = logits_CV.masked_fill(columns >= vocab_size, float("-inf"))
        return logprob_entropy(logits_CV, labels_C, vocab_start=vocab_start, group=group)

    if hidden_TH.shape[0] <= chunk_tokens:
        return one_chunk(hidden_TH, weight_VH, labels_T)
    parts = [
        checkpoint(one_chunk, hidden_CH, weight_VH, labels_C, use_reentrant=False, preserve_rng_state=False)
        for hidden_CH, labels_C in zip(hidden_TH.split(chunk_tokens), labels_T.split(chunk_tokens), strict=True)
    ]
    return torch.cat([logprob for logprob, _ in parts]), torch.cat([entropy for _, entropy in parts])
