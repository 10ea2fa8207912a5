"""Hugging Face folders: read into our parameters, written from a checkpoint.

One table (TABLE) says where each tensor lies on either side and how its axes go over; both
directions use it, and model/gguf.py does too. Tensors go through one at a time: reading holds the
fp32 parameters and one tensor, writing the same. The numbers themselves are never computed with:
a folder read and written in its own dtype comes out bit for bit.

Axis letters as in model/decoder.py: v vocabulary, d width, n query head, k key/value head,
h head width, f MLP width.
"""

import dataclasses
import json
import math
import re

import jax
import ml_dtypes
import numpy as np
from etils import epath

from model import checkpoint
from model import config as model_config
from model.config import DecoderConfig
from sharding.errors import UserError

# HF name → our path, HF's axes, ours. Letters written together are one axis over there: the rows
# of a q_proj.weight [nh, d] are n heads of h each.
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
SAFETENSORS_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


# ---------------------------------------------------------------------- the table, applied


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one HF tensor lies in our parameters."""

    path: tuple[str | int, ...]
    layer: int | None  # index of the stacked axis
    hf_axes: tuple[str, ...]
    our_axes: tuple[str, ...]


def slots(config: DecoderConfig) -> dict[str, Slot]:
    """Every tensor of the model by its HF name, in the order in which they are written."""
    found = table_slots(TABLE, config.num_hidden_layers)
    if config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found


def table_slots(table: dict[str, tuple[str, str, str]], layers: int) -> dict[str, Slot]:
    """The tensors that a table names, by HF name. "{}" there is the layer: in a name alone, the
    layers are stacked on our side; in the path too, they are a list."""
    found = {}
    for layer in (None, *range(layers)):
        for name, (path, hf_axes, our_axes) in table.items():
            if ("{}" in name) == (layer is None):
                continue
            keys = tuple(layer if key == "{}" else key for key in path.split("/"))
            stacked = layer if layer not in keys else None
            axes = tuple(hf_axes.split()), tuple(our_axes.split())
            found[name.format(layer)] = Slot(keys, stacked, *axes)
    return found


def hf_shape(config, slot: Slot) -> tuple[int, ...]:
    sizes = config.axis_sizes
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in slot.hf_axes)


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


def put(params: dict, config: DecoderConfig, slot: Slot, tensor: np.ndarray):
    """Write one HF tensor (fp32, fp16 or bf16: all exact in fp32) into its place, in place."""
    _place(params, slot)[...] = to_ours(config, slot, tensor)


def to_ours(config, slot: Slot, tensor: np.ndarray) -> np.ndarray:
    """One HF tensor with our axes: a view."""
    sizes, letters = config.axis_sizes, "".join(slot.hf_axes)
    split = tensor.reshape([sizes[letter] for letter in letters])
    return split.transpose([letters.index(axis) for axis in slot.our_axes])


def get(params: dict, config: DecoderConfig, slot: Slot, dtype) -> np.ndarray:
    """One HF tensor, contiguous, rounded to `dtype` (to nearest, ties to even)."""
    letters = "".join(slot.hf_axes)
    ours = _cast(_place(params, slot), dtype)
    split = ours.transpose([slot.our_axes.index(letter) for letter in letters])
    return np.ascontiguousarray(split.reshape(hf_shape(config, slot)))


def _place(params: dict, slot: Slot) -> np.ndarray:
    leaf = params
    for key in slot.path:
        leaf = leaf[key]
    return leaf[...] if slot.layer is None else leaf[slot.layer]


# ---------------------------------------------------------------------- reading a folder


def local_folder(src: str, files: list[str], revision: str = "main") -> tuple[str, str | None]:
    """(local folder, commit on the hub or None) of a folder or a hub id, ORG/NAME, of which those
    `files` (patterns) are downloaded that it has. Raises UserError."""
    if epath.Path(src).is_dir():
        return src, None
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", src):
        raise UserError(f"{src} is neither a folder nor a hub id of the form ORG/NAME")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(src, revision=revision, allow_patterns=files)
    except Exception as error:  # of many kinds: no such model, gated, no network, no space
        line = next((s.strip() for s in str(error).splitlines() if s.strip()), repr(error))
        raise UserError(
            f"{src} is no folder here, and the hub does not give it (revision {revision}): {line}"
        ) from None
    return folder, epath.Path(folder).name


def read_hf(folder: str) -> tuple[DecoderConfig, dict]:
    """(config, fp32 numpy parameters) of a folder as the hub holds it.

    `config.torch_dtype` becomes the dtype that the tensors really have, so that writing the model
    back by default gives the same bits. Raises UserError (UserError for an unbuilt architecture).
    """
    config = read_config(folder)
    wanted, stored = slots(config), stored_tensors(folder)
    tied_copy = stored.get("lm_head.weight") if config.tie_word_embeddings else None
    check_tensors(folder, config, wanted, stored, {"lm_head.weight"} if tied_copy else set())
    params = empty_params(config)
    for name, slot in wanted.items():
        put(params, config, slot, stored[name].read())
    if tied_copy is not None and not np.array_equal(tied_copy.read(), params["embed"]):
        raise UserError(
            f"{tied_copy.file}: lm_head.weight differs from the embedding, though config.json ties "
            "the two: set tie_word_embeddings to false if both were trained"
        )
    kinds = {stored[name].dtype for name in wanted}
    dtype = kinds.pop() if len(kinds) == 1 else np.float32  # mixed: only fp32 holds them all
    return dataclasses.replace(config, torch_dtype=np.dtype(dtype).name), params


def check_tensors(folder: str, config, wanted: dict[str, Slot], stored: dict, more: set[str]):
    """UserError, naming the tensor, unless `stored` (name → StoredTensor or its like) has what is
    `wanted`, each in the shape that the config makes it, and beside them only those in `more`."""
    for name, slot in wanted.items():
        if name not in stored:
            raise UserError(f"{folder}: tensor {name} is missing: download the folder again")
        shape, expected = tuple(stored[name].shape), hf_shape(config, slot)
        if shape != expected:
            raise UserError(
                f"{stored[name].file}: tensor {name} is {list(shape)}, config.json makes it "
                f"{list(expected)}: the two belong to different models"
            )
    for name in sorted(stored.keys() - wanted.keys() - more):
        if not _is_harmless(name):
            raise UserError(
                f"{stored[name].file}: tensor {name} has no place in this architecture "
                "(a bias, an adapter, another model?): remove it only if it is not used"
            )


def read_config(folder: str) -> DecoderConfig:
    path = epath.Path(folder)
    if not (path / "config.json").exists():
        raise UserError(f"{folder}: config.json is missing: give the folder of a downloaded model")
    generation = path / "generation_config.json"
    hf = read_json(path / "config.json")
    try:
        return model_config.from_hf(hf, read_json(generation) if generation.exists() else None)
    except UserError as error:
        raise UserError(f"{path / 'config.json'}: {error}") from None


def weight_files(folder: str) -> list[epath.Path]:
    """The safetensors files of a folder: one, or those that its index names."""
    path = epath.Path(folder)
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    if not (path / "model.safetensors.index.json").exists():
        raise UserError(
            f"{folder}: neither model.safetensors nor model.safetensors.index.json is there "
            "(other formats are not read: save the model with safe serialization)"
        )
    index = read_json(path / "model.safetensors.index.json")
    if not isinstance(index.get("weight_map"), dict):
        raise UserError(f"{path / 'model.safetensors.index.json'}: weight_map is missing")
    files = [path / name for name in sorted(set(index["weight_map"].values()))]
    for file in files:
        if not file.exists():
            raise UserError(f"{file} is missing, and the index names it: download the folder again")
    return files


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor inside a safetensors file."""

    file: str
    name: str
    dtype: type
    shape: tuple[int, ...]
    start: int  # in bytes from the beginning of the file

    def read(self) -> np.ndarray:
        size = math.prod(self.shape) * np.dtype(self.dtype).itemsize
        with epath.Path(self.file).open("rb") as file:
            file.seek(self.start)
            data = file.read(size)
        if len(data) != size:
            raise UserError(f"{self.file} became shorter while it was read")
        return np.frombuffer(data, self.dtype).reshape(self.shape)


def stored_tensors(folder: str) -> dict[str, StoredTensor]:
    found = {}
    for file in weight_files(folder):
        for tensor in read_header(file):
            if tensor.name in found:
                other = found[tensor.name].file
                raise UserError(f"{file}: tensor {tensor.name} is in {other} too: keep one of them")
            found[tensor.name] = tensor
    return found


def read_header(file: epath.Path) -> list[StoredTensor]:
    """The tensors of a safetensors file: 8 bytes of length, a JSON header, the tensors' bytes.

    Our own reader, since the package's numpy side knows no bfloat16 and torch would be needed.
    """
    size = file.stat().length
    again = "it is damaged or cut off; download it again"
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{file} ({size} bytes): {again}")
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            entries = [
                (name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file} ({size} bytes): {again}") from None
    tensors = []
    for name, kind, shape, begin, end in entries:
        where = f"{file}: tensor {name}"
        if 8 + length + end > size:
            raise UserError(f"{where} ends at byte {8 + length + end}, the file at {size}: {again}")
        if kind not in SAFETENSORS_DTYPES:
            if _is_harmless(name):
                continue
            built = ", ".join(SAFETENSORS_DTYPES)
            raise UserError(f"{where} is {kind}; {built} are built: take the unquantized model")
        dtype = SAFETENSORS_DTYPES[kind]
        if math.prod(shape) * np.dtype(dtype).itemsize != end - begin:
            raise UserError(f"{where}: {end - begin} bytes do not make {list(shape)}: {again}")
        tensors.append(StoredTensor(str(file), name, dtype, shape, 8 + length + begin))
    return tensors


def _is_harmless(name: str) -> bool:
    """RoPE's frequencies and position numbers, which old conversions hold: both are computed."""
    return name.endswith((".rotary_emb.inv_freq", ".position_ids"))


def read_json(path: epath.Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: download it again")
    return content


# ---------------------------------------------------------------------- writing a folder


def write_hf(
    folder: str,
    dst: str,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    manifest: dict | None = None,
    card: str | None = None,
) -> str:
    """Write the checkpoint `folder` as a folder that transformers loads; return its dtype.

    dtype: one of config.DTYPES; default: the one the model was published in. The folder appears
    whole, by a rename. `manifest` is put into it as manifest.json, `card` as README.md.
    """
    config = checkpoint.load_config(folder)
    dtype = dtype or config.torch_dtype
    if epath.Path(dst).exists():
        raise UserError(f"{dst} exists: choose another folder, or remove it")
    temporary = epath.Path(f"{str(dst).rstrip('/')}.tmp")
    if temporary.exists():
        temporary.rmtree()
    temporary.mkdir(parents=True)

    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    _, params = checkpoint.load(folder, cpu)
    params = jax.tree.map(np.asarray, params)  # of CPU arrays: the same memory
    shards = _split(config, dtype, max_shard_bytes)
    weight_map, total = {}, 0
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        total += _write_safetensors(temporary / file, params, config, dtype, names)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(temporary / "model.safetensors.index.json", index)

    source = epath.Path(folder)
    for name in (*checkpoint.TOKENIZER_FILES, "generation_config.json"):
        if (source / name).exists():
            (source / name).copy(temporary / name)
    hf = model_config.to_hf(config, dtype)
    _write_json(temporary / "config.json", hf)
    if not (source / "generation_config.json").exists():
        ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(temporary / "generation_config.json", ids)
    if manifest is not None:
        _write_json(temporary / checkpoint.MANIFEST, manifest)
    if card is not None:
        (temporary / "README.md").write_text(card)
    temporary.rename(dst)
    return dtype


def _split(config: DecoderConfig, dtype: str, max_shard_bytes: int) -> list[list[str]]:
    """Names by file: filled in order, none above the size unless one tensor alone is."""
    itemsize, shards, room = np.dtype(NUMPY_DTYPES[dtype]).itemsize, [], -1
    for name, slot in slots(config).items():
        size = math.prod(hf_shape(config, slot)) * itemsize
        if size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _write_safetensors(path, params: dict, config, dtype: str, names: list[str]) -> int:
    """Write `names` into one file, tensor by tensor; returns the tensors' bytes."""
    kind = next(k for k, d in SAFETENSORS_DTYPES.items() if d is NUMPY_DTYPES[dtype])
    itemsize, end = np.dtype(NUMPY_DTYPES[dtype]).itemsize, 0
    header, model_slots = {"__metadata__": {"format": "pt"}}, slots(config)
    for name in names:
        shape = hf_shape(config, model_slots[name])
        begin, end = end, end + math.prod(shape) * itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = get(params, config, model_slots[name], NUMPY_DTYPES[dtype])
            if dtype != "float32" and not np.isfinite(tensor).all():
                raise UserError(f"{name} does not fit into {dtype} (or is not finite): use fp32")
            file.write(tensor.view(np.uint8).data)
    return end


def _write_json(path: epath.Path, content: dict):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------- what rounding takes away


def rounded_away(folder: str, base: str, dtype: str) -> tuple[int, int]:
    """(weights whose whole update is lost in `dtype`, weights that differ from `base`'s).

    Lost: the rounded weight equals the rounded weight from before the training. One parameter of
    each model is in memory at a time.
    """
    config, before = checkpoint.load_config(folder), checkpoint.load_config(base)
    if config.axis_sizes != before.axis_sizes or slots(config).keys() != slots(before).keys():
        raise UserError(f"{base} is another architecture than {folder}: give the one trained from")
    lost = changed = 0
    for path in dict.fromkeys(slot.path for slot in slots(config).values()):
        ours, theirs = (checkpoint.load_leaf(f, config, path) for f in (folder, base))
        for new, old in zip(ours, theirs):
            differs = new != old
            same = _rounded(new, dtype) == _rounded(old, dtype)
            changed += int(np.count_nonzero(differs))
            lost += int(np.count_nonzero(differs & same))
    return lost, changed


def inexact(folder: str, dtype: str) -> tuple[int, int]:
    """(weights that `dtype` cannot hold exactly, all weights)."""
    config, count, total = checkpoint.load_config(folder), 0, 0
    for path in dict.fromkeys(slot.path for slot in slots(config).values()):
        for weights in checkpoint.load_leaf(folder, config, path):
            count += int(np.count_nonzero(_rounded(weights, dtype) != weights))
            total += weights.size
    return count, total


def _rounded(weights: np.ndarray, dtype: str) -> np.ndarray:
    return _cast(weights, NUMPY_DTYPES[dtype]).astype(np.float32)


def _cast(weights: np.ndarray, dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # becomes inf, which is looked for where it matters
        return weights.astype(dtype, copy=False)
