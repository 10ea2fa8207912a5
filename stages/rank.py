"""Rank the answers of each prompt. samples.jsonl → ranked.jsonl

    python -m stages.rank --ranker reward.py:reward --samples samples.jsonl --out ranked.jsonl

The ranker is a reward function in a Python file (model/rankers.py has its signature). Each row
gains `scores`, one per response, higher is better, and `score_terms` where the function tells what
its scores consist of. A function that raises, or returns the wrong number of scores or one that is
not finite, stops the stage at that prompt; what was ranked before is kept.
"""

import dataclasses
import sys
from collections import Counter

from tqdm import tqdm

from model.rankers import FunctionRanker, RankerError, open_ranker
from stages import records
from stages.records import Manifest, Output, UserError


@dataclasses.dataclass
class Args:
    ranker: str  # FILE.py:FUNCTION, the reward function
    samples: str  # samples.jsonl
    out: str  # ranked.jsonl
    overwrite: bool = False  # replace an --out that is there


def main(args: Args) -> None:
    try:
        ranker = open_ranker(args.ranker)
    except RankerError as error:
        raise UserError(str(error)) from error
    counts: Counter = Counter()
    order = [row["prompt_id"] for _, row in _read(args.samples, counts)]
    lineage = records.read_lineage(args.samples)
    manifest = Manifest(
        stage="rank",
        arguments={},
        inputs={args.samples: records.file_sha256(args.samples)},
        identities={**(lineage.identities if lineage else {}), "ranker": ranker.identity},
    )
    output = Output.open(args.out, manifest, args.overwrite)
    if output.finished:
        return
    progress = tqdm(total=len(order), initial=len(output), unit=" prompts", desc="rank")
    with progress, records.stop_signal() as check_stop:
        for where, row in _read(args.samples, Counter()):
            if not output.has(row["prompt_id"]):
                check_stop()
                _rank_row(ranker, row, where, output)
                progress.update()
    output.finish(iter(order), counts)


def _read(path: str, counts: Counter):
    """(where, row) of each checked row; a prompt_id that comes twice is an error."""
    seen = set()
    for where, row in records.read_rows(path):
        prompt_id = records.field(row, "prompt_id", str, where)
        records.messages_of(row, where)
        for i, response in enumerate(records.field(row, "responses", list, where)):
            at = f"{where}, responses[{i}]"
            if not isinstance(response, dict):
                raise UserError(f"{at}: {type(response).__name__}, not an object with a text")
            records.field(response, "text", str, at)
        if prompt_id in seen:
            raise UserError(f"{where}: prompt_id {prompt_id!r} stood above: remove one of them")
        seen.add(prompt_id)
        counts["in"] += 1
        yield where, row


def _rank_row(ranker: FunctionRanker, row: records.Row, where: str, output: Output) -> None:
    responses = row["responses"]
    if not responses:
        output.set_aside(row, "no responses")
        return
    texts = [response["text"] for response in responses]
    reasons = [response.get("finish_reason", "stop") for response in responses]
    try:
        ranking = ranker.rank(records.prompt_text(row, where), texts, reasons)
    except RankerError as error:
        raise UserError(
            f"{where}, prompt_id {row['prompt_id']!r}: {error}; "
            "mend the function, then run again (the prompts before it are kept)"
        ) from error
    row["scores"] = ranking.scores
    if ranking.comparisons is not None:
        row["comparisons"] = ranking.comparisons
    if ranking.terms is not None:
        row["score_terms"] = ranking.terms
    output.write(row)


if __name__ == "__main__":
    sys.exit(records.run(main, Args))
