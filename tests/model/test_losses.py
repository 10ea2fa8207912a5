"""DPO's loss, log-probs, optimizer and schedules against the references users trust."""

import dataclasses
import math
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from model import decoder, losses, train
from model.logprobs import response_logprobs
from model.packing import Sequence, pack
from model.precision import FLOAT32
from sharding.mesh import batch_shards, make_mesh
from stages import dpo
from tests import tiny

OPTIMIZATION = train.Optimization(
    learning_rate=1e-3,
    schedule="linear",
    warmup_ratio=0.2,
    optimizer="adamw",
    weight_decay=0.05,
    max_grad_norm=1.0,
)


def trainer_of(config, mesh, optimization, steps) -> train.Trainer:
    """A DPO trainer in fp32."""
    loss = losses.Loss("sigmoid", 0.1)
    loss = partial(losses.pair_loss, loss=loss, config=config, precision=FLOAT32)
    return train.Trainer(loss, optimization, steps, decoder.abstract(config, mesh))


# Each paper's formula in float64, from what `losses.Pairs` holds (c chosen, r rejected; n tokens).
def log_sigmoid(x):
    return -np.logaddexp(0, -x)


FORMULAS = {
    "sigmoid": lambda pc, pr, rc, rr, nc, nr, w, b, e, g: (
        -(1 - e) * log_sigmoid(b * (pc - rc - pr + rr)) - e * log_sigmoid(-b * (pc - rc - pr + rr))
    ),
    "robust": lambda pc, pr, rc, rr, nc, nr, w, b, e, g: (
        (
            -(1 - e) * log_sigmoid(b * (pc - rc - pr + rr))
            + e * log_sigmoid(-b * (pc - rc - pr + rr))
        )
        / (1 - 2 * e)
    ),
    "ipo": lambda pc, pr, rc, rr, nc, nr, w, b, e, g: (
        ((pc - rc) / nc - (pr - rr) / nr - 1 / (2 * b)) ** 2
    ),
    "hinge": lambda pc, pr, rc, rr, nc, nr, w, b, e, g: np.maximum(0, 1 - b * (pc - rc - pr + rr)),
    "sppo": lambda pc, pr, rc, rr, nc, nr, w, b, e, g: (
        (pc - rc - (w - 0.5) / b) ** 2 + (pr - rr - (0.5 - w) / b) ** 2
    ),
    "sigmoid_norm": lambda pc, pr, rc, rr, nc, nr, w, b, e, g: (
        -log_sigmoid(b / nc * (pc - rc) - b / nr * (pr - rr))
    ),
    "simpo": lambda pc, pr, rc, rr, nc, nr, w, b, e, g: -log_sigmoid(b / nc * pc - b / nr * pr - g),
}
VARIANTS = [
    losses.Loss("sigmoid", 0.1),
    losses.Loss("sigmoid", 0.01, label_smoothing=0.3),
    losses.Loss("sigmoid", 0.5, label_smoothing=0.1, nll_weight=0.5),
    losses.Loss("robust", 0.2, label_smoothing=0.2),
    losses.Loss("robust", 0.1),
    losses.Loss("ipo", 0.1),
    losses.Loss("ipo", 2.0, nll_weight=1.0),
    losses.Loss("hinge", 0.1),
    losses.Loss("sppo", 0.05),
    losses.Loss("sigmoid_norm", 5.0),
    losses.Loss("simpo", 2.5),
    losses.Loss("simpo", 2.0, gamma=1.2),
]


def some_pairs(count=16):
    """fp64, what `losses.Pairs` holds."""
    rng = np.random.default_rng(0)
    references = rng.normal(-60, 10, (2, count))
    policy = references + rng.normal(0, 5, (2, count))
    tokens = rng.integers(5, 90, (2, count)).astype(float)
    return np.stack([*policy, *references, *tokens, rng.uniform(0, 1, count)])


@pytest.mark.parametrize("loss", VARIANTS, ids=lambda c: f"{c.name}-{c.beta}-{c.label_smoothing}")
def test_each_loss_and_its_gradient_are_its_papers_formula_in_float64(loss):
    arrays = some_pairs()

    def formula(arrays):
        found = FORMULAS[loss.name](*arrays, loss.beta, loss.label_smoothing, loss.gamma)
        return found - loss.nll_weight * arrays[0] / arrays[4]

    with jax.enable_x64(True):
        pairs = losses.Pairs(*map(jnp.array, arrays))
        np.testing.assert_allclose(loss(pairs), formula(arrays), rtol=1e-12)
        gradients = jax.grad(lambda p: jnp.sum(loss(p)))(pairs)
    for i, name in enumerate(("pi_chosen", "pi_rejected")):
        step = np.zeros_like(arrays)
        step[i] = 1e-5
        slope = (formula(arrays + step) - formula(arrays - step)) / 2e-5
        np.testing.assert_allclose(getattr(gradients, name), slope, rtol=1e-6, atol=1e-8)
    in_fp32 = loss(losses.Pairs(*jnp.array(arrays, jnp.float32)))
    np.testing.assert_allclose(in_fp32, formula(arrays), rtol=1e-4, atol=1e-5)


def test_every_loss_has_its_formula_and_its_flag():
    assert set(FORMULAS) == set(losses.FORMULAS) == set(get_args(losses.Name))
    assert get_args(dpo.Args.__annotations__["loss"]) == get_args(losses.Name)


@pytest.mark.parametrize(
    "wrong,word",
    [
        ({"name": "exo"}, "--loss"),
        ({"beta": 0}, "--beta"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"name": "ipo", "label_smoothing": 0.1}, "only sigmoid and robust"),
        ({"gamma": 1.0}, "SimPO"),
        ({"nll_weight": -1}, "--nll-weight"),
    ],
)
def test_constants_that_make_no_sense_are_refused_by_flag(wrong, word):
    with pytest.raises(ValueError, match=word):
        losses.Loss(**wrong)


def test_the_loss_stays_finite_at_extreme_margins():
    far, zero, one = jnp.array([-1e4, 1e4]), jnp.zeros(2), jnp.ones(2)
    for name in FORMULAS:
        found = losses.Loss(name, 1.0)(losses.Pairs(far, -far, zero, zero, one, one, one))
        assert np.isfinite(found).all()


def test_loss_is_ln_2_where_policy_and_reference_agree():
    x, y, one = jnp.array([-3.0, -70.0]), jnp.array([-9.0, -2.0]), jnp.ones(2)
    for eps in (0.0, 0.2):
        found = losses.Loss("sigmoid", 0.3, eps)(losses.Pairs(x, y, x, y, one, one, one))
        np.testing.assert_allclose(found, math.log(2), rtol=1e-6)


def sequences(*sizes):
    """Random sequences of (prompt length, response length, …)."""
    rng = np.random.default_rng(1)
    tokens = [[rng.integers(3, tiny.VOCABULARY, n).tolist() for n in row] for row in sizes]
    return [Sequence(prompt, responses) for prompt, *responses in tokens]


def torch_model(config, params):
    """transformers' Llama with our weights."""
    hf = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    )
    d, layers = 32, params["layers"]
    state = {
        "model.embed_tokens.weight": params["embed"],
        "model.norm.weight": params["final_norm"],
    }
    names = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    for i in range(2):
        for ours, theirs in names.items():
            w = np.asarray(layers[ours][i])
            w = w if w.ndim == 1 else w.reshape(w.shape[0], -1).T
            state[f"model.layers.{i}.{theirs}.weight"] = w
        state[f"model.layers.{i}.self_attn.o_proj.weight"] = (
            np.asarray(layers["o"][i]).reshape(-1, d).T
        )
    state = {name: torch.tensor(np.array(w)) for name, w in state.items()}
    missing, unexpected = hf.load_state_dict(state, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"])
    return hf


def torch_logprobs(model, sequences):
    """Every response alone behind its prompt, unpadded."""
    found = []
    for sequence in sequences:
        for response in sequence.responses:
            ids = torch.tensor(sequence.prompt + response)[None]
            logprobs = torch.log_softmax(model(ids).logits[0], -1)
            start, end = len(sequence.prompt), ids.shape[1]
            found.append(logprobs[range(start - 1, end - 1), ids[0, start:]].sum())
    return torch.stack(found)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("shards", [1, 4])
def test_packed_logprobs_equal_transformers_on_each_response_alone(alone, shards, monkeypatch):
    config = tiny.config()
    params = tiny.params(config)
    rows = sequences((6, 18, 4), (3, 7, 7), (16, 1, 9), (1, 7), (5, 30, 2, 11))
    expected = torch_logprobs(torch_model(config, params), rows).detach().numpy()
    batch = pack(rows, shards, alone)
    assert len(batch["tokens"]) % shards == 0
    for chunk in (512, 8):
        monkeypatch.setattr("model.logprobs.CHUNK", chunk)
        found = response_logprobs(params, config, batch, len(expected) + 1)
        np.testing.assert_allclose(found[:-1], expected, atol=1e-4)
        assert found[-1] == 0  # no such response


def test_packing_keeps_the_sliding_window_of_each_branch():
    config = tiny.config(sliding_window=5)
    params = tiny.params(config)
    rows = sequences((9, 12, 8), (4, 10, 13))
    together = response_logprobs(params, config, pack(rows), 4)
    for i, (row, k) in enumerate((row, k) for row in rows for k in (0, 1)):
        alone = pack([Sequence(row.prompt, [row.responses[k]])])
        np.testing.assert_allclose(
            together[i], response_logprobs(params, config, alone, 1)[0], atol=1e-4
        )


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_training_steps_equal_torchs_optimizer_on_transformers_model(name):
    """Loss, gradient norm and total update of 6 clipped steps, two micro-batches each."""
    config = tiny.config()
    params = tiny.params(config)
    optimization = dataclasses.replace(OPTIMIZATION, optimizer=name, schedule="cosine")
    steps, pairs = 6, 4
    batches = [sequences((6, 18, 12), (4, 14, 19)), sequences((5, 7, 17), (3, 12, 6))]
    references = {
        "ref_chosen": np.array([-60.0, -50.0], np.float32),
        "ref_rejected": np.array([-55.0, -40.0], np.float32),
    }
    ones = ("chosen_tokens", "rejected_tokens", "win_probability", "weights")
    references |= {name: np.ones(2, np.float32) for name in ones}

    model = torch_model(config, params)
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.RMSprop
    optimizer = kind(groups, lr=1e-3)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, steps)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    expected = []
    for _ in range(steps):
        loss = 0
        for b in batches:
            chosen, rejected = torch_logprobs(model, b).reshape(2, 2).T
            margin = (chosen - torch.tensor(references["ref_chosen"])) - (
                rejected - torch.tensor(references["ref_rejected"])
            )
            loss = loss - torch.nn.functional.logsigmoid(0.1 * margin).sum() / pairs
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        expected.append((loss.item(), norm.item(), schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    expected_update = torch.cat([p.detach().flatten() for p in model.parameters()]) - before

    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = trainer_of(config, mesh, optimization, steps)
        ours = jax.tree.map(jnp.copy, params)
        state = trainer.init_optimizer(ours)
        for i, (loss, norm, rate) in enumerate(expected):
            gradients, values = None, []
            for b in batches:
                gradients, micro = trainer.accumulate(
                    ours, gradients, pack(b) | references, float(pairs)
                )
                values.append(micro["loss"])
            our_norm = trainer.norm(gradients)
            ours, state, _ = trainer.apply(ours, state, gradients, our_norm)
            assert float(np.sum(values) / pairs) == pytest.approx(loss, abs=1e-5)
            assert float(our_norm) == pytest.approx(norm, rel=1e-4)
            assert float(trainer.schedule(i)) == pytest.approx(rate, rel=1e-5, abs=1e-12)
    found_model = torch_model(config, ours)
    update = torch.cat([p.detach().flatten() for p in found_model.parameters()]) - before
    assert torch.norm(update - expected_update) / torch.norm(expected_update) < 1e-3


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_schedules_are_transformers_schedules(name):
    total, optimization = 37, dataclasses.replace(OPTIMIZATION, schedule=name, warmup_ratio=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optimization.learning_rate)
    warmup = math.ceil(0.1 * total)
    if name == "constant":
        reference = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        make = getattr(transformers, f"get_{name}_schedule_with_warmup")
        reference = make(optimizer, warmup, total)
    ours = train.learning_rate(optimization, total)
    for step in range(total):
        assert float(ours(step)) == pytest.approx(reference.get_last_lr()[0], rel=1e-5, abs=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 2),
        pytest.param((1, 4, 1), marks=pytest.mark.heavy),
        pytest.param((1, 1, 4), marks=pytest.mark.heavy),
        pytest.param((2, 2, 1), marks=pytest.mark.heavy),
    ],
)
def test_moments_lie_as_their_parameters_do_and_old_buffers_are_donated(shape):
    config = tiny.config(num_key_value_heads=4)
    mesh = make_mesh(*shape)
    shardings = jax.tree.map(lambda x: x.sharding, decoder.abstract(config, mesh))
    with jax.set_mesh(mesh):
        trainer = trainer_of(config, mesh, OPTIMIZATION, 4)
        params = jax.device_put(tiny.params(config), shardings)
        state = trainer.init_optimizer(params)
        references = {name: np.full(2, -50, np.float32) for name in ("ref_chosen", "ref_rejected")}
        ones = ("chosen_tokens", "rejected_tokens", "win_probability", "weights")
        references |= {name: np.ones(2, np.float32) for name in ones}
        b = pack(sequences((6, 18, 12), (4, 14, 19)), batch_shards(mesh))
        first, _ = trainer.accumulate(params, None, b | references, 2.0)
        gradients, _ = trainer.accumulate(params, first, b | references, 2.0)
        adam = next(s for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s))
        for moment in (adam.mu, adam.nu, gradients):
            same = jax.tree.map(
                lambda m, p: m.sharding.is_equivalent_to(p.sharding, m.ndim), moment, params
            )
            assert all(jax.tree.leaves(same))
        assert any(not p.sharding.is_fully_replicated for p in jax.tree.leaves(params))
        new, *_ = trainer.apply(params, state, gradients, trainer.norm(gradients))
        assert all(x.is_deleted() for x in jax.tree.leaves((params, state, first)))
        assert new["layers"]["q"].sharding.is_equivalent_to(shardings["layers"]["q"], 4)


def _is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)
