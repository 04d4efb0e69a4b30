"""vLLM weight transfer shard to shard: the worker's half. It runs inside vLLM (see plugin.py).

First the worker says what it wants (recorded.py), then every update brings just that, from the trainer's ranks that
hold it, layer by layer (reload.py). A failed update leaves the model able to serve, with the weights of some layers
possibly new: the trainer must push again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_r1.engines.vllm.checks import Layouts, WorkerCheck
from megatron_r1.engines.vllm.kernels import sharers_of
from megatron_r1.engines.vllm.messages import (
    messages_of,
    pieces_by_layer,
    prepare_to_receive,
    receive_all,
    wants_as_numbers,
)
from megatron_r1.engines.vllm.peers import Meeting, Peers, join
from megatron_r1.engines.vllm.recorded import Recording, record
from megatron_r1.engines.vllm.reload import Reload
from megatron_r1.resharding.plan import Message, Piece, Tensor, Want
from megatron_r1.weights.wire import ParamSpec, wire_tensors


@dataclass
class ShardInitInfo(WeightTransferInitInfo):
    """One of two calls. With `names`, `dtype_names` and `shapes`: the weights that will be sent; the worker finds out
    what it wants of them. With `meeting` and `first_worker`: the worker enters the group, as the number of its server's
    first worker and its own say, tells rank 0 what it wants and hears which messages it will get."""

    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    meeting: dict | None = None
    first_worker: int = 0


@dataclass
class ShardUpdateInfo(WeightTransferUpdateInfo):
    """What comes is known beforehand. `checked`: tensors whose fingerprints the worker tells rank 0 afterwards."""

    checked: list[int] = field(default_factory=list)


class ShardWeightTransferEngine(WeightTransferEngine[ShardInitInfo, ShardUpdateInfo]):
    """Receives this worker's shards from the trainer's ranks and puts them into the model."""

    init_info_cls = ShardInitInfo
    update_info_cls = ShardUpdateInfo
    recording: Recording | None = None
    specs: Sequence[ParamSpec] = ()
    tensors: Sequence[Tensor] = ()
    messages: Sequence[Message] = ()
    peers: Peers | None = None
    layouts: Layouts | None = None

    def init_transfer_engine(self, init_info: ShardInitInfo) -> None:
        if init_info.meeting is None:
            self.shutdown()
            dtypes = [getattr(torch, name) for name in init_info.dtype_names]
            shapes = [tuple(shape) for shape in init_info.shapes]
            self.specs = list(zip(init_info.names, dtypes, shapes, strict=True))
            self.tensors = wire_tensors(self.specs)
            self.recording, self.layouts = record(self.model, self.specs), Layouts()
        else:
            self.meet(Meeting(**init_info.meeting), init_info.first_worker)

    def meet(self, meeting: Meeting, first_worker: int) -> None:
        if self.recording is None:
            raise RuntimeError("weight sync: the worker was asked to meet before it heard what will be sent")
        parallel = self.parallel_config
        worker = first_worker + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.peers = join(meeting, meeting.trainers + worker, self.device)
        try:
            wants = [Want(place.tensor, place.box) for place in self.recording.destinations]
            self.peers.send_numbers(wants_as_numbers(wants), to=0)
            self.messages = messages_of(self.peers.receive_numbers(of=0), worker, self.tensors)
            prepare_to_receive(self.peers, self.messages)
        except BaseException:
            self.shutdown()
            raise

    def start_weight_update(self) -> None:
        """Nothing to prepare: a layer is touched when its first piece has come."""

    def update_weights(self, update_info: dict) -> None:
        """As vLLM's, without its accelerator synchronisation: the reload has a stream of its own."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ShardUpdateInfo) -> None:
        """Receive and place all pieces, and say what the model has then. On any error leave the group, so that the
        senders fail too."""
        if self.peers is None or self.recording is None or self.layouts is None:
            raise RuntimeError("weight sync: update_weights came before the meeting with the trainer's ranks")
        recording = self.recording
        layers = [tensor.layer for tensor in self.tensors]
        checked, filled = set(update_info.checked), recording.filled
        sharers = sharers_of(self.model)
        check = WorkerCheck(recording.destinations, self.specs, layers, checked, self.layouts, filled, sharers)
        coming = pieces_by_layer(self.messages, self.tensors)
        reload = Reload(self.model, self.model_config, coming, recording.filled, check.placed)

        def take(piece: Piece, values: torch.Tensor) -> None:
            reload.place(self.tensors[piece.tensor].layer, recording.destinations[piece.want], piece.box, values)

        try:
            receive_all(self.peers, self.messages, self.specs, self.tensors, take)
            reload.finish()
            if update_info.checked:
                self.peers.send_numbers(check.report(), to=0)
        except BaseException:
            reload.close()
            self.shutdown()
            raise

    def finish_weight_update(self) -> None:
        """Nothing is left to do: every layer was finished when its last piece came."""

    def shutdown(self) -> None:
        if self.peers is not None:
            self.peers.close()
            self.peers = None
