"""What the trainer's ranks do in a diagnosis: record on a server, then compare with the policy under its own layout."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from megatron_r1.activations import EMBEDDING, EXPERTS, INPUT, LOGPROBS, NORM_INPUT, TOKEN_IDS, layer_part
from megatron_r1.agreement import on_rank_zero
from megatron_r1.config.packages import has_module
from megatron_r1.config.safetensors import read_header
from megatron_r1.config.schema import ModelConfig, OptimizerConfig
from megatron_r1.config.shape import ModelShape, load_shape
from megatron_r1.data.packing import RowLayout, pack_rank
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.diagnose.config import DiagnoseConfig, differing_fields
from megatron_r1.diagnose.report import Diagnosis, as_json, table, verdict
from megatron_r1.diagnose.verdict import TokenDifference, judge, weights_behind
from megatron_r1.engines.base import EngineSpec
from megatron_r1.engines.chosen import engine_kind
from megatron_r1.errors import CheckpointError, ConfigError, MismatchError
from megatron_r1.observe.metrics import write_json
from megatron_r1.policy.activations import Difference, compare_activations
from megatron_r1.policy.checkpoint import MASTER, load_policy
from megatron_r1.policy.policy import Policy
from megatron_r1.policy.saved_pieces import Piece
from megatron_r1.types import PackedMicrobatch, TrainingSequence
from megatron_r1.weights.folders import open_checkpoint
from megatron_r1.weights.reader import read_tensor
from megatron_r1.weights.table import build_table

RECORDING = "recording.safetensors"


def diagnose_on_rank(config: DiagnoseConfig, shape: ModelShape, device: torch.device) -> None:
    """The whole diagnosis, on every trainer rank. Prints the table; MismatchError, with the verdict, if a module
    departs."""
    assert config.run_dir is not None
    file = config.recording or config.run_dir / RECORDING

    def record() -> None:
        if config.recording is None:
            spec = EngineSpec(config=config.server, model_path=config.folder, run_dir=file.parent)
            print(f"vLLM: {config.folder}", flush=True)
            engine_kind(config.server).record(spec, token_ids(config, shape).tolist(), file)
        print(f"Megatron: {config.trainer_folder or config.folder}", flush=True)

    on_rank_zero(record)
    diagnosis = compare_sides(config, shape, device, load_file(file))
    on_rank_zero(lambda: tell(config, shape, diagnosis))


def compare_sides(
    config: DiagnoseConfig, shape: ModelShape, device: torch.device, recording: Mapping[str, torch.Tensor]
) -> Diagnosis:
    """What the policy's modules give beside the recording, the same on every rank. A collective."""
    policy = build_policy(config, shape, device)
    rows = rows_of(config, recording[TOKEN_IDS].numpy())
    own, logprobs = compare_activations(policy, rows, recording, feed=False)
    fed, _ = compare_activations(policy, rows, recording, feed=True)
    return on_rank_zero(lambda: _diagnosis(config, shape, recording, own, fed, logprobs))


def token_ids(config: DiagnoseConfig, shape: ModelShape) -> np.ndarray:
    """i64[tokens]. ConfigError for a text that has fewer than three tokens, or tokens that the model does not have."""
    if config.text is None:
        return np.random.default_rng(config.seed).integers(0, shape.vocab_size, config.tokens)
    words = config.text.read_text(encoding="utf-8")
    ids = np.asarray(load_tokenizer(config.folder).encode(words), dtype=np.int64)[: config.tokens]
    if len(ids) < 3 or ids.max() >= shape.vocab_size:
        raise ConfigError(
            f"text: {config.text} makes {len(ids)} tokens, the largest {max(ids, default=0)}; a diagnosis needs three "
            f"or more, below the model's {shape.vocab_size}"
        )
    return ids


def build_policy(config: DiagnoseConfig, shape: ModelShape, device: torch.device) -> Policy:
    """The trainer's model with its weights, in the layout that is diagnosed."""
    state, source = (config.trainer_folder, None) if config.is_run_checkpoint else (None, config.trainer_folder)
    policy = Policy(
        shape,
        parallel=config.parallel,
        train=config.train,
        model=ModelConfig(
            path=config.model_folder, load_from=source, train_mtp=state is not None and _trained_mtp(state)
        ),
        optimizer=OptimizerConfig(),
        total_steps=1,
        device=device,
        transformer_engine=device.type == "cuda" and has_module("transformer_engine"),
    )
    if state is not None:
        load_policy(policy, state)
    return policy


def _trained_mtp(state: Path) -> bool:
    """Whether the run of this checkpoint trained its MTP layers, which then have optimizer state too."""
    names = (name for file in state.glob("state-*.safetensors") for name in read_header(file)[0])
    return any(name.startswith("mtp.") and Piece.of(name).kind == MASTER for name in names)


def rows_of(config: DiagnoseConfig, ids: np.ndarray) -> list[PackedMicrobatch]:
    """The prompt as a row, the same on every data-parallel rank, and as often as the pipeline's schedule asks for."""
    parallel, length = config.parallel, len(ids)
    sequence = TrainingSequence(
        token_ids=ids.astype(np.int32), loss_mask=np.arange(length) > 0, token_weight=np.ones(length, np.float32)
    )
    layout = RowLayout(
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        row_multiple=parallel.row_multiple,
        segment_multiple=parallel.segment_multiple,
    )
    (row,) = pack_rank([sequence], layout, rank=0, num_ranks=1)
    return [row] * (parallel.pipeline_parallel if parallel.virtual_pipeline > 1 else 1)


def _diagnosis(
    config: DiagnoseConfig,
    shape: ModelShape,
    recording: Mapping[str, torch.Tensor],
    own: Mapping[str, Difference],
    fed: Mapping[str, Difference],
    logprobs: np.ndarray,
) -> Diagnosis:
    """`logprobs` f32[S] of the row's labels."""
    modules = judge(
        {name: by_token(each) for name, each in fed.items()},
        {name: by_token(each) for name, each in own.items()},
        num_layers=shape.num_layers,
        dtype=config.dtype,
        chosen={name: each.numpy() for name, each in recording.items() if name.endswith(EXPERTS)},
    )
    num_tokens = len(recording[EMBEDDING])
    apart = np.abs(logprobs[: num_tokens - 1] - recording[LOGPROBS].numpy()[1:])
    hidden_names = [*(layer_part(layer, INPUT) for layer in range(1, shape.num_layers)), NORM_INPUT]
    first = next((module for module in modules if module.departs), None)
    weights = [] if first is None else weights_behind(first, modules, hf_names(shape))
    return Diagnosis(
        modules=modules,
        num_tokens=num_tokens,
        dtype=config.dtype,
        logprob_difference=float(apart.mean()),
        worst_logprob=float(apart.max()),
        hidden=[by_token(own[name]).worst for name in hidden_names],
        fields=differing_fields(load_shape(config.folder), shape),
        weights=weights,
        unlike=unlike_tensors(config, weights),
    )


def hf_names(shape: ModelShape) -> list[str]:
    return [name for entry in build_table(shape) for name in entry.hf]


def tell(config: DiagnoseConfig, shape: ModelShape, diagnosis: Diagnosis) -> None:
    """Print and write what was found; MismatchError if a module departs."""
    print(table(diagnosis), flush=True)
    if config.json is not None:
        write_json(config.json, as_json(diagnosis, hf_names(shape)))
    if diagnosis.departing:
        raise MismatchError(verdict(diagnosis))
    print(verdict(diagnosis), flush=True)


def by_token(difference: Difference) -> TokenDifference:
    return TokenDifference(positions=difference.positions, error=difference.error, size=difference.size)


def unlike_tensors(config: DiagnoseConfig, names: Sequence[str]) -> list[str] | None:
    """Those of the named tensors whose numbers are not the same in the two folders, whatever their precision; None
    where there are not two folders, or one is a run's checkpoint, which has pieces of tensors."""
    if config.trainer_folder is None or config.is_run_checkpoint:
        return None
    with contextlib.ExitStack() as files:
        readers = [open_checkpoint(folder, load_shape(folder)) for folder in (config.folder, config.trainer_folder)]
        for reader in readers:
            files.callback(reader.close)
        try:
            pairs = ((name, *(read_tensor(reader, name).float() for reader in readers)) for name in names)
            return [name for name, one, other in pairs if not torch.equal(one, other)]
        except CheckpointError:  # one of them lacks the tensor, as the head of a tied model
            return None
