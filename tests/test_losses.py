"""DPO's loss, log-probs, optimizer and schedules against the references users trust."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from model import losses, mistral, train
from model.logprobs import response_logprobs
from model.packing import Sequence, pack
from sharding.mesh import batch_shards, make_mesh, replicated, tree_shardings
from tests import tiny

RECIPE = train.Recipe(
    beta=0.1, label_smoothing=0.0, learning_rate=1e-3, schedule="linear", warmup_ratio=0.2,
    optimizer="adamw", weight_decay=0.05, max_grad_norm=1.0,
)  # fmt: skip


def dpo_by_formula(pc, pr, rc, rr, beta, eps):
    margin = beta * ((pc - rc) - (pr - rr))
    sigmoid = 1 / (1 + np.exp(-margin))
    return -(1 - eps) * np.log(sigmoid) - eps * np.log(1 - sigmoid)


@pytest.mark.parametrize("beta,eps", [(0.1, 0.0), (0.5, 0.1), (0.01, 0.3)])
def test_dpo_loss_and_gradient_are_the_papers_formula(beta, eps):
    vectors = np.random.default_rng(0).normal(-50, 10, size=(4, 16))
    found = losses.dpo_loss(*jnp.array(vectors, jnp.float32), beta, eps)
    np.testing.assert_allclose(found, dpo_by_formula(*vectors, beta, eps), rtol=1e-5, atol=1e-6)

    def total(pi_chosen):
        return losses.dpo_loss(pi_chosen, *jnp.array(vectors[1:], jnp.float32), beta, eps).sum()

    step = 1e-4
    up, down = (dpo_by_formula(vectors[0] + s, *vectors[1:], beta, eps) for s in (step, -step))
    gradient = jax.grad(total)(jnp.array(vectors[0], jnp.float32))
    np.testing.assert_allclose(gradient, (up - down) / (2 * step), rtol=1e-3, atol=1e-5)


def test_the_loss_stays_finite_at_extreme_margins():
    far = jnp.array([-1e4, 1e4])
    zero = jnp.zeros(2)
    assert np.isfinite(losses.dpo_loss(far, -far, zero, zero, 1.0)).all()


def test_loss_is_ln_2_where_policy_and_reference_agree():
    x, y = jnp.array([-3.0, -70.0]), jnp.array([-9.0, -2.0])
    for eps in (0.0, 0.2):
        np.testing.assert_allclose(losses.dpo_loss(x, y, x, y, 0.3, eps), math.log(2), rtol=1e-6)


def sequences(*sizes):
    """Random sequences of (prompt length, response length, …)."""
    rng = np.random.default_rng(1)
    tokens = [[rng.integers(3, tiny.VOCABULARY, n).tolist() for n in row] for row in sizes]
    return [Sequence(prompt, responses) for prompt, *responses in tokens]


def torch_model(config, params):
    """transformers' Llama with our weights."""
    hf = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    d, layers = 32, params["layers"]
    state = {
        "model.embed_tokens.weight": params["embed"],
        "model.norm.weight": params["final_norm"],
    }
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
             "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
             "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}  # fmt: skip
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


@pytest.mark.parametrize("row_tokens", [16, 40, 1024])
@pytest.mark.parametrize("shards", [1, 4])
def test_packed_logprobs_equal_transformers_on_each_response_alone(row_tokens, shards, monkeypatch):
    config = tiny.config()
    params = mistral.init(config)
    rows = sequences((6, 18, 4), (3, 7, 7), (16, 1, 9), (1, 7), (5, 30, 2, 11))
    expected = torch_logprobs(torch_model(config, params), rows).detach().numpy()
    monkeypatch.setattr("model.packing.ROW_TOKENS", row_tokens)
    batch = pack(rows, shards)
    assert len(batch["tokens"]) % shards == 0
    for chunk in (512, 8):
        monkeypatch.setattr("model.logprobs.CHUNK", chunk)
        found = response_logprobs(params, config, batch, len(expected) + 1)
        np.testing.assert_allclose(found[:-1], expected, atol=1e-4)
        assert found[-1] == 0  # no such response


def test_packing_keeps_the_sliding_window_of_each_branch():
    config = tiny.config(sliding_window=5)
    params = mistral.init(config)
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
    params = mistral.init(config)
    recipe = dataclasses.replace(RECIPE, optimizer=name, schedule="cosine")
    steps, pairs = 6, 4
    batches = [sequences((6, 18, 12), (4, 14, 19)), sequences((5, 7, 17), (3, 12, 6))]
    references = {"chosen": np.array([-60.0, -50.0], np.float32),
                  "rejected": np.array([-55.0, -40.0], np.float32),
                  "weights": np.ones(2, np.float32)}  # fmt: skip

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
            margin = (chosen - torch.tensor(references["chosen"])) - (
                rejected - torch.tensor(references["rejected"])
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
    shardings = tree_shardings(mesh, mistral.logical_axes(config), mistral.abstract(config))
    with jax.set_mesh(mesh):
        trainer = train.Trainer(config, recipe, steps, shardings, replicated(mesh))
        ours = jax.tree.map(jnp.copy, params)
        state = trainer.init_optimizer(ours)
        for i, (loss, norm, rate) in enumerate(expected):
            gradients, values = None, []
            for b in batches:
                gradients, micro = trainer.accumulate(
                    ours, gradients, pack(b), references, float(pairs)
                )
                values.append(micro["loss"])
            ours, state, our_norm = trainer.apply(ours, state, gradients)
            assert float(np.sum(values) / pairs) == pytest.approx(loss, abs=1e-5)
            assert float(our_norm) == pytest.approx(norm, rel=1e-4)
            assert float(trainer.schedule(i)) == pytest.approx(rate, rel=1e-5, abs=1e-12)
    found_model = torch_model(config, ours)
    update = torch.cat([p.detach().flatten() for p in found_model.parameters()]) - before
    assert torch.norm(update - expected_update) / torch.norm(expected_update) < 1e-3


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_schedules_are_transformers_schedules(name):
    total, recipe = 37, dataclasses.replace(RECIPE, schedule=name, warmup_ratio=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    warmup = math.ceil(0.1 * total)
    if name == "constant":
        reference = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        make = getattr(transformers, f"get_{name}_schedule_with_warmup")
        reference = make(optimizer, warmup, total)
    ours = train.learning_rate(recipe, total)
    for step in range(total):
        assert float(ours(step)) == pytest.approx(reference.get_last_lr()[0], rel=1e-5, abs=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 1, 4), (2, 2, 1), (1, 2, 2)])
def test_moments_lie_as_their_parameters_do_and_old_buffers_are_donated(shape):
    config = tiny.config(num_key_value_heads=4)
    mesh = make_mesh(*shape)
    shardings = tree_shardings(mesh, mistral.logical_axes(config), mistral.abstract(config))
    with jax.set_mesh(mesh):
        trainer = train.Trainer(config, RECIPE, 4, shardings, replicated(mesh))
        params = jax.device_put(mistral.init(config), shardings)
        state = trainer.init_optimizer(params)
        references = {name: np.full(2, -50, np.float32) for name in ("chosen", "rejected")}
        references["weights"] = np.ones(2, np.float32)
        b = pack(sequences((6, 18, 12), (4, 14, 19)), batch_shards(mesh))
        first, _ = trainer.accumulate(params, None, b, references, 2.0)
        gradients, _ = trainer.accumulate(params, first, b, references, 2.0)
        adam = next(s for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s))
        for moment in (adam.mu, adam.nu, gradients):
            same = jax.tree.map(
                lambda m, p: m.sharding.is_equivalent_to(p.sharding, m.ndim), moment, params
            )
            assert all(jax.tree.leaves(same))
        assert any(not p.sharding.is_fully_replicated for p in jax.tree.leaves(params))
        new, *_ = trainer.apply(params, state, gradients)
        assert all(x.is_deleted() for x in jax.tree.leaves((params, state, first)))
        assert new["layers"]["q"].sharding.is_equivalent_to(shardings["layers"]["q"], 4)


def _is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)
