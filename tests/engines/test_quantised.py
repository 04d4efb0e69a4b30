"""Weights quantised on their way to the servers."""

import json

import torch
from ranks import run_ranks

from megatron_r1.engines.quantised import QuantisedSource
from megatron_r1.weights.fp8 import FP8, dequantise


def weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


TENSORS = {"a.weight": weight(130, 200), "norm.weight": weight(1, 8)[0], "embed.weight": weight(16, 8)}


class Source:
    """Three tensors; the first has scales at the server."""

    def metadata(self):
        return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]

    def __iter__(self):
        yield from TENSORS.items()


SERVED = {"a.weight", "a.weight_scale_inv", "norm.weight", "embed.weight"}


def test_metadata_is_what_is_sent():
    source = QuantisedSource(Source(), SERVED, block=128)
    assert source.metadata() == [
        ("a.weight", FP8, (130, 200)),
        ("a.weight_scale_inv", torch.float32, (2, 2)),
        ("norm.weight", torch.bfloat16, (8,)),
        ("embed.weight", torch.bfloat16, (16, 8)),
    ]
    for _ in range(2):  # it can be iterated again
        sent = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
        assert sent == source.metadata()


def test_what_arrives_is_the_weight_within_the_formats_error():
    sent = dict(QuantisedSource(Source(), SERVED, block=128))
    given = TENSORS["a.weight"].float()
    arrived = dequantise(sent["a.weight"], sent["a.weight_scale_inv"], block=128, out=torch.empty(130, 200).bfloat16())
    scales = sent["a.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:130, :200]
    bound = torch.maximum(2.0**-4 * given.abs(), 2.0**-10 * scales) + 2.0**-8 * given.abs()  # and bf16's own rounding
    assert ((arrived.float() - given).abs() <= bound).all()
    assert torch.equal(sent["embed.weight"], TENSORS["embed.weight"])


def test_three_ranks_quantise_their_parts_as_the_whole(tmp_path):
    """Cuts inside blocks, by rows and by columns, and between blocks: codes and scales to the bit."""
    run_ranks("quantised.py", str(tmp_path), ranks=3)
    for rank in range(3):
        equal = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(equal) == 14 and all(equal.values()), equal
