"""Record what a vLLM model computes for one prompt. Runs inside vLLM's workers, of servers that were asked for it.

vLLM adds `Recorder` to its worker class (--worker-extension-cls), whose methods POST /collective_rpc then calls. The
server runs without compilation, so that modules are called, and a module's output is what its hooks see. Hidden states
are given from layer to layer in two parts, which are added here. The first worker records: outputs are whole on each
after their all-reduce. Left out: pipeline parallel servers, of which there are none here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_r1.activations import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    GATE,
    HEAD,
    HEAD_POSITIONS,
    INPUT,
    INPUT_NORM,
    MIDDLE,
    MIDDLE_NORM,
    MLP,
    NORM,
    NORM_INPUT,
    layer_part,
)


class Recorder:
    """What is added to vLLM's worker class; the names must be none of its own."""

    model_runner: Any
    rank: int
    _activations: Activations | None = None

    def begin_activations(self, num_tokens: str) -> None:
        """Record the next forward pass, which must be of `num_tokens` tokens, 3 or more."""
        self._stop()
        if self.rank == 0:
            self._activations = Activations(self.model_runner.model, int(num_tokens))

    def end_activations(self, file: str) -> None:
        """Write what was recorded to `file` (safetensors), and stop. RuntimeError if that is not one pass of them."""
        activations = self._stop()
        if activations is not None:
            save_file(activations.checked(), file)

    def _stop(self) -> Activations | None:
        activations, self._activations = self._activations, None
        if activations is not None:
            activations.close()
        return activations


class Activations:
    """Hooks on a vLLM model, and what they saw: `tensors` in host memory, by the names of megatron_r1.activations."""

    def __init__(self, model: Any, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.tensors: dict[str, torch.Tensor] = {}
        self.faults: list[str] = []
        self.undo: list[Callable[[], object]] = []
        decoder = model.model
        self.after(decoder.embed_tokens, EMBEDDING)
        for number, layer in enumerate(decoder.layers):
            self.watch_layer(layer, number)
        self.before(decoder.norm, NORM_INPUT)
        self.after(decoder.norm, NORM)
        self.undo.append(model.logits_processor.register_forward_hook(self.see_logits).remove)

    def watch_layer(self, layer: Any, number: int) -> None:
        def name(part: str) -> str:
            return layer_part(number, part)

        self.before(layer, name(INPUT))
        self.after(layer.input_layernorm, name(INPUT_NORM))
        self.after(layer.self_attn, name(ATTENTION))
        self.before(layer.post_attention_layernorm, name(MIDDLE))
        self.after(layer.post_attention_layernorm, name(MIDDLE_NORM))
        self.after(layer.mlp, name(MLP))
        if hasattr(layer.mlp, "gate"):
            self.after(layer.mlp.gate, name(GATE))
            self.watch_router(layer.mlp.experts, name(EXPERTS))

    def before(self, module: torch.nn.Module, name: str) -> None:
        """Record the hidden state that `module` is given, in one part or two: a layer by its arguments' names, a norm
        as (x) or (x, residual)."""
        signature = inspect.signature(module.forward)

        def see(_: torch.nn.Module, positional: tuple, named: dict[str, Any]) -> None:
            given = signature.bind(*positional, **named).arguments
            if "hidden_states" in given:
                hidden, residual = given["hidden_states"], given.get("residual")
            else:
                hidden, residual = positional[0], positional[1] if len(positional) > 1 else None
            self.keep(name, hidden if residual is None else hidden + residual)

        self.undo.append(module.register_forward_pre_hook(see, with_kwargs=True).remove)

    def after(self, module: torch.nn.Module, name: str) -> None:
        """Record the output of `module`, or the first one of several."""

        def see(_: torch.nn.Module, __: tuple, output: Any) -> None:
            self.keep(name, output[0] if isinstance(output, tuple) else output)

        self.undo.append(module.register_forward_hook(see).remove)

    def watch_router(self, experts: Any, name: str) -> None:
        """Record which experts are chosen. A kernel that chooses by itself says nothing: the name is then missing."""
        router = experts.router
        choose = router.select_experts

        def see(*positional: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
            weights, chosen = choose(*positional, **named)
            self.keep(name, chosen.to(torch.int32))
            return weights, chosen

        router.select_experts = see
        self.undo.append(lambda: delattr(router, "select_experts"))

    def see_logits(self, _: torch.nn.Module, __: tuple, logits: torch.Tensor | None) -> None:
        """Logits of the prompt's positions: all but the last, whose logits come apart, to sample from."""
        if logits is not None and len(logits) == self.num_tokens - 1:
            self.keep(HEAD, logits[:HEAD_POSITIONS], rows=min(HEAD_POSITIONS, self.num_tokens - 1))

    def keep(self, name: str, values: torch.Tensor, *, rows: int | None = None) -> None:
        """A copy: vLLM's kernels write over their inputs."""
        rows = self.num_tokens if rows is None else rows
        if name in self.tensors or values.ndim != 2 or len(values) != rows:
            again = "again, " if name in self.tensors else ""
            self.faults.append(f"{name}: {again}shape {list(values.shape)} for {rows} rows")
        self.tensors[name] = values.detach().to("cpu", copy=True).contiguous()

    def checked(self) -> dict[str, torch.Tensor]:
        """RuntimeError if more or less than one pass of all tokens was seen."""
        missing = [name for name in (EMBEDDING, NORM, HEAD) if name not in self.tensors]
        if self.faults or missing:
            raise RuntimeError(
                f"activations: expected one forward pass of {self.num_tokens} tokens; missing {missing}, wrong "
                f"{self.faults[:5]}"
            )
        return self.tensors

    def close(self) -> None:
        """Take the hooks off."""
        while self.undo:
            self.undo.pop()()
