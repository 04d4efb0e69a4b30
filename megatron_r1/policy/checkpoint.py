"""Everything that a policy needs to go on training, in files that any parallel layout can read.

Each rank writes what its optimizer owns: slices of flattened parameter shards, with master weights in fp32 and Adam's
moments as the optimizer has them, in fp32 or bf16; a run that has the others reads them too. A piece is named by the
weight table's parameter, its shard and its slice, and each is written once, by the lowest rank that has it. Under the
same layout a rank reads its own pieces back, bit for bit; under another one the whole tensor is put together from the
pieces and cut anew (saved_pieces.py). Left out: which of several checkpoints is taken, and the state of the stage.
"""

# Megatron's annotations are narrower than what it takes.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_r1.errors import CheckpointError
from megatron_r1.policy.policy import Policy
from megatron_r1.policy.random_states import random_states, set_random_states
from megatron_r1.policy.saved_pieces import REFERENCE, Piece, SavedPieces
from megatron_r1.policy.topology import answered

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"
STATE = "policy.json"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What this rank writes of a policy: a copy in host memory, so that training may go on meanwhile."""

    rank: int
    tensors: Mapping[str, torch.Tensor]
    random: Mapping[str, torch.Tensor]
    state: Mapping[str, Any] | None
    """Rank 0's: what is no tensor."""

    def write(self, folder: Path) -> list[Path]:
        """The files of this rank, written into `folder`, which is there. No collective. Raises OSError."""
        files = [folder / _file(self.rank), folder / _random_file(self.rank)]
        for file, tensors in zip(files, (self.tensors, self.random), strict=True):
            _save(tensors, file)
        if self.state is not None:
            files.append(folder / STATE)
            files[-1].write_text(json.dumps(self.state), encoding="utf-8")
        return files


def take_snapshot(policy: Policy) -> Snapshot:
    """A copy of all that `load_policy` puts back, each piece on one rank. A collective."""
    own = {piece.key: tensor for piece, tensor in _pieces(policy)}
    keys, steps = answered((list(own), adam_steps(policy)), _who_writes)
    tensors = {key: own[key].detach().to("cpu", copy=True).contiguous() for key in keys}
    rank = dist.get_rank()
    state = {
        "model": _fingerprint(policy),
        "world_size": dist.get_world_size(),
        "steps_taken": policy.steps_taken,
        "adam_steps": steps,
    }
    return Snapshot(rank, tensors, random_states(), state if rank == 0 else None)


def _who_writes(everyone: Sequence[tuple[list[str], float]]) -> list[tuple[list[str], float]]:
    """By rank: the keys that it writes, which is the lowest rank that has them, and Adam's steps (a rank whose
    optimizer owns no parameter has counted nothing)."""
    steps = max(steps for _, steps in everyone)
    seen: set[str] = set()
    answers = []
    for keys, _ in everyone:
        answers.append(([key for key in keys if key not in seen], steps))
        seen.update(keys)
    return answers


def load_policy(policy: Policy, folder: Path) -> None:
    """Put `folder`'s state into the policy, whose layout may be another than the one that wrote it. A collective.

    Random states are put back where the number of ranks is the same. Raises CheckpointError if it is another model's,
    a piece is missing or a file cannot be read."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state.get("model", own := _fingerprint(policy)) != own:  # the first version's have no such field
        raise CheckpointError(
            f"{folder}: the checkpoint of a model of another shape; start in a new run folder, or restore model.path"
        )
    owned = _owned(policy)
    trained = _trained_names(policy, owned)
    saved = SavedPieces.of(policy, folder)
    policy.steps_taken = state["steps_taken"]
    with torch.no_grad():
        for name, (optimizer, parameter, start, stop) in owned.items():
            values = {kind: saved.read(policy, name, kind, start, stop) for kind in (MASTER, *MOMENTS)}
            _put(optimizer, parameter, values, state["adam_steps"])
        for name in policy.tensors.keys() - trained:
            policy.tensors[name].tensor.copy_(saved.read_shard(policy, name, WEIGHT))
    if saved.has_reference:
        policy.set_reference({name: saved.read_shard(policy, name, REFERENCE) for name in policy.tensors})
    policy.spread_master_weights()
    if state.get("world_size") == dist.get_world_size():
        set_random_states(load_file(folder / _random_file(dist.get_rank())))


def _file(rank: int) -> str:
    return f"state-{rank:05d}.safetensors"


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.safetensors"


def _save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(dict(tensors), file)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(errno.EIO, f"cannot be written: {error}", str(file)) from error


def _fingerprint(policy: Policy) -> str:
    """Of the model's shape: a checkpoint fits only the model that it was made of."""
    shape = dataclasses.asdict(policy.shape) | {"fp8_block": None}
    return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()


def _optimizers(policy: Policy) -> Sequence[DistributedOptimizer]:
    optimizer = policy.optimizer
    found = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    distributed = [one for one in found if isinstance(one, DistributedOptimizer)]
    if len(distributed) < len(found):
        raise CheckpointError("optimizer.distributed is False; only the distributed optimizer can be saved")
    return [one for one in distributed if not one.is_stub_optimizer]


def _owned(policy: Policy) -> dict[str, tuple[DistributedOptimizer, torch.nn.Parameter, int, int]]:
    """The parameters of which this rank's optimizer owns a slice: (optimizer, parameter, start, stop)."""
    names = {id(local.tensor): name for name, local in policy.tensors.items()}
    found = {}
    for optimizer in _optimizers(policy):
        for parameter in optimizer.model_param_group_index_map:
            part = optimizer._get_model_param_range_map(parameter)["param"]
            found[names[id(parameter)]] = (optimizer, parameter, part.start, part.end)
    return found


def _pieces(policy: Policy) -> list[tuple[Piece, torch.Tensor]]:
    owned = _owned(policy)
    trained = _trained_names(policy, owned)
    pieces: list[tuple[Piece, torch.Tensor]] = []
    for name, local in policy.tensors.items():
        size = local.tensor.numel()
        if name in owned:
            optimizer, parameter, start, stop = owned[name]
            for kind, value in _values(optimizer, parameter).items():
                pieces.append((Piece(name, kind, local.index, local.count, start, stop), value.view(-1)))
        elif name not in trained:
            pieces.append((Piece(name, WEIGHT, local.index, local.count, 0, size), local.tensor.view(-1)))
    for name, tensor in (policy.reference or {}).items():
        local = policy.tensors[name]
        pieces.append((Piece(name, REFERENCE, local.index, local.count, 0, tensor.numel()), tensor.view(-1)))
    return pieces


def _trained_names(policy: Policy, owned: Mapping[str, object]) -> set[str]:
    """This rank's parameters that some rank's optimizer owns: others may own every slice of one that it holds."""

    def answer(everyone: list[tuple[list[str], list[str]]]) -> list[set[str]]:
        trained = {name for _, names in everyone for name in names}
        return [trained.intersection(held) for held, _ in everyone]

    return answered((list(policy.tensors), list(owned)), answer)


def adam_steps(policy: Policy) -> float:
    """How many steps this rank's Adam has taken, which its bias correction counts; 0 before the first."""
    steps = 0.0
    for optimizer in _optimizers(policy):
        adam = optimizer.optimizer
        # Transformer Engine counts for groups too of which this rank owns no parameter, and those begin anew.
        for counted in adam.param_groups if _counts_by_group(adam) else adam.state.values():
            steps = max(steps, float(counted.get("step", 0)))
    return steps


def _counts_by_group(adam: torch.optim.Optimizer) -> bool:
    """torch's Adam counts the steps of each parameter in its state; Transformer Engine's and Apex's count those of a
    group in the group, which has no "step" before the first one. So the class tells them apart, the key does not."""
    return not isinstance(adam, (torch.optim.Adam, torch.optim.AdamW))


def _main(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
    """What Adam steps for this rank's slice of a parameter: its master weights, or the slice itself where Adam holds
    the masters (moments in bf16)."""
    group, order = optimizer.model_param_group_index_map[parameter]
    return optimizer.optimizer.param_groups[group]["params"][order]


def _values(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Master weights (fp32) and moments of this rank's slice of a parameter, on the device; before the first step the
    masters are the weights and the moments zero."""
    main = _main(optimizer, parameter)
    state = optimizer.optimizer.state.get(main, {})
    master = state.get("master_param", main) if _holds_masters(optimizer) else main
    moments = {kind: state[kind] if kind in state else torch.zeros_like(main) for kind in MOMENTS}
    return {MASTER: master.float(), **moments}


def _holds_masters(optimizer: DistributedOptimizer) -> bool:
    """Whether Adam itself holds the master weights: Megatron's precision-aware optimizer."""
    return optimizer.config.use_precision_aware_optimizer


def _put(
    optimizer: DistributedOptimizer, parameter: torch.nn.Parameter, values: Mapping[str, torch.Tensor], steps: float
) -> None:
    adam, main = optimizer.optimizer, _main(optimizer, parameter)
    main.copy_(values[MASTER].view(main.shape))
    if _holds_masters(optimizer):
        _put_precisely(adam, main, values)
    if not steps:
        return
    state = adam.state[main]
    if not _holds_masters(optimizer):
        for kind in MOMENTS:
            state[kind] = values[kind].view(main.shape).to(main.device, torch.float32, copy=True)
    if _counts_by_group(adam):
        group, _ = optimizer.model_param_group_index_map[parameter]
        adam.param_groups[group]["step"] = int(steps)
    else:
        state["step"] = torch.tensor(steps, dtype=torch.float32)


def _put_precisely(adam: Any, main: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
    """Into Transformer Engine's FusedAdam, which casts to its own precisions and keeps a scale beside each state."""
    for kind, name in (("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq"), (MASTER, "master_param")):
        adam.set_scaled_state(main, name, values[kind].view(main.shape).to(main.device, torch.float32, copy=True))
