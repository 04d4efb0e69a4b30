"""Worker: the jobs of checkpoint.py under an Adam that counts its steps by group, as Transformer Engine's does.

usage: fused_adam.py STORE FOLDER ADAM JOB...; ADAM is te (Transformer Engine's FusedAdam, whose kernel is replaced by
`multi_tensor_adam`: the rest needs no GPU), te-bf16 (the same for a bf16 model with its moments in bf16), te-half (a
bf16 model with moments in fp32), group (GroupAdam, for machines without Transformer Engine), or kernel-bf16 and
kernel-half: with its own kernel, on a GPU (WORKER_DEVICE=cuda). The files are those of checkpoint.py.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import checkpoint
import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import distrib_optimizer

from megatron_r1.planning.state import optimizer_bytes
from megatron_r1.policy.policy import Policy


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
    """The kernel's arithmetic on [gradients, parameters, first moments, second moments, master weights or nothing],
    with its arguments: all in fp32, whatever is stored."""
    assert decoupled and bias_correction
    for gradient, parameter, first, second, *masters in zip(*lists, strict=True):
        assert gradient.dtype == torch.float32
        master = masters[0] if masters else parameter
        m = first.float() * beta1 + gradient * (1 - beta1)
        v = second.float() * beta2 + gradient * gradient * (1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        master.sub_(update + weight_decay * master, alpha=lr)
        first.copy_(m)
        second.copy_(v)
        if masters:
            parameter.copy_(master)


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
    if adam != "group":
        sys.modules.pop("transformer_engine", None)  # the CPU platform hides it from Megatron
        from transformer_engine.pytorch.optimizers import FusedAdam, fused_adam

        if adam.startswith("te"):
            fused_adam.tex.multi_tensor_adam = multi_tensor_adam
        chosen = FusedAdam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    megatron_optimizer.Adam = distrib_optimizer.Adam = chosen


def check_bytes(policy: Policy) -> None:
    """What the optimizer holds beside weights and gradients is what the planner counts, but for scalars."""
    parameters = [local.tensor for local in policy.tensors.values()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    owned = held = 0
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for group in [] if part.is_stub_optimizer else part.optimizer.param_groups:
            for own in group["params"]:
                state = [value for value in part.optimizer.state[own].values() if value.dim()]
                owned += own.numel()
                held += sum(v.nbytes for v in [own, *state] if v.untyped_storage().data_ptr() not in weights)
    fp32, moments = policy.train_config.dtype == "fp32", policy._optimizer_config.moments
    assert owned and held == owned * optimizer_bytes(fp32=fp32, moments=moments), (owned, held)


def main(store: str, folder: Path, adam: str, jobs: list[str]) -> None:
    use(adam)
    kind = adam.partition("-")[2]
    train, optimizer = checkpoint.TRAIN, checkpoint.OPTIMIZER
    if kind:
        train = dataclasses.replace(train, dtype="bf16")
        optimizer = dataclasses.replace(optimizer, moments="bf16" if kind == "bf16" else "fp32")
    checkpoint.main(store, folder, jobs, train=train, optimizer=optimizer, check=check_bytes)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
