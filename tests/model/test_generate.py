"""The sampling engine: what it draws, and that nothing but (seed, prompt, index) decides it."""

import threading
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model import attention_tpu, decoder, drawing, generate, slot_state
from model.forward import forward
from model.generate import Sampler, Sampling
from model.logprobs import response_logprobs
from model.packing import Sequence, pack
from model.precision import FLOAT32, precision_of
from sharding.mesh import make_mesh
from tests import tiny

RNG = np.random.default_rng(0)
PROMPTS = [
    (f"p{i}", RNG.integers(3, 320, size=length).tolist())
    for i, length in enumerate((5, 70, 3, 20, 64, 65, 9))
]


def as_text(ids):
    return " ".join(map(str, ids))


def answers(
    sampling, slots=8, prompts=PROMPTS, seed=0, params=None, answered=(), dtype="float32", **changes
):
    config, precision = tiny.config(**changes), precision_of(dtype)
    params = tiny.params(config, seed) if params is None else params
    params = decoder.stored_in(params, precision)
    longest = max(len(ids) for _, ids in prompts)
    sampler = Sampler(config, params, as_text, sampling, slots, longest, precision)
    return dict(sampler.run(prompts, answered=answered))


def placed(params, config, mesh):
    return jax.device_put(
        params, jax.tree.map(lambda x: x.sharding, decoder.abstract(config, mesh))
    )


def per_row(sampling, rows: int) -> dict:
    return {
        name: jnp.full(rows, getattr(sampling, name), dtype)
        for name, dtype in drawing.SETTINGS.items()
    }


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_p=1.0),
        Sampling(temperature=1.3, top_p=0.9),
        Sampling(temperature=1.0, top_p=0.05),
        Sampling(temperature=0.7, top_p=1.0, top_k=7),
        Sampling(temperature=2.0, top_p=0.8, top_k=150),
        Sampling(temperature=1.5, top_p=1.0, min_p=0.05),
        Sampling(temperature=1.5, top_p=0.9, top_k=300, min_p=0.02),
        Sampling(temperature=5.0, top_p=0.99),  # more tokens than the head of the top-p search
    ],
)
def test_filters_leave_the_tokens_and_probabilities_that_transformers_leaves(sampling):
    logits = np.random.default_rng(1).normal(0, 3, size=(64, 1000)).astype(np.float32)
    expected = TemperatureLogitsWarper(sampling.temperature)(None, torch.tensor(logits))
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    if sampling.min_p:
        expected = MinPLogitsWarper(sampling.min_p)(None, expected)
    expected = torch.softmax(expected, -1).numpy()
    weights = np.asarray(drawing.filtered_weights(jnp.array(logits), per_row(sampling, 64)))
    probabilities = weights / weights.sum(-1, keepdims=True)
    assert ((probabilities > 0) == (expected > 0)).all()
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_drawn_frequencies_are_the_probabilities():
    logits = jnp.array([[2.0, 0.5, 0.0, -1.0, 1.0, -3.0, 0.2]])
    n = 20_000
    keys = jnp.stack([jnp.array(drawing.answer_key(0, "p", i)) for i in range(100)])
    keys = jnp.repeat(keys, n // 100, axis=0)
    uniform = drawing.uniforms(keys, jnp.tile(jnp.arange(n // 100), 100))
    settings = per_row(Sampling(temperature=1, top_p=1), n)
    tokens, _ = drawing.draw(jnp.repeat(logits, n, 0), uniform, settings)
    counts = np.bincount(np.asarray(tokens), minlength=7)
    expected = n * np.asarray(jax.nn.softmax(logits[0]))
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 22.46  # 99.9% quantile at 6 degrees of freedom


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_uniform_range_never_draw_a_filtered_token(uniform):
    logits = jnp.array(np.random.default_rng(2).normal(0, 3, size=(32, 700)), jnp.float32)
    settings = per_row(Sampling(temperature=1, top_p=0.7, top_k=20), 32)
    tokens, _ = drawing.draw(logits, jnp.full(32, uniform), settings)
    weights = drawing.filtered_weights(logits, settings)
    assert (np.take_along_axis(np.asarray(weights), np.asarray(tokens)[:, None], 1) > 0).all()


def test_two_samplers_side_by_side_answer_as_one_does():
    answered = ("p1", "p4")
    config, sampling = tiny.config(), Sampling(n=3, temperature=1.0, top_p=1.0, max_new_tokens=20)
    first = Sampler(config, tiny.params(config), as_text, sampling, 4, longest_prompt=70)
    second = Sampler(config, first.params, as_text, sampling, 3, longest_prompt=70)
    first.prefill_tokens = 80  # several rows
    calls = []
    made = generate.run_side_by_side(
        [first, second], PROMPTS, lambda: calls.append(threading.get_ident()), answered
    )
    expected = answers(sampling, answered=answered)
    together = dict(made)
    assert set(together) == set(expected) == {i for i, _ in PROMPTS} - set(answered)
    for prompt_id, theirs in expected.items():
        for a, b in zip(together[prompt_id], theirs):
            assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert first.tokens_drawn and second.tokens_drawn and set(calls) == {threading.get_ident()}


def test_a_stop_between_calls_ends_samplers_side_by_side():
    config, sampling = tiny.config(), Sampling(max_new_tokens=40, ignore_eos=True)
    first = Sampler(config, tiny.params(config), as_text, sampling, 4, longest_prompt=70)
    second = Sampler(config, first.params, as_text, sampling, 4, longest_prompt=70)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(generate.run_side_by_side([first, second], PROMPTS, stop))


def test_greedy_answers_are_the_argmax_of_the_full_forward_pass():
    config = tiny.config(eos_token_ids=())
    params = tiny.params(config)
    found = answers(Sampling(n=1, temperature=0, max_new_tokens=12), eos_token_ids=())
    for prompt_id, prompt in PROMPTS[:4]:
        drawn = found[prompt_id][0].token_ids
        assert len(drawn) == 12
        row = np.zeros((1, 96), np.int32)  # one shape for all: what comes later is not seen
        row[0, : len(prompt) + 12] = prompt + drawn
        logits = decoder.logits(params, config, forward(params, config, tiny.rows_of_one(row)))[0]
        for i, token in enumerate(drawn):
            assert token == int(jnp.argmax(logits[len(prompt) + i - 1]))


def test_cache_and_slots_are_fitted_to_the_answers_in_the_making(monkeypatch):
    sizes = []
    resize = Sampler._resize

    def spy(self, *args):
        before = self.length
        resize(self, *args)
        sizes.append((self.rows, before, self.length))

    monkeypatch.setattr(Sampler, "_resize", spy)
    # The long prompt comes first: once its answers have ended, the cache can be halved.
    lengths = (200, 5, 9, 30, 12, 20)
    rng = np.random.default_rng(7)
    prompts = [(f"p{i}", rng.integers(14, 300, n).tolist()) for i, n in enumerate(lengths)]
    sampling = Sampling(n=4, temperature=1.0, top_p=1.0, max_new_tokens=70)
    often = {"eos_token_ids": tuple(range(2, 14))}  # so that answers end at different steps
    monkeypatch.setattr(generate, "fewest_slots", lambda *_: 1)
    found = answers(sampling, slots=8, prompts=prompts, **often)
    assert {rows for rows, *_ in sizes} == {8, 4, 2}
    assert (8, 256, 272) in sizes  # grown, but not beyond the longest possible answer
    assert any(after <= before // 2 for _, before, after in sizes)  # and halved
    # and each answer is what it is alone
    for prompt in prompts[:3]:
        for one, other in zip(found[prompt[0]], answers(sampling, 1, [prompt], **often)[prompt[0]]):
            assert one.token_ids == other.token_ids and one.finish_reason == other.finish_reason
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_answers_do_not_depend_on_slots_order_or_company():
    sampling = Sampling(n=3, temperature=1.0, top_p=0.9, max_new_tokens=20, seed=5)
    base = answers(sampling, slots=8)
    for slots, prompts in ((2, PROMPTS), (21, PROMPTS[::-1]), (3, PROMPTS[3:5])):
        for prompt_id, other in answers(sampling, slots, prompts).items():
            for a, b in zip(base[prompt_id], other):
                assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_in_bf16_on_a_cpu_no_bit_depends_on_slots_order_or_company():
    """Each prompt has a row of its own there: what else is in a row changes its last bits, and
    rounding to bf16 makes other answers of that."""
    how = {"dtype": "bfloat16", "hidden_size": 512, "intermediate_size": 512, "head_dim": 128}
    sampling = Sampling(n=3, temperature=1.0, top_p=0.9, max_new_tokens=20, seed=5)
    base = answers(sampling, slots=generate.FEWEST_IN_BF16, **how)
    for slots, prompts in ((40, PROMPTS[::-1]), (27, PROMPTS[2:5])):
        for prompt_id, other in answers(sampling, slots, prompts, **how).items():
            assert other == base[prompt_id]


@pytest.mark.parametrize("dtype,in_a_row", [("float32", 7), ("bfloat16", 1)])
def test_how_many_prompts_a_row_has(dtype, in_a_row):
    config, precision = tiny.config(), precision_of(dtype)
    params = decoder.stored_in(tiny.params(config), precision)
    sampler = Sampler(config, params, as_text, Sampling(n=1), 8, 70, precision)
    rows = [groups[0].row for groups in sampler.rows_of_groups(PROMPTS, ())]
    assert max(len(row.prompts) for row in rows) == in_a_row
    for prompt in PROMPTS:
        sampler.submit(*prompt)
    while sampler.waiting:
        sampler._cut_row()
        assert len(sampler.waiting[0].row.prompts) == in_a_row
        sampler.waiting = type(sampler.waiting)(g for g in sampler.waiting if g.row is None)


@pytest.mark.parametrize(
    "n,slots,width", [(1, 8, 32), (5, 12, 32), pytest.param(40, 160, 512, marks=pytest.mark.heavy)]
)
def test_a_restart_changes_no_bit_of_an_answer(n, slots, width):
    lengths = (5, 70, 3, 20, 64, 65, 9, 150, 12, 1, 30, 40, 90, 7)
    rng = np.random.default_rng(1)
    prompts = [(f"p{i}", rng.integers(3, 320, size=n).tolist()) for i, n in enumerate(lengths)]
    sampling = Sampling(n=n, temperature=1.0, top_p=0.95, max_new_tokens=24)
    config = {"eos_token_ids": tuple(range(2, 14)), "hidden_size": width}
    config |= {"intermediate_size": width, "head_dim": width // 4}
    whole = answers(sampling, slots, prompts, **config)
    for answered in ((0, 9), range(1, 14, 2)):
        done = {f"p{i}" for i in answered}
        rest = answers(sampling, slots, prompts, answered=done, **config)
        assert rest.keys() == whole.keys() - done
        assert all(rest[prompt_id] == whole[prompt_id] for prompt_id in rest)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 2),
        pytest.param((1, 4, 1), marks=pytest.mark.heavy),
        pytest.param((1, 2, 2), marks=pytest.mark.heavy),
    ],
)
def test_answers_are_the_same_on_four_devices(shape):
    sampling = Sampling(n=2, temperature=1.0, top_p=0.9, max_new_tokens=10)
    base = answers(sampling, prompts=PROMPTS[:3])
    config = tiny.config()
    mesh = make_mesh(*shape)
    params = placed(tiny.params(config), config, mesh)
    with jax.set_mesh(mesh):
        sharded = answers(sampling, prompts=PROMPTS[:3], params=params)
    assert {k: [a.token_ids for a in v] for k, v in sharded.items()} == {
        k: [a.token_ids for a in v] for k, v in base.items()
    }


def test_seed_prompt_and_index_each_change_the_draw():
    sampling = Sampling(n=4, temperature=1.5, top_p=1.0, max_new_tokens=8)
    same_prompt = [("a", PROMPTS[0][1]), ("b", PROMPTS[0][1])]
    one = answers(sampling, prompts=same_prompt)
    texts = [a.text for v in one.values() for a in v]
    assert len(set(texts)) == 8
    other = answers(
        Sampling(n=4, temperature=1.5, top_p=1.0, max_new_tokens=8, seed=1), prompts=same_prompt
    )
    assert all(a.text != b.text for k in one for a, b in zip(one[k], other[k]))


def test_recorded_logprobs_are_what_the_trainer_computes_for_the_same_tokens():
    config, sampling = tiny.config(), Sampling(n=4, temperature=1.0, top_p=0.9, max_new_tokens=40)
    params = tiny.params(config)
    reasons = set()
    for prompt_id, found in answers(sampling).items():
        prompt = dict(PROMPTS)[prompt_id]
        for answer in found:
            reasons.add(answer.finish_reason)
            ids = answer.token_ids + ([2] if answer.finish_reason == "stop" else [])
            logprob = response_logprobs(params, config, pack([Sequence(prompt, [ids])]), 1)
            assert answer.logprob == pytest.approx(float(logprob[0]), abs=1e-3)
    assert reasons == {"stop", "length"}


def test_finish_reason_tells_how_an_answer_ended():
    found = answers(Sampling(n=8, temperature=1.0, top_p=1.0, max_new_tokens=30))
    each = [a for v in found.values() for a in v]
    assert {a.finish_reason for a in each} == {"stop", "length"}
    for answer in each:
        assert 2 not in answer.token_ids
        assert (len(answer.token_ids) == 30) == (answer.finish_reason == "length")


def test_of_several_eos_ids_the_one_that_was_drawn_is_told():
    ends = (2, 5, 7, 11)
    config = tiny.config(eos_token_ids=ends)
    params = tiny.params(config)
    sampling = Sampling(n=8, temperature=1.5, top_p=1.0, max_new_tokens=60)
    drawn = set()
    for prompt_id, made in answers(sampling, eos_token_ids=ends).items():
        for answer in made:
            assert not set(answer.token_ids) & set(ends)
            assert (answer.end_token_id is not None) == (answer.finish_reason == "stop")
            if answer.end_token_id is not None:
                ids = [*answer.token_ids, answer.end_token_id]
                batch = pack([Sequence(dict(PROMPTS)[prompt_id], [ids])])
                logprob = response_logprobs(params, config, batch, 1)
                assert answer.logprob == pytest.approx(float(logprob[0]), abs=1e-3)
                drawn.add(answer.end_token_id)
    assert len(drawn) > 1 and drawn <= set(ends)


def test_one_new_token_is_allowed():
    found = answers(Sampling(n=2, max_new_tokens=1))
    assert all(len(a.token_ids) <= 1 for v in found.values() for a in v)


def test_stop_strings_end_an_answer_before_them_also_across_tokens():
    sampling = Sampling(n=3, temperature=1.0, top_p=1.0, max_new_tokens=30)
    whole = answers(sampling, eos_token_ids=())
    words = whole["p0"][0].text.split()
    stop = f"{words[5][-1]} {words[6][0]}"  # spans two tokens
    cut = answers(
        Sampling(n=3, temperature=1.0, top_p=1.0, max_new_tokens=30, stop_strings=(stop,)),
        eos_token_ids=(),
    )
    hit = 0
    for prompt_id, found in cut.items():
        for a, b in zip(found, whole[prompt_id]):
            if stop in b.text:
                hit += 1
                assert a.finish_reason == "stop_string"
                assert a.text == b.text[: b.text.index(stop)]
                assert a.token_ids == b.token_ids[: len(a.token_ids)]
                assert a.text.startswith(as_text(a.token_ids))
                assert a.logprob >= b.logprob
            else:
                assert a == b
    assert hit >= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1},
        {"min_p": -0.1},
        {"max_new_tokens": 0},
        {"stop_strings": ("",)},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_prompt_that_does_not_fit_the_cache_is_refused():
    config = tiny.config()
    sampler = Sampler(config, tiny.params(config), as_text, Sampling(), 4, longest_prompt=10)
    with pytest.raises(ValueError, match="longest_prompt is 10"):
        list(sampler.run([("p", [5] * 65)]))


# ------------------------------------------------------------------------ answers, one by one


def test_each_answer_is_drawn_in_its_own_way():
    """Answers of other settings share the slots; each is what it is among its like."""
    config, limit = tiny.config(), Sampling(max_new_tokens=24)
    ways = [
        Sampling(n=2, temperature=0, max_new_tokens=24),
        Sampling(n=2, temperature=1.0, top_p=0.8, max_new_tokens=9, seed=3),
        Sampling(n=2, temperature=1.5, top_p=1.0, top_k=200, max_new_tokens=24),
        Sampling(n=2, temperature=1.0, top_p=0.9, min_p=0.01, max_new_tokens=24),
        Sampling(n=2, temperature=1.2, top_p=1.0, max_new_tokens=24, ignore_eos=True),
    ]
    sampler = Sampler(config, tiny.params(config), as_text, limit, slots=6, longest_prompt=70)
    for i, (prompt_id, token_ids) in enumerate(PROMPTS[:5]):
        sampler.submit(prompt_id, token_ids, [0, 1], ways[i])
    told: dict = {}
    ended = {}
    for event in sampler.events(steps=4):
        ids, logprobs = told.setdefault((event.prompt_id, event.index), ([], []))
        ids += event.token_ids
        logprobs += event.logprobs
        assert len(event.token_ids) == len(event.logprobs) <= 5  # the first one comes with the next
        if event.answer is not None:
            ended[event.prompt_id, event.index] = event.answer
    for i, (prompt_id, token_ids) in enumerate(PROMPTS[:5]):
        alike = answers(ways[i], prompts=[(prompt_id, token_ids)], slots=6) if i < 4 else None
        for index in (0, 1):
            answer = ended[prompt_id, index]
            ids, logprobs = told[prompt_id, index]
            end = [] if answer.end_token_id is None else [answer.end_token_id]
            assert ids == answer.token_ids + end
            assert sum(logprobs) == pytest.approx(answer.logprob, abs=1e-4)
            if alike:
                assert answer.token_ids == alike[prompt_id][index].token_ids
            else:
                assert len(answer.token_ids) == 24 and answer.finish_reason == "length"


def test_a_cancelled_answer_brings_nothing_more_and_frees_its_slot():
    config = tiny.config(eos_token_ids=())
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=40)
    sampler = Sampler(config, tiny.params(config), as_text, sampling, slots=2, longest_prompt=70)
    for prompt_id, token_ids in PROMPTS[:4]:
        sampler.submit(prompt_id, token_ids)
    seen = []
    for event in sampler.events(steps=4):
        seen.append(event)
        if len(seen) == 1:
            sampler.cancel(event.prompt_id)  # in a slot
            sampler.cancel("p3")  # waiting
    assert {e.prompt_id for e in seen[2:]} == {"p1", "p2"}
    assert [e.prompt_id for e in seen if e.answer is not None] == ["p1", "p2"]
    assert not sampler.doing and not sampler.waiting
    with pytest.raises(ValueError, match="max_new_tokens is at most 40"):
        sampler.submit("p", [5], sampling=Sampling(max_new_tokens=41))


def test_a_stop_string_is_looked_for_in_the_new_tokens_alone():
    """The text is decoded from the start only where a stop string may be in it."""
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return as_text(ids)

    config = tiny.config(eos_token_ids=())
    sampling = Sampling(n=1, temperature=1.0, top_p=1.0, max_new_tokens=160, stop_strings=("no",))
    sampler = Sampler(config, tiny.params(config), decode, sampling, slots=1, longest_prompt=70)
    ((_, (answer,)),) = sampler.run(PROMPTS[:1])
    assert len(answer.token_ids) == 160
    assert sorted(decoded)[:-1] == [n for n in sorted(decoded) if n <= 48] and max(decoded) == 160


def sampler_of(platform: str, monkeypatch, slots: int, sampling: Sampling, **changes) -> Sampler:
    """A sampler that is made as on that platform."""
    config = tiny.config(**changes)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: platform)
        return Sampler(config, tiny.params(config), as_text, sampling, slots, longest_prompt=70)


def test_answers_by_an_accelerators_programs_are_those_of_a_cpus(monkeypatch):
    """Programs compiled whole, longer rows of prompts, and calls that end once several slots are
    idle."""
    sampling = Sampling(n=1, temperature=1.0, top_p=0.9, max_new_tokens=40)
    often = {"eos_token_ids": tuple(range(2, 14))}  # so that answers end at different steps
    lengths = (3, 20, 9, 5, 12, 7, 16, 8) * 5
    rng = np.random.default_rng(3)
    prompts = [(f"p{i}", rng.integers(14, 320, n).tolist()) for i, n in enumerate(lengths)]
    sampler = sampler_of("gpu", monkeypatch, 32, sampling, **often)
    assert (sampler._prefill.func, sampler._start.func) == slot_state.WHOLE
    assert sampler.prefill_tokens == 2048 and sampler.unit == 16
    wanted, how_many = [], sampler._wanted
    monkeypatch.setattr(sampler, "_wanted", lambda: wanted.append(how_many()) or wanted[-1])
    made = dict(sampler.run(prompts))
    assert max(wanted) == 32 // 16
    expected = answers(sampling, 32, prompts, **often)
    assert made.keys() == expected.keys()
    for prompt_id, (b,) in expected.items():
        (a,) = made[prompt_id]
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("platform,kept", [("tpu", "tpu"), ("gpu", None), ("cpu", None)])
def test_a_sampler_keeps_a_calls_keys_beside_the_cache_on_tpus_alone(platform, kept, monkeypatch):
    sampler = sampler_of(platform, monkeypatch, 8, Sampling())
    assert sampler._advance.keywords["side_buffer"] == generate.side_buffer(platform) == kept
    assert sampler.unit == (attention_tpu.LANES if kept else 16)


@pytest.mark.parametrize("window,shape", [(None, None), (40, None), (40, (2, 1, 2))])
def test_answers_by_a_tpus_programs_are_those_of_a_cpus(window, shape):
    """The keys of a call beside the cache, and the kernels that read and write the cache,
    interpreted; on a mesh, each device with its rows and heads."""
    sampling = Sampling(n=2, temperature=1.0, top_p=1.0, max_new_tokens=58)
    changes = {"sliding_window": window, "max_position_embeddings": 256}
    config = tiny.config(**changes)
    params, mesh = tiny.params(config), None if shape is None else make_mesh(*shape)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        params = params if mesh is None else placed(params, config, mesh)
        sampler = Sampler(config, params, as_text, sampling, 8, longest_prompt=70)
        how = {"config": config, "precision": FLOAT32, "side_buffer": "interpret"}
        sampler._advance = partial(slot_state.advance, **how)
        made = dict(sampler.run(PROMPTS[:4]))
    for prompt_id, expected in answers(sampling, prompts=PROMPTS[:4], **changes).items():
        for a, b in zip(made[prompt_id], expected, strict=True):
            assert a.token_ids == b.token_ids and a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("length", [256, 384])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_for_tpus_attends_to_what_a_row_has(length, dtype, monkeypatch):
    monkeypatch.setattr("model.attention_tpu.BLOCK_BYTES", 1)  # several blocks
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, shape, jnp.float32).astype(dtype)
        for key, shape in zip(keys, ((5, 2, 4, 16), (5, 2, 16, length), (5, 2, length, 16)))
    )
    first = jnp.array([0, 0, 130, 100, 7])
    end = jnp.array([0, 1, 131, length + 500, 256])  # longer than the cache, which was cut since
    out, largest, total = attention_tpu.attention(q, k, v, first, end, interpret=True)
    scores = jnp.einsum("bkrh,bkhs->bkrs", *(x.astype(jnp.float32) for x in (q, k))) / 4
    place = jnp.arange(length)
    seen = ((place >= first[:, None]) & (place < end[:, None]))[:, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    assert total[0].max() == 0 and out[0].max() == 0 and largest[0].max() < -1e29
    weights = jax.nn.softmax(scores[1:], axis=-1)
    expected = jnp.einsum("bkrs,bksh->bkrh", weights, v[1:].astype(jnp.float32))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(out[1:] / total[1:, ..., None], expected, atol=tolerance)
    np.testing.assert_allclose(largest[1:], scores[1:].max(-1), atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_for_tpus_writes_each_rows_new_keys_at_its_own_position(dtype):
    starts, length, steps = [0, 70, 120, 374, 384, 500], 384, 32  # within a block, over an end, …
    rows = len(starts)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (2, 16, length), (2, length, 16), (2, steps, 16), (2, steps, 16)
    arrays = [
        jax.random.normal(key, (rows, *shape)).astype(dtype) for key, shape in zip(keys, shapes)
    ]
    k, v = attention_tpu.merge(*arrays, jnp.array(starts), interpret=True)
    expected_k, expected_v, new_k, new_v = (np.array(x) for x in arrays)
    for row, start in enumerate(starts):
        fits = max(0, min(steps, length - start))
        expected_k[row, :, :, start : start + fits] = np.swapaxes(new_k[row, :, :fits], 1, 2)
        expected_v[row, :, start : start + fits] = new_v[row, :, :fits]
    np.testing.assert_array_equal(k, expected_k)
    np.testing.assert_array_equal(v, expected_v)


def test_a_stop_string_is_not_missed_where_its_letters_are_bytes():
    """Byte tokens of a tokenizer that shows a damaged run of them as "\ufffd" throughout."""
    text = "🙂🙂🙂🛑🙂".encode() + b"ab"

    def decode(ids):
        run = bytes(ids)
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    config = tiny.config(eos_token_ids=())
    sampler = Sampler(config, tiny.params(config), decode, Sampling(), slots=1, longest_prompt=8)
    for step in (1, 3, 5):
        making = generate.Making("p", 0, 5, Sampling(stop_strings=("🛑",)))
        for end in range(step, len(text) + step, step):
            making.token_ids = list(text[:end])
            making.logprobs = [np.float32(0)] * len(making.token_ids)
            if answer := sampler._cut_at_stop_string(making):
                break
            making.told = len(making.token_ids)
        assert answer is not None and answer.text == "🙂🙂🙂" and len(answer.token_ids) == 12
