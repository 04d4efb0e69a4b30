"""GRPO's loss and gradient by transformers and autograd: what workers/layouts.py is held to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from oracles import all_logits

CLIP_LOW, CLIP_HIGH, KL = 0.2, 0.3, 0.05
SEQUENCE_CLIP = 0.05
SEQUENCE_CAP = 1.5


def oracle_values(model, sequences: list[np.ndarray], folder: Path) -> dict:
    """Logits, logprobs and the GRPO gradient by transformers and autograd; writes the sequences that go with them."""
    rng, of_sampler = np.random.default_rng(1), np.random.default_rng(2)
    stored: dict[str, np.ndarray] = {"count": np.array(len(sequences))}
    logprobs, weights = [], []
    loss, sequence_loss = torch.zeros(()), torch.zeros(())
    for i, ids in enumerate(sequences):
        tokens = torch.from_numpy(ids.astype(np.int64))
        scores = torch.log_softmax(model(tokens[None]).logits[0, :-1].float(), dim=-1)
        own = torch.cat([torch.zeros(1), scores.gather(1, tokens[1:, None]).squeeze(1)])
        mask = np.arange(len(ids)) >= 3
        weight = np.where(mask, 1.0 / (len(sequences) * mask.sum()), 0.0).astype(np.float32)
        old = np.where(mask, own.detach().numpy() + rng.normal(0, 0.25, len(ids)), 0).astype(np.float32)
        behaviour = np.where(mask, old + of_sampler.normal(0, 0.15, len(ids)), 0).astype(np.float32)
        reference = np.where(mask, own.detach().numpy() + rng.normal(0, 0.5, len(ids)), 0).astype(np.float32)
        advantage = float(rng.normal())
        # The formulas of the paper written out, independently of megatron_r1.algorithms.
        ratio = torch.exp(own - torch.from_numpy(old))
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
        gap = torch.from_numpy(reference) - own
        token_loss = -surrogate + KL * (torch.exp(gap) - gap - 1)
        loss = loss + (torch.from_numpy(weight) * token_loss).sum()
        # GSPO, arXiv 2507.18071, eq. 5 and 7; each sequence weighed with the truncated product of p_old / p_rollout.
        trained = torch.from_numpy(mask)
        whole = torch.exp((own - torch.from_numpy(old))[trained].mean())
        clipped = whole.clamp(1 - SEQUENCE_CLIP, 1 + SEQUENCE_CLIP)
        of_sequence = min(float(np.exp((old.astype(np.float64) - behaviour)[mask].sum())), SEQUENCE_CAP)
        weights.append(of_sequence)
        sequence_loss = sequence_loss - of_sequence * torch.minimum(whole * advantage, clipped * advantage) / len(
            sequences
        )
        logprobs.append(np.where(mask, own.detach().numpy(), 0))
        fields = {"token_ids": ids, "loss_mask": mask, "token_weight": weight, "advantage": np.array(advantage)}
        fields |= {"old_logprobs": old, "reference_logprobs": reference, "behaviour_logprobs": behaviour}
        stored |= {f"{i}.{name}": value for name, value in fields.items()}
    assert min(weights) < 1 and max(weights) == SEQUENCE_CAP, "some are truncated, some are not"
    np.savez(folder / "sequences.npz", **stored)
    return {
        "logits": all_logits(model, sequences),
        "logprobs": logprobs,
        "gradients": _gradients(model, loss),
        "gspo": _gradients(model, sequence_loss),
    }


def _gradients(model, loss: torch.Tensor) -> dict[str, np.ndarray]:
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def hf_gradients(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers 5 stacks experts in memory (gate_up_proj, down_proj); checkpoints have one tensor an expert."""
    split = {}
    for name, value in gradients.items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(value):
                gate, up = np.split(both, 2)
                split[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                split[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(value):
                split[name.replace("down_proj", f"{e}.down_proj.weight")] = down
        else:
            split[name] = value
    return split
