"""Our decoder against transformers' PyTorch model: the same random weights, the same logits."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from model import decoder, hf, kv_cache
from model.config import from_hf
from model.forward import forward
from model.precision import precision_of
from sharding.mesh import make_mesh
from tests import tiny

TOLERANCE = 1e-4
SHAPES = {
    # grouped queries, no window, untied
    "grouped": {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None},
    # a window shorter than the sequences
    "window": {"model_type": "mistral", "rope_theta": 1e4, "sliding_window": 7},
    # a window of 1, where a query sees itself alone; one key head for all
    "window of one": {"model_type": "mistral", "sliding_window": 1, "num_key_value_heads": 1},
    # heads wider than hidden_size / heads, tied
    "wide heads": {
        "model_type": "mistral",
        "sliding_window": None,
        "head_dim": 24,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    },
    # narrower ones, in a window
    "narrow heads": {"model_type": "mistral", "sliding_window": 5, "head_dim": 4},
    # SmolLM2's kind: llama, tied, 9 query heads on 3
    "llama": {
        "model_type": "llama",
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
        "hidden_size": 36,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    # llama without grouping
    "llama plain": {"model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
}
BASE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@dataclasses.dataclass
class Pair:
    """One model twice: transformers' and ours."""

    theirs: torch.nn.Module
    config: object
    params: dict

    def reference(self, tokens_bt, valid_bt=None) -> np.ndarray:
        kwargs = {}
        if valid_bt is not None:
            kwargs["attention_mask"] = torch.tensor(valid_bt).long()
            kwargs["position_ids"] = torch.tensor(np.maximum(valid_bt.cumsum(1) - 1, 0))
        with torch.no_grad():
            return self.theirs(torch.tensor(tokens_bt), **kwargs).logits.numpy()

    def ours(self, tokens_bt, valid_bt=None, **kwargs) -> np.ndarray:
        return np.asarray(full_logits(self.params, self.config, tokens_bt, valid_bt, **kwargs))


@partial(jax.jit, static_argnames=("config", "precision", "remat"))
def full_logits(params, config, tokens_bt, valid_bt=None, **kwargs):
    batch = tiny.rows_of_one(tokens_bt, valid_bt)
    return decoder.logits(params, config, forward(params, config, batch, **kwargs))


@cache
def make_pair(name: str, attention: str = "eager") -> Pair:
    torch.manual_seed(sorted(SHAPES).index(name))
    their_config = transformers.AutoConfig.for_model(**BASE | SHAPES[name])
    theirs = transformers.AutoModelForCausalLM.from_config(
        their_config, attn_implementation=attention
    )
    with torch.no_grad():  # norms away from one, or a forgotten one would not show
        for key, weight in theirs.named_parameters():
            if "norm" in key:
                weight.uniform_(0.5, 1.5)
    config = from_hf(their_config.to_dict())
    params, state = hf.empty_params(config), theirs.eval().state_dict()
    for key, slot in hf.slots(config).items():
        hf.put(params, config, slot, state[key].numpy(), key)
    return Pair(theirs, config, jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="module", params=SHAPES)
def pair(request) -> Pair:
    return make_pair(request.param)


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE["vocab_size"], shape)


def assert_close(ours, reference, valid_bt=None, tolerance=TOLERANCE):
    spread = reference.std()
    assert spread > 0.5, (
        f"the reference's logits hardly vary ({spread}): the test would show nothing"
    )
    difference = np.abs(np.asarray(ours) - reference)
    if valid_bt is not None:
        difference = difference[valid_bt]
    assert difference.max() < tolerance


def test_logits_equal_transformers(pair):
    tokens_bt = random_tokens(3, 20)
    assert_close(pair.ours(tokens_bt), pair.reference(tokens_bt))


@pytest.mark.parametrize("name", ["grouped", "window"])
@pytest.mark.parametrize("length", [1, 9])
def test_logits_equal_those_of_the_other_attention_of_transformers(name, length):
    pair, tokens_bt = make_pair(name, attention="sdpa"), random_tokens(2, length)
    assert_close(pair.ours(tokens_bt), pair.reference(tokens_bt))


def test_logits_of_padded_rows_equal_transformers(pair):
    """Rows padded on the left, on the right and not at all, in one batch."""
    tokens_bt, length = random_tokens(5, 20), 20
    valid_bt = np.ones((5, length), bool)
    valid_bt[1, :9] = valid_bt[2, :17] = valid_bt[3, 11:] = valid_bt[4, 3:] = False
    ours = pair.ours(tokens_bt, valid_bt)
    assert_close(ours, pair.reference(tokens_bt, valid_bt), valid_bt)
    # and what the padding holds does not matter
    others_bt = np.where(valid_bt, tokens_bt, 5)
    np.testing.assert_array_equal(pair.ours(others_bt, valid_bt)[valid_bt], ours[valid_bt])


def test_prefill_and_decode_equal_the_full_forward(pair):
    """Three prompts of different lengths, then 12 tokens each, one at a time: past the window."""
    prompt_length, steps, lengths_b = 8, 12, np.array([8, 5, 1])
    tokens_bt = random_tokens(3, prompt_length + steps)
    expected = pair.ours(tokens_bt)
    params = kv_cache.unstack_layers(jax.tree.map(lambda x: x, pair.params))
    prompts_bt = np.where(
        np.arange(prompt_length) < lengths_b[:, None], tokens_bt[:, :prompt_length], 0
    )
    prefill = jax.jit(lambda tokens_bt: kv_cache.prefill(params, pair.config, tokens_bt))
    hidden_btd, kv = prefill(jnp.asarray(prompts_bt))
    prefilled = np.asarray(decoder.logits(params, pair.config, hidden_btd))
    cache = [
        (k.at[..., :prompt_length].set(new_k), v.at[:, :, :prompt_length].set(new_v))
        for (k, v), (new_k, new_v) in zip(
            kv_cache.empty_cache(pair.config, 3, prompt_length + steps), kv
        )
    ]
    for row, length in enumerate(lengths_b):
        assert_close(prefilled[row, :length], expected[row, :length])

    decode = jax.jit(lambda cache, t, p: kv_cache.decode(params, pair.config, cache, t, p))
    for step in range(steps):
        positions_b = lengths_b + step
        fed_b = tokens_bt[np.arange(3), positions_b]
        hidden_bd, cache = decode(cache, jnp.asarray(fed_b), jnp.asarray(positions_b))
        logits_bv = decoder.logits(params, pair.config, hidden_bd)
        assert_close(logits_bv, expected[np.arange(3), positions_b])


def test_each_row_writes_one_position_and_the_last_one_for_those_beyond_the_cache():
    pair = make_pair("grouped")
    params = kv_cache.unstack_layers(jax.tree.map(lambda x: x, pair.params))
    cache = [(k + 1, v + 1) for k, v in kv_cache.empty_cache(pair.config, 2, 4)]
    decode = jax.jit(lambda cache, t, p: kv_cache.decode(params, pair.config, cache, t, p))
    _, after = decode(cache, jnp.array([3, 3]), jnp.array([1, 4]))
    for before, now in zip(cache, after):
        for b, n, positions in zip(before, now, (3, 2)):
            changed = np.moveaxis(np.asarray(b != n), positions, 1).any(axis=(2, 3))
            assert changed.tolist() == [[False, True, False, False], [False, False, False, True]]


def test_rematerialization_changes_neither_values_nor_gradients():
    pair, tokens_bt = make_pair("window"), random_tokens(2, 12)

    def loss(params, remat):
        logits_btv = full_logits(params, pair.config, tokens_bt, remat=remat)
        return -jnp.mean(jax.nn.log_softmax(logits_btv)[:, :, 1])

    plain, plain_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)(pair.params, "none")
    again, again_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)(pair.params, "full")
    np.testing.assert_allclose(again, plain, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(plain_grad), jax.tree.leaves(again_grad)):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6 * np.abs(a).max())


def test_gradients_equal_those_of_torch():
    pair, tokens_bt = make_pair("window"), random_tokens(2, 12)
    theirs = pair.theirs
    torch.log_softmax(theirs(torch.tensor(tokens_bt)).logits, -1)[:, :, 1].mean().backward()
    grads = {key: weight.grad.numpy() for key, weight in theirs.named_parameters()}

    def objective(params):
        logits_btv = full_logits(params, pair.config, tokens_bt)
        return jnp.mean(jax.nn.log_softmax(logits_btv)[:, :, 1])

    ours = jax.tree.map(np.asarray, jax.jit(jax.grad(objective))(pair.params))
    for name, slot in hf.slots(pair.config).items():
        reference = grads[name]
        found = slot.to_hf(pair.config, hf.place(ours, slot))
        np.testing.assert_allclose(found, reference, atol=1e-4 * np.abs(reference).max())


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("name", ["grouped", "llama"])
def test_bf16_is_near_fp32(name, platform):
    pair, tokens_bt = make_pair(name), random_tokens(3, 20)
    rounded = pair.ours(tokens_bt, precision=precision_of(jnp.bfloat16, platform))
    exact = pair.ours(tokens_bt)
    assert rounded.dtype == np.float32
    assert np.abs(rounded - exact).mean() < 0.05 * exact.std()
    assert np.corrcoef(rounded.ravel(), exact.ravel())[0, 1] > 0.995


def test_unstack_layers_gives_each_layer_its_weights_and_empties_the_stack():
    pair = make_pair("grouped")
    stacked = dict(pair.params["layers"])
    given = {**pair.params, "layers": dict(stacked)}
    unstacked = kv_cache.unstack_layers(given)
    assert given["layers"] == {}
    assert len(unstacked["layers"]) == BASE["num_hidden_layers"]
    for i, layer in enumerate(unstacked["layers"]):
        assert layer.keys() == stacked.keys()
        for name, weight in layer.items():
            np.testing.assert_array_equal(weight, stacked[name][i])


def test_abstract_describes_the_parameters():
    pair = make_pair("llama")
    described = jax.tree.map(lambda x: (x.shape, str(x.dtype)), decoder.abstract(pair.config))
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), pair.params) == described


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("window", (4, 1, 1)),
        ("window", (1, 4, 1)),
        ("grouped", (1, 1, 4)),
        ("llama", (1, 2, 2)),
        ("window", (2, 1, 2)),
        ("llama", (1, 1, 4)),
    ],
)
def test_a_mesh_of_four_devices_gives_the_same_logits(name, sizes):
    pair, tokens_bt = make_pair(name), random_tokens(4, 16)
    valid_bt = np.arange(16) < np.array([[16], [9], [12], [4]])
    expected = pair.ours(tokens_bt, valid_bt)
    mesh = make_mesh(*sizes, devices=jax.devices()[:4])
    shardings = jax.tree.map(lambda x: x.sharding, decoder.abstract(pair.config, mesh))
    placed = jax.device_put(pair.params, shardings)
    if sizes[0] < 4:  # something is really cut
        assert not placed["layers"]["gate"].sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        ours = jax.jit(lambda p, t, v: full_logits(p, pair.config, t, v))(
            placed, tokens_bt, valid_bt
        )
    assert_close(ours, expected, valid_bt)
