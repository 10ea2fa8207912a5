"""PairRM against llm-blender's own PyTorch code and transformers' DeBERTa."""

import json
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

from model.rankers import deberta, deberta_tpu, pairrm
from model.rankers.blender import BlenderRanker
from model.rankers.deberta import from_hf as deberta_from_hf
from model.rankers.pairrm import MARKERS, PairRM, open_folder
from scripts.random_pairrm import LARGE, encoder_config
from sharding.errors import UserError
from sharding.mesh import make_mesh
from tests import tiny_pairrm

ODD = [
    ("Say hello.\n\nTwice,\tplease…", ["hello!", "hi!  hi!", "", "ﬁne ① Ωmega\r\n"]),
    ("Übersetze 你好 😀", ["Hallo 😀😀", "こんにちは、世界", "نعم", "hello"]),
    ("What does [SEP] mean? [CLS] too", ["A [SEP] token.", "[SEP][SEP]", "Nothing [MASK] at all."]),
    ("word " * 1500, ["short", "long answer " * 300, "long answer " * 301]),  # beyond 1,224 tokens
    ("Short?", ["a b c " * 700, "x y " * 900]),  # beyond the answers' budget
]


ONE = make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_pairrm.write_pairrm(tmp_path_factory.mktemp("pairrm") / "tiny")


@pytest.fixture(scope="module")
def both(tiny):
    return PairRM(str(tiny)), BlenderRanker(str(tiny))


def matrix(model, source, answers):
    """All logits [n, n], those of one prompt asked for at once."""
    n, encoded = len(answers), model.encode(source, answers)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    found = np.zeros((n, n))
    for pair, logit in zip(pairs, model.logits([(encoded, *pair) for pair in pairs])):
        found[pair] = logit
    return found


def compare_all(ours, theirs, prompts):
    """(largest difference, spread) of all logits of (source, answers); scores and ranks equal."""
    largest, logits = 0.0, []
    for source, answers in prompts:
        a, b = matrix(ours, source, answers), matrix(theirs, source, answers)
        largest = max(largest, np.abs(a - b).max())
        scores = [(m - m.T).mean(axis=1) for m in (a, b)]
        np.testing.assert_allclose(*scores, atol=1e-4)
        gaps = np.abs(scores[1][:, None] - scores[1])[~np.eye(len(answers), dtype=bool)]
        if gaps.min() > 1e-4:  # nearer than the tolerance, order means nothing
            assert np.argsort(scores[0]).tolist() == np.argsort(scores[1]).tolist()
        logits += b[~np.eye(len(answers), dtype=bool)].tolist()
    return largest, np.ptp(logits)


# ----------------------------------------------------------------------- the encoder


@pytest.mark.parametrize(("buckets", "furthest"), [(256, 512), (16, 48), (32, 512), (64, 1000)])
def test_every_distance_has_the_bucket_that_transformers_gives_it(buckets, furthest):
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    config = deberta_from_hf(
        encoder_config(
            {**tiny_pairrm.TINY, "position_buckets": buckets, "max_position_embeddings": furthest},
            800,
        )
    )
    distance = torch.arange(-2599, 2600)
    theirs = make_log_bucket_position(distance, buckets, furthest).long() + buckets
    np.testing.assert_array_equal(
        deberta.relative_rows(config, 2600), theirs.clamp(0, 2 * buckets - 1).numpy()
    )


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(tiny_pairrm.TINY, id="tiny"),
        pytest.param(tiny_pairrm.MIDDLE, id="middle", marks=pytest.mark.heavy),
    ],
)
def test_hidden_states_equal_transformers_at_any_length_padded_or_not(tmp_path, sizes):
    from transformers import AutoModel

    folder = tiny_pairrm.write_pairrm(tmp_path / "model", sizes)
    model = PairRM(str(folder))
    theirs = AutoModel.from_pretrained(f"{folder}-encoder").eval()
    state = safetensors.torch.load_file(folder / "model.safetensors")
    theirs.resize_token_embeddings(model.config.encoder.vocab_size)
    theirs.load_state_dict(
        {k.removeprefix("pretrained_model."): v for k, v in state.items() if "head" not in k}
    )
    rng = np.random.default_rng(0)
    for length, padded in ((1, 4), (17, 17), (100, 128), (300, 320), (700, 704)):
        ids = rng.integers(4, 700, (2, padded))
        lengths = np.array([length, max(1, length // 2)])
        mask = np.arange(padded) < lengths[:, None]
        with torch.no_grad():
            expected = theirs(torch.tensor(ids), torch.tensor(mask.astype(np.int64)))[0].numpy()
        read = np.stack([np.zeros(2), lengths // 2, lengths - 1], 1).astype(np.int32)
        found = deberta.encode(
            model.params["encoder"],
            model.config.encoder,
            jnp.asarray(ids, jnp.int32),
            jnp.asarray(lengths, jnp.int32),
            jnp.asarray(read),
        )
        for row in range(2):
            np.testing.assert_allclose(found[row], expected[row, read[row]], atol=1e-4)


@pytest.mark.parametrize(
    ("length", "buckets"), [(128, 16), pytest.param(384, 32, marks=pytest.mark.heavy), (384, 256)]
)
def test_the_kernel_for_tpus_computes_the_same_attention(length, buckets):
    config = deberta_from_hf(encoder_config({**tiny_pairrm.TINY, "position_buckets": buckets}, 800))
    rng, n, b, h, t = np.random.default_rng(0), 2, 2, 16, length

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    arrays = (
        normal(n, b, t, h),
        normal(n, b, h, t),
        normal(n, b, t, h),
        normal(n, h, 2 * buckets),
        normal(n, 2 * buckets, h),
    )
    rows, tokens = deberta.relative_rows(config, t), np.arange(t)
    rows_bts = jnp.asarray(rows[t - 1 + tokens[:, None] - tokens][None])
    real_bs = jnp.asarray(tokens < np.array([[t], [t - 50]]))
    expected = deberta.attention(*arrays, rows_bts, real_bs)
    found = deberta_tpu.attention(*arrays, rows, real_bs, interpret=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_encoder_with_that_kernel_gives_the_same_hidden_states(tiny, monkeypatch):
    model, whole, calls = PairRM(str(tiny)), deberta_tpu.attention, []
    deberta.layer.clear_cache()
    monkeypatch.setattr(
        deberta_tpu, "attention", lambda *x: calls.append(1) or whole(*x, interpret=True)
    )
    tokens = np.random.default_rng(0).integers(4, 700, (2, 128))
    given = [jnp.asarray(x, jnp.int32) for x in (tokens, [128, 70], [[0, 5, 69]] * 2)]
    found, expected = (
        deberta.encode(model.params["encoder"], model.config.encoder, *given, kernel=kernel)
        for kernel in (True, False)
    )
    assert len(calls) == 2  # a program for the last layer, and one for all others
    np.testing.assert_allclose(found, expected, atol=1e-5)
    deberta.layer.clear_cache()  # of interpreted programs


def test_the_kernel_is_for_tpus_that_can_roll_with_a_stride():
    kinds = ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "TPU v4", "NVIDIA H100", "cpu")
    assert [deberta_tpu.runs_on(kind) for kind in kinds] == [True] * 4 + [False] * 3


def test_a_tpu_without_the_kernel_is_warned_of(tiny, capsys):
    def mesh(kind):
        chip = SimpleNamespace(platform="tpu", device_kind=kind)
        return SimpleNamespace(devices=np.array([chip]))

    PairRM(str(tiny), mesh=mesh("TPU v5"))
    assert capsys.readouterr().err == ""
    PairRM(str(tiny), mesh=mesh("TPU v4"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "slow on a TPU v4" in line and "--device host" in line


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"conv_kernel_size": 3}, "conv_kernel_size"),
        ({"pos_att_type": "c2p"}, "pos_att_type"),
        ({"share_att_key": False}, "share_att_key"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"position_biased_input": True}, "position_biased_input"),
        ({"model_type": "bert"}, "model_type"),
        ({"embedding_size": 16}, "embedding_size"),
        ({"position_buckets": -1}, "position_buckets"),
        ({"num_attention_heads": 3}, "heads"),
    ],
)
def test_an_encoder_that_is_not_built_is_refused_by_name(change, word):
    config = encoder_config(tiny_pairrm.TINY, 800) | change
    with pytest.raises(UserError, match=word):
        deberta_from_hf(config)


# ------------------------------------------------------------------------- the logits


def test_every_logit_equals_llm_blenders_for_odd_texts(both):
    largest, spread = compare_all(*both, ODD)
    assert largest < 1e-4
    assert spread > 3


def real_prompts(data, count):
    """(prompt, three real answers) of AlpacaEval, and UltraFeedback's pairs with a third."""
    files = ("Mistral-7B-Instruct-v0.2", "Snorkel-Mistral-PairRM-DPO", "gpt4_1106_preview")
    models = [json.loads((data / f"alpaca_eval/{name}.json").read_text()) for name in files]
    rows = [(rows[0]["instruction"], [row["output"] for row in rows]) for rows in zip(*models)]
    step = len(rows) // count
    return rows[::step][:count]


def prompts_for(data, sizes, count):
    if sizes is not LARGE:
        return real_prompts(data, count)
    # The shorter ones of more prompts: a long comparison takes llm-blender 20 s.
    prompts = real_prompts(data, 5 * count)
    return sorted(prompts, key=lambda p: len("".join([p[0], *p[1]])))[:count]


@pytest.fixture(scope="module")
def real_texts(data):
    rows = real_prompts(data, 400)
    return tuple(text for source, answers in rows for text in (source, *answers[:2]))


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        pytest.param(tiny_pairrm.TINY, 6, id="tiny, a few"),
        pytest.param(tiny_pairrm.TINY, 200, id="tiny", marks=pytest.mark.heavy),
        pytest.param(tiny_pairrm.MIDDLE, 200, id="middle", marks=pytest.mark.heavy),
        pytest.param(LARGE, 8, id="PairRM's size", marks=pytest.mark.heavy),
    ],
)
def test_every_logit_score_and_rank_equals_llm_blenders_on_real_answers(
    tmp_path, data, real_texts, sizes, count
):
    folder = tiny_pairrm.write_pairrm(tmp_path / "model", sizes, pieces=8000, texts=real_texts)
    prompts = prompts_for(data, sizes, count)
    largest, spread = compare_all(PairRM(str(folder)), BlenderRanker(str(folder)), prompts)
    print(f"{count} prompts, largest difference {largest:.2g} of a spread of {spread:.1f}")
    assert largest < 1e-4
    assert spread > 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_logit_depends_on_its_own_texts_alone(tiny, dtype):
    ours = PairRM(str(tiny), dtype=dtype)
    encoded = [ours.encode(source, answers) for source, answers in ODD]
    asked = [
        (e, i, j)
        for e in encoded
        for i in range(len(e.candidates))
        for j in range(len(e.candidates))
        if i != j
    ]
    together = ours.logits(asked)
    alone = [ours.logits([comparison])[0] for comparison in asked]
    backwards = ours.logits(asked[::-1])[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, backwards, atol=1e-5)


def test_all_devices_compute_and_the_logits_are_those_of_one(both, tiny, monkeypatch):
    one, whole, cuts = PairRM(str(tiny), mesh=ONE), pairrm.compare, []
    ours = both[0]
    assert (ours.mesh.size, one.mesh.size) == (4, 1)

    def compare(params, config, **arrays):
        for x in (arrays["tokens_bt"], arrays["lengths_b"], arrays["markers_br"]):
            cuts.append({shard.data.shape[0] / len(x) for shard in x.addressable_shards})
        assert all(x.is_fully_replicated for x in jax.tree.leaves(params))
        return whole(params, config, **arrays)

    asked = [
        (e, i, j)
        for e in (ours.encode(source, answers) for source, answers in ODD)
        for i in range(len(e.candidates))
        for j in range(len(e.candidates))
        if i != j
    ]
    expected = one.logits(asked)
    monkeypatch.setattr(pairrm, "compare", compare)
    np.testing.assert_allclose(ours.logits(asked * 4), expected * 4, rtol=0, atol=1e-5)
    assert cuts and all(cut == {1 / 4} for cut in cuts)


def test_a_stop_between_batches_does_not_wait_for_all_of_them(tiny, monkeypatch):
    model, computed = PairRM(str(tiny), tokens_per_batch=1), []
    whole = pairrm.compare
    monkeypatch.setattr(pairrm, "compare", lambda *x, **y: computed.append(1) or whole(*x, **y))
    encoded = model.encode("a prompt", ["one", "two"])

    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.logits([(encoded, 0, 1)] * 200, stop)
    assert len(computed) < 100


def test_batches_hold_every_comparison_once_and_few_rows_of_padding(tiny, both):
    for model in (PairRM(str(tiny), mesh=ONE), both[0]):
        encoded = [model.encode(source, answers) for source, answers in ODD]
        asked = [(e, i, j) for e in encoded for i in range(2) for j in range(2) if i != j]
        batches = list(model.batches(asked))
        assert sorted(i for batch, _ in batches for i in batch) == list(range(len(asked)))
        for batch, arrays in batches:
            rows, length = arrays["tokens_bt"].shape
            assert rows % model.mesh.size == 0 and rows - len(batch) < model.mesh.size
            assert arrays["lengths_b"].max() > length - 32
        lengths = [x for _, arrays in batches for x in arrays["lengths_b"]]
        assert lengths == sorted(lengths, reverse=True) or model.mesh.size > 1


def test_on_an_accelerator_each_length_is_one_shape(tiny, both):
    model = PairRM(str(tiny), tokens_per_batch=1024)
    model._on_cpu = False
    encoded = [model.encode(source, answers) for source, answers in ODD]
    asked = [(e, i, j) for e in encoded for i in range(2) for j in range(2) if i != j]
    shapes = [arrays["tokens_bt"].shape for _, arrays in model.batches(asked)]
    assert len(set(shapes)) == len({length for _, length in shapes}) < len(asked)
    np.testing.assert_allclose(model.logits(asked), both[0].logits(asked), atol=1e-5)


# -------------------------------------------------------------------------- the layout


@pytest.mark.parametrize(
    "text",
    [
        "<|source|>",
        "a <|candidate1|> b",
        "<|candidate2|><|candidate|><|source|>",
        "<<|source|>|source|>",
        "＜|source|＞ <｜source｜>",
        "<|source|>\u0338",
        "\u0338 slashed",
        "[MASK]\u007f<|source|>",
        "［SEP］ <|\u00adsource|>",
        "<|candidate|\u200b>",
    ],
)
def test_a_users_text_never_becomes_a_marker(both, text):
    layout = both[0].layout
    encoded = layout.encode(text, [text, f"fine {text}"])
    tokens, lengths, markers = layout.join([(encoded, 0, 1)], 256).values()
    ids = tokens[0, : lengths[0]].tolist()
    assert [ids.count(i) for i in layout.marker_ids] == [1, 1, 1, 0]
    assert ids.count(layout.sep_id) == 3
    assert [ids[k] for k in markers[0]] == layout.marker_ids[:3]
    assert np.isfinite(both[0].logits([(encoded, 0, 1)])).all()


def test_a_marker_in_a_text_reads_as_with_a_space_behind_its_first_character(both):
    ours, theirs = both
    for marker in MARKERS:
        plain = f"see {marker[0]} {marker[1:]} there"
        found = matrix(ours, f"see {marker} there", [f"see {marker} there", "no"])
        np.testing.assert_allclose(found, matrix(theirs, plain, [plain, "no"]), atol=1e-4)


def test_half_a_surrogate_pair_is_read_as_unknown(both):
    encoded = both[0].encode("a \ud83d b", ["\udc00", "ok"])
    assert np.isfinite(both[0].logits([(encoded, 0, 1)])).all()


def test_ids_are_those_of_sentencepiece_itself(tiny, data):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=f"{tiny}-encoder/spm.model")
    layout = PairRM(str(tiny)).layout
    for source, answers in real_prompts(data, 200):
        for text in (source, *answers):
            assert layout._ids(MARKERS[0], text, 10**6)[0][2:-1] == model.encode(text)


# ------------------------------------------------------------------------- the folder


def test_all_published_layouts_give_the_same_logits(tiny, tmp_path, both):
    expected = matrix(both[0], *ODD[0])
    state = safetensors.torch.load_file(tiny / "model.safetensors")

    torch_layout = tmp_path / "bin"
    torch_layout.mkdir()
    shutil.copy(tiny / "config.json", torch_layout)
    torch.save(state, torch_layout / "pytorch_model.bin")

    hf_layout = tmp_path / "hf"  # everything in one folder, as in PairRM-hf
    shutil.copytree(f"{tiny}-encoder", hf_layout)
    config = json.loads((hf_layout / "config.json").read_text())
    config |= {"vocab_size": 705, "source_prefix_id": 701, "drop_out": 0.05, "n_tasks": 1}
    (hf_layout / "config.json").write_text(json.dumps(config))
    shutil.copy(tiny / "model.safetensors", hf_layout)

    own_tokenizer = tmp_path / "own"
    shutil.copytree(tiny, own_tokenizer)
    both[0].layout.tokenizer.save(str(own_tokenizer / "tokenizer.json"))

    for folder in (torch_layout, hf_layout, own_tokenizer):
        np.testing.assert_array_equal(matrix(PairRM(str(folder)), *ODD[0]), expected)


def damage(folder, tiny, what):
    """A copy of the tiny PairRM with one thing wrong; returns its name."""
    shutil.copytree(tiny, folder)
    state = safetensors.torch.load_file(tiny / "model.safetensors")
    query = "pretrained_model.encoder.layer.1.attention.self.query_proj.weight"
    settings = json.loads((tiny / "config.json").read_text())
    if what == "missing":
        del state[query]
    elif what == "extra":
        state["pretrained_model.encoder.conv.weight"] = torch.zeros(3)
    elif what == "shape":
        state[query] = torch.zeros(3, 32)
    elif what == "another model":
        state = {"model.embed_tokens.weight": torch.zeros(3, 4)}
    elif what == "settings":
        settings = {"model_type": "mistral"}
    elif what == "encoder":
        settings["model_name"] = str(folder / "nowhere")
    elif what == "length":
        settings["source_maxlength"] = "1224"
    elif what == "not finite":
        state[query][0, 0] = float("nan")
    elif what == "vocabulary":
        name = "pretrained_model.embeddings.word_embeddings.weight"
        state[name] = state[name][:600].clone()
    (folder / "config.json").write_text(json.dumps(settings))
    safetensors.torch.save_file(state, folder / "model.safetensors")
    if what == "weights":
        (folder / "model.safetensors").unlink()
    elif what == "cut off":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif what == "pickle":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(b"no torch file")
    elif what == "tokenizer":
        bare = folder.parent / "bare"
        shutil.copytree(f"{tiny}-encoder", bare)
        (bare / "spm.model").unlink()
        (folder / "config.json").write_text(json.dumps(settings | {"model_name": str(bare)}))
    elif what == "config":
        (folder / "config.json").unlink()
    return str(folder)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "query_proj.weight is missing"),
        ("extra", "conv.weight has no place"),
        ("shape", "query_proj.weight is [3, 32]"),
        ("another model", "not PairRM's"),
        ("settings", "not PairRM's"),
        ("encoder", "nowhere"),
        ("weights", "pytorch_model.bin"),
        ("cut off", "download it again"),
        ("pickle", "pytorch_model.bin: it is damaged"),
        ("tokenizer", "spm.model"),
        ("config", "config.json is missing"),
        ("vocabulary", "belong to different models"),
        ("length", "source_length is '1224'"),
        ("not finite", "not finite"),
    ],
)
def test_a_folder_that_is_no_pairrm_is_refused_with_its_fault(tiny, tmp_path, what, words):
    with pytest.raises(UserError) as error:
        model = PairRM(damage(tmp_path / "model", tiny, what))
        model.logits([(model.encode("a", ["b", "c"]), 0, 1)])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "part",
    [
        "word_embeddings.weight",
        "rel_embeddings.weight",
        "layer.0.output.dense.bias",
        "head_layer.4",
    ],
)
def test_weights_that_are_not_finite_are_named_before_anything_is_ranked(
    tiny, tmp_path, part, value
):
    shutil.copytree(tiny, tmp_path / "model")
    state = safetensors.torch.load_file(tiny / "model.safetensors")
    name = next(name for name in state if part in name)
    state[name].view(-1)[-1] = float(value)
    safetensors.torch.save_file(state, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=f"model.safetensors: tensor {name} is not finite"):
        PairRM(str(tmp_path / "model"))


@pytest.mark.parametrize("hole", [0, 1, 5, 100, 300, 500, 650, 690, 699, 700])
def test_a_tokenizer_whose_ids_have_a_hole_is_refused(tiny, both, monkeypatch, hole):
    """There are as many tokens as the weights have, but one has an id beyond them."""
    ids = both[0].layout.tokenizer.get_vocab()
    ids = {token: len(ids) if i == hole else i for token, i in ids.items()}
    tokenizer = SimpleNamespace(get_vocab=lambda: ids, token_to_id=ids.get)
    monkeypatch.setattr("model.rankers.pairrm.open_tokenizer", lambda folder: tokenizer)
    with pytest.raises(UserError, match="do not have the ids 0 to 704 of the weights"):
        PairRM(str(tiny))


def test_a_name_that_is_no_folder_is_looked_for_on_the_hub():
    with pytest.raises(UserError, match="hub"):
        open_folder("llm-blender/PairRM-that-is-not-here")
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        open_folder("/no/such/folder")


def test_bf16_stays_near_fp32(tiny, both):
    half = PairRM(str(tiny), dtype=jnp.bfloat16)
    for source, answers in ODD[:2]:
        np.testing.assert_allclose(
            matrix(half, source, answers), matrix(both[0], source, answers), atol=0.5
        )


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        pytest.param(tiny_pairrm.MIDDLE, 200, id="middle"),
        pytest.param(LARGE, 8, id="PairRM's size"),
    ],
)
def test_bf16_mostly_ranks_as_fp32_does(tmp_path, data, real_texts, sizes, count):
    folder = tiny_pairrm.write_pairrm(tmp_path / "model", sizes, pieces=8000, texts=real_texts)
    prompts, logits = prompts_for(data, sizes, count), {}
    for dtype in ("float32", "bfloat16"):  # one after the other: both at once are 3 GB
        model = PairRM(str(folder), dtype=dtype)
        logits[dtype] = np.stack([matrix(model, *prompt) for prompt in prompts])
        del model
    full, half = logits.values()
    scores = [(m - m.transpose(0, 2, 1)).mean(axis=2) for m in (full, half)]
    order, rounded = (np.argsort(x, axis=1) for x in scores)
    best, worst = ((order[:, k] == rounded[:, k]).mean() for k in (-1, 0))
    whole = (order == rounded).all(axis=1).mean()
    largest, spread = np.abs(full - half).max(), np.ptp(full)
    print(
        f"bf16 against fp32, {count} prompts: the same best answer for {best:.1%}, worst "
        f"{worst:.1%}, whole order {whole:.1%}; logits differ by at most {largest:.3f} of a spread "
        f"of {spread:.2f}"
    )
    assert min(best, worst) >= 0.85 and whole >= 0.8
    assert largest < spread / 10


# ------------------------------------------------------------------- the real weights


def real_folder():
    """PairRM itself: where ALIGN_PAIRRM points, or the hub's cache."""
    if "ALIGN_PAIRRM" in os.environ:
        return os.environ["ALIGN_PAIRRM"]
    try:
        open_folder("llm-blender/PairRM")
    except UserError:
        pytest.skip("PairRM's weights are not here: set ALIGN_PAIRRM to its folder")
    return "llm-blender/PairRM"


def test_the_published_weights_give_the_published_numbers():
    """Compare mode [A,B] of llm-blender's documentation, and the README's ranks."""
    model = PairRM(real_folder())
    for source, first, second, logit in (
        ("hello!", "hi!", "f**k off!", 1.9003021717),
        ("I love you!", "I hate you!", "I love you, too!", -1.2547134161),
    ):
        encoded = model.encode(source, [first, second])
        assert model.logits([(encoded, 0, 1)])[0] == pytest.approx(logit, abs=1e-3)
    ranks = []
    for source, answers in (
        ("hello, how are you!", ["get out!", "hi! I am fine, thanks!", "bye!"]),
        ("I love you!", ["I love you too!", "I hate you!", "Thanks! You're a good guy!"]),
    ):
        found = matrix(model, source, answers)
        order = np.argsort(-(found - found.T).mean(axis=1)).tolist()
        ranks.append([order.index(i) + 1 for i in range(3)])
    assert ranks == [[3, 1, 2], [1, 3, 2]]
