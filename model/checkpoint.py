"""A checkpoint: one self-contained folder. Here it is read; model/checkpoint_writing.py writes it.

    params/               the fp32 parameters (Orbax), the tree of model/decoder.py
    config.json           the architecture, as Hugging Face writes it
    tokenizer files       whatever the tokenizer came with, and its chat template
    manifest.json         identity of the parameters, and where they came from

Nothing is guessed from a folder's name.
"""

import json

import jax
import numpy as np
from etils import epath

from model import config as model_config
from model import decoder
from model.config import DecoderConfig
from model.orbax_settings import orbax
from sharding.errors import UserError, check_scheme, first_line

MANIFEST = "manifest.json"


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
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["identity"], manifest["parameters"], manifest["origin"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder}: {MANIFEST} is damaged ({error!r})") from None
    return manifest


def identity(folder: str) -> str:
    """The identity of the checkpoint's parameters: equal if and only if all weights are."""
    return read_manifest(folder)["identity"]


def load_config(folder: str) -> DecoderConfig:
    read_manifest(folder)
    path = epath.Path(folder)
    try:
        generation = path / "generation_config.json"
        return model_config.from_hf(
            json.loads((path / "config.json").read_text()),
            json.loads(generation.read_text()) if generation.exists() else None,
        )
    except ValueError as error:
        raise UserError(f"checkpoint {folder}: {error}") from None


def load(folder: str, shardings=None) -> tuple[DecoderConfig, decoder.Params]:
    """(config, fp32 parameters), placed by `shardings` (a tree like the parameters, or one)."""
    config = load_config(folder)
    abstract = decoder.abstract(config)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        shardings if isinstance(shardings, dict) else jax.tree.map(lambda _: shardings, abstract),
    )
    try:
        with orbax(abstract) as ocp:
            params = ocp.load(epath.Path(folder) / "params", abstract)
    except Exception as error:  # Orbax raises many kinds; all of them mean the folder is damaged
        raise _unreadable(folder, error) from error
    return config, params


def load_leaf(folder: str, config: DecoderConfig, path: tuple[str, ...]) -> np.ndarray:
    """One parameter, e.g. ("layers", "q"), in host memory: for going through a model that is too
    large to be loaded whole."""
    leaf = decoder.abstract(config)
    for key in path:
        leaf = leaf[key]
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    tree = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cpu)
    for key in reversed(path):
        tree = {key: tree}
    try:
        with orbax(tree, partial=True) as ocp:
            loaded = ocp.load(epath.Path(folder) / "params", tree)
    except Exception as error:  # as in load
        raise _unreadable(folder, error) from error
    return np.asarray(jax.tree.leaves(loaded)[0])


def _unreadable(folder: str, error: Exception) -> UserError:
    return UserError(f"checkpoint {folder}: params cannot be read ({first_line(error)})")
