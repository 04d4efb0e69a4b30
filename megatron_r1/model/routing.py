"""Which experts a token goes to, when somebody else has chosen them: routing replay (R3, arXiv 2510.11370).

A mixture of experts is trained on what an engine sampled. Where rounding makes the trainer's router choose other
experts than the engine's did, the two are different functions of the weights there. Here the trainer's layers take the
engine's choice and weigh it by their own scores, so that the router still learns:

    experts = the engine's where they are known, else the K best of the trainer's scores
    weight_e = the trainer's own weight of expert e

The choice travels with the microbatch (`RoutedSeqParams` goes to every layer), so it is the same when a layer is
computed again for its gradient, in whatever order pipeline stages take microbatches. Multi-token-prediction layers have
no routes and choose themselves, and so do padding and the last token of a sequence, which an engine never read.
"""

# Megatron's annotations are narrower than what it takes.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_r1.config.shape import ModelShape
from megatron_r1.model.policy_model import PolicyModel

UNKNOWN = -1
"""In the place of an expert: the trainer chooses."""


@dataclass
class RoutedSeqParams(PackedSeqParams):
    """Of a microbatch of S tokens on this context-parallel rank: `routes` i16[S, sparse layers, K], UNKNOWN for a token
    as a whole. `replay`: they are used; else they are only compared with the trainer's choice."""

    routes: torch.Tensor | None = None
    replay: bool = False


class Routing:
    """The replaying routers of this rank, and how often they would have chosen otherwise."""

    def __init__(self, chunks: Sequence[PolicyModel], shape: ModelShape) -> None:
        """Takes the place of Megatron's RouterReplay in each sparse decoder layer of `chunks`."""
        self.sparse = [layer for layer in range(shape.num_layers) if shape.is_moe_layer(layer)]
        self.routers: dict[int, ReplayedRouter] = {}
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                if isinstance(layer.mlp, MoELayer):
                    place = self.sparse.index(layer.layer_number - 1)
                    router = self.routers[place] = ReplayedRouter(place)
                    layer.mlp.router.router_replay = router
                    layer.register_forward_pre_hook(router.begin, with_kwargs=True)

    def counts(self, device: torch.device) -> torch.Tensor:
        """f64[sparse layers, 2]: of this rank's layers the tokens that the trainer's router alone would have sent
        elsewhere, and all tokens with known routes, since `forget_counts`."""
        found = torch.zeros(len(self.sparse), 2, dtype=torch.float64, device=device)
        for place, router in self.routers.items():
            if router.counts is not None:
                found[place] = router.counts
        return found

    def forget_counts(self) -> None:
        for router in self.routers.values():
            router.counts = None


class ReplayedRouter:
    """What Megatron's routers ask for their choice: one of each sparse layer, the `place`-th."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.params: RoutedSeqParams | None = None
        self.counts: torch.Tensor | None = None

    def begin(self, layer: torch.nn.Module, arguments: tuple, options: dict) -> None:
        """Before each forward pass of the layer, also the one that is done again in the backward pass."""
        params = options.get("packed_seq_params")
        self.params = params if isinstance(params, RoutedSeqParams) and params.routes is not None else None

    def get_replay_topk(
        self,
        scores_TE: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's call: the scores of the chosen experts, with gradient, and their numbers i64[T, K]."""
        assert default_compute_topk is not None
        values_TK, own_TK = default_compute_topk(scores_TE, topk, num_groups=num_groups, group_topk=group_topk)
        experts_TK = self.choose(own_TK)
        return (values_TK, own_TK) if experts_TK is own_TK else (scores_TE.gather(1, experts_TK), experts_TK)

    def choose(self, own_TK: torch.Tensor) -> torch.Tensor:
        """The experts to take instead of the router's own; itself where nothing is replayed."""
        if self.params is None:
            return own_TK
        routes_TK = self._rows(len(own_TK)).to(own_TK.dtype)
        known_T = routes_TK[:, 0] != UNKNOWN
        differs_T = (routes_TK.sort(dim=-1).values != own_TK.sort(dim=-1).values).any(dim=-1) & known_T
        counts = torch.stack([differs_T.sum(), known_T.sum()]).double()
        self.counts = counts if self.counts is None else self.counts + counts
        return torch.where(known_T[:, None], routes_TK, own_TK) if self.params.replay else own_TK

    def _rows(self, count: int) -> torch.Tensor:
        """The routes of this rank's `count` tokens; with sequence parallel they are a part of the microbatch."""
        assert self.params is not None and self.params.routes is not None
        routes_SK = self.params.routes[:, self.place]
        if count == len(routes_SK):
            return routes_SK
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        if count * ranks != len(routes_SK):
            raise RuntimeError(f"routing replay: {count} tokens in a layer, routes of {len(routes_SK)}, {ranks} ranks")
        start = parallel_state.get_tensor_model_parallel_rank() * count
        return routes_SK[start : start + count]
