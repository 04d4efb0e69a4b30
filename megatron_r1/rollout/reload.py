"""Load new weights into a running vLLM model, a decoder layer at a time. Runs inside vLLM.

vLLM's own layerwise reload finds out when a module is complete by running every weight loader twice, once
under a dispatch mode that counts elements; on CPU that is most of a push. The stream announces its names
beforehand, so here a decoder layer is loaded when all of its tensors have come: its modules go back to the
checkpoint's shapes, vLLM's loaders fill them once, and vLLM's post-processing copies the result into the
tensors that the model runs with. Everything else is vLLM 0.32's reload, module by module.
"""

# torch types a module's attributes as tensors.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload.layerwise import (
    _layerwise_process,
    _place_kernel_tensors,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, materialize_layer, restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

from megatron_r1.rollout.source import group_of_module, group_of_tensor


class Reload:
    """One update of `model`: give `add` all tensors of `names`, in any order, some at a time.

    At most the tensors of unfinished decoder layers are held, and the layers that one call completes exist
    twice. After an error the model can serve, with the weights of some modules possibly new.
    """

    def __init__(self, model: torch.nn.Module, model_config: ModelConfig, names: Iterable[str]) -> None:
        self.model = model
        self.model_config = model_config
        self.missing = Counter(group_of_tensor(name) for name in names)
        self.waiting: dict[str, list[tuple[str, torch.Tensor]]] = {}
        self.modules: dict[str, list[tuple[str, torch.nn.Module]]] = {}
        self.holders: dict[int, list[torch.nn.Module]] = {}
        for name, module in model.named_modules():
            self.modules.setdefault(group_of_module(name), []).append((name, module))
            for parameter in module._parameters.values():
                self.holders.setdefault(id(parameter), []).append(module)

    def add(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take tensors under their Hugging Face names and load the layers that are complete now.

        RuntimeError for a tensor of a layer that vLLM's model does not have.
        """
        complete = []
        for name, tensor in tensors:
            group = group_of_tensor(name)
            if group not in self.modules:
                raise RuntimeError(f"weight update: vLLM's model has no module {group!r}, where {name!r} belongs")
            self.waiting.setdefault(group, []).append((name, tensor))
            self.missing[group] -= 1
            if not self.missing[group]:
                complete.append(group)
        if complete:
            self.load(
                [module for group in complete for module in self.modules[group]],
                [tensor for group in complete for tensor in self.waiting.pop(group)],
            )

    def load(self, modules: list[tuple[str, torch.nn.Module]], tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Load all tensors of these modules."""
        try:
            for _, module in modules:
                make_loadable(module)
            with disable_mtp_completeness_check():
                named = [name.rpartition(".") for name in self.model.load_weights(tensors)]
            loaded = {module for module, _, tensor in named if tensor not in SKIP_TENSORS}  # those are loaded in place
            for name, module in modules:
                if name in loaded and not is_deferred_attention_layer(module):
                    _layerwise_process(module, get_layerwise_info(module))
                    repack_experts(module)
        finally:
            for _, module in modules:  # whatever was not processed runs with what it had
                put_back(module)
        for name, module in modules:
            if name in loaded:
                self.process_sharers(module)
        for _, module in modules:  # last: MLA derives its matrices from its neighbours' weights
            if is_deferred_attention_layer(module):
                module.process_weights_after_loading(self.model_config.dtype)

    def process_sharers(self, module: torch.nn.Module) -> None:
        """Let modules that share a parameter with `module` process it anew.

        A tied head shares the embedding's weight, and on CPU computes with a packed copy of it, made when it was
        loaded: left alone, it would go on with the weights that the server started from.
        """
        for parameter in module._parameters.values():
            for other in self.holders.get(id(parameter), ()):
                if parameter is not None and other is not module:
                    other.quant_method.process_weights_after_loading(other)


def make_loadable(module: torch.nn.Module) -> None:
    """Give the module empty tensors in the checkpoint's shapes, keeping those that it runs with in vLLM's
    record of it.
    """
    info = get_layerwise_info(module)
    info.kernel_tensors = get_layer_params_buffers(module)
    info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
    restore_layer_on_meta(module, info)
    materialize_layer(module, info)


def put_back(module: torch.nn.Module) -> None:
    """Undo make_loadable where no processing has done so."""
    info = get_layerwise_info(module)
    if info.kernel_tensors is not None:
        _place_kernel_tensors(module, info)
    info.reset()


def repack_experts(module: torch.nn.Module) -> None:
    """Bring experts into their CPU kernel's layout.

    vLLM 0.32 copies unquantised experts of a reload into place unpacked on CPU (its is_weight_update branch
    skips the kernel's own processing), which puts logprobs off by 0.1; running that processing cures it.
    """
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    if kernel is not None:
        kernel.fused_experts.process_weights_after_loading(module)
