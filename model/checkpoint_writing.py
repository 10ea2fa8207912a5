"""Write checkpoints (model/checkpoint.py says what they are) and the states of a training.

A folder appears whole, by a rename, or not at all: while it is written, its name ends in MARK.
Object stores (gs://…) do not rename: there the folder is written in its place, and holds a file
called UNFINISHED, which goes last. A folder without this file is never replaced.
"""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from model.checkpoint import MANIFEST
from model.config import DecoderConfig, to_hf
from model.decoder import Params
from model.disk import MARK, naming, put_in_place
from model.orbax_settings import load_arrays, orbax
from sharding import processes
from sharding.errors import UserError, first_line
from sharding.mesh import constrain

# What a tokenizer may consist of; copied into every checkpoint as it is.
TOKENIZER_FILES = """tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.jinja chat_template.json""".split()
UNFINISHED = ".unfinished"  # in a folder of an object store that is being written, or was left so


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
    with orbax(params) as ocp, naming(folder):
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
    """Whether something exists at `folder` that must not be replaced. Raises UserError for a link
    to nothing."""
    path = epath.Path(folder)
    if not _in_object_store(path):
        if os.path.islink(folder) and not path.exists():
            raise UserError(f"{folder} is a link to nothing: remove it, or choose another name")
        return path.exists()
    # A killed process may have written all but not yet removed its mark, or only made the folder.
    is_leftover = path.is_dir() and ((path / UNFINISHED).exists() or not any(path.iterdir()))
    return path.exists() and ((path / MANIFEST).exists() or not is_leftover)


def begin_folder(folder: str) -> epath.Path:
    """An empty folder, to write what `finish_folder` then puts in its place. `is_taken` must be
    false; a leftover of ours is removed."""
    path = _unfinished(folder)
    if path.exists():
        path.rmtree()
    path.mkdir(parents=True)
    if _in_object_store(path):
        text = "This folder is being written, or the process was ended meanwhile.\n"
        (path / UNFINISHED).write_text(text)
    return path


def finish_folder(unfinished: epath.Path, folder: str) -> None:
    if _in_object_store(unfinished):
        (unfinished / UNFINISHED).unlink()
    else:
        put_in_place(str(unfinished), folder)


def _unfinished(folder: str) -> epath.Path:
    path = epath.Path(folder)
    return path if _in_object_store(path) else path.parent / f"{path.name}{MARK}"


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
    with orbax(state) as ocp, naming(folder):
        writing = ocp.save_async(_unfinished(folder), state)

    def put():
        with naming(folder):
            writing.result()  # in process 0, that all have written
            if processes.is_first() and not _in_object_store(epath.Path(folder)):
                finish_folder(_unfinished(folder), folder)

    thread = ThreadPoolExecutor(1)
    putting = thread.submit(put)
    thread.shutdown(wait=on_cpu)

    def finish():
        putting.result()
        processes.wait()

    return finish


def is_whole_state(folder: epath.Path) -> bool:
    """Whether `save_state` came to its end there. The files are those that Orbax writes last."""
    name = "commit_success.txt" if _in_object_store(folder) else "_CHECKPOINT_METADATA"
    return (folder / name).exists()


def load_state(folder: str, abstract):
    """Read a training state into the shapes, dtypes and shardings of `abstract`."""
    try:
        return load_arrays(epath.Path(folder), abstract)
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
