"""What experts a completion must bring: taken out of the engine's, and every fault refused by name."""

import numpy as np
import pytest

from megatron_r1.errors import RoutesError
from megatron_r1.rollout.routes import RouteForm
from megatron_r1.types import Completion

FORM = RouteForm(num_layers=4, sparse=(1, 2, 3), num_experts=8, top_k=2)
PROMPT, TOKENS = 5, 3


def completion(routes: np.ndarray | None) -> Completion:
    return Completion(
        token_ids=np.arange(TOKENS, dtype=np.int32),
        logprobs=np.zeros(TOKENS, np.float32),
        finish_reason="stop",
        weight_version=0,
        routes=routes,
    )


def engines(tokens: int = PROMPT + TOKENS - 1, layers: int = 4, experts: int = 8, chosen: int = 2) -> np.ndarray:
    """As vLLM sends them: the dense layer's row is zeros."""
    rng = np.random.default_rng(0)
    routes = rng.random((tokens, layers, experts)).argsort(-1)[..., :chosen].astype(np.uint8)
    routes[:, 0] = 0
    return routes


def test_the_sparse_layers_of_all_tokens_but_the_last():
    found = FORM.taken(completion(engines()), PROMPT).routes
    assert found is not None and found.dtype == np.uint8 and found.shape == (7, 3, 2)
    np.testing.assert_array_equal(found, engines()[:, 1:])


def test_bytes_per_token():
    assert FORM.bytes_per_token == 6
    deepseek = RouteForm(num_layers=61, sparse=tuple(range(3, 61)), num_experts=256, top_k=8)
    assert deepseek.bytes_per_token == 464, "58 sparse layers, 8 experts, a byte each"
    kimi = RouteForm(num_layers=61, sparse=tuple(range(1, 61)), num_experts=384, top_k=8)
    assert kimi.bytes_per_token == 960, "more than 256 experts need two bytes"


def spoiled(place: tuple, value: object) -> np.ndarray:
    routes = engines()
    routes[place] = value
    return routes


@pytest.mark.parametrize(
    ("routes", "said"),
    [
        (None, "a completion came without the experts of its tokens"),
        (engines(layers=3), "experts came for 7 tokens, 3 layers and 2 experts a token"),
        (engines(chosen=4), "experts came for 7 tokens, 4 layers and 4 experts a token"),
        (engines(tokens=8), "experts came for 8 tokens"),
        (engines(tokens=TOKENS - 1), "experts came for 2 tokens, 4 layers and 2 experts a token; a completion of 3"),
        (engines()[:, :, 0], "an array of 2 dimensions"),
        (np.zeros_like(engines()), "token 0 of 7 went to experts 0, 0 in layer 1 (100% of all)"),
        (spoiled((4, 2), [3, 3]), "token 4 of 7 went to experts 3, 3 in layer 2 (5% of all)"),
        (spoiled((4, 2), [3, 8]), "a token went to expert 8; the model has 8 experts"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(routes, said):
    with pytest.raises(RoutesError) as caught:
        FORM.taken(completion(routes), PROMPT)
    assert said in str(caught.value)
    assert "rollout.routes" in str(caught.value) and "off" in str(caught.value), "the field and the remedy"


def test_a_model_with_one_expert_a_token():
    single = RouteForm(num_layers=4, sparse=(1, 2, 3), num_experts=8, top_k=1)
    good = engines()[..., :1]
    assert single.taken(completion(good), PROMPT).routes is not None
    with pytest.raises(RoutesError, match="all 7 tokens went to expert 0 in every layer"):
        single.taken(completion(np.zeros_like(good)), PROMPT)


def test_a_dense_layer_may_hold_anything():
    assert FORM.taken(completion(spoiled((slice(None), 0), 77)), PROMPT).routes is not None
