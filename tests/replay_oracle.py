"""Routing replay by transformers and autograd: a model whose routers are told which experts to take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch


def gates_of(model) -> list:
    """The routers of the sparse layers, in order."""
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def weights_of(gate, logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """What a router gives to these experts: DeepSeek-V3's normalised sigmoids, or Qwen3-MoE's softmax."""
    deepseek = hasattr(gate, "routed_scaling_factor")
    scores = logits.sigmoid() if deepseek else logits.softmax(-1)
    weights = scores.gather(1, experts)
    if gate.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * (gate.routed_scaling_factor if deepseek else 1.0)


@contextmanager
def forced(model, routes: np.ndarray | None) -> Iterator[list[torch.Tensor]]:
    """Within, layer k's tokens go to routes[:, k] (-1: as the router wants; None: all). Yields what the routers would
    have chosen, i64[T, K] of each sparse layer."""
    own: list[torch.Tensor] = []
    gates, before = gates_of(model), [gate.forward for gate in gates_of(model)]

    def replaced(place: int):
        def forward(hidden: torch.Tensor):
            logits, weights, chosen = before[place](hidden)
            own.append(chosen.detach())
            if routes is None:
                return logits, weights, chosen
            told = torch.from_numpy(routes[:, place].astype(np.int64))
            experts = torch.where(told[:, :1] < 0, chosen, told)
            return logits, weights_of(gates[place], logits, experts).to(weights.dtype), experts

        return forward

    for place, gate in enumerate(gates):
        gate.forward = replaced(place)
    try:
        yield own
    finally:
        for gate, forward in zip(gates, before, strict=True):
            gate.forward = forward


def replay_values(model, sequences: list[np.ndarray], folder: Path) -> dict:
    """Logprobs, the gradient of their weighted sum and the shares of tokens that the routers would have sent elsewhere,
    with routes that no router would choose. Writes sequences and routes."""
    rng = np.random.default_rng(3)
    gates, experts = gates_of(model), gates_of(model)[0].num_experts
    stored: dict[str, np.ndarray] = {"count": np.array(len(sequences))}
    logprobs, natural = [], []
    differing, known = np.zeros(len(gates)), 0
    loss = torch.zeros(())
    for i, ids in enumerate(sequences):
        size = (len(ids), len(gates), gates[0].top_k)
        routes = rng.random((*size[:2], experts)).argsort(-1)[..., : size[2]].astype(np.int16)
        routes[-1] = -1  # the last token was never read by an engine
        whole = i % 4 != 3  # one sequence in four has no routes
        tokens = torch.from_numpy(ids.astype(np.int64))
        with forced(model, routes if whole else np.full(size, -1, np.int16)) as own:
            scores = torch.log_softmax(model(tokens[None]).logits[0, :-1].float(), dim=-1)
        found = torch.cat([torch.zeros(1), scores.gather(1, tokens[1:, None]).squeeze(1)])
        weight = np.where(np.arange(len(ids)) >= 3, rng.normal(size=len(ids)), 0.0).astype(np.float32)
        loss = loss - (torch.from_numpy(weight) * found).sum()
        logprobs.append(np.where(weight != 0, found.detach().numpy(), 0))
        if whole:
            chosen = np.stack([each.numpy() for each in own], axis=1)[:-1]
            differing += (np.sort(chosen, -1) != np.sort(routes[:-1], -1)).any(-1).sum(0)
            known += len(ids) - 1
            stored[f"{i}.routes"] = routes[:-1].astype(np.uint8)
        with torch.no_grad(), forced(model, None) as own:
            model(tokens[None])
        natural.append(np.stack([each.numpy() for each in own], axis=1)[:-1])
        stored |= {f"{i}.token_ids": ids, f"{i}.weight": weight, f"{i}.natural": natural[-1].astype(np.uint8)}
    np.savez(folder / "replayed.npz", **stored)
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    return {"logprobs": logprobs, "gradients": gradients, "differ": differing / known}
