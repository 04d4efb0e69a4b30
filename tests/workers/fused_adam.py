"""Worker: the jobs of checkpoint.py under an Adam that counts its steps by group, as Transformer Engine's does.

usage: fused_adam.py STORE FOLDER ADAM JOB...; ADAM is te (Transformer Engine's FusedAdam, whose kernel is replaced by
`multi_tensor_adam`: the rest needs no GPU) or group (GroupAdam, for machines without Transformer Engine). The files are
those of checkpoint.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import checkpoint
import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import distrib_optimizer


def multi_tensor_adam(
    _chunk: int,
    _overflow: torch.Tensor,
    lists: Sequence[Sequence[torch.Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """The kernel's arithmetic on [gradients, parameters, first moments, second moments], with its arguments."""
    assert decoupled and bias_correction
    for gradient, parameter, first, second in zip(*lists, strict=True):
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
        parameter.sub_(update + weight_decay * parameter, alpha=lr)


class GroupAdam(torch.optim.Optimizer):
    """Counts as Transformer Engine's FusedAdam does: "step" appears in a group with its first step."""

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode=True, capturable=False) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                lists = [[parameter.grad], [parameter], [state["exp_avg"]], [state["exp_avg_sq"]]]
                numbers = (group["lr"], *group["betas"], group["eps"], group["step"], 1, 1, group["weight_decay"])
                multi_tensor_adam(0, torch.zeros(1), lists, *numbers)


def use(adam: str) -> None:
    chosen = GroupAdam
    if adam == "te":
        sys.modules.pop("transformer_engine", None)  # the CPU platform hides it from Megatron
        from transformer_engine.pytorch.optimizers import FusedAdam, fused_adam

        fused_adam.tex.multi_tensor_adam = multi_tensor_adam
        chosen = FusedAdam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    megatron_optimizer.Adam = distrib_optimizer.Adam = chosen


def main(store: str, folder: Path, adam: str, jobs: list[str]) -> None:
    use(adam)
    checkpoint.main(store, folder, jobs)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
