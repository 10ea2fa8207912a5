"""The architectures as frozen dataclasses: Mistral- or Llama-shaped decoders, DeBERTa encoders.

Field names are Hugging Face's, so that a `config.json` can be read beside the code. What a config
asks for and this project has not built is refused by name (UserError): ignoring it would give
a model that runs and answers wrongly.
"""

import dataclasses

from sharding.errors import UserError

# Keys of a config.json that do not change the forward pass of inference and DPO training.
HARMLESS = {
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
ARCHITECTURES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of one decoder. Sizes are counts, not bytes; ids are token ids."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    sliding_window: int | None = None  # a query sees this many positions, its own included
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    model_type: str = "mistral"  # or "llama": decides only what to_hf writes
    torch_dtype: str = "float32"  # of the weights as they were published; ours are always fp32

    def __post_init__(self):
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{field} is {value!r}: it must be a positive whole number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: RoPE rotates halves")

    @property
    def q_per_kv(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Axis letter → size, as model/decoder.py uses the letters."""
        return {
            "v": self.vocab_size,
            "d": self.hidden_size,
            "n": self.num_attention_heads,
            "k": self.num_key_value_heads,
            "h": self.head_dim,
            "f": self.intermediate_size,
        }


def from_hf(hf: dict, generation: dict | None = None) -> DecoderConfig:
    """Read a `config.json` (transformers 4 or 5 spelling) of model type mistral or llama.

    `generation`: the `generation_config.json`, whose EOS ids are what sampling stops at.
    Raises UserError for everything that is not built.
    """
    hf = dict(hf)
    model_type = hf.pop("model_type", None)
    if model_type not in ("mistral", "llama"):
        raise UserError(f"model_type {model_type!r} is not built: mistral and llama are")

    # transformers 5 moved the RoPE base into rope_parameters; 4 had rope_theta and rope_scaling.
    rope = dict(hf.pop("rope_parameters", None) or {})
    for name in ("rope_scaling", "rope_parameters"):
        scaling = rope if name == "rope_parameters" else (hf.pop("rope_scaling", None) or {})
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        extra = {k: v for k, v in scaling.items() if k not in ("rope_type", "type", "rope_theta")}
        if kind != "default" or extra:
            raise UserError(f"{name} {scaling} is not built: only plain RoPE is")
    theta = rope.get("rope_theta", hf.pop("rope_theta", 10000.0))
    hf.pop("rope_theta", None)
    for key, built in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("rope_interleaved", False),
        ("partial_rotary_factor", 1.0),
    ):
        value = hf.pop(key, built)
        if value != built:
            raise UserError(f"{key} {value!r} is not built: {built!r} is")
    # Keys that are left out have the defaults of transformers' classes.
    window = hf.pop("sliding_window", 4096 if model_type == "mistral" else None)
    layer_types = hf.pop("layer_types", None)
    if layer_types is not None:
        kinds = set(layer_types)
        if kinds - {"full_attention", "sliding_attention"} or len(kinds) > 1:
            raise UserError(f"layer_types {sorted(kinds)} is not built: one kind for all is")
        if kinds == {"full_attention"}:
            window = None
    if model_type == "llama" and window is not None:
        raise UserError(f"sliding_window {window} in a llama config is not built")

    def take(key, *default):
        if key not in hf and not default:
            raise UserError(f"{key} is missing")
        return hf.pop(key, *default)

    hidden, heads = take("hidden_size"), take("num_attention_heads")
    head_dim = take("head_dim", None)
    if head_dim is None:
        if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
            raise UserError(f"hidden_size {hidden} does not divide into {heads} heads")
        head_dim = hidden // heads
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise UserError(f"torch_dtype {dtype!r} is not built: {', '.join(DTYPES)} are")
    kv_heads = take("num_key_value_heads", 8 if model_type == "mistral" else None)
    eos = (generation or {}).get("eos_token_id", None)
    eos = hf.get("eos_token_id", 2) if eos is None else eos
    config = DecoderConfig(
        vocab_size=take("vocab_size"),
        hidden_size=hidden,
        intermediate_size=take("intermediate_size"),
        num_hidden_layers=take("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(take("rms_norm_eps", 1e-6)),
        rope_theta=float(theta),
        max_position_embeddings=take("max_position_embeddings", 32768),
        sliding_window=window,
        tie_word_embeddings=bool(take("tie_word_embeddings", False)),
        bos_token_id=hf.get("bos_token_id", 1),
        eos_token_ids=tuple(eos)
        if isinstance(eos, (list, tuple))
        else (() if eos is None else (eos,)),
        pad_token_id=hf.get("pad_token_id"),
        initializer_range=hf.get("initializer_range", 0.02),
        model_type=model_type,
        torch_dtype=dtype,
    )
    for key, value in hf.items():
        if key in HARMLESS or key.startswith(("_", "transformers.", "unsloth")):
            continue
        if value is None or value is False:
            continue
        raise UserError(
            f"{key} {value!r} is not known here and might change the model; "
            "remove the key from config.json if it does not"
        )
    return config


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


# ------------------------------------------------------------------------------- DeBERTa


# What a DeBERTa config may say, and nothing else, for the encoder of model/rankers/deberta.py.
DEBERTA_BUILT = {
    "model_type": "deberta-v2",
    "hidden_act": "gelu",
    "relative_attention": True,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "conv_kernel_size": 0,
}
# transformers' defaults (DebertaV2Config), where they are not what is built.
DEBERTA_DEFAULTS = {
    "relative_attention": False,
    "share_att_key": False,
    "norm_rel_ebd": "none",
    "pos_att_type": "",
    "position_biased_input": True,
}


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
    """Shape and constants of one DeBERTa-v2/v3 encoder (disentangled attention, c2p and p2c)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    position_buckets: int  # of each sign; the first half of them one token wide, then logarithmic
    max_relative_positions: int  # the distance at which the last bucket begins

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "layer_norm_eps" and (type(value) is not int or value < 1):
                raise UserError(f"{field.name} is {value!r}: it must be a positive whole number")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Axis letter → size, as model/rankers/deberta.py uses the letters."""
        return {
            "v": self.vocab_size,
            "d": self.hidden_size,
            "n": self.num_attention_heads,
            "h": self.head_dim,
            "f": self.intermediate_size,
            "p": 2 * self.position_buckets,
        }


def deberta_from_hf(hf: dict) -> DebertaConfig:
    """Read the `config.json` of a DeBERTa-v2 or v3 encoder. Raises UserError by name for what is
    not built: a convolution (v2-xlarge), absolute positions, keys of their own for positions."""
    for key, built in DEBERTA_BUILT.items():
        value = hf.get(key, DEBERTA_DEFAULTS.get(key, built))
        if key == "pos_att_type":
            kinds = value.split("|") if isinstance(value, str) else (value or [])
            same = {kind.strip() for kind in kinds} == {"c2p", "p2c"}
        else:
            same = value == built
        if not same:
            raise UserError(f"{key} {value!r} is not built: {built!r} is")
    for key in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    ):
        if key not in hf:
            raise UserError(f"{key} is missing")
    head_dim = hf["hidden_size"] // hf["num_attention_heads"]
    for key, built in (("embedding_size", hf["hidden_size"]), ("attention_head_size", head_dim)):
        if hf.get(key) not in (None, built):
            raise UserError(f"{key} {hf[key]!r} is not built: {built!r} is")
    furthest = hf.get("max_relative_positions", -1)
    return DebertaConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_hidden_layers=hf["num_hidden_layers"],
        num_attention_heads=hf["num_attention_heads"],
        layer_norm_eps=float(hf.get("layer_norm_eps", 1e-7)),
        position_buckets=hf.get("position_buckets", -1),
        max_relative_positions=hf.get("max_position_embeddings", 512) if furthest < 1 else furthest,
    )
