"""The architecture of a Mistral- or Llama-shaped decoder as a frozen dataclass.

Field names are Hugging Face's, so that a `config.json` can be read beside the code. transformers'
config class of the `model_type` decides what a key means: a key that the class knows and that is
not built is refused by name (UserError); a key that it does not know cannot change its model.
"""

import dataclasses
import json
from collections.abc import Mapping

from etils import epath

from model.weights import FLOAT32, check_positive, check_whole, is_number, read_json
from sharding.errors import UserError, at

# Keys that change neither the forward pass nor the training: no dropout is applied here, as in
# TRL's DPOTrainer, and `pretraining_tp` only cuts a product into parts.
HARMLESS = set(
    """architectures attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id
    id2label initializer_range is_llama_config label2id name_or_path num_labels output_attentions
    output_hidden_states pad_token_id pretraining_tp problem_type return_dict torch_dtype
    transformers_version use_cache attn_implementation experts_implementation""".split()
)
# Keys with a single value that is built; a missing key has it too. transformers' class knows the
# first three, where it has them; its other code looks for the rest in any config.
BUILT = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "is_causal": True,
    "attention_chunk_size": None,
    "kv_sharing_modes": None,
    "per_layer_config": None,
    "quantization_config": None,
    "compression_config": None,
    "fusion_config": None,
    "transformers_weights": None,
}
BY_CLASS = ("hidden_act", "attention_bias", "mlp_bias")
ARCHITECTURES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
CONTEXTS = {"mistral": 131072, "llama": 2048}  # max_position_embeddings where the key is missing
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
        for field in (*REQUIRED, *"num_key_value_heads head_dim max_position_embeddings".split()):
            check_whole(field, getattr(self, field))
        for field in ("rms_norm_eps", "rope_theta"):
            check_positive(field, getattr(self, field))
        if not is_number(self.initializer_range) or not 0 <= self.initializer_range <= 1:
            raise UserError(
                f"initializer_range is {self.initializer_range!r}: it must be a number from 0 to 1"
            )
        if type(self.tie_word_embeddings) is not bool:
            raise UserError(
                f"tie_word_embeddings is {self.tie_word_embeddings!r}: it must be true or false"
            )
        for field in ("bos_token_id", "pad_token_id"):
            if type(value := getattr(self, field)) not in (int, type(None)):
                raise UserError(f"{field} is {value!r}: it must be a token id or null")
        for value in self.eos_token_ids:
            if type(value) is not int or value < 0:
                raise UserError(f"eos_token_id {value!r}: it must be a token id or a list of them")
        for field, ids in (("bos", (self.bos_token_id,)), ("eos", self.eos_token_ids)):
            for i in ids:
                if i is not None and not 0 <= i < self.vocab_size:
                    raise UserError(
                        f"{field}_token_id {i}: it must be an id of the vocabulary of "
                        f"{self.vocab_size}"
                    )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: RoPE rotates halves")

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


def read_config(folder: str) -> DecoderConfig:
    """The config of a model's folder: config.json, and generation_config.json if it is there."""
    path = epath.Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: config.json is missing: give the folder of a downloaded model")
    generation = path.parent / "generation_config.json"
    hf, generation = read_json(path), read_json(generation) if generation.exists() else None
    with at(path):
        return from_hf(hf, generation)


def from_hf(hf: dict, generation: dict | None = None) -> DecoderConfig:
    """Read a `config.json` (transformers 4 or 5 spelling) of model type mistral or llama.

    `generation`: the `generation_config.json`. Sampling stops at its EOS ids, or, where it names
    none, at those of `hf`; if both name none, at the tokenizer's (model/checkpoint.py).
    Raises UserError for everything that is not built.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(f"model_type {kind!r} is not built: mistral and llama are")
    for name in REQUIRED:
        if name not in hf:
            raise UserError(f"{name} is missing")
        check_whole(name, hf[name])
    left_out(hf)
    names = [field.name for field in dataclasses.fields(DecoderConfig)]
    values = {name: hf[name] for name in names if name in hf}
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if values.setdefault("num_key_value_heads", 8 if kind == "mistral" else None) is None:
        values["num_key_value_heads"] = heads
    # transformers' LlamaConfig asks for it even beside a head_dim
    if hidden % heads and (values.get("head_dim") is None or kind == "llama"):
        raise UserError(f"hidden_size {hidden} does not divide into {heads} heads")
    if values.get("head_dim") is None:
        values["head_dim"] = hidden // heads
    values.setdefault("max_position_embeddings", CONTEXTS[kind])
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise UserError(f"torch_dtype {dtype!r} is not built: {', '.join(DTYPES)} are")
    own = eos_tuple(hf.get("eos_token_id", 2))
    eos = eos_tuple((generation or {}).get("eos_token_id")) or own
    theta, window = _rope_theta(hf), _sliding_window(hf)
    values |= {"rope_theta": theta, "sliding_window": window, "torch_dtype": dtype}
    return DecoderConfig(**values | {"eos_token_ids": eos})


def left_out(hf: dict) -> list[str]:
    """The keys with a value that transformers' model does not know, and that are therefore left
    out. Raises UserError for a value that it knows and that is not built."""
    read = {field.name for field in dataclasses.fields(DecoderConfig)} | {"model_type"}
    read |= {"rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types"} | HARMLESS
    keys = [
        key
        for key, value in hf.items()
        if key not in read
        and not key.startswith(("_", "transformers.", "unsloth"))
        and (value != BUILT[key] if key in BUILT else value is not None and value is not False)
    ]
    if not keys:
        return []
    from transformers import CONFIG_MAPPING  # here: seconds where torch is, for rare keys alone

    config_class = CONFIG_MAPPING[hf["model_type"]]
    unknown = []
    for key in keys:
        if not hasattr(config_class, key) and (key not in BUILT or key in BY_CLASS):
            unknown.append(key)
        elif key in BUILT:
            raise UserError(f"{key} is {hf[key]!r}: only {json.dumps(BUILT[key])} is built")
        elif hf[key] != getattr(config_class, key):
            raise UserError(f"{key} {hf[key]!r} is not built, but changes transformers' model")
    return unknown


def eos_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    """EOS ids as a tuple, each once; Hugging Face writes a single id, a list or null."""
    ids = ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    return tuple(i for n, i in enumerate(ids) if i not in ids[:n])


def _rope_theta(hf: dict) -> float:
    """The base of RoPE. transformers 5 keeps it in rope_parameters; 4 had rope_theta, with
    rope_scaling beside it, which goes before."""
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(name) or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{name} is {rope!r}: it must be an object or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    plain = kind == "default" or (kind == "linear" and rope.get("factor") == 1)
    unbuilt = {
        key
        for key, value in rope.items()
        if key not in ("rope_type", "type", "rope_theta")
        and not (key in ("factor", "partial_rotary_factor") and value == 1)
    }
    if not plain or unbuilt:
        raise UserError(f"{name} {rope} is not built: only plain RoPE is")
    if hf.get("partial_rotary_factor") not in (None, 1):
        raise UserError(
            f"partial_rotary_factor is {hf['partial_rotary_factor']!r}: only 1.0 is built"
        )
    theta = rope.get("rope_theta", hf.get("rope_theta", DecoderConfig.rope_theta))
    # an int beyond the range of floats is refused with the others
    return float(theta) if is_number(theta) and abs(theta) <= FLOAT32[1] else theta


def _sliding_window(hf: dict) -> int | None:
    """The window of all layers; None if every token is seen."""
    mistral, layers = hf["model_type"] == "mistral", hf["num_hidden_layers"]
    window, kinds = hf.get("sliding_window", 4096 if mistral else None), hf.get("layer_types")
    if window is not None:
        check_whole("sliding_window", window)
    if kinds is not None:
        built = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or kinds not in ([kind] * layers for kind in built):
            raise UserError(
                f"layer_types {kinds!s:.80} is not built: {layers} times {' or '.join(built)} is"
            )
        if kinds[0] == "full_attention":
            window = None
        elif window is None:
            raise UserError("layer_types has sliding_attention, but sliding_window is not set")
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
