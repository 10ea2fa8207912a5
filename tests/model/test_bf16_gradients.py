"""Gradients of a training in bf16 against those in fp32: sums over tokens and devices are fp32.

The forms that round such sums to bf16, as JAX's own gradients do, are written out here."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from model import decoder, forward, losses
from model.packing import Sequence, pack
from model.precision import FLOAT32, precision_of
from sharding.mesh import make_mesh
from tests import tiny

HALF = precision_of(jnp.bfloat16, "accelerator")
CONFIG = tiny.config(tie_word_embeddings=False, initializer_range=0.05)
FREQUENT = {5: 4000, 6: 1000, 7: 100}  # token → how often it occurs


def rounded_embed(params, tokens_bt, dtype):
    """Cast before the look-up: each occurrence's gradient is added to a sum in bf16."""
    return params["embed"].astype(dtype)[tokens_bt]


def rounded_matmul(equation, x, w, operands):
    """JAX's own gradient, which has the dtype of computation."""
    return jnp.einsum(equation, x, w.astype(x.dtype))


def relative(x, exact) -> float:
    x, exact = (np.asarray(y, np.float64) for y in (x, exact))
    return np.linalg.norm(x - exact) / np.linalg.norm(exact)


def frequent_batch() -> tuple[dict, int]:
    """Pairs of 360 random tokens, among which some occur often; how many pairs."""
    rng = np.random.default_rng(0)
    often = np.repeat(list(FREQUENT), list(FREQUENT.values()))
    others = rng.integers(8, tiny.VOCABULARY, 7200 - len(often))
    texts = rng.permutation(np.concatenate([often, others])).reshape(-1, 3, 120)
    packed = pack([Sequence(x, [y, z]) for x, y, z in texts.tolist()])
    return packed, len(texts)


def logprob_sum(params, packed, precision, pairs):
    chosen_b, rejected_b = losses.pair_logprobs(
        params, packed, config=CONFIG, pairs=pairs, precision=precision, remat="full"
    )
    return jnp.sum(rejected_b - chosen_b)  # DPO's gradient at its start, up to a factor


def test_the_programs_of_a_bf16_training_scatter_the_embeddings_gradient_in_fp32(monkeypatch):
    packed, pairs = frequent_batch()

    def scattered() -> list[str]:
        gradient = jax.jit(jax.grad(partial(logprob_sum, precision=HALF, pairs=pairs)))
        text = gradient.lower(decoder.abstract(CONFIG), packed).as_text()
        found = re.findall(r"stablehlo\.scatter\".*?\}\) : \(tensor<([^>]*)>", text, re.DOTALL)
        return [shape for shape in found if shape.startswith("320x32x")]

    assert scattered() == ["320x32xf32"]
    monkeypatch.setattr(forward, "embed", rounded_embed)
    assert scattered() == ["320x32xbf16"]


def test_a_frequent_tokens_gradient_is_nearer_to_fp32s_than_a_sum_in_bf16(monkeypatch):
    packed, pairs = frequent_batch()
    params = tiny.params(CONFIG)

    def gradient(precision):
        gradient = jax.jit(jax.grad(partial(logprob_sum, precision=precision, pairs=pairs)))
        return np.asarray(gradient(params, packed)["embed"])

    exact, ours = gradient(FLOAT32), gradient(HALF)
    monkeypatch.setattr(forward, "embed", rounded_embed)
    rounded = gradient(HALF)
    for token in FREQUENT:
        error, rounded_error = (relative(x[token], exact[token]) for x in (ours, rounded))
        assert error < 0.015 and error < rounded_error / 2


@pytest.mark.parametrize("devices", [1, 4])
def test_weight_gradients_of_several_devices_are_summed_in_fp32(devices):
    mesh = make_mesh(1, devices, 1, jax.devices()[:devices])
    rng = np.random.default_rng(0)
    x_btd, grad_btf = (
        jnp.asarray(rng.normal(size=(8, 64, width)), jnp.bfloat16) for width in (32, 48)
    )
    w_df = jnp.asarray(rng.normal(size=(32, 48)), jnp.float32)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))

    def error(matmul) -> float:
        @partial(jax.jit, in_shardings=(rows,) * 3, out_shardings=rows)
        def gradient(w_df, x_btd, grad_btf):
            return jax.grad(
                lambda w: jnp.sum(matmul("btd,df->btf", x_btd, w, jnp.bfloat16) * grad_btf)
            )(w_df)

        return relative(gradient(w_df, x_btd, grad_btf), exact)

    exact = np.einsum("btd,btf->df", *(np.asarray(x, np.float64) for x in (x_btd, grad_btf)))
    assert error(decoder.matmul) < 1e-6 < 1e-3 < error(rounded_matmul)
    x_btd, grad_btf = (x.astype(jnp.float32) for x in (x_btd, grad_btf))  # as they are on a CPU
    assert error(decoder.matmul) < 1e-6


@pytest.mark.parametrize("equation", ["btd,df->btf", "btf,fd->btd", "btd,dnh->btnh", "bte,ed->btd"])
def test_a_cpus_gradients_in_bf16_are_those_of_the_rounded_operands(equation):
    """Sums are fp32: what is left is the rounding of x, w and the cotangent alone."""
    axes_x, axes_w, out = re.split(",|->", equation)
    size = {"b": 2, "t": 24, "d": 32, "e": 40, "f": 48, "n": 3, "h": 16}
    rng = np.random.default_rng(0)
    x, w, ct = (
        jnp.asarray(rng.normal(size=[size[a] for a in axes]), jnp.float32)
        for axes in (axes_x, axes_w, out)
    )
    made, gradients = jax.vjp(lambda x, w: decoder.matmul(equation, x, w, jnp.bfloat16), x, w)
    grad_x, grad_w = gradients(ct)
    x, w, ct = (np.asarray(y.astype(jnp.bfloat16), np.float64) for y in (x, w, ct))
    for array, exact in (
        (made, np.einsum(equation, x, w)),
        (grad_x, np.einsum(f"{out},{axes_w}->{axes_x}", ct, w)),
        (grad_w, np.einsum(f"{axes_x},{out}->{axes_w}", x, ct)),
    ):
        assert array.dtype == jnp.float32 and relative(array, exact) < 1e-6


def test_a_norms_gradients_are_jaxs_own():
    rng = np.random.default_rng(0)
    x, ct = (jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.float32) for _ in range(2))
    w = jnp.asarray(rng.normal(size=32), jnp.float32)

    def plain(x, w):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * w

    (ours, grads), (theirs, exact) = (
        jax.vjp(function, x, w) for function in (lambda x, w: decoder.rms_norm(x, w, 1e-5), plain)
    )
    np.testing.assert_array_equal(ours, theirs)
    for a, b in zip(grads(ct), exact(ct)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
