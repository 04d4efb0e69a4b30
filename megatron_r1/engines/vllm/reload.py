"""Load new weights into a running vLLM model, part by part as they come. Runs inside vLLM.

vLLM's own layerwise reload keeps every tensor, unsharded, until the module that it belongs to has all of its own: for
the experts of a DeepSeek-V3 layer 22.5 GB on each GPU, of which the GPU may keep one part in 32. It also runs every
weight loader twice, once under a dispatch mode that counts elements. Here it is known what will come, and where it goes
(recorded.py): a decoder layer's modules go back to the checkpoint's shapes (this worker's shard of them) when its first
part comes; when the last has come, vLLM's post-processing copies the result into the tensors that the model runs with.
Everything else is vLLM's reload, module by module.
"""

# torch types a module's attributes as tensors.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload.layerwise import (
    _layerwise_process,
    _place_kernel_tensors,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, materialize_layer, restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

from megatron_r1.engines.vllm.destination import Destination
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.layers import group_of_module

logger = init_logger(f"vllm.{__name__}")  # vLLM shows only its own


class Reload:
    """One update of `model`: `place` boxes of its tensors, in any order, until all has come.

    Held beside the model are this worker's shards of the decoder layers that have begun and are not complete (one, if
    the stream goes layer by layer), and while a layer is completed its processed form. `close` ends an update that
    broke off: the model can serve, with the weights of some layers possibly new. `peak_bytes`: the most that was held.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        missing: Mapping[str, int],
        filled: Collection[tuple[str, str]] = (),
        placed: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`missing`: how many parts of each layer will come. `filled`: parameters (module name, name) that are 0 where
        nothing comes. `placed` is called with a layer whose parts have all come, before they are processed."""
        self.model = model
        self.model_config = model_config
        self.missing = Counter(missing)
        self.filled = filled
        self.placed = placed
        self.begun: dict[str, set[str]] = {}
        """Modules that a loader has filled, by the group that they belong to, of groups that have begun."""
        self.held_bytes = self.peak_bytes = 0
        self.modules: dict[str, list[tuple[str, torch.nn.Module]]] = {}
        self.holders: dict[int, list[torch.nn.Module]] = {}
        for name, module in model.named_modules():
            self.modules.setdefault(group_of_module(name), []).append((name, module))
            for parameter in module._parameters.values():
                self.holders.setdefault(id(parameter), []).append(module)
        self.group_of = {name: group for group, modules in self.modules.items() for name, _ in modules}
        device = next(model.parameters()).device
        self.stream = cuda_stream(device) if device.type == "cuda" else None

    def place(self, group: str, destination: Destination, box: Box, values: torch.Tensor) -> None:
        """Put the numbers of `box`, [rows, columns], where they go, and complete their layer if they are its last.
        RuntimeError for a layer that vLLM's model does not have. The values may be freed after the call: on a GPU all
        work is on one stream of its own, in order with the caller's.
        """
        with self.in_order():
            if group not in self.modules:
                raise RuntimeError(f"weight update: vLLM's model has no module {group!r}")
            if group not in self.begun:
                self.begin(group)
            destination.view(box).copy_(values)
            if destination.parameter not in SKIP_TENSORS and self.group_of.get(destination.module_name) == group:
                self.begun[group].add(destination.module_name)
            self.missing[group] -= 1
            if self.missing[group] <= 0:
                self.complete(group)

    def begin(self, group: str) -> None:
        """Give the group's modules empty tensors in the checkpoint's shapes."""
        self.begun[group] = set()
        for name, module in self.modules[group]:
            make_loadable(module)
            for parameter in (own for path, own in self.filled if path == name):
                getattr(module, parameter).data.zero_()
        self.held_bytes += group_bytes(self.modules[group])
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def complete(self, group: str) -> None:
        """Process what was loaded and put it into the tensors that the model runs with."""
        loaded, modules = self.begun[group], self.modules[group]
        self.held_bytes -= group_bytes(modules)
        try:
            self.placed(group)
            for name, module in modules:
                if name in loaded and not is_deferred_attention_layer(module):
                    keep_what_was_released(module)
                    with as_first_load(module):
                        _layerwise_process(module, get_layerwise_info(module))
        finally:
            self.put_back(group)
        for name, module in modules:
            if name in loaded:
                self.process_sharers(module)
        for _, module in modules:  # last: MLA derives its matrices from its neighbours' weights
            if is_deferred_attention_layer(module):
                module.process_weights_after_loading(self.model_config.dtype)

    def put_back(self, group: str) -> None:
        """Let modules that were not processed run with what they had."""
        for _, module in self.modules[group]:
            put_back(module)
        del self.begun[group]

    def finish(self) -> None:
        """RuntimeError if a layer has begun and is not complete: tensors that were announced did not come."""
        unfinished = sorted(self.begun)
        self.close()
        if unfinished:
            raise RuntimeError(f"weight update: tensors of {', '.join(unfinished[:5])} were announced and did not come")
        logger.info("Weight update: at most %d bytes were held beside the model.", self.peak_bytes)

    def close(self) -> None:
        """End the update. Layers that are not complete keep the weights that they had."""
        for group in list(self.begun):
            self.put_back(group)

    @contextlib.contextmanager
    def in_order(self) -> Iterator[None]:
        """On the reload's stream, after what the caller's has queued and before what it will."""
        if self.stream is None:
            yield
            return
        callers = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(callers)
        with torch.cuda.stream(self.stream):
            yield
        callers.wait_stream(self.stream)

    def process_sharers(self, module: torch.nn.Module) -> None:
        """Let modules that share a parameter with `module` process it anew.

        A tied head shares the embedding's weight, and on CPU computes with a packed copy of it, made when it was
        loaded: left alone, it would go on with the weights that the server started from. Experts and their router share
        the router's bias, which nothing is derived from: they are processed once, since some kernels' experts are
        shuffled in place, and would be so twice.
        """
        for name, parameter in module._parameters.items():
            for other in self.holders.get(id(parameter), ()) if name not in SKIP_TENSORS else ():
                if parameter is not None and other is not module:
                    other.quant_method.process_weights_after_loading(other)


@functools.cache
def cuda_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all updates: the allocator keeps what a stream has freed for that stream alone."""
    return torch.cuda.Stream(device)


def group_bytes(modules: Iterable[tuple[str, torch.nn.Module]]) -> int:
    return sum(
        tensor.nbytes
        for _, module in modules
        for tensors in get_layer_params_buffers(module)
        for tensor in tensors.values()
    )


def keep_what_it_runs_with(module: torch.nn.Module) -> None:
    """Note the tensors that the module runs with in vLLM's record of it."""
    info = get_layerwise_info(module)
    info.kernel_tensors = get_layer_params_buffers(module)
    info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)


def make_loadable(module: torch.nn.Module) -> None:
    """Give the module empty tensors in the checkpoint's shapes; put_back undoes it."""
    keep_what_it_runs_with(module)
    info = get_layerwise_info(module)
    restore_layer_on_meta(module, info)
    materialize_layer(module, info)


def put_back(module: torch.nn.Module) -> None:
    """Undo make_loadable where no processing has done so."""
    info = get_layerwise_info(module)
    if info.kernel_tensors is not None:
        _place_kernel_tensors(module, info)
    info.reset()


def keep_what_was_released(module: torch.nn.Module) -> None:
    """MLA on CPUs with AMX computes with packed copies of kv_b_proj's weight and empties it. It is to derive them anew:
    let the loaded weight stay, where vLLM 0.32 would copy it into the empty one, which fails."""
    kernel_tensors = get_layerwise_info(module).kernel_tensors
    if getattr(module, "_cpu_skip_gemm_dispatch", False) and kernel_tensors is not None:
        parameters, _ = kernel_tensors
        parameters |= {name: module._parameters[name] for name, own in parameters.items() if not own.numel()}


@contextlib.contextmanager
def as_first_load(module: torch.nn.Module) -> Iterator[None]:
    """Have experts on a CPU brought into their kernel's layout, as when the model was loaded first.

    vLLM 0.32 skips that for a module that has a kernel (its is_weight_update branch) and copies the unpacked weights
    into place, which puts logprobs off by 0.1, and fails where the kernel's layout is padded."""
    method = getattr(module, "quant_method", None)
    kernel = getattr(method, "moe_kernel", None)
    if method is None or kernel is None or next(module.parameters()).device.type != "cpu":
        yield
        return
    method.moe_kernel = None
    try:
        yield
    finally:
        method.moe_kernel = kernel
