"""The configuration of megatron-r1 diagnose, and its rules. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_r1.activations import EMBEDDING, GATE, HEAD, LOGPROBS, MLP, TOKEN_IDS, layer_part
from megatron_r1.bounds import Count, Natural, NonNegative, Positive, above, at_least, number_faults
from megatron_r1.config.engines import ENGINES
from megatron_r1.config.lengths import length_faults
from megatron_r1.config.packages import installed_versions, needed_packages, plugin_faults, version_faults
from megatron_r1.config.parts import missing_files
from megatron_r1.config.safetensors import read_header
from megatron_r1.config.schema import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    SamplingConfig,
    TrainConfig,
)
from megatron_r1.config.server_faults import server_faults
from megatron_r1.config.shape import ModelShape, load_shape
from megatron_r1.config.trainer_faults import parallel_faults, reward_model_faults
from megatron_r1.errors import CheckpointError, ConfigError

RUN_STATE = "policy.json"
"""In a run's checkpoints/step_N (policy/checkpoint.py)."""

MAY_DIFFER = ("norm_eps", "max_positions", "init_std", "rope", "num_mtp_layers", "mla.norm_eps")
MAY_DIFFER += tuple(f"moe.{name}" for name in ("router", "num_groups", "topk_groups", "routed_scaling"))
MAY_DIFFER += ("moe.normalise_topk",)
"""Of two models' shapes: what changes no tensor's size, and so can be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnosedServer:
    """The vLLM server that records: fields of a stage's `rollout` part."""

    tensor_parallel: Count = 1
    """GPUs (on CPU: processes) of the server; its matrices are split over them."""
    expert_parallel: bool = False
    """Whole experts on each of its GPUs instead of a part of every expert."""
    memory_fraction: Annotated[float, above(0, 1)] = 0.85
    """vLLM's --gpu-memory-utilization (on CPU it is a share of host memory)."""
    kv_cache_gib: Positive = 0.25
    """CPU only: KV cache size."""
    threads: Count = 2
    """CPU only: OpenMP threads of the server."""
    start_timeout_seconds: NonNegative = 0.0
    """Until it answers; 0: from the bytes of its weights."""
    vllm_args: tuple[str, ...] = ()
    """More arguments of vLLM, each NAME=VALUE or NAME without dashes: those of the run that is diagnosed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnoseConfig:
    """`megatron-r1 diagnose FOLDER`: the servers' model and the trainer's on the same tokens, module by module."""

    folder: Path
    """Hugging Face folder that the server loads, and the trainer too unless `trainer_folder` is given."""
    trainer_folder: Path | None = None
    """Weights of the trainer, of a model of the same shape: a Hugging Face or torch_dist folder, with its own
    config.json, or checkpoints/step_N of a run."""
    text: Path | None = None
    """File whose first `tokens` tokens are used; none: ids drawn at random from the vocabulary."""
    tokens: Annotated[int, at_least(3)] = 128
    """Tokens that both models read, in one pass."""
    seed: Natural = 0
    """Of the random ids."""
    recording: Path | None = None
    """An earlier diagnosis' run_dir/recording.safetensors, of the same `folder`: its tokens are used, and no server is
    started."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of both sides. fp32 shows faults that rounding to bf16 hides."""
    device: Literal["cpu", "cuda"] = "cuda"
    """Where both sides run, one after the other."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The trainer's layout."""
    rollout: DiagnosedServer = field(default_factory=DiagnosedServer)
    threads_per_rank: Count = 1
    """CPU threads of torch in each trainer process."""
    json: Path | None = None
    """File for all numbers."""
    run_dir: Path | None = None
    """Folder that keeps the recording and the server's log; none: a temporary one. Under torchrun or srun it must be
    given, and shared by all ranks."""

    @property
    def is_run_checkpoint(self) -> bool:
        """Whether the trainer's weights are a run's checkpoint, which has no config.json."""
        return self.trainer_folder is not None and (self.trainer_folder / RUN_STATE).is_file()

    @property
    def model_folder(self) -> Path:
        """The folder whose config.json the trainer's model is built from."""
        return self.folder if self.trainer_folder is None or self.is_run_checkpoint else self.trainer_folder

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, at most."""
        return self.tokens if self.recording is None else read_header(self.recording)[0][TOKEN_IDS]["shape"][0]

    @property
    def train(self) -> TrainConfig:
        multiple = math.lcm(self.parallel.row_multiple, self.parallel.segment_multiple)
        room = -(-self.num_tokens // multiple) * multiple
        return TrainConfig(dtype=self.dtype, tokens_per_microbatch=room, threads_per_rank=self.threads_per_rank)

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(path=self.model_folder)

    @property
    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig()

    @property
    def server(self) -> RolloutConfig:
        """The server's configuration as the engine takes it."""
        shared = {each.name: getattr(self.rollout, each.name) for each in dataclasses.fields(self.rollout)}
        return RolloutConfig(
            device=self.device,
            dtype=self.dtype,
            sync="gloo" if self.device == "cpu" else "nccl",
            max_model_len=self.tokens + 1,
            max_num_seqs=1,
            enforce_eager=True,
            sampling=SamplingConfig(max_new_tokens=1),
            **shared,
        )


def validate_diagnose(config: DiagnoseConfig) -> ModelShape:
    """The shape of the trainer's model. Raises ConfigError listing every fault."""
    faults = number_faults(config)
    served = _shape("folder", config.folder, faults)
    trained = served if config.model_folder == config.folder else _shape("trainer_folder", config.model_folder, faults)
    faults += _file_faults(config)
    faults += _weight_faults(config)
    if config.recording is not None and served is not None:
        faults += _recording_faults(config, config.recording, served)
    elif served is not None:
        faults += server_faults(config.server, served)
        faults += length_faults("tokens and the one that vLLM samples", config.tokens + 1, served, served=True)
    if served is not None:
        faults += reward_model_faults(served, config.folder, "folder")
        if served.fp8_block is not None:
            faults.append(f"folder: {config.folder} is FP8; compare its bf16 form (tools/prepare_checkpoint.py)")
    if served is not None and trained is not None:
        faults += _shape_faults(served, trained, config)
    faults += parallel_faults(config.parallel, trained)
    packages = needed_packages(device=config.device, trains=True, serves=(ENGINES["vllm"].packages[config.device],))
    faults += version_faults(packages, installed_versions()) + plugin_faults(packages)
    if faults or trained is None:
        raise ConfigError(faults)
    return trained


def differing_fields(served: ModelShape, trained: ModelShape) -> dict[str, tuple[Any, Any]]:
    """(served, trained) of every number of the two shapes that differs, by its path; FP8 blocks aside."""
    one, other = (dict(_leaves(dataclasses.asdict(shape), "")) for shape in (served, trained))
    names = sorted((one.keys() | other.keys()) - {"fp8_block"})
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def _shape(field: str, folder: Path, faults: list[str]) -> ModelShape | None:
    """What load_shape says; or None, and its words are added to `faults`."""
    try:
        return load_shape(folder)
    except ConfigError as error:
        faults += [fault.replace("model.path", field, 1) for fault in error.faults]
        return None


def _file_faults(config: DiagnoseConfig) -> list[str]:
    """Of the text that is read and the file that is written."""
    faults = []
    if config.text is not None and not (faults := missing_files({"text": (config.text,)})):
        try:
            config.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            faults = [f"text: {config.text} cannot be read ({error}); give a file of UTF-8 text"]
    if config.json is not None and (config.json.is_dir() or not config.json.parent.is_dir()):
        faults.append(f"json: {config.json} cannot be written; name a file in a folder that is there")
    return faults


def _weight_faults(config: DiagnoseConfig) -> list[str]:
    faults, other = [], config.trainer_folder
    if config.folder.is_dir() and not any(config.folder.glob("*.safetensors")):
        faults.append(
            f"folder: {config.folder} holds no *.safetensors; vLLM loads a Hugging Face folder, which "
            "tools/convert_checkpoint.py makes of other forms"
        )
    if other is not None and other.is_dir() and not any((*other.glob("*.safetensors"), *other.glob(".metadata"))):
        faults.append(
            f"trainer_folder: {other} holds no weights; give a Hugging Face folder, a torch_dist checkpoint, or "
            "checkpoints/step_N of a run"
        )
    return faults


def _recording_faults(config: DiagnoseConfig, file: Path, served: ModelShape) -> list[str]:
    """Whether the file is a recording of a model of this shape, in this precision."""
    if not file.is_file():
        return [f"recording: {file} does not exist"]
    try:
        header, _ = read_header(file)
    except CheckpointError as error:
        return [f"recording: {error}"]
    wanted = {EMBEDDING: served.hidden_size, HEAD: served.vocab_size, layer_part(served.num_layers - 1, MLP): None}
    lacking = [name for name in (*wanted, TOKEN_IDS, LOGPROBS) if name not in header]
    more = layer_part(served.num_layers, MLP)
    if lacking or more in header:
        what = f"lacks {', '.join(lacking)}" if lacking else f"has {more}"
        return [f"recording: {file} is none of a model of {served.num_layers} layers (it {what})"]
    if served.moe is not None:
        sparse = (layer for layer in range(served.num_layers) if served.is_moe_layer(layer))
        wanted |= {layer_part(layer, GATE): served.moe.num_experts for layer in sparse}
    faults = [
        f"recording: {file} has {name} with {header[name]['shape'][1]} columns, and {config.folder} {columns}"
        for name, columns in wanted.items()
        if columns is not None and name in header and header[name]["shape"][1] != columns
    ][:1]
    made = {"F32": "fp32", "BF16": "bf16"}.get(header[EMBEDDING]["dtype"], header[EMBEDDING]["dtype"])
    return faults + ([] if made == config.dtype else [f"dtype is {config.dtype}, and {file} was made in {made}"])


def _shape_faults(served: ModelShape, trained: ModelShape, config: DiagnoseConfig) -> list[str]:
    wrong = [
        f"{name} {two}, and {config.folder} {one}"
        for name, (one, two) in differing_fields(served, trained).items()
        if not name.startswith(MAY_DIFFER)
    ]
    if not wrong:
        return []
    return [f"trainer_folder: {config.trainer_folder} is a model of another shape: it has {'; '.join(wrong)}"]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, sorted(value) if isinstance(value, frozenset) else value
        return
    for name, item in value.items():
        yield from _leaves(item, f"{path}.{name}" if path else name)
