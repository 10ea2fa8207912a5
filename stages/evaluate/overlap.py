"""Contamination: n-grams that training prompts share with benchmarks and with each other.

prompts.jsonl of each slice + benchmarks → overlap.json

    python -m stages.evaluate overlap --train runs/me/iteration_*/prompts.jsonl \\
        --benchmarks alpaca_eval question.jsonl --out overlap.json
"""

import dataclasses
import itertools
import re
import unicodedata
from collections import Counter

import numpy as np

from sharding.errors import UserError
from stages.files.benchmarks import asked_texts, local_file, rows_of
from stages.files.output import Manifest, Output, an_input


@dataclasses.dataclass
class Overlap:
    """The n-grams of words that benchmarks share with training prompts, and slices with each other.

    Case and the width of letters do not count, nor does punctuation. A symbol is a word (the + of
    C++, the - of x-3, the ! of n!, an emoji), and so is each character of a script that sets no
    spaces between words (Chinese, Japanese, Thai, Khmer, …). A prompt's share is the part of its
    n-grams that occur in some training prompt. A prompt of fewer than n words is one n-gram, which
    only the same whole prompt contains; one of punctuation alone is compared as it is.
    """

    train: tuple[str, ...]
    """The training prompts, one file per slice: prompts.jsonl, or any JSONL or JSON list whose rows
    have prompt, messages, instruction (with or without input) or turns."""
    out: str
    """The JSON file to write."""
    benchmarks: tuple[str, ...] = ()
    """Files of the same kinds, or "alpaca_eval" from the hub. Each turn of MT-Bench is a prompt."""
    n: int = 8
    """Words per n-gram."""
    threshold: float = 0.5
    """A prompt counts as contaminated from this share on."""
    overwrite: bool = False
    """Replace --out if it exists."""


@dataclasses.dataclass
class PromptFile:
    """A file's prompts and their n-grams."""

    name: str
    texts: list[str]
    grams: list[set]
    first: dict  # n-gram → index of the first prompt that has it


def main(args: Overlap) -> None:
    # ------------------------------------------------------------------------------ inputs
    if args.n < 1 or not 0 < args.threshold <= 1:
        raise UserError("--n must be at least 1, and --threshold above 0 and at most 1")
    if not args.benchmarks and len(args.train) < 2:
        raise UserError("nothing to compare: give --benchmarks, or several slices as --train")
    benchmarks = {name: local_file(name) for name in args.benchmarks}
    inputs = {f"train {i}": path for i, path in enumerate(args.train, 1)}
    inputs |= {f"benchmark {i}": path for i, path in enumerate(benchmarks.values(), 1)}
    manifest = Manifest(
        stage="evaluate overlap",
        arguments={
            "n": args.n,
            "threshold": args.threshold,
            "slices": len(args.train),
            "normalisation": NORMALISATION,
        },
        inputs={role: an_input(path) for role, path in inputs.items()},
        identities={},
    )
    output = Output.open(args.out, manifest, args.overwrite)
    if output.finished:
        return

    # ------------------------------------------------------------------------------ overlap
    slices = [_read(path, path, args.n) for path in args.train]
    asked = [_read(path, name, args.n) for name, path in benchmarks.items()]
    pairs = [*itertools.product(asked, slices), *itertools.permutations(slices, 2)]
    reports = [overlap_of(one, other, args.threshold) for one, other in pairs]
    for report in reports:
        print(
            f"{report['of']} in {report['in']}: {report['prompts']} prompts, {report['identical']} "
            f"of them word for word, {report['contaminated']} by {args.threshold:.0%} or more, "
            f"{report['touched']} in some {args.n}-gram (mean share {report['mean_share']:.2%})"
        )

    # ------------------------------------------------------------------------------ finish
    counts = {f"prompts of {one.name}": len(one.texts) for one in (*asked, *slices)}
    summary = [{k: v for k, v in report.items() if k != "matches"} for report in reports]
    content = {
        "n": args.n,
        "threshold": args.threshold,
        "normalisation": NORMALISATION,
        "reports": reports,
    }
    output.finish_as(content, counts, {"reports": summary})


def overlap_of(asked: PromptFile, train: PromptFile, threshold: float) -> dict:
    """How much of `asked` occurs in `train`. `matches` has every prompt that shares an n-gram, the
    largest share first, with the training prompt that shares most."""
    shares, matches = np.zeros(len(asked.texts)), []
    whole = {_normal(text): i for i, text in reversed(list(enumerate(train.texts)))}
    for i, (text, grams) in enumerate(zip(asked.texts, asked.grams)):
        met = Counter(train.first[gram] for gram in grams if gram in train.first)
        if not met:
            continue
        shares[i] = met.total() / len(grams)
        same = whole.get(_normal(text))
        nearest = max(met, key=lambda k: (met[k], -k)) if same is None else same
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
        "identical": sum(match["identical"] for match in matches),
        "contaminated": int(np.sum(shares >= threshold)),
        "touched": len(matches),
        "mean_share": float(shares.mean()),
        "matches": sorted(matches, key=lambda m: -m["share"]),
    }


def _read(path: str, name: str, n: int) -> PromptFile:
    texts = [text for where, row in rows_of(path) for text in asked_texts(row, where)]
    if not texts:
        raise UserError(f"{path} holds no prompts")
    grams = [ngrams(text, n) for text in texts]
    first = {gram: i for i in reversed(range(len(grams))) for gram in grams[i]}
    return PromptFile(name, texts, grams, first)


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """The different runs of n words; for fewer than n words their one run, marked as whole."""
    words = _normal(text)
    if len(words) < n:
        return {("", *words)}
    return {words[i : i + n] for i in range(len(words) - n + 1)}


NORMALISATION = "NFKC, casefold; words, operators, symbols, characters of scripts without spaces"
# The first words of the names that Unicode gives to the characters of these scripts.
WITHOUT_SPACES = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "TANGUT", "NUSHU", "YI"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TAI", "NEW", "JAVANESE", "BALINESE", "CHAM"),
)
# NFKC would make 23 of 2³, 112 of 1½ and log28 of log₂8.
SUPERSCRIPTS = re.compile("[\u00b9\u00b2\u00b3\u2070-\u207f]+")
NUMBER = "[\u00bc-\u00be\u2080-\u2089\u2150-\u2189\u2460-\u249b\u24ea-\u24ff]"
SET_APART = re.compile(rf"(?<=\d)(?={NUMBER})|(?<={NUMBER})(?=\d)")
# Markdown's stars: around *one*, **two** or ***three***, and before the items of a list.
STARS = re.compile(
    r"(?<![\d*])(\*{2,3})(?=\S)[^*\n]+(?<=\S)\1(?![\d*])"
    r"|(?<![\w*)\]])\*(?=\S)[^*\n]+(?<=\S)\*(?![\w*])"
    r"|^[ \t]*\*+(?=\s|$)",
    re.MULTILINE,
)
WORD = r"[^\W\d_]{2}"  # the beginning or the end of one
SLASH = re.compile(rf"(?<={WORD})\s*/\s*(?={WORD})")  # and/or
# Signs that are operators, as in x-3, -5, n!, != and 1:2. In GPT-4, Hi! and "so: this" they are
# punctuation. Operators become a minus sign or a wide form, which NFKC leaves in no text.
VARIABLE = "a-zα-ωа-я"  # a single letter is a variable
DASH = "[-\u2010-\u2013]"
OPERATORS = {
    "\N{MINUS SIGN}": rf"(?<![^\W\d_]){DASH}(?=\s*\d)"
    rf"|(?<=[\d)\]{VARIABLE}])(?<!{WORD})\s*{DASH}(?=\s*(?:[\d(\[]|[{VARIABLE}](?![^\W\d_])))",
    "！": rf"(?<=[\d{VARIABLE}])(?<!{WORD})!|(?<!\w)!(?=[\w(])|!(?==)",
    "：": r"(?<=\d):(?=\d)",
    "．": r"(?<=\d)\.(?=\d)",
}
SAME = {
    "*": "\N{MULTIPLICATION SIGN}",
    "/": "\N{DIVISION SIGN}",
    "\N{FRACTION SLASH}": "\N{DIVISION SIGN}",
}


class _Characters(dict):
    """Code point → what it becomes before a text is split at spaces, for str.translate."""

    def __missing__(self, code: int) -> str:
        character, category = chr(code), unicodedata.category(chr(code))
        script = unicodedata.name(character, "").split(" ")[0].split("-")[0]
        becomes = " "  # punctuation, spaces, control characters
        if 0xE0020 <= code <= 0xE007F:
            becomes = character  # tags, as in the flag of Scotland
        elif category == "Cf" or 0xFE00 <= code <= 0xFE0F:
            becomes = ""  # invisible: joiners, soft hyphens, variation selectors
        elif character in "#%&*/@§‰′！：．" or (category[0] == "S" and character != "`"):
            becomes = f" {SAME.get(character, character)} "
        elif category in ("Cn", "Co", "Cs") or script in WITHOUT_SPACES:
            becomes = f" {character} "  # Cn, Co, Cs: not in this Python's Unicode, private, halves
        elif category[0] in "LMN":  # marks belong to their word, e.g. Hindi's vowel signs
            becomes = character
        self[code] = becomes
        return becomes


CHARACTERS = _Characters()


def _normal(text: str) -> tuple[str, ...]:
    """The words of a text."""
    folded = SUPERSCRIPTS.sub(r"^\g<0>", SET_APART.sub(" ", text))
    folded = unicodedata.normalize("NFKC", folded).casefold()
    folded = unicodedata.normalize("NFKC", folded)  # casefold may take letters apart
    marked = STARS.sub(lambda match: match[0].replace("*", " "), SLASH.sub(" ", folded))
    for operator, pattern in OPERATORS.items():
        marked = re.sub(pattern, operator, marked)
    return tuple(marked.translate(CHARACTERS).split() or folded.split())
