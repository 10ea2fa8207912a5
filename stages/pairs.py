"""Make preference pairs. ranked.jsonl → pairs.jsonl (and a test split, and Parquet).

    python -m stages.pairs --ranked ranked.jsonl --out pairs.jsonl --test-count 1000

The chosen answer is the one with the highest score, the rejected one the one with the lowest; the
earlier answer wins a tie. Blank answers are used as neither. A prompt makes no pair, and is set
aside with its reason, where fewer than two answers have text, all their scores tie, or the best
and the worst read the same.

With --length-penalty L each score counts as its standard score among the prompt's answers, less L
times the standard score of its length in characters (model/rankers/lengths.py); the rejected answer
still has to score below the chosen one, so no pair contradicts the ranker, and `all_rm_scores` stay
the ranker's. The stage says what this does to the gap between chosen and rejected, and warns where
it does not narrow it. The manifest's results have the lengths of sampled, chosen and rejected
answers and how scores go with length.
"""

import dataclasses
import heapq
import sys
from collections import Counter
from typing import Literal

from model.rankers.lengths import LengthReport, penalised
from sharding.errors import UserError
from stages.files import formats as parquet
from stages.files.output import Manifest, Output, read_lineage
from stages.files.paths import file_sha256, text_sha256
from stages.files.rows import Row, field, messages_of, prompt_text, read_prompts
from stages.files.run import run_main, stop_signal

# The columns made here; the rest of a row is carried through.
MADE = ("prompt", "chosen", "rejected", "all_generated_responses", "all_rm_scores")
MADE += ("chosen_index", "rejected_index")
MADE += tuple(
    f"{side}_{name}"
    for side in ("chosen", "rejected")
    for name in ("token_ids", "logprob", "finish_reason")
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
    """So many standard deviations of score does a standard deviation of length cost, both within
    the prompt's answers; 0: length does not count. 0.25 is a mild one."""
    test_fraction: float = 0.0
    """Put about this share of the prompts into the test split. A prompt's place depends on its
    prompt_id and the seed alone, so it is the same in every file."""
    test_count: int = 0
    """Or: put this many prompts into the test split, those with the smallest hashes. As some may
    make no pair, the split can hold fewer."""
    test_out: str | None = None
    """Where the test split goes; default: OUT with .test.jsonl for .jsonl."""
    parquet: str | None = None
    """Also write the splits as Parquet into this folder, in the columns of
    snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset. Iterations gather in one folder, whose dataset
    card (README.md) grows with them."""
    iteration: int | None = None
    """With --parquet: the N of the splits train_iteration_N and test_iteration_N."""
    seed: int = 0
    """Decides the test split and max-random; each prompt's draw depends on its prompt_id alone."""
    overwrite: bool = False
    """Replace outputs that exist."""


def main(args: Args) -> None:
    test_out = _check(args)
    lineage = read_lineage(args.ranked)
    inputs = {args.ranked: file_sha256(args.ranked)}
    identities = lineage.identities if lineage else {}
    counts: Counter = Counter()
    ids = []
    for where, row in _read(args.ranked, counts):  # every row is checked before any is written
        make_pair(row, where, args.strategy, args.seed, args.length_penalty)
        ids.append(row["prompt_id"])
    test_ids = _test_ids(ids, args)

    splits = [("train", args.out, test_ids)]  # name, file, the prompts that go to the other one
    if test_out is not None:
        splits.append(("test", test_out, set(ids) - test_ids))
    with stop_signal() as check_stop:
        for split, path, elsewhere in splits:
            arguments = {"split": split, "strategy": args.strategy, "seed": args.seed}
            arguments |= {"length_penalty": args.length_penalty}
            arguments |= {"test_fraction": args.test_fraction, "test_count": args.test_count}
            manifest = Manifest("pairs", arguments, inputs, identities)
            output = Output.open(path, manifest, args.overwrite)
            if not output.finished:
                _write_pairs(args, output, elsewhere, check_stop)
            if args.parquet is not None:
                name = f"{split}_iteration_{args.iteration}"
                parquet.write_split(path, args.parquet, name, args.overwrite)
        if args.parquet is not None:
            parquet.write_card(args.parquet)


def _write_pairs(args: Args, output: Output, elsewhere: set[str], check_stop) -> None:
    counts: Counter = Counter()
    order: list[str] = []
    other = f"split off: {'train' if output.manifest.arguments['split'] == 'test' else 'test'}"
    report, gap_without, sums = LengthReport(), [], Counter()
    for where, row in _read(args.ranked, counts):
        check_stop()
        if row["prompt_id"] in elsewhere:
            counts[other] += 1
            continue
        order.append(row["prompt_id"])
        pair, reason = make_pair(row, where, args.strategy, args.seed, args.length_penalty)
        picked = None if pair is None else (pair["chosen_index"], pair["rejected_index"])
        if pair is not None:
            for side, i in zip(("chosen", "rejected"), picked):
                sums[f"{side}_mean_score"] += pair["all_rm_scores"][i]
            sums["pairs"] += 1
        report.add(row["responses"], row["scores"], picked)
        if args.length_penalty:
            gap_without += _gap(row, args)
        if output.has(row["prompt_id"]):
            continue
        if pair is not None:
            output.write(pair)
        else:
            output.set_aside(row, reason)
    pairs = sums.pop("pairs", 0)
    results = {name: total / pairs for name, total in sums.items()} | report.results()
    if args.length_penalty and pairs:
        results["gap_without_length_penalty"] = sum(gap_without) / len(gap_without)
    output.finish(order, counts, results)
    _show_lengths(results)


def _gap(row: Row, args: Args) -> list[int]:
    """[characters of chosen less rejected as they would be without the penalty], or [], no pair."""
    texts = [response["text"] for response in row["responses"]]
    picked = choose(texts, row["scores"], row["prompt_id"], args.strategy, args.seed, 0.0)
    return [] if isinstance(picked, str) else [len(texts[picked[0]]) - len(texts[picked[1]])]


def _show_lengths(results: dict) -> None:
    characters = results["lengths"]["characters"]
    if "gap" not in characters:
        return
    means = ", ".join(
        f"{side} {characters[side]['mean']:.0f}" for side in ("sampled", "chosen", "rejected")
    )
    print(f"mean characters: {means}")
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


def make_pair(
    row: Row, where: str, strategy: str, seed: int, length_penalty: float = 0.0
) -> tuple[Row | None, str | None]:
    """(the pairs.jsonl row, None), or (None, why the prompt makes no pair). Raises UserError."""
    taken = [name for name in MADE if name in row and name != "prompt"]
    if taken:
        raise UserError(f"{where}: the field {taken[0]!r} is made here: rename it in the input")
    responses, scores = _answers(row, where)
    texts = [response["text"] for response in responses]
    picked = choose(texts, scores, row["prompt_id"], strategy, seed, length_penalty)
    if isinstance(picked, str):
        return None, picked
    best, worst = picked

    conversation = messages_of(row, where)
    pair = {"prompt_id": row["prompt_id"], "prompt": prompt_text(row, where)}
    if "messages" in row:
        pair["messages"] = conversation
    for side, i in (("chosen", best), ("rejected", worst)):
        pair[side] = [*conversation, {"role": "assistant", "content": texts[i]}]
    pair |= {"all_generated_responses": texts, "all_rm_scores": scores}
    pair |= {"chosen_index": best, "rejected_index": worst}
    pair |= {k: v for k, v in row.items() if k not in ("responses", "scores", *pair)}
    for side, i in (("chosen", best), ("rejected", worst)):
        for name in ("token_ids", "logprob", "finish_reason"):
            if responses[i].get(name) is not None:
                pair[f"{side}_{name}"] = responses[i][name]
    return pair, None


def choose(
    texts: list[str], scores: list[float], prompt_id: str, strategy: str, seed: int, penalty: float
) -> tuple[int, int] | str:
    """(the chosen answer's index, the rejected one's), or why the prompt makes no pair."""
    usable = [i for i, text in enumerate(texts) if text.strip()]
    if len(usable) < 2:
        return "fewer than two answers with text"
    if len({scores[i] for i in usable}) == 1:
        return "all scores tie"
    worth = {i: scores[i] for i in usable}
    if penalty:
        lengths = [len(texts[i]) for i in usable]
        worth = dict(zip(usable, penalised(list(worth.values()), lengths, penalty)))
    best = max(usable, key=lambda i: (worth[i], -i))
    # By the ranker's own scores, so that there is a preference.
    lower = [i for i in usable if scores[i] < scores[best]]
    if not lower:
        return "the length penalty outweighs the scores"
    worst = min(lower, key=lambda i: (worth[i], i))
    if strategy == "max-random":  # drawn by hash, not by order
        worst = lower[int(_hash(prompt_id, seed, "rejected"), 16) % len(lower)]
    if texts[best] == texts[worst]:
        return "chosen and rejected are the same text"
    return best, worst


def _answers(row: Row, where: str) -> tuple[list[dict], list[float]]:
    """The checked `responses` and `scores` of a ranked row."""
    responses, scores = field(row, "responses", list, where), field(row, "scores", list, where)
    if len(scores) != len(responses):
        raise UserError(
            f"{where}: {len(scores)} scores for {len(responses)} responses: give one for each"
        )
    for i, response in enumerate(responses):
        at = f"{where}, responses[{i}]"
        if not isinstance(response, dict):
            raise UserError(f"{at}: a {type(response).__name__}, not an object with text")
        field(response, "text", str, at)
        for name, kind in (("token_ids", list), ("logprob", (int, float)), ("finish_reason", str)):
            if response.get(name) is not None:
                field(response, name, kind, at)
    for i, score in enumerate(scores):
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if not number or not abs(score) <= sys.float_info.max:
            raise UserError(
                f"{where}, scores[{i}]: {score!r} is no finite number: correct the line"
            )
    return responses, [float(score) for score in scores]


def _read(path: str, counts: Counter):
    return read_prompts(path, counts, agree=("responses", "scores"))


def _hash(prompt_id: str, seed: int, purpose: str) -> str:
    return text_sha256(f"{purpose}/{seed}/{prompt_id}")


def _test_ids(ids: list[str], args: Args) -> set[str]:
    """The prompts of the test split: never a matter of their order or their answers."""
    hashes = {i: _hash(i, args.seed, "test") for i in ids}
    if args.test_count and args.test_count >= len(ids):
        raise UserError(
            f"--test-count {args.test_count} leaves none of the {len(ids)} prompts to train on"
        )
    if args.test_count:
        return set(heapq.nsmallest(args.test_count, ids, key=hashes.__getitem__))
    return {i for i in ids if int(hashes[i], 16) < args.test_fraction * 2**256}


def _check(args: Args) -> str | None:
    """Check the flags against each other; gives the test split's file, None where there is none."""
    if not 0 <= args.test_fraction < 1:
        raise UserError(f"--test-fraction {args.test_fraction} must be at least 0 and below 1")
    if not 0 <= args.length_penalty < float("inf"):
        raise UserError(f"--length-penalty {args.length_penalty} must be a number of at least 0")
    if args.test_count < 0:
        raise UserError(f"--test-count {args.test_count} must not be negative")
    if args.test_fraction and args.test_count:
        raise UserError("give --test-fraction or --test-count, not both")
    if (args.parquet is None) != (args.iteration is None):
        raise UserError("--parquet and --iteration go together: give both or neither")
    if args.iteration is not None and args.iteration < 1:
        raise UserError(f"--iteration {args.iteration} must be 1 or more")
    if not args.test_fraction and not args.test_count:
        if args.test_out is not None:
            raise UserError("--test-out needs --test-fraction or --test-count")
        return None
    test_out = args.test_out or f"{args.out.removesuffix('.jsonl')}.test.jsonl"
    if test_out == args.out:
        raise UserError("--test-out and --out are the same file: give the test split its own")
    return test_out


if __name__ == "__main__":
    sys.exit(run_main(main, Args))
