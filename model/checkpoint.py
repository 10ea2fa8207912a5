"""A checkpoint: one self-contained folder. Here it is read; model/checkpoint_writing.py writes it.

    params/               the fp32 parameters (Orbax), the tree of model/decoder.py
    config.json           the architecture, as Hugging Face writes it
    tokenizer files       whatever the tokenizer came with, and its chat template
    manifest.json         identity of the parameters, and where they came from

Nothing is guessed from a folder's name.
"""

import dataclasses

import jax
from etils import epath

from model import decoder
from model.config import DecoderConfig, read_config
from model.orbax_settings import load_arrays
from model.weights import check_links, read_json
from sharding.errors import UserError, check_scheme, first_line

MANIFEST = "manifest.json"
FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # all that may lie beside the parameters


def read_manifest(folder: str) -> dict:
    """The manifest of a complete checkpoint; UserError names what is missing."""
    check_scheme(folder, "checkpoint")
    path = epath.Path(folder)
    if not path.exists():
        raise UserError(f"checkpoint {folder} does not exist")
    for name in (MANIFEST, "config.json", "params", "tokenizer_config.json"):
        if not (path / name).exists():
            raise UserError(
                f"checkpoint {folder} is incomplete: {name} is missing; "
                "make it again (python -m scripts.convert, or the stage that wrote it)"
            )
    check_links(folder, FILES)
    manifest = read_json(
        path / MANIFEST, "make the checkpoint again, with the command that made it"
    )
    for key, kind in (("identity", str), ("parameters", int), ("origin", dict)):
        if not isinstance(manifest.get(key), kind):
            raise UserError(f"checkpoint {folder}: {MANIFEST} is damaged: {key} is not there")
    return manifest


def identity(folder: str) -> str:
    """The identity of the checkpoint's parameters: equal if and only if all weights are."""
    return read_manifest(folder)["identity"]


def load_config(folder: str) -> DecoderConfig:
    read_manifest(folder)
    return read_config(folder)


def load_tokenizer(folder: str, config: DecoderConfig) -> tuple:
    """(config, ChatTokenizer of the folder's files), which must fit together. A config that names
    no EOS gets the tokenizer's. Raises UserError."""
    from model.tokenizer import ChatTokenizer  # here: transformers takes seconds to load

    tokenizer = ChatTokenizer.from_folder(folder, config.eos_token_ids)
    try:
        tokenizer.check_vocabulary(config.vocab_size)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return dataclasses.replace(config, eos_token_ids=tokenizer.eos_ids), tokenizer


def open_folder(folder: str) -> tuple:
    """A checkpoint's (config, ChatTokenizer): what stages begin with, before they load weights."""
    return load_tokenizer(folder, load_config(folder))


def load(folder: str, mesh=None) -> tuple[DecoderConfig, decoder.Params]:
    """(config, fp32 parameters), placed on the mesh; without one, on the first device."""
    config = load_config(folder)
    shapes = decoder.abstract(config, mesh)
    if mesh is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(lambda x: x.update(sharding=first), shapes)
    return config, load_params(folder, shapes)


def load_params(folder: str, shapes: decoder.Params, partial: bool = False) -> decoder.Params:
    """The parameters that `shapes` (with shardings) has; partial: it may be a part of the tree."""
    try:
        return load_arrays(epath.Path(folder) / "params", shapes, partial)
    except Exception as error:  # Orbax raises many kinds; all of them mean the folder is damaged
        message = f"checkpoint {folder}: params cannot be read ({first_line(error)})"
        raise UserError(message) from error
