"""Contamination: n-grams that training prompts share with benchmarks and with each other."""

import dataclasses
import itertools
import re
import unicodedata
from collections import Counter

import numpy as np

from sharding.errors import UserError
from stages.evaluate.answers import is_json_list, read_json_list
from stages.evaluate.benchmarks import local_file
from stages.files.output import Manifest, Output
from stages.files.paths import file_sha256
from stages.files.rows import Row, field, messages_of, read_rows


@dataclasses.dataclass
class Overlap:
    """How much of each benchmark's prompts stands in the training prompts, by n-grams of words.

    Words are what is left of a text in lower case (NFKC, casefold) when all but letters and digits
    is taken for space. A prompt's share is that of its n-grams which occur in some training prompt;
    one of fewer than n words counts as one n-gram of all its words, and is met only by the same
    whole prompt. The slices' prompts are held against each other in the same way.
    """

    train: tuple[str, ...]
    """The training prompts, a file a slice: prompts.jsonl, or any JSONL or JSON list whose rows
    have prompt, messages, instruction or turns."""
    out: str
    """The JSON file to write."""
    benchmarks: tuple[str, ...] = ()
    """Files of the same kinds, or "alpaca_eval" from the hub; MT-Bench's turns count one by one."""
    n: int = 8
    """Words of an n-gram."""
    threshold: float = 0.5
    """A prompt of which at least this share is found counts as contaminated."""
    overwrite: bool = False
    """Replace an --out that is there."""


@dataclasses.dataclass
class Prompts:
    """A file's prompts, and where each of their n-grams first occurs."""

    name: str
    texts: list[str]
    grams: list[set]
    found_in: dict  # n-gram → the first prompt that has it


def main(args: Overlap) -> None:
    if args.n < 1 or not 0 < args.threshold <= 1:
        raise UserError("--n must be at least 1, and --threshold above 0 and at most 1")
    if not args.benchmarks and len(args.train) < 2:
        raise UserError("nothing to compare: give --benchmarks, or several slices as --train")
    benchmarks = {name: local_file(name) for name in args.benchmarks}
    files = [*args.train, *benchmarks.values()]
    manifest = Manifest(
        stage="evaluate overlap",
        arguments={"n": args.n, "threshold": args.threshold, "slices": len(args.train)},
        inputs={path: file_sha256(path) for path in files},
        identities={},
    )
    output = Output.open(args.out, manifest, args.overwrite)
    if output.finished:
        return
    slices = [_read(path, path, args.n) for path in args.train]
    asked = [_read(path, name, args.n) for name, path in benchmarks.items()]
    pairs = [*itertools.product(asked, slices), *itertools.permutations(slices, 2)]
    reports = [compare(one, other, args.threshold) for one, other in pairs]
    for report in reports:
        print(
            f"{report['of']} in {report['in']}: of {report['prompts']} prompts "
            f"{report['identical']} are there word for word, {report['contaminated']} by "
            f"{args.threshold:.0%} or more, {report['touched']} in some {args.n}-gram "
            f"(mean share {report['mean_share']:.2%})"
        )
    counts = {f"prompts of {one.name}": len(one.texts) for one in (*asked, *slices)}
    summary = [{k: v for k, v in report.items() if k != "matches"} for report in reports]
    content = {
        "n": args.n,
        "threshold": args.threshold,
        "normalisation": "NFKC, casefold, letters and digits",
        "reports": reports,
    }
    output.finish_as(content, counts, {"reports": summary})


def compare(asked: Prompts, train: Prompts, threshold: float) -> dict:
    """What of `asked` occurs in `train`; every prompt that shares an n-gram, the most shared first,
    with the training prompt that shares most."""
    shares, matches, identical = np.zeros(len(asked.texts)), [], 0
    whole = {_normal(text): i for i, text in reversed(list(enumerate(train.texts)))}
    for i, (text, grams) in enumerate(zip(asked.texts, asked.grams)):
        met = Counter(train.found_in[gram] for gram in grams if gram in train.found_in)
        if not met:
            continue
        same = whole.get(_normal(text))
        identical += same is not None
        shares[i] = sum(met.values()) / len(grams)
        nearest = met.most_common(1)[0][0] if same is None else same
        matches.append(
            {
                "share": float(shares[i]),
                "prompt": text,
                "nearest": train.texts[nearest],
                "identical": same is not None,
            }
        )
    return {
        "of": asked.name,
        "in": train.name,
        "prompts": len(asked.texts),
        "identical": identical,
        "contaminated": int(np.sum(shares >= threshold)),
        "touched": len(matches),
        "mean_share": float(shares.mean()),
        "matches": sorted(matches, key=lambda m: -m["share"]),
    }


def _read(path: str, name: str, n: int) -> Prompts:
    rows = read_json_list(path) if is_json_list(path) else read_rows(path)
    texts = [text for where, row in rows for text in _texts(row, where)]
    if not texts:
        raise UserError(f"{path} holds no prompts")
    grams = [ngrams(text, n) for text in texts]
    found_in: dict = {}
    for i, some in enumerate(grams):
        for gram in some:
            found_in.setdefault(gram, i)
    return Prompts(name, texts, grams, found_in)


def _texts(row: Row, where: str) -> list[str]:
    """What a row asks: its user turns."""
    if "turns" in row:
        turns = field(row, "turns", list, where)
        if not all(isinstance(turn, str) for turn in turns):
            raise UserError(f"{where}: field 'turns' must be a list of texts")
        return turns
    if "messages" in row and "prompt" not in row:
        return [m["content"] for m in messages_of(row, where) if m["role"] == "user"]
    name = "instruction" if "instruction" in row and "prompt" not in row else "prompt"
    return [field(row, name, str, where)]


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """The different runs of n words; of fewer words, the one run of all, marked as whole."""
    words = _normal(text)
    if len(words) < n:
        return {("", *words)}
    return {words[i : i + n] for i in range(len(words) - n + 1)}


def _normal(text: str) -> tuple[str, ...]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return tuple(re.sub(r"[\W_]+", " ", folded).split())
