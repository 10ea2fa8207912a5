import dataclasses
import json
import math

import pytest
import torch
import transformers

from model.config import BUILT, HARMLESS, DecoderConfig, from_hf, left_out, read_config, to_hf
from scripts.bench.shapes import MISTRAL_7B
from sharding.errors import UserError

# mistralai/Mistral-7B-Instruct-v0.2's config.json, complete; v0.1 differs in two values.
MISTRAL_V2 = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_V1 = MISTRAL_V2 | {"rope_theta": 10000.0, "sliding_window": 4096}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}


def test_reads_mistral_7b_instruct_v02():
    config = from_hf(MISTRAL_V2)
    assert config == MISTRAL_7B
    assert (config.sliding_window, config.torch_dtype) == (None, "bfloat16")


def test_reads_mistral_7b_v01_with_its_window():
    config = from_hf(MISTRAL_V1)
    assert (config.sliding_window, config.rope_theta) == (4096, 10000.0)


def test_reads_smollm2():
    config = from_hf(SMOLLM2)
    assert (config.model_type, config.head_dim) == ("llama", 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert (config.tie_word_embeddings, config.rope_theta, config.pad_token_id) == (True, 1e5, 2)
    assert config.sliding_window is None


@pytest.mark.parametrize("hf", [MISTRAL_V2, MISTRAL_V1, SMOLLM2], ids=["v0.2", "v0.1", "smollm2"])
def test_writes_what_it_reads(hf):
    config = from_hf(hf)
    written = to_hf(config, config.torch_dtype)
    assert from_hf(written) == config
    # Every key that says something about the model comes back with its value.
    silent = {
        "transformers_version",
        "transformers.js_config",
        "is_llama_config",
        "pretraining_tp",
        "rope_interleaved",
        "rope_scaling",
    }
    assert {k: v for k, v in written.items() if k in hf} == {
        k: v for k, v in hf.items() if k not in silent
    }


@pytest.mark.parametrize("hf", [MISTRAL_V2, MISTRAL_V1, SMOLLM2], ids=["v0.2", "v0.1", "smollm2"])
def test_transformers_understands_what_is_written(hf):
    ours = from_hf(hf)
    written = to_hf(ours, "bfloat16")
    theirs = transformers.AutoConfig.for_model(**written)
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
    assert theirs.head_dim == ours.head_dim
    # and its own spelling (rope_parameters, dtype, its defaults) is understood here
    assert from_hf(theirs.to_dict()) == ours


def test_reads_the_defaults_of_transformers():
    mistral = from_hf(transformers.MistralConfig().to_dict())
    assert (mistral.sliding_window, mistral.rope_theta, mistral.rms_norm_eps) == (4096, 1e4, 1e-6)
    llama = from_hf(transformers.LlamaConfig().to_dict())
    assert (llama.sliding_window, llama.num_key_value_heads, llama.head_dim) == (None, 32, 128)


def test_a_head_dim_of_its_own_is_kept():
    config = from_hf(MISTRAL_V2 | {"head_dim": 160})
    assert config.head_dim == 160
    assert to_hf(config, "float32")["head_dim"] == 160


def test_the_generation_config_says_where_sampling_stops():
    config = from_hf(MISTRAL_V2, {"bos_token_id": 1, "eos_token_id": [2, 7]})
    assert config.eos_token_ids == (2, 7)
    assert to_hf(config, "float32")["eos_token_id"] == [2, 7]
    assert from_hf(MISTRAL_V2, {"_from_model_config": True}).eos_token_ids == (2,)


def test_layer_types_of_one_kind_decide_the_window():
    sliding = MISTRAL_V1 | {"layer_types": ["sliding_attention"] * 32}
    assert from_hf(sliding).sliding_window == 4096
    full = MISTRAL_V1 | {"layer_types": ["full_attention"] * 32}
    assert from_hf(full).sliding_window is None


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.*yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.*llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters.*dynamic",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias is True: only false"),
        ({"model_type": "llama", "attention_bias": None}, "attention_bias is None: only false"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is True: only false"),
        ({"hidden_act": "gelu"}, """hidden_act is 'gelu': only "silu" is built"""),
        ({"hidden_act": None}, "hidden_act is None"),
        ({"is_causal": False}, "is_causal is False"),
        ({"attention_chunk_size": 8}, "attention_chunk_size is 8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"per_layer_config": {"0": {"num_key_value_heads": 4}}}, "per_layer_config"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder True"),
        ({"attribute_map": {"hidden_size": "n_embd"}}, "attribute_map"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_scaling": [1]}, "rope_scaling is"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.*linear"),
        ({"rope_scaling": {"rope_type": None}}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
        ({"model_type": "qwen2"}, "model_type 'qwen2'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 16}, "layer_types"),
        ({"layer_types": ["full_attention"] * 31}, "layer_types .*: 32 times"),
        ({"layer_types": "full_attention"}, "layer_types full_attention is not built"),
        ({"layer_types": ["sliding_attention"] * 32}, "sliding_window is not set"),
        ({"model_type": ["mistral"]}, "model_type .'mistral'. is not built"),
        ({"model_type": "llama", "layer_types": ["sliding_attention"] * 32}, "sliding_window"),
        ({"torch_dtype": "int8"}, "torch_dtype 'int8'"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 24}, "hidden_size 4096 does not divide into 24 heads"),
        (
            {"model_type": "llama", "num_attention_heads": 24, "head_dim": 128},
            "hidden_size 4096 does not divide into 24 heads",
        ),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"head_dim": 33}, "head_dim 33"),
        ({"model_type": "llama", "sliding_window": 4096}, "sliding_window 4096"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_built_is_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        from_hf(MISTRAL_V2 | changes)


def test_a_missing_key_is_named():
    without = {k: v for k, v in MISTRAL_V2.items() if k != "vocab_size"}
    with pytest.raises(UserError, match="vocab_size is missing"):
        from_hf(without)


@pytest.mark.parametrize(
    "key", "vocab_size hidden_size intermediate_size num_hidden_layers head_dim".split()
)
@pytest.mark.parametrize("value", ["32", 32.0, True, 0, -1, 2**31, 10**30, [32], math.nan])
def test_a_size_is_a_positive_whole_number(key, value):
    with pytest.raises(UserError, match=f"^{key} is .*: it must be a positive whole number"):
        from_hf(MISTRAL_V2 | {key: value})


@pytest.mark.parametrize(
    "key, values, allowed",
    [
        ("vocab_size", [None], "a positive whole number"),
        ("num_attention_heads", ["32", 32.0, None], "a positive whole number"),
        ("num_key_value_heads", ["8", 8.0, 0, -8], "a positive whole number"),
        ("max_position_embeddings", [None, "4096", 4096.0, 0], "a positive whole number"),
        ("num_hidden_layers", [10**6], "a positive whole number of at most 10000"),
        ("sliding_window", ["4096", 0, -1, 4096.0, True], "a positive whole number"),
        ("rms_norm_eps", [None, "1e-5", 0, -1e-5, math.nan, math.inf, True, []], "a number above"),
        ("rope_theta", [None, "1e4", 0, -1.0, math.nan, math.inf, 10**400, True], "a number above"),
        ("rope_theta", [{"__float__": "Infinity"}], "a number above"),
        ("initializer_range", [None, "0.02", math.nan, -1, 2], "a number from 0 to 1"),
        ("tie_word_embeddings", [None, "false", 0, 1, "true"], "true or false"),
        ("pad_token_id", ["1", 1.0, [1]], "a token id or null"),
        ("eos_token_id", ["2", 2.0, ["2"], [[2]], True, {"a": 1}], "a token id or a list of them"),
    ],
)
def test_each_value_has_its_type_and_range(key, values, allowed):
    for value in values:
        with pytest.raises(UserError, match=rf"^{key} .*: it must be {allowed}.*"):
            from_hf(MISTRAL_V1 | {key: value})


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", ["1", 1.0, [-1], -1, 32000, [[1]], True])
def test_a_token_id_is_one_of_the_vocabulary(key, value):
    with pytest.raises(
        UserError, match=rf"^{key} .*must be (an id of the vocabulary of|a token id)"
    ):
        from_hf(MISTRAL_V1 | {key: value})


def test_what_an_error_of_a_value_names(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MISTRAL_V2 | {"rms_norm_eps": "1e-5"}))
    with pytest.raises(UserError) as error:
        read_config(str(tmp_path))
    assert str(error.value) == f"{path}: rms_norm_eps is '1e-5': it must be a number above 0"


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 10**5]
)
def test_what_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json (is not JSON|holds no JSON object)"):
        read_config(str(tmp_path))


@pytest.mark.parametrize(
    "changes, theta",
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_scaling": {"type": "default", "rope_theta": 5e5}, "rope_theta": 1e4}, 5e5),
        ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1.0}, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, 1e4),
        ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_scaling": None, "rope_parameters": None}, 1e4),
        ({"partial_rotary_factor": 1.0}, 1e4),
        ({"partial_rotary_factor": None}, 1e4),
        (
            {
                "rope_scaling": {"type": "default", "rope_theta": 5e5},
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            5e5,
        ),
    ],
)
def test_the_base_of_rope_is_that_of_transformers(changes, theta):
    hf = {key: value for key, value in MISTRAL_V1.items() if key != "rope_theta"} | changes
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(hf)))
    assert from_hf(hf).rope_theta == theta == theirs.rope_parameters["rope_theta"]


# ---------------------------------------------------------------------- keys of others

# Keys that people publish, with values that would change a model if anything read them.
UNKNOWN = {
    "unk_token_id": 0,
    "temperature": 0.3,
    "do_sample": True,
    "max_length": 20,
    "repetition_penalty": 2.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"},
    "attn_logit_softcapping": 30.0,
    "use_mrope": True,
    "rope_interleaved": True,
    "embedding_multiplier": 12.0,
    "my_vendor_key": {"deep": [1, 2]},
    "is_decoder": True,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "num_experts_per_tok": 2,
}
TINY = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
}


def their_logits(hf: dict) -> torch.Tensor:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(hf)))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_a_key_that_transformers_class_does_not_know_is_left_out(kind):
    base = TINY | {"model_type": kind}
    assert left_out(base) == []
    assert left_out(base | UNKNOWN) == list(UNKNOWN)
    assert from_hf(base | UNKNOWN) == from_hf(base)
    assert torch.equal(their_logits(base | UNKNOWN), their_logits(base))


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_mistral_has_no_biases_whatever_its_config_says(key):
    base = TINY | {"model_type": "mistral"}
    assert left_out(base | {key: True}) == [key]
    assert torch.equal(their_logits(base | {key: True}), their_logits(base))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_mrope": False, "quantization_config": None, "rope_scaling": None},
        {"attention_dropout": 0.1, "pretraining_tp": 2},
        {"id2label": {"0": "A", "1": "B", "2": "C"}, "problem_type": "regression"},
        {"attention_bias": False, "mlp_bias": False, "is_causal": True, "head_dim": None},
        {"_name_or_path": "x", "transformers.js_config": {}, "unsloth_version": "1"},
        {"is_encoder_decoder": False, "chunk_size_feed_forward": 0, "attention_chunk_size": None},
    ],
)
def test_keys_that_change_nothing_are_not_spoken_of(changes):
    assert left_out(SMOLLM2 | changes) == []
    assert from_hf(SMOLLM2 | changes) == from_hf(SMOLLM2)


@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_every_key_of_transformers_class_is_read_built_or_harmless(kind):
    """A key that a new version brings is refused, until someone has looked at it."""
    config_class = transformers.CONFIG_MAPPING[kind]
    names = {field.name for field in dataclasses.fields(config_class)}
    ours = {field.name for field in dataclasses.fields(DecoderConfig)}
    assert names - ours - HARMLESS - BUILT.keys() == {"rope_parameters", "is_encoder_decoder"}
    assert all(hasattr(config_class, name) for name in names)


@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_keys_left_out_have_the_defaults_of_transformers(name):
    base = MISTRAL_V1 | {"model_type": name}
    for key in (
        "sliding_window",
        "num_key_value_heads",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
        "initializer_range",
        "hidden_act",
        "bos_token_id",
        "eos_token_id",
    ):
        del base[key]
    assert from_hf(base) == from_hf(transformers.AutoConfig.for_model(**base).to_dict())
