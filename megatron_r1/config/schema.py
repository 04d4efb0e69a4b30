"""The configuration of a run, as data. Rules about it are in validate.py; this file has none."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from megatron_r1.bounds import DECAY, Count, Natural, NonNegative, Positive, above, at_least
from megatron_r1.config.sandbox import SandboxConfig

AnswerPlace = Literal["answer", "boxed", "either"]
"""Where a response's answer is looked for: in `<answer>`, in the last \\boxed{}, or in the first of these that is
there."""

OffloadPart = Literal["weights", "gradients", "optimizer"]
"""A part of a trainer rank's device memory that can go to the host while servers sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model. `path` is a Hugging Face folder: config.json, tokenizer files, safetensors."""

    path: Path
    """Hugging Face folder that gives the architecture and the tokenizer."""
    load_from: Path | None = None
    """Folder of the first weights, Hugging Face's or torch_dist, of the same shape as `path`; None: `path` itself."""
    initialise: Literal["weights", "random"] = "weights"
    """Start from the folder's weights, or from random weights of its config.json."""
    train_mtp: bool = False
    """Train the multi-token-prediction layers too, with weight 0.1 of their loss; else they are kept, frozen. In RL
    they learn the sampled tokens, whatever their advantage."""
    router_bias_update_rate: NonNegative = 0.0
    """Step of the router's score-correction bias per optimizer step (1e-3 in V3 pretraining; 0 freezes it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Megatron's parallel sizes. world_size = tensor * pipeline_parallel * context * data; experts are split inside
    data x tensor."""

    tensor: Count = 1
    """Ranks that each layer's matrices are split over."""
    pipeline_parallel: Count = 1
    """Ranks that the layers are split over."""
    virtual_pipeline: Count = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    context: Count = 1
    """Ranks that each packed row is split over."""
    expert: Count = 1
    """Ranks that the experts are split over."""
    expert_tensor: Count = 1
    """Ranks that each expert's matrices are split over."""
    sequence: bool = False
    """Sequence parallelism (norms and dropout split over tensor ranks); required by MoE with tensor > 1."""
    pipeline_layout: str = ""
    """Megatron's pipeline layout string for uneven stages, e.g. `Et*3|(tt|)*29,m|L`; empty splits evenly."""
    world_size: Count = 1
    """Trainer processes in all."""

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline_parallel * self.context)

    @property
    def row_multiple(self) -> int:
        """A packed row's length is a multiple of it: context ranks split a row, sequence parallelism each part."""
        return self.tensor * self.context if self.sequence else 1

    @property
    def segment_multiple(self) -> int:
        """Each sequence is padded to a multiple of it: context rank i holds its i-th and its i-th last slice."""
        return 2 * self.context if self.context > 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FP8Config:
    """How matrix products run when train.dtype is fp8 (Transformer Engine's recipes, through Megatron-Core).

    As in DeepSeek-V3 (arXiv 2412.19437, section 3.3.1) only the products of linear layers and experts are in FP8:
    embedding, output head, router, norms and the attention core stay in bf16 or fp32, gradients are summed in fp32, and
    the optimizer's master weights are fp32."""

    recipe: Literal["blockwise", "tensorwise", "delayed", "mxfp8"] = "blockwise"
    """blockwise: DeepSeek-V3's, a scale for 1 x 128 activations and 128 x 128 weights (Hopper). tensorwise: a scale a
    tensor, of its present values. delayed: of its past values. mxfp8: a scale for 1 x 32 (Blackwell)."""
    format: Literal["e4m3", "hybrid"] = "e4m3"
    """hybrid: gradients in e5m2, which has more range and less precision."""
    parameters: bool = False
    """Keep the weights that only FP8 products read in FP8 too. Refused: docs/fp8.md says why."""
    amax_history: Count = 1024
    """delayed only: steps that a scale looks back on."""
    first_layers_bf16: Natural = 0
    """Layers at the start of the model that stay in bf16."""
    last_layers_bf16: Natural = 0
    """Layers at the end of the model that stay in bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a training step runs, whatever its loss."""

    dtype: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Compute precision. fp8 needs Transformer Engine and is refused without it."""
    fp8: FP8Config = field(default_factory=FP8Config)
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are computed again in the backward pass instead of kept: none, those of attention, or all of
    each layer's."""
    tokens_per_microbatch: Count = 4096
    """Length of a packed row. Every sequence must fit in one."""
    logprob_chunk_tokens: Count = 1024
    """At most this many rows of [tokens, vocabulary] are held in fp32 at a time."""
    deterministic: bool = False
    """The same bits from the same inputs on the same GPUs; slower. Rollouts are left out (docs/restart.md)."""
    offload: tuple[OffloadPart, ...] = ()
    """With servers on the trainer's GPUs (rollout.sync ipc): what goes to host memory while they sample. weights: with
    the router's biases; gradients: dropped, they hold nothing between steps; optimizer: master weights and moments."""
    threads_per_rank: Count = 1
    """CPU threads of torch in each trainer process."""
    gpu: str = ""
    """GPU that the memory is checked for before the start (h100, h200, ...: docs/planner.md); empty: this machine's."""
    collective_timeout_seconds: Positive = 6 * 3600.0
    """A rank that waits longer for the others gives up. It must outlast a rollout: all ranks wait for rank 0's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    lr: NonNegative = 3e-6
    """AdamW's learning rate after the warm-up."""
    min_lr: NonNegative = 3e-6
    """Learning rate at the end of a cosine or linear schedule; constant ignores it."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes from lr to min_lr after the warm-up."""
    warmup_steps: Natural = 0
    """Optimizer steps over which the learning rate rises from 0 to lr."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay."""
    beta1: Annotated[float, DECAY] = 0.9
    """Decay rate of Adam's first moment."""
    beta2: Annotated[float, DECAY] = 0.95
    """Decay rate of Adam's second moment."""
    eps: Positive = 1e-8
    """Added to the root of Adam's second moment."""
    clip_grad: NonNegative = 1.0
    """Largest norm of the whole gradient; a longer one is scaled down to it. 0 does not clip."""
    distributed: bool = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Precision of Adam's two moments. bf16, as DeepSeek-V3 has them (arXiv 2412.19437, section 3.3.3), takes 4 bytes
    less per trained weight; master weights and gradients stay fp32. It needs GPUs with Transformer Engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where problems come from: reasoning-gym tasks (procedural, seeded), files or a function of yours."""

    tasks: tuple[str, ...] = ()
    """reasoning-gym dataset names, optionally with arguments: `chain_sum:min_terms=2,max_terms=2`."""
    files: tuple[Path, ...] = ()
    """jsonl files; each line has question and answer, or messages and answer (see docs/grpo.md)."""
    source: str = ""
    """module:function or file.py:function that gives problems (docs/extending.md)."""
    task_size: Count = 100_000
    """Problems drawn from each task before the stream wraps."""
    template: Literal["r1_zero", "chat", "plain"] = "r1_zero"
    """How a problem becomes a prompt: the paper's R1-Zero template, the model's chat template, or the bare text."""
    thinking: Literal["on", "off", "template"] = "on"
    """With template chat: ask the model's template for a thought (DeepSeek's `thinking`, Qwen's `enable_thinking`), for
    none, or leave it at its default. One that closes the thought before the answer is refused unless it is off."""
    seed: Natural = 0
    """Of the tasks' problems, of their order, and of what is kept apart."""
    holdout: Count = 100
    """Problems kept apart for accuracy before and after; never sampled for training."""
    holdout_files: tuple[Path, ...] = ()
    """jsonl files of problems to judge by instead; `holdout` then means nothing. Training problems with the same
    questions are passed over and counted."""
    validation: Natural = 0
    """Further problems kept apart, for accuracy during training and for target_accuracy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    temperature: NonNegative = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_p: Annotated[float, above(0, 1)] = 1.0
    """Sample from the fewest tokens whose probabilities sum to it; 1: from all."""
    top_k: Annotated[int, at_least(-1)] = 0
    """0 means the whole vocabulary."""
    max_new_tokens: Count = 32_768
    """Longest response, in tokens; it is cut off there."""
    stop_token_ids: tuple[int, ...] = ()
    """Besides the tokenizer's end-of-sequence token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """vLLM servers: how many, where, and how weights reach them."""

    engine: str = "vllm"
    """What samples: vllm, or the import path of an engine of your own, module:name (docs/extending.md)."""
    num_engines: Count = 1
    """vLLM servers."""
    tensor_parallel: Count = 1
    """GPUs of each server; its matrices are split over them."""
    max_model_len: Count = 33_792
    """Longest prompt and response together, in tokens."""
    max_num_seqs: Count = 256
    """Sequences that a server decodes at once."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of the servers' weights and activations."""
    device: Literal["cpu", "cuda"] = "cuda"
    """Where the servers run; trainers run on the same kind."""
    memory_fraction: Annotated[float, above(0, 1)] = 0.85
    """vLLM's --gpu-memory-utilization (on CPU it is a share of host memory)."""
    kv_cache_gib: Positive = 1.0
    """CPU only: KV cache size."""
    threads: Count = 2
    """CPU only: OpenMP threads of each server."""
    devices: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of each server. Empty: the GPUs after the trainer's on this host (nccl), or those (ipc)."""
    sync: Literal["gloo", "nccl", "ipc"] = "nccl"
    """The way that weights take to the servers: gloo on CPUs; nccl to GPUs of their own; ipc, through the host's shared
    memory, to servers on the trainer's GPUs, or on CPUs."""
    sync_bucket_mib: Count = 512
    """Weights travel in rounds, two at a time, in each of which a trainer rank or a worker sends or receives at most
    this."""
    check_tensors: Natural = 8
    """After a sync so many tensors in all workers are compared with the trainer's, to the bit, others every time; after
    the first two of a server all of them. 0: never."""
    fp8_folder: Path | None = None
    """FP8 rollouts on GPUs: a folder of the same model in DeepSeek's FP8 form, which the servers start from; every sync
    then quantises the weights in its blocks before it sends them. None: rollouts in `dtype`."""
    draft_tokens: Natural = 0
    """Tokens that the model's multi-token-prediction layer drafts and the model then checks (speculative decoding,
    exact). The layer keeps the weights that the server started with; 0 drafts none."""
    routes: Literal["off", "compare", "replay"] = "off"
    """The experts that the servers choose for each token of a mixture of experts. compare: they come with the samples,
    and metrics say where the trainer chooses others. replay: the trainer uses them, forward and backward (R3)."""
    sleep_level: Literal[0, 1, 2] = 0
    """With servers on the trainer's GPUs (sync ipc): what they give back while it trains. 0: nothing. 1: the cache, and
    the weights to host memory. 2: both, and the weights come with the next sync."""
    start_timeout_seconds: NonNegative = 0.0
    """Until a server answers; 0: from the bytes of its weights (config/deadlines.py)."""
    stall_seconds: NonNegative = 0.0
    """A server that has work and has moved no token for so long is stuck, and is restarted; 0: from the longest prompt.
    How long a request lasts does not matter."""
    weights_gb_per_second: Positive = 0.5
    """The slowest rate at which weights reach a server, from its folder or from the trainer: start and sync may take as
    long as their bytes do at it."""
    max_restarts: Natural = 3
    """Failures of a server since the last whole rollout."""
    enforce_eager: bool = False
    """Run vLLM without CUDA graphs and compilation: a faster start, slower decoding."""
    expert_parallel: bool = False
    """Whole experts on each of a server's GPUs (vLLM's --enable-expert-parallel) instead of a part of every expert."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Keys and values of `dtype`, or in FP8 (GPUs only): twice the cache, and logprobs that differ more."""
    vllm_args: tuple[str, ...] = ()
    """More arguments of vLLM for the rollout servers, each NAME=VALUE or NAME without dashes, such as
    max-num-batched-tokens=16384; what a field here says is refused."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServerConfig:
    """A vLLM server that already runs (`vllm serve`); the stage's own model still gives tokenizer and template."""

    url: str = ""
    """http://host:8000; empty: servers of our own are started."""
    model: str = ""
    """The name under which the server knows the model."""
    token_file: Path | None = None
    """File that holds the server's bearer token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceConfig:
    """A reward model that scores what no rule can (paper, section 2.3.3), served by vLLM beside the rollouts.

    Its server is like the rollout servers but for what is said here. The score is the model's value, less the mean and
    divided by the standard deviation that it had on its validation pairs."""

    name: str
    """Of this part of the reward, such as helpful."""
    model: Path
    """Folder that a reward model stage made; its tokenizer is the policy's."""
    domains: tuple[str, ...]
    """The problems that it scores, by their domain."""
    weight: NonNegative = 1.0
    """Of its score in the total."""
    tensor_parallel: Count = 1
    """GPUs of its server."""
    devices: str = ""
    """CUDA_VISIBLE_DEVICES of its server; empty: what this process sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """Total = accuracy_weight * accuracy + format_weight * format + language_weight * language + the reward models'
    scores by their weights (paper, sections 2.2.2, 2.3.2 and 2.3.3). A problem has the parts that apply to it."""

    accuracy_weight: NonNegative = 1.0
    """Of the reward for a right answer; 0 leaves it out of the total."""
    format_weight: NonNegative = 1.0
    """Of the reward for the tags of thought and answer."""
    language_weight: NonNegative = 0.0
    """Of the language-consistency reward; 0 does not compute it. The paper adds it with weight 1 in R1's first RL."""
    language: str = "en"
    """The language that thoughts should be in, for problems that do not name one themselves: a code, or a name
    (config/languages.py)."""
    record_language: bool = False
    """Compute the language-consistency reward even where its weight is 0."""
    preferences: tuple[PreferenceConfig, ...] = ()
    """Reward models, for problems with grader "preference" and any others of their domains."""
    custom: tuple[str, ...] = ()
    """Rewards of your own, each module:function or file.py:function, with =WEIGHT behind if it is not 1; the part has
    the function's name (docs/extending.md)."""
    graders: tuple[str, ...] = ()
    """Graders of your own that problems may name, each module:function or file.py:function (docs/extending.md)."""
    answer_from: AnswerPlace = "answer"
    """Where the answer is: `<answer>` (the paper's template), the last \\boxed{} after the thought (models of Qwen and
    those distilled from R1), or either."""
    num_workers: Count = 4
    """Worker processes that grade answers, and programs that run at once."""
    timeout_seconds: Positive = 5.0
    """One answer's grading time, of the processor: a busy machine makes no answer wrong. Past it the worker is killed
    and the answer scores 0."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """Where the programs of coding problems run, and what they may use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineConfig:
    """Seconds that a phase may last. Past them every rank writes its Python stacks to run_dir/stacks and the run ends
    with status 75, so that a batch system starts it again. 0: no deadline."""

    start: NonNegative = 2 * 3600.0
    """Loading the model and waiting for every server; the warm-up too, if there is one."""
    rollout: NonNegative = 4 * 3600.0
    """Sampling, and grading beside it."""
    reward: NonNegative = 3600.0
    """Grading that outlasts sampling."""
    teacher: NonNegative = 3600.0
    """Scoring of a rollout by the teacher."""
    logprob: NonNegative = 3600.0
    """Scoring by the old and the reference policy."""
    train: NonNegative = 2 * 3600.0
    """All optimizer steps of one rollout."""
    sync: NonNegative = 2 * 3600.0
    """Pushing the weights, a server that died and starts again meanwhile included."""
    evaluate: NonNegative = 4 * 3600.0
    """Greedy accuracy on the validation or held-out problems."""
    save: NonNegative = 3600.0
    """An export, or what a checkpoint holds the ranks up."""

    def by_phase(self, rank: int) -> dict[str, float]:
        """Seconds by the names that the phases have in metrics.jsonl. Rank 0 alone knows when sampling ends and grading
        begins; the others are in one phase meanwhile."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if rank:
            named |= {
                name: named[name] + self.reward for name in ("rollout", "evaluate") if named[name] and self.reward
            }
        return named | {"checkpoint": self.save}


class StageConfig(Protocol):
    """What every stage's dataclass has, whatever it does: a name and a folder of its own."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...
    @property
    def run_dir(self) -> Path: ...
    @property
    def seed(self) -> int: ...
    @property
    def if_exists(self) -> Literal["refuse", "archive", "resume"]: ...


class TrainerStage(StageConfig, Protocol):
    """A stage that runs on trainer ranks."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def device(self) -> Literal["cpu", "cuda"]: ...
