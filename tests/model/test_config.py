import pytest
import transformers

from model.config import from_hf, to_hf
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
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "qwen2"}, "model_type 'qwen2'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 16}, "layer_types"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0"),
        ({"torch_dtype": "int8"}, "torch_dtype 'int8'"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"num_attention_heads": 0}, "hidden_size 4096"),
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


def test_an_unknown_key_that_is_off_is_accepted():
    assert from_hf(MISTRAL_V2 | {"use_mrope": False, "quantization_config": None}) == from_hf(
        MISTRAL_V2
    )


@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_keys_left_out_have_the_defaults_of_transformers(name):
    base = MISTRAL_V1 | {"model_type": name}
    for key in (
        "sliding_window",
        "num_key_value_heads",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
    ):
        del base[key]
    assert from_hf(base) == from_hf(transformers.AutoConfig.for_model(**base).to_dict())
