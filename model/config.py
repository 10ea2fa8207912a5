"""The architecture of a Mistral- or Llama-shaped decoder as a frozen dataclass.

Field names are Hugging Face's, so that a `config.json` can be read beside the code. A key that asks
for something this project has not built is refused by name (UserError): a model that ignores it
would run and answer wrongly.
"""

import dataclasses

from sharding.errors import UserError

# Keys of a config.json that do not change the forward pass of inference and DPO training.
HARMLESS = set(
    """architectures attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id
    id2label initializer_range is_llama_config label2id output_attentions output_hidden_states
    pad_token_id pretraining_tp return_dict torch_dtype transformers_version use_cache""".split()
)
# Keys with a single value that is built; a missing key has it too.
BUILT = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
}
ARCHITECTURES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
DTYPES = ("float32", "bfloat16", "float16")
REQUIRED = """vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads""".split()


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of one decoder. Ids are token ids."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    # The defaults are those of transformers' classes, for keys that a config.json leaves out.
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 32768
    sliding_window: int | None = None  # how many positions a query sees, its own included
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    model_type: str = "mistral"  # or "llama": decides only what `to_hf` writes
    torch_dtype: str = "float32"  # of the published weights; our parameters are always fp32

    def __post_init__(self):
        for field in (*REQUIRED, "num_key_value_heads", "head_dim"):
            if type(value := getattr(self, field)) is not int or value < 1:
                raise UserError(f"{field} is {value!r}: it must be a positive whole number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: RoPE rotates halves")
        for name, ids in (("bos", (self.bos_token_id,)), ("eos", self.eos_token_ids)):
            for i in ids:
                if i is not None and (type(i) is not int or not 0 <= i < self.vocab_size):
                    raise UserError(
                        f"{name}_token_id {i!r} is no id of a vocabulary of {self.vocab_size}: "
                        "correct it in config.json and generation_config.json"
                    )

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

    `generation`: the `generation_config.json`. Sampling stops at its EOS ids, or, where it names
    none, at those of `hf`; if both name none, at the tokenizer's (model/checkpoint.py).
    Raises UserError for everything that is not built.
    """
    keys = dict(hf)  # what is read is taken out; what is left must be harmless
    if keys.get("model_type") not in ARCHITECTURES:
        raise UserError(
            f"model_type {keys.get('model_type')!r} is not built: mistral and llama are"
        )
    mistral = keys["model_type"] == "mistral"
    for key, built in BUILT.items():
        if keys.pop(key, built) != built:
            raise UserError(f"{key} {hf[key]!r} is not built: {built!r} is")
    theta, window = _take_rope_theta(keys), _take_sliding_window(keys, mistral)
    names = [field.name for field in dataclasses.fields(DecoderConfig)]
    values = {name: keys.pop(name) for name in names if name in keys}
    for name in REQUIRED:
        if name not in values:
            raise UserError(f"{name} is missing")
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if values.setdefault("num_key_value_heads", 8 if mistral else None) is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim") is None:
        if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
            raise UserError(f"hidden_size {hidden} does not divide into {heads} heads")
        values["head_dim"] = hidden // heads
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise UserError(f"torch_dtype {dtype!r} is not built: {', '.join(DTYPES)} are")
    own = eos_tuple(hf.get("eos_token_id", 2))
    eos = eos_tuple((generation or {}).get("eos_token_id")) or own
    values |= {"rope_theta": theta, "sliding_window": window, "torch_dtype": dtype}
    config = DecoderConfig(**values | {"eos_token_ids": eos})
    for key, value in keys.items():
        if key in HARMLESS or key.startswith(("_", "transformers.", "unsloth")):
            continue
        if value is not None and value is not False:
            raise UserError(
                f"{key} {value!r} is not known here and might change the model; "
                "remove the key from config.json if it does not"
            )
    return config


def eos_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    """EOS ids as a tuple, each once; Hugging Face writes a single id, a list or null."""
    ids = ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    for i in ids:
        if type(i) is not int:
            raise UserError(f"eos_token_id holds {i!r}: it must be a token id or a list of them")
    return tuple(dict.fromkeys(ids))


def _take_rope_theta(keys: dict) -> float:
    """The base of RoPE. transformers 5 keeps it in rope_parameters; 4 had rope_theta, with
    rope_scaling beside it."""
    ropes = {name: keys.pop(name, None) or {} for name in ("rope_scaling", "rope_parameters")}
    for name, rope in ropes.items():
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.keys() - {"rope_type", "type", "rope_theta"}:
            raise UserError(f"{name} {rope} is not built: only plain RoPE is")
    theta = keys.pop("rope_theta", DecoderConfig.rope_theta)
    return float(ropes["rope_parameters"].get("rope_theta", theta))


def _take_sliding_window(keys: dict, mistral: bool) -> int | None:
    """The window of all layers; None if every token is seen."""
    window = keys.pop("sliding_window", 4096 if mistral else None)
    kinds = set(keys.pop("layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"} or len(kinds) > 1:
        raise UserError(f"layer_types {sorted(kinds)} is not built: one kind for all is")
    if kinds == {"full_attention"}:
        window = None
    if not mistral and window is not None:
        raise UserError(f"sliding_window {window} in a llama config is not built")
    return window


def to_hf(config: DecoderConfig, dtype: str) -> dict:
    """The `config.json` of the model with its weights stored as `dtype` (one of DTYPES), in the
    spelling of transformers 4 (rope_theta, torch_dtype), which 5 reads too."""
    hf = dataclasses.asdict(config) | {
        "architectures": [ARCHITECTURES[config.model_type]],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "use_cache": True,
    }
    eos = hf.pop("eos_token_ids")
    hf["eos_token_id"] = eos[0] if len(eos) == 1 else (list(eos) or None)
    if config.model_type == "llama":
        del hf["sliding_window"]
        hf |= {"attention_bias": False, "mlp_bias": False}
    return dict(sorted(hf.items()))
