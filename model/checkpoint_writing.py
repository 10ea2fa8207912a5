"""Write checkpoints (model/checkpoint.py says what they are) and the states of a training.

A folder appears whole, by a rename, or not at all. While it is written, it is called
FOLDER.unfinished and holds the file MARK; a folder without this file is never replaced. Object
stores (gs://…) do not rename: there the folder is written in its place, and MARK goes last.
"""

import hashlib
import json
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from model.checkpoint import MANIFEST
from model.config import DecoderConfig, to_hf
from model.decoder import Params
from model.disk_errors import as_os_error
from model.orbax_settings import orbax
from sharding import processes
from sharding.errors import UserError, first_line
from sharding.mesh import constrain

# What a tokenizer may consist of; copied into every checkpoint as it is.
TOKENIZER_FILES = """tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.jinja chat_template.json""".split()
MARK = ".unfinished"  # in a folder that we are writing, or that a killed process left behind


def save(
    folder: str, config: DecoderConfig, params: Params, tokenizer_from: str, origin: dict, **known
) -> str:
    """Write a checkpoint and return its identity. Several processes write their shards each, to a
    file system that all of them see.

    params: fp32 arrays (jax or numpy), stacked layers. tokenizer_from: the folder whose tokenizer
    files and generation_config.json are copied. origin: what made it (stage, arguments, inputs,
    identities), kept in the manifest; so is `known`, for cards: `source` of a conversion, `parent`
    (a checkpoint's manifest) and `data` (its pairs' provenance) of a training. Replaces an
    unfinished folder, never a finished one.
    """
    if is_taken(folder):
        raise UserError(f"{folder} exists: choose another folder, or remove it")
    processes.wait()  # all have looked
    unfinished = begin_folder(folder) if processes.is_first() else _unfinished(folder)
    processes.wait()
    with orbax(params) as ocp, as_os_error(folder):
        ocp.save(unfinished / "params", params)
    identity = fingerprint(params)
    if processes.is_first():
        copy_tokenizer(tokenizer_from, unfinished)
        write_json(unfinished / "config.json", to_hf(config, config.torch_dtype))
        count = sum(x.size for x in jax.tree.leaves(params))
        manifest = {"identity": identity, "parameters": count, "origin": origin, **known}
        write_json(unfinished / MANIFEST, manifest)
        finish_folder(unfinished, folder)
    processes.wait()
    return identity


def write_json(path: epath.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def copy_tokenizer(source: str, folder: epath.Path) -> None:
    """Copy a tokenizer's files, and generation_config.json, from one folder into another."""
    for file in (*tokenizer_files(source), epath.Path(source) / "generation_config.json"):
        if file.exists():
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            file.copy(copy)


def tokenizer_files(folder: str) -> list[epath.Path]:
    """The tokenizer's files in a folder, its named chat templates among them."""
    path = epath.Path(folder)
    files = [path / name for name in TOKENIZER_FILES]
    return [
        *(file for file in files if file.exists()),
        *sorted(path.glob("additional_chat_templates/*.jinja")),
    ]


# ---------------------------------------------------------------- folders that appear whole


def is_taken(folder: str) -> bool:
    """Whether something exists at `folder` that must not be replaced. Raises UserError if something
    that we did not make stands where the folder would be written."""
    path, unfinished = epath.Path(folder), _unfinished(folder)
    if unfinished != path:
        if os.path.islink(folder) and not path.exists():
            raise UserError(f"{folder} is a link to nothing: remove it, or choose another name")
        if unfinished.exists() and not _is_leftover(unfinished):
            raise UserError(
                f"{unfinished} is in the way: move it, or choose another name than {folder}"
            )
        return path.exists()
    # A killed process may have written all but not yet removed its mark.
    return path.exists() and ((path / MANIFEST).exists() or not _is_leftover(path))


def begin_folder(folder: str) -> epath.Path:
    """An empty folder with our mark, to write what `finish_folder` then puts in its place.
    `is_taken` must be false; a leftover of ours is removed."""
    path = _unfinished(folder)
    if path.exists():
        path.rmtree()
    path.mkdir(parents=True)
    (path / MARK).write_text("This folder is being written, or the process was ended meanwhile.\n")
    return path


def finish_folder(unfinished: epath.Path, folder: str) -> None:
    path = epath.Path(folder)
    if unfinished != path:
        unfinished.rename(path)
    (path / MARK).unlink()


def _is_leftover(path: epath.Path) -> bool:
    """Whether a killed process of ours left this folder, which may still be empty."""
    return path.is_dir() and ((path / MARK).exists() or not any(path.iterdir()))


def _unfinished(folder: str) -> epath.Path:
    path = epath.Path(folder)
    return path if _in_object_store(path) else path.parent / f"{path.name}.unfinished"


def _in_object_store(path: epath.Path) -> bool:
    return "://" in str(path)


# ------------------------------------------------------------------------ training states


def save_state(folder: str, state) -> Callable[[], None]:
    """Begin to write a training state (any tree of arrays) to `folder`, which does not exist. The
    function that it returns waits for the end. The folder appears whole (`is_whole_state`).

    The arrays may be donated at once: they are copied first. On CPU, where a copy would be another
    whole state in the same memory, it is written before this returns. Both may raise OSError.
    """
    on_cpu = any(d.platform == "cpu" for x in jax.tree.leaves(state) for d in x.devices())
    with orbax(state) as ocp, as_os_error(folder):
        writing = ocp.save_async(epath.Path(folder), state)
        if on_cpu:
            writing.result()

    def finish():
        with as_os_error(folder):
            writing.result()

    return finish


def is_whole_state(folder: epath.Path) -> bool:
    """Whether `save_state` came to its end there. The files are those that Orbax writes last:
    before it renames the folder, or, in an object store, in its place."""
    name = "commit_success.txt" if _in_object_store(folder) else "_CHECKPOINT_METADATA"
    return (folder / name).exists()


def load_state(folder: str, abstract):
    """Read a training state into the shapes, dtypes and shardings of `abstract`."""
    try:
        with orbax(abstract) as ocp:
            return ocp.load(epath.Path(folder), abstract)
    except Exception as error:  # as in checkpoint.load
        raise UserError(
            f"{folder} cannot be read ({first_line(error)}): remove it to go on from the state "
            "before it, if one was kept"
        ) from error


# ------------------------------------------------------------------------------- identity


def fingerprint(params) -> str:
    """A 64-hex identity of a tree of arrays: its paths, shapes and every bit of its fp32 values.

    Computed on the devices that hold the arrays, in integer sums, which do not depend on the order
    of the devices. Two trees that differ in one bit have different identities. Not cryptographic:
    it detects mistakes, not forgery.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda x: str(x[0])):
        name = "/".join(str(key.key) for key in path)
        # Stacked leaves go layer by layer: the mixed bits of a whole leaf would take four times its
        # size, and a numpy leaf a copy besides.
        slices = leaf if leaf.ndim > 2 else [leaf]
        size, lanes = leaf.size // len(slices), np.zeros(4, np.uint32)
        for i in range(len(slices)):
            first = jnp.uint32(i * size % 2**32)
            lanes += np.asarray(_lanes(jnp.asarray(slices[i]), first))
        digest.update(json.dumps([name, leaf.shape, lanes.tolist()]).encode())
    return digest.hexdigest()


@jax.jit
def _lanes(x: jax.Array, first: jax.Array) -> jax.Array:
    """Four sums modulo 2³² over a mix of each value's bits with its index, uint32 [4]. Indices
    count from `first`, modulo 2³²."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    index += first
    mixed = _mix(index ^ jnp.uint32(0x9E3779B9)) ^ bits
    # One lane after the other, since all together would take four times the memory.
    lanes = jnp.arange(1, 5, dtype=jnp.uint32)
    sums = jax.lax.map(lambda lane: jnp.sum(_mix(mixed + lane), dtype=jnp.uint32), lanes)
    return constrain(sums, None)  # whole in every process


def _mix(h: jax.Array) -> jax.Array:
    """The 32-bit finaliser of MurmurHash3: every input bit changes about half of the output's."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
