"""Make preference pairs. ranked.jsonl → pairs.jsonl (and a test split)

    python -m stages.pairs --ranked ranked.jsonl --out pairs.jsonl --test-count 1000

The chosen answer has the highest score, the rejected one the lowest; the earlier answer wins a tie.
Blank answers are used as neither. A prompt makes no pair, and is set aside with its reason, where
fewer than two answers have text, all their scores tie, or the best and the worst read the same.

With --length-penalty L an answer's score becomes its standard score among the prompt's answers,
minus L times the standard score of its length in characters (model/rankers/lengths.py). The
rejected answer still scores below the chosen one by the ranker's own scores, so no pair contradicts
the ranker. The stage prints how the penalty changes the gap in length between chosen and rejected,
and warns if it does not narrow it. `all_rm_scores` stay the ranker's. The manifest's results hold
the lengths of sampled, chosen and rejected answers, and their correlation with the scores.
"""

import dataclasses
import heapq
import sys
from collections import Counter
from typing import Literal

from etils import epy

from sharding.errors import UserError
from stages.files.output import Manifest, Output, an_input, read_lineage
from stages.files.paths import check_distinct, text_sha256
from stages.files.rows import Fields, Ranked, read
from stages.files.run import run_main, stop_signal

with epy.lazy_imports():  # loaded at its first use, so that --help answers at once
    from model.rankers import lengths

SIDES = ("chosen", "rejected")
OF_A_SIDE = ("token_ids", "end_token_id", "logprob", "finish_reason")
# The columns that this stage makes; all other fields of a row are carried through.
MADE = (
    *("prompt", *SIDES, "all_generated_responses", "all_rm_scores"),
    *("chosen_index", "rejected_index"),
    *(f"{side}_{name}" for side in SIDES for name in OF_A_SIDE),
)


@dataclasses.dataclass
class Args:
    ranked: str
    """The ranked.jsonl to make pairs of."""
    out: str
    """The pairs.jsonl to write."""
    strategy: Literal["max-min", "max-random"] = "max-min"
    """The rejected answer: the worst (max-min), or any that scores below the best (max-random)."""
    length_penalty: float = 0.0
    """How many standard deviations of score one standard deviation of length costs, both within
    the prompt's answers. 0: length does not count; 0.25 is mild."""
    test_fraction: float = 0.0
    """Put about this share of the prompts into the test split. A prompt's split depends on its
    prompt_id and the seed alone, so it is the same in every file."""
    test_count: int = 0
    """Or: put this many prompts into the test split, those with the smallest hashes. Some may make
    no pair, so the split can hold fewer."""
    test_out: str | None = None
    """The test split's file. Default: OUT with .test.jsonl for .jsonl."""
    seed: int = 0
    """The seed of the test split and max-random. A draw depends on it and the prompt_id alone."""
    overwrite: bool = False
    """Replace outputs that exist."""


def main(args: Args) -> None:
    check_flags(args)
    outputs = {"train": args.out}
    if args.test_fraction or args.test_count:
        outputs["test"] = args.test_out or f"{args.out.removesuffix('.jsonl')}.test.jsonl"
    flags = {"train": "--out", "test": "--test-out"}
    check_distinct({"--ranked": args.ranked}, {flags[s]: path for s, path in outputs.items()})

    # Input: every row is checked, and its pair made once, before anything is written.
    ranked = read(args.ranked, Ranked, each=lambda row: make_pair(row, args))
    lineage = read_lineage(args.ranked, ranked.sha256)
    test_ids = ids_of_test_split(ranked.ids, args)

    # Both are opened before either is written, so that a refused test split costs no work.
    opened = {}
    for split, path in outputs.items():
        arguments = {"split": split, "strategy": args.strategy, "seed": args.seed}
        arguments |= {"length_penalty": args.length_penalty}
        arguments |= {"test_fraction": args.test_fraction, "test_count": args.test_count}
        manifest = Manifest(
            stage="pairs",
            arguments=arguments,
            inputs={"ranked": an_input(args.ranked, ranked.sha256)},
            identities=lineage.identities if lineage else {},
        )
        opened[split] = Output.open(path, manifest, args.overwrite)

    with stop_signal() as check_stop:
        for split, output in opened.items():
            if output.finished:
                continue
            order = [i for i in ranked.ids if (i in test_ids) == (split == "test")]
            results = write_split(args, ranked, order, output, check_stop)
            counts = ranked.counts.copy()
            if other := len(ranked) - len(order):
                counts[f"split off: {'train' if split == 'test' else 'test'}"] = other
            output.finish(order, counts, results)
            show_lengths(results)


def write_split(args: Args, ranked, order: list[str], output: Output, check_stop) -> dict:
    """Write the pairs of the prompts `order`; the results for the manifest."""
    report, scores, gaps_without = lengths.LengthReport(), Counter(), []
    for row in map(ranked.__getitem__, order):
        check_stop()
        pair, reason = make_pair(row, args)
        picked = None if pair is None else (pair["chosen_index"], pair["rejected_index"])
        report.add(row.fields["responses"], row.scores, picked)
        if picked is not None:
            scores.update({f"{side}_mean_score": row.scores[i] for side, i in zip(SIDES, picked)})
            scores["pairs"] += 1
        if args.length_penalty:
            without = choose(row, dataclasses.replace(args, length_penalty=0.0))
            if not isinstance(without, str):
                gaps_without.append(len(row.texts[without[0]]) - len(row.texts[without[1]]))
        if not output.has(row.prompt_id):
            output.set_aside(row.fields, reason) if pair is None else output.write(pair)
    pairs = scores.pop("pairs", 0)
    results = {name: total / pairs for name, total in scores.items()} | report.results()
    if gaps_without and pairs:
        results["gap_without_length_penalty"] = sum(gaps_without) / len(gaps_without)
    return results


def make_pair(row: Ranked, args: Args) -> tuple[Fields | None, str | None]:
    """(the row of pairs.jsonl, None), or (None, why the prompt makes no pair). Raises UserError
    where the row has a field that this stage makes."""
    taken = [name for name in MADE if name in row.fields and name != "prompt"]
    if taken:
        raise UserError(
            f"{row.where}: stages.pairs makes the field {taken[0]!r} itself: rename it in the input"
        )
    picked = choose(row, args)
    if isinstance(picked, str):
        return None, picked
    sides = dict(zip(SIDES, picked))
    pair = {"prompt_id": row.prompt_id, "prompt": row.prompt}
    if "messages" in row.fields:
        pair["messages"] = row.messages
    for side, i in sides.items():
        pair[side] = [*row.messages, {"role": "assistant", "content": row.texts[i]}]
    pair |= {"all_generated_responses": row.texts, "all_rm_scores": row.scores}
    pair |= {f"{side}_index": i for side, i in sides.items()}
    pair |= {k: v for k, v in row.fields.items() if k not in ("responses", "scores", *pair)}
    for side, i in sides.items():
        response = row.fields["responses"][i]
        known = (name for name in OF_A_SIDE if response.get(name) is not None)
        pair |= {f"{side}_{name}": response[name] for name in known}
    return pair, None


def choose(row: Ranked, args: Args) -> tuple[int, int] | str:
    """(the chosen answer's index, the rejected one's), or why the prompt makes no pair."""
    usable = [i for i, text in enumerate(row.texts) if text.strip()]
    if len(usable) < 2:
        return "fewer than two answers with text"
    if len({row.scores[i] for i in usable}) == 1:
        return "all scores tie"
    worth = {i: row.scores[i] for i in usable}
    if args.length_penalty:
        characters = [len(row.texts[i]) for i in usable]
        penalised = lengths.penalised(list(worth.values()), characters, args.length_penalty)
        worth = dict(zip(usable, penalised))
    best = max(usable, key=lambda i: (worth[i], -i))
    # By the ranker's own scores, so that the ranker itself prefers the chosen answer.
    lower = [i for i in usable if row.scores[i] < row.scores[best]]
    if not lower:
        return "the length penalty outweighs the scores"
    worst = min(lower, key=lambda i: (worth[i], i))
    if args.strategy == "max-random":  # a hash decides, not the order of the rows
        worst = lower[int(drawn(row.prompt_id, args.seed, "rejected"), 16) % len(lower)]
    if row.texts[best] == row.texts[worst]:
        return "chosen and rejected are the same text"
    return best, worst


def drawn(prompt_id: str, seed: int, purpose: str) -> str:
    """64 random hex digits, a function of these three alone."""
    return text_sha256(f"{purpose}/{seed}/{prompt_id}")


def ids_of_test_split(ids: list[str], args: Args) -> set[str]:
    """The prompts of the test split, whatever their order and their answers."""
    if not args.test_count and not args.test_fraction:
        return set()

    def place(prompt_id: str) -> str:
        return drawn(prompt_id, args.seed, "test")

    if args.test_count and args.test_count >= len(ids):
        raise UserError(
            f"--test-count {args.test_count} leaves none of the {len(ids)} prompts to train on"
        )
    if args.test_count:
        return set(heapq.nsmallest(args.test_count, ids, key=place))
    return {i for i in ids if int(place(i), 16) < args.test_fraction * 2**256}


def show_lengths(results: dict) -> None:
    """Print the mean lengths, how scores go with length, and what the penalty did."""
    characters = results["lengths"]["characters"]
    if "gap" not in characters:
        return
    means = (f"{part} {characters[part]['mean']:.0f}" for part in ("sampled", *SIDES))
    print(f"mean characters: {', '.join(means)}")
    if "score_length_correlation" in results:
        print(
            f"correlation of score and length {results['score_length_correlation']:+.2f}, of "
            f"ranks {results['score_length_rank_correlation']:+.2f}"
        )
    without, gap = results.get("gap_without_length_penalty"), characters["gap"]
    if without is None:
        return
    print(
        f"characters of chosen less rejected: {without:+.0f} without the penalty, {gap:+.0f} with"
    )
    if abs(gap) >= abs(without):
        print(
            "warning: --length-penalty does not narrow the gap between chosen and rejected: give "
            "another, or 0"
        )


def check_flags(args: Args) -> None:
    """Raise UserError for a value that cannot be, and for flags that contradict each other."""
    if not 0 <= args.test_fraction < 1:
        raise UserError(f"--test-fraction {args.test_fraction} must be at least 0 and below 1")
    if not 0 <= args.length_penalty < float("inf"):
        raise UserError(f"--length-penalty {args.length_penalty} must be a number of at least 0")
    if args.test_count < 0:
        raise UserError(f"--test-count {args.test_count} must not be negative")
    if args.test_fraction and args.test_count:
        raise UserError("give --test-fraction or --test-count, not both")
    if args.test_out is not None and not (args.test_fraction or args.test_count):
        raise UserError("--test-out needs --test-fraction or --test-count")


if __name__ == "__main__":
    sys.exit(run_main(main, Args))
