"""What a recipe of scripts/recipes/ asks for, read by running it in a shell that does nothing.

Its stages' flags are parsed by the stages' own Args, so a flag means here what it means there.
"""

import dataclasses
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import tyro
from etils import epy

from sharding.errors import UserError
from stages import dpo, pairs, rank, sample
from stages.evaluate.kl import Kl
from stages.files.rows import Prompt
from stages.files.rows import read as read_rows

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    from model import config as configs
    from model import gguf, hf, weights

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
# Run in the project's folder; gives the variables, and what `start_model` would call. Prompts that
# come from local files are written (by head or cp); what needs Python, a data set say, is not.
SCRIPT = """
set -euo pipefail
file=$1 out=$2
SEED=${SEED:-0} LIMIT=${LIMIT:-0} PYTHON=python
HELDOUT_SAMPLE= EXPORT_DTYPE= RANK= PAIRS= KL= SETTINGS= PLAN=
source "$file"
for name in ITERATIONS RANKER SAMPLE HELDOUT_SAMPLE RANK PAIRS DPO KL PLAN; do
  printf '%s' "${!name-}" >"$out/$name"
done
python() { return 1; }
(train_prompts 1 "$out/prompts.jsonl") >/dev/null 2>&1 || rm -f "$out/prompts.jsonl"
(heldout_prompts "$out/heldout.jsonl") >/dev/null 2>&1 || rm -f "$out/heldout.jsonl"
python() { echo "python $*" >"$out/start"; }
cp() { echo "cp $*" >"$out/start"; }
mkdir() { :; }
(start_model "$out/model") >/dev/null
"""


@dataclasses.dataclass
class LoopRecipe:
    name: str
    topology: str  # its PLAN; "" where it names none
    start: list[str]  # the command that makes the start model
    iterations: int
    ranker: str
    sample: sample.Args
    heldout_sample: sample.Args
    rank: rank.Args
    pairs: pairs.Args
    dpo: dpo.Args
    kl: Kl
    # Characters of each prompt of the first iteration and of the held-out ones; None: not known
    # without fetching them.
    prompts: list[int] | None
    heldout: list[int] | None


def read(recipe: str) -> LoopRecipe:
    """`recipe`: a name in scripts/recipes/ or a file, as scripts/iterate.sh takes it."""
    file = Path(recipe) if Path(recipe).is_file() else RECIPES / f"{recipe}.sh"
    if not file.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.sh")))
        raise UserError(f"no recipe {recipe}: give a file, or one of {names}")
    with tempfile.TemporaryDirectory() as out:
        command = ["bash", "-c", SCRIPT, "bash", str(file.resolve()), out]
        done = subprocess.run(command, cwd=RECIPES.parents[1], capture_output=True, text=True)
        if done.returncode:
            line = (done.stderr.strip() or "it has no start_model").splitlines()[-1]
            raise UserError(f"{file} cannot be read as a recipe: {line}")

        def text(name: str) -> str:
            path = Path(out, name)
            return path.read_text().strip() if path.exists() else ""

        missing = [n for n in ("ITERATIONS", "RANKER", "SAMPLE", "DPO", "start") if not text(n)]
        if missing:
            raise UserError(f"{file} sets no {missing[0]}: see scripts/recipes/demo.sh")
        if not text("ITERATIONS").isdigit():
            raise UserError(f"{file}: ITERATIONS={text('ITERATIONS')} is no whole number")

        sampled = {"checkpoint": "C", "prompts": "P", "out": "S"}
        ranked = {"ranker": text("RANKER"), "samples": "S", "out": "K"}
        return LoopRecipe(
            name=file.stem,
            topology=text("PLAN"),
            start=shlex.split(text("start")),
            iterations=int(text("ITERATIONS")),
            ranker=text("RANKER"),
            sample=_flags(sample.Args, sampled, text("SAMPLE")),
            heldout_sample=_flags(sample.Args, sampled, text("HELDOUT_SAMPLE") or text("SAMPLE")),
            rank=_flags(rank.Args, ranked, text("RANK")),
            pairs=_flags(pairs.Args, {"ranked": "K", "out": "D"}, text("PAIRS")),
            dpo=_flags(dpo.Args, {"checkpoint": "C", "pairs": "D", "out": "C2"}, text("DPO")),
            kl=_flags(Kl, {"checkpoint": "C", "samples": "S", "out": "O"}, text("KL")),
            prompts=_characters(Path(out, "prompts.jsonl")),
            heldout=_characters(Path(out, "heldout.jsonl")),
        )


def _flags(kind, given: dict[str, str], flags: str):
    """A stage's Args from the words of a recipe's variable; `given`: its paths."""
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    return tyro.cli(kind, args=words + shlex.split(flags))


def _characters(path: Path) -> list[int] | None:
    if not path.exists():
        return None
    limit = os.environ.get("LIMIT") or "0"
    if not limit.isdigit():
        raise UserError(f"LIMIT={limit} is no whole number")
    limit = int(limit)
    lengths = [len(row.prompt) for row in read_rows(str(path), Prompt)]
    return lengths[:limit] if limit else lengths


# ------------------------------------------------------------------------------ the model

# Mistral-7B-Instruct-v0.2's config.json: the plan of the published pipeline needs no hub.
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_config(source: list[str]):
    """The DecoderConfig of what a recipe's start model is made of (`LoopRecipe.start`)."""
    name = source[4] if source[:3] == ["python", "-m", "scripts.convert"] else source[-2]
    try:
        if "from-gguf" in source:
            return gguf.read_config(gguf.find(name))
        if name == "mistralai/Mistral-7B-Instruct-v0.2":
            return configs.from_hf(MISTRAL_7B)
        return hf.read_config(
            weights.local_folder(name, ["config.json", "generation_config.json"])[0]
        )
    except ValueError as error:
        raise UserError(f"{error}; or name a folder with a config.json by --model") from None
