"""Write a decoder's config.json, as Hugging Face has it. model/config.py reads it."""

from model.config import ARCHITECTURES, DecoderConfig


def to_hf(config: DecoderConfig, dtype: str) -> dict:
    """The `config.json` of the model with its weights stored as `dtype` (one of DTYPES).

    Written in the spelling of transformers 4 (rope_theta, torch_dtype), which 5 reads too.
    """
    c = config
    eos = c.eos_token_ids
    hf = {
        "architectures": [ARCHITECTURES[c.model_type]],
        "attention_dropout": 0.0,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (list(eos) or None),
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": c.initializer_range,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "model_type": c.model_type,
        "num_attention_heads": c.num_attention_heads,
        "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads,
        "pad_token_id": c.pad_token_id,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
    if c.model_type == "mistral":
        hf["sliding_window"] = c.sliding_window
    else:
        hf |= {"attention_bias": False, "mlp_bias": False}
    return hf
