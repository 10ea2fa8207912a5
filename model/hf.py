"""Decoders as Hugging Face folders: read into our parameters, written from a checkpoint.

TABLE says where each tensor lies on either side (model/tensors.py); model/gguf.py uses it too.
Reading holds the fp32 parameters and one tensor; writing holds them and one file's tensors. No
number is computed with: a folder read and written in its own dtype comes out bit for bit.

Axis letters as in model/decoder.py: v vocabulary, d width, n query head, k key/value head,
h head width, f MLP width.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from model import checkpoint, checkpoint_writing, decoder
from model.checkpoint_writing import write_json
from model.config import DecoderConfig, read_config, to_hf
from model.tensors import Slot, check_tensors, stored_tensors, table_slots, write_tensors
from model.weights import weight_files
from sharding.errors import UserError

TABLE = {
    "model.embed_tokens.weight": ("embed", "v d", "v d"),
    "model.layers.{}.input_layernorm.weight": ("layers/attn_norm", "d", "d"),
    "model.layers.{}.self_attn.q_proj.weight": ("layers/q", "nh d", "d n h"),
    "model.layers.{}.self_attn.k_proj.weight": ("layers/k", "kh d", "d k h"),
    "model.layers.{}.self_attn.v_proj.weight": ("layers/v", "kh d", "d k h"),
    "model.layers.{}.self_attn.o_proj.weight": ("layers/o", "d nh", "n h d"),
    "model.layers.{}.post_attention_layernorm.weight": ("layers/mlp_norm", "d", "d"),
    "model.layers.{}.mlp.gate_proj.weight": ("layers/gate", "f d", "d f"),
    "model.layers.{}.mlp.up_proj.weight": ("layers/up", "f d", "d f"),
    "model.layers.{}.mlp.down_proj.weight": ("layers/down", "d f", "f d"),
    "model.norm.weight": ("final_norm", "d", "d"),
    "lm_head.weight": ("unembed", "v d", "d v"),
}


# ---------------------------------------------------------------------- the table, applied


def slots(config: DecoderConfig) -> dict[str, Slot]:
    """Every tensor of the model by its HF name, in the order in which they are written."""
    by_name = table_slots(TABLE, config.num_hidden_layers)
    if config.tie_word_embeddings:
        del by_name["lm_head.weight"]
    return by_name


def empty_params(config: DecoderConfig) -> dict:
    """The parameters' tree as uninitialised fp32 numpy arrays."""
    sizes, params = config.axis_sizes, {}
    for slot in slots(config).values():
        shape = tuple(sizes[letter] for letter in slot.our_axes)
        stack = () if slot.layer is None else (config.num_hidden_layers,)
        parent = params if slot.layer is None else params.setdefault(slot.path[0], {})
        if slot.path[-1] not in parent:
            parent[slot.path[-1]] = np.empty(stack + shape, np.float32)
    return params


def put(params: dict, config: DecoderConfig, slot: Slot, tensor: np.ndarray, name: str):
    """Write one HF tensor (fp32, fp16 or bf16: all exact in fp32) into its place. Raises UserError
    with the tensor's `name` if a weight is NaN or infinite."""
    weights = place(params, slot)
    weights[...] = slot.to_ours(config, tensor)
    if not np.isfinite([weights.min(), weights.max()]).all():
        raise UserError(f"{name} holds NaN or infinity: take an undamaged copy of the model")


def place(params: dict, slot: Slot) -> np.ndarray:
    """Where a tensor lies in the parameters: a view."""
    leaf = params
    for key in slot.path:
        leaf = leaf[key]
    return leaf[...] if slot.layer is None else leaf[slot.layer]


# ---------------------------------------------------------------------- reading a folder


def read_hf(folder: str) -> tuple[DecoderConfig, dict]:
    """(config, fp32 numpy parameters) of a local folder as the hub holds it.

    `config.torch_dtype` becomes the dtype that the tensors really have, so that writing the model
    back by default gives the same bits. Raises UserError.
    """
    config = read_config(folder)
    wanted, stored = slots(config), stored_tensors(*weight_files(folder))
    if "lm_head.weight" in wanted and "lm_head.weight" not in stored:
        raise UserError(
            f"{folder}: tensor lm_head.weight is missing, and config.json does not tie it to the "
            "embedding: set tie_word_embeddings to true if the model shares the two, or download "
            "the folder again"
        )
    tied_copy = stored.get("lm_head.weight") if config.tie_word_embeddings else None
    check_tensors(folder, config, wanted, stored, {"lm_head.weight"} if tied_copy else set())
    params = empty_params(config)
    for name, slot in wanted.items():
        put(params, config, slot, stored[name].read(), f"{stored[name].file}: tensor {name}")
    if tied_copy is not None and not np.array_equal(tied_copy.read(), params["embed"]):
        raise UserError(
            f"{tied_copy.file}: lm_head.weight differs from the embedding, though config.json ties "
            "the two: set tie_word_embeddings to false if both were trained"
        )
    dtypes = {stored[name].dtype for name in wanted}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.float32  # mixed: only fp32 holds them all
    return dataclasses.replace(config, torch_dtype=np.dtype(dtype).name), params


# ---------------------------------------------------------------------- writing a folder


def write_hf(
    folder: str, dst: str, dtype: str, max_shard_bytes: int, manifest: dict, card: str
) -> None:
    """Write the checkpoint `folder` as a folder that transformers loads. It appears whole, by a
    rename. dtype: one of config.DTYPES. `manifest` is put into it as manifest.json, `card` as
    README.md."""
    config = checkpoint.load_config(folder)
    if checkpoint_writing.is_taken(dst):
        raise UserError(f"{dst} exists: choose another folder, or remove it")
    unfinished = checkpoint_writing.begin_folder(dst)

    params = jax.tree.map(np.asarray, checkpoint.load(folder)[1])  # of CPU arrays: the same memory
    shards = _split(config, dtype, max_shard_bytes)
    weight_map, total = {}, 0
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        tensors = {
            name: slot.to_hf(config, _cast(place(params, slot), dtype))
            for name, slot in shard.items()
        }
        for name, tensor in tensors.items():
            if dtype != "float32" and not np.isfinite(tensor).all():
                raise UserError(f"{name} does not fit into {dtype} (or is not finite): use float32")
        write_tensors(unfinished / file, tensors)
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(shard, file)
        del tensors, tensor  # before the next file's are made
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(unfinished / "model.safetensors.index.json", index)

    checkpoint_writing.copy_tokenizer(folder, unfinished)
    hf = to_hf(config, dtype)
    write_json(unfinished / "config.json", hf)
    if not (unfinished / "generation_config.json").exists():
        ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(unfinished / "generation_config.json", ids)
    write_json(unfinished / checkpoint.MANIFEST, manifest)
    (unfinished / "README.md").write_text(card)
    checkpoint_writing.finish_folder(unfinished, dst)


def _split(config: DecoderConfig, dtype: str, max_shard_bytes: int) -> list[dict[str, Slot]]:
    """The tensors by file: filled in order, none above the size unless a single tensor is."""
    itemsize, shards, room = jnp.dtype(dtype).itemsize, [], -1
    for name, slot in slots(config).items():
        size = math.prod(slot.hf_shape(config)) * itemsize
        if size > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = slot
        room -= size
    return shards


# ---------------------------------------------------------------------- what rounding takes away


def rounded_away(folder: str, base: str, dtype: str) -> tuple[int, int]:
    """(weights whose whole update is lost in `dtype`, weights that differ from `base`'s).

    An update is lost if the rounded weight equals the rounded weight from before the training. One
    parameter of each model is in memory at a time.
    """
    config, before = checkpoint.load_config(folder), checkpoint.load_config(base)
    if config.axis_sizes != before.axis_sizes or slots(config).keys() != slots(before).keys():
        raise UserError(f"{base} is another architecture than {folder}: give the one trained from")
    lost = changed = 0
    for ours, theirs in zip(_each_parameter(folder, config), _each_parameter(base, config)):
        for new, old in zip(ours, theirs):
            differs = new != old
            same = _rounded(new, dtype) == _rounded(old, dtype)
            changed += int(np.count_nonzero(differs))
            lost += int(np.count_nonzero(differs & same))
    return lost, changed


def inexact(folder: str, dtype: str) -> tuple[int, int]:
    """(weights that `dtype` cannot hold exactly, all weights)."""
    count = total = 0
    for parameter in _each_parameter(folder, checkpoint.load_config(folder)):
        for weights in parameter:
            count += int(np.count_nonzero(_rounded(weights, dtype) != weights))
            total += weights.size
    return count, total


def _each_parameter(folder: str, config: DecoderConfig) -> Iterator[np.ndarray]:
    """The parameters one after the other: the model may be too large to be loaded whole."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for path, shape in jax.tree_util.tree_leaves_with_path(decoder.abstract(config)):
        tree = shape.update(sharding=first)
        for key in reversed(path):
            tree = {key.key: tree}
        tree = checkpoint.load_params(folder, tree, partial=True)
        yield np.asarray(jax.tree.leaves(tree)[0])


def _rounded(weights: np.ndarray, dtype: str) -> np.ndarray:
    return _cast(weights, dtype).astype(np.float32)


def _cast(weights: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to `dtype`, to nearest, ties to even."""
    with np.errstate(over="ignore"):  # becomes inf; the caller looks for it if it matters
        return weights.astype(jnp.dtype(dtype), copy=False)
