"""Which part of which Hugging Face tensor goes where in this worker's parameters: asked of vLLM's own loaders.

vLLM's model loads placeholders (sharded_rdt_fake.FakeRDTTensor) that have shapes and no numbers, while its parameters
have none either. What the loaders narrow, chunk and copy is recorded by them; here each copy becomes a box of the
tensor and a strided place in the parameter. So every split that vLLM knows is known, and none is written down. Runs
inside vLLM.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.distributed.weight_transfer.sharded_rdt_fake import BakeSink, FakeRDTTensor, OpChain
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS, restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers, get_tensor_load_numel
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from megatron_r1.engines.vllm.destination import Destination
from megatron_r1.engines.vllm.reload import keep_what_it_runs_with, put_back
from megatron_r1.resharding.boxes import Box, whole
from megatron_r1.weights.wire import ParamSpec


@dataclass
class Recording:
    """`destinations`: everything that loading all tensors writes. `filled`: parameters (module name, name) of which the
    loaders set a part to 0."""

    destinations: list[Destination] = field(default_factory=list)
    filled: set[tuple[str, str]] = field(default_factory=set)


def record(model: torch.nn.Module, specs: Sequence[ParamSpec]) -> Recording:
    """Load placeholders of `specs` into `model`, which is left as it was.

    RuntimeError, naming the parameter or tensor, if a loader does not take it (its shape, say), leaves a part of a
    parameter unset, or does something with a tensor that is no view of it.
    """
    sink = BakeSink()
    fills: Counter[tuple[str, str]] = Counter()
    names = {module: name for name, module in model.named_modules()}
    device = next(model.parameters()).device
    reached = ""

    def placeholders() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal reached
        for name, dtype, shape in specs:
            reached = f"{name} {list(shape)}"
            placeholder: Any = FakeRDTTensor  # its own __new__ has these arguments
            yield name, placeholder(name, torch.Size(shape), dtype, device, sink=sink)

    with (
        without_numbers(model) as sizes,
        stamped(model, sink),
        _Fills(sink, names, fills),
        disable_mtp_completeness_check(),
    ):
        try:
            model.load_weights(placeholders())  # type: ignore[operator]
        except Exception as error:
            raise RuntimeError(
                f"weight sync: vLLM cannot load {reached} ({error}); serve the model that is trained, in a layout "
                "that divides it"
            ) from error
    number_of = {name: number for number, (name, _, _) in enumerate(specs)}
    found, written = Recording(), Counter(fills)
    for module, scatters in sink.copies_by_layer.items():
        for scatter in scatters:
            if scatter is None:
                continue
            name, chain = scatter.src
            number = number_of[name]
            box, strides = geometry(name, specs[number][2], chain, scatter.shape, scatter.stride)
            found.destinations.append(
                Destination(number, box, names[module], module, scatter.param_name, scatter.offset, *strides)
            )
            written[names[module], scatter.param_name] += box.size
    check_complete(written, sizes)
    found.filled = {place for place, count in fills.items() if count}
    return found


def check_complete(written: Counter[tuple[str, str]], sizes: dict[str, dict[str, int]]) -> None:
    """RuntimeError unless modules that are written at all are written whole: `sizes`, numbers by module and
    parameter."""
    for module in {module for module, _ in written}:
        for parameter, size in sizes[module].items():
            if written[module, parameter] < size:
                raise RuntimeError(
                    f"weight sync: vLLM's loaders set {written[module, parameter]} of the {size} numbers of "
                    f"{module}.{parameter}; send all tensors of the layer, of the model that is served"
                )


@contextlib.contextmanager
def without_numbers(model: torch.nn.Module) -> Iterator[dict[str, dict[str, int]]]:
    """Parameters in the checkpoint's shapes, on the meta device; yields how many numbers of each loading sets."""
    modules = list(model.named_modules())
    try:
        for _, module in modules:
            keep_what_it_runs_with(module)
            restore_layer_on_meta(module, get_layerwise_info(module))
        yield {
            name: {
                parameter: get_tensor_load_numel(tensor)
                for tensors in get_layer_params_buffers(module)
                for parameter, tensor in tensors.items()
                if tensor.is_meta and parameter not in SKIP_LOAD_TENSORS
            }
            for name, module in modules
        }
    finally:
        for _, module in modules:
            put_back(module)


@contextlib.contextmanager
def stamped(model: torch.nn.Module, sink: BakeSink) -> Iterator[None]:
    """While this lasts each parameter's loader tells `sink` whose copies are whose."""
    changed: list[tuple[Any, Callable | None]] = []
    try:
        for module in model.modules():
            for tensors in get_layer_params_buffers(module):
                for name, tensor in tensors.items():
                    own = getattr(tensor, "weight_loader", None)
                    changed.append((tensor, own))
                    loader = default_weight_loader if own is None else _get_original_loader(tensor)
                    tensor.weight_loader = stamp(loader, sink, module, name)  # type: ignore[attr-defined]
        yield
    finally:
        for tensor, own in reversed(changed):  # tied parameters are met twice
            if own is None:
                del tensor.weight_loader
            else:
                tensor.weight_loader = own


def stamp(loader: Callable, sink: BakeSink, module: torch.nn.Module, name: str) -> Callable:
    @functools.wraps(loader)
    def stamped_loader(*arguments: Any, **options: Any) -> Any:
        sink.current = (module, name)
        try:
            return loader(*arguments, **options)
        finally:
            sink.current = None

    return stamped_loader


class _Fills(TorchDispatchMode):
    """Counts the numbers that loaders fill with 0 (rows that pad a vocabulary)."""

    def __init__(self, sink: BakeSink, names: dict[torch.nn.Module, str], fills: Counter[tuple[str, str]]) -> None:
        super().__init__()
        self._sink, self._names, self._fills = sink, names, fills

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        aten = torch.ops.aten
        filling = func is aten.zero_.default or (func is aten.fill_.Scalar and args[1] == 0)
        if filling and self._sink.current is not None:
            module, name = self._sink.current
            self._fills[self._names[module], name] += args[0].numel()
        return func(*args, **(kwargs or {}))


def geometry(
    name: str, full: Sequence[int], chain: OpChain, shape: Sequence[int], stride: Sequence[int]
) -> tuple[Box, tuple[int, int]]:
    """The box of a tensor of shape `full` that `chain` of views leads to, and the strides of its rows and columns in
    the destination, which has `shape` and `stride`. RuntimeError for a part that is no box, or is not laid out like
    one."""
    view, columns = replayed(name, full, chain), whole(full).columns
    source = [(size, step) for size, step in zip(view.shape, view.stride(), strict=True) if size != 1]
    target = [(size, step) for size, step in zip(shape, stride, strict=True) if size != 1]
    top, left = divmod(int(view.storage_offset()), columns)
    fault = RuntimeError(
        f"weight sync: vLLM copies a part of {name} {list(full)}, shape {list(view.shape)} by strides "
        f"{list(view.stride())}, into shape {list(shape)} by strides {list(stride)}; only boxes are sent"
    )
    if [size for size, _ in source] != [size for size, _ in target]:
        raise fault
    dims = [(step, size, to) for (size, step), (_, to) in zip(source, target, strict=True)]
    if columns > 1 and len(dims) == 1 and dims[0][0] == 1 and dims[0][1] % columns == 0 and not left:  # rows on end
        ((_, size, to),) = dims
        dims = [(columns, size // columns, columns * to), (1, columns, to)]
    width = column_stride = rows = row_stride = 1
    for step, size, to in sorted(dims):
        if step == 1 and columns > 1 and left + size <= columns:
            width, column_stride = size, to
        elif step == rows * columns and (rows == 1 or to == rows * row_stride):
            rows, row_stride = rows * size, to if rows == 1 else row_stride
        else:
            raise fault
    return Box(top, top + rows, left, left + width), (row_stride, column_stride)


def replayed(name: str, full: Sequence[int], chain: OpChain) -> torch.Tensor:
    """`chain` on a tensor without numbers: its shape, strides and offset are the part's."""
    view = torch.empty(tuple(full), device="meta")
    for operation, arguments, options in chain:
        if operation == "contiguous":
            continue  # the same numbers in the same order
        operation = "view" if operation == "reshape" else operation
        view = getattr(view, operation)(*arguments, **dict(options))
    return view
