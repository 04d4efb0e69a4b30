"""Logprob and entropy against torch in float64, chunked or not, with a padded vocabulary."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.model.logprob import chunked_logprob_entropy, logprob_entropy


def reference(hidden, weight, labels, temperature=1.0):
    scores = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    entropy = -(scores.exp() * scores).sum(-1)
    return scores.gather(1, labels[:, None]).squeeze(1), entropy


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator, dtype=torch.float64) * 2
    weight = torch.randn(23, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 23, (37,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("chunk_tokens", [1, 8, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_float64_log_softmax(chunk_tokens, temperature):
    hidden, weight, labels = inputs(torch.float32)
    logprobs, entropy = chunked_logprob_entropy(
        hidden, weight, labels, vocab_size=23, chunk_tokens=chunk_tokens, temperature=temperature
    )
    exact_hidden, exact_weight, _ = inputs()
    exact_logprobs, exact_entropy = reference(exact_hidden, exact_weight, labels, temperature)
    torch.testing.assert_close(logprobs.double(), exact_logprobs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, atol=2e-5, rtol=1e-5)
    mix = torch.linspace(-1, 1, 37)
    (logprobs * mix + 0.3 * entropy).sum().backward()
    (exact_logprobs * mix.double() + 0.3 * exact_entropy).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, atol=1e-4, rtol=1e-4)


def test_gradcheck_of_both_outputs():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(lambda z: logprob_entropy(z, labels), (logits,))


def test_padding_columns_have_no_probability_and_no_gradient():
    hidden, weight, labels = inputs()
    padded = torch.cat([weight.detach(), torch.full((5, 16), 9.0, dtype=torch.float64)]).requires_grad_()
    logprobs, entropy = chunked_logprob_entropy(hidden, padded, labels, vocab_size=23, chunk_tokens=8)
    exact_logprobs, exact_entropy = reference(hidden, weight, labels)
    torch.testing.assert_close(logprobs, exact_logprobs.float().to(logprobs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, exact_entropy.float().to(entropy), atol=1e-5, rtol=1e-5)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.count_nonzero(padded.grad[23:]) == 0
    assert torch.isfinite(padded.grad).all()


def test_never_more_than_a_chunk_of_logits_at_once():
    """The largest fp32 tensor that autograd keeps between forward and backward is a chunk's, not the whole row's."""
    hidden, weight, labels = inputs(torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked_logprob_entropy(hidden, weight, labels, vocab_size=23, chunk_tokens=8)
    assert kept, "autograd saved nothing: the test would prove nothing"
    assert max(kept) < 37 * 23
    assert max(kept) <= max(37 * 16, 8 * 23, 23 * 16)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    logprobs, entropy = logprob_entropy(logits, torch.tensor([1]))
    assert logprobs.item() == -600.0
    assert entropy.item() == pytest.approx(0.0, abs=1e-6)
    (logprobs + entropy).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0, 0.0]]))
