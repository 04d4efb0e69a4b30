"""vLLM's own NCCL weight transfer with our loading: a layer at a time, each worker's shard only (reload.py).

Runs inside vLLM (see plugin.py). The transport, its handshake and its buffers are vLLM's; it loads through vLLM's
layerwise reload, which keeps a layer's tensors unsharded until the layer is complete. The trainer's half is vLLM's too.
"""

from __future__ import annotations

from collections import Counter

import torch
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

from megatron_r1.engines.vllm.reload import Reload
from megatron_r1.resharding.layers import group_of_tensor


class LayerwiseNCCLWeightTransferEngine(NCCLWeightTransferEngine):
    """Receives packed broadcasts of trainer rank 0."""

    last: NCCLWeightTransferUpdateInfo | None = None
    """The last update's parameters: vLLM 0.33's trainer names them again only when they have changed."""

    def start_weight_update(self) -> None:
        """Nothing to prepare: a layer is touched when its first tensor comes."""

    def finish_weight_update(self) -> None:
        """Nothing is left to do: every layer was finished when it was complete."""

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive and load one whole update. On an error layers that are not complete keep the weights they had."""
        if self.model_update_group is None:
            raise RuntimeError("nccl weight transfer: update_weights came before init_weight_transfer_engine")
        info = update_info if update_info.names else self.last
        if info is None or not self.packed:
            raise RuntimeError("nccl weight transfer: the trainer must name the parameters and send them packed")
        self.last = info
        reload = Reload(self.model, self.model_config, Counter(map(group_of_tensor, info.names)))
        try:
            packed_nccl_broadcast_consumer(
                iterator=(
                    (name, (shape, getattr(torch, dtype)))
                    for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes)
                ),
                group=self.model_update_group,
                src=0,
                post_unpack_func=reload.add,
                buffer_size_bytes=self.packed_buffer_size_bytes,
                num_buffers=self.packed_num_buffers,
                device=self.device,
            )
        except BaseException:
            reload.close()
            raise
        reload.finish()
