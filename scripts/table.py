"""What the loop asks about a run: can it go on to its end, and did the model get better.

    python -m scripts.table show runs/demo --terms      the table of iterations
    python -m scripts.table ready runs/demo --iterations 3 --ranker reward.py:reward

The table compares answers to the same held-out prompts. A prompt's win is the share of pairs
(an answer of this model, an answer of the start model) in which this model's scores higher, ties
counting half; win rate and interval are over prompts. Intervals are 95%, of the normal
approximation of a mean over prompts (for the win rate, Wilson's, which stays within 0 and 100%).
"""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import tyro

from model.rankers import RankerError, open_ranker
from stages import records
from stages.records import UserError

Z = 1.959964  # 97.5% quantile of the normal distribution


@dataclasses.dataclass
class Show:
    """Print the table of a run's iterations so far."""

    run: tyro.conf.Positional[str]  # the run's folder, runs/NAME
    terms: bool = False  # also the reward's terms one by one, start and newest iteration


@dataclasses.dataclass
class Ready:
    """Fail unless the ranker opens and the disk has room for what the run will still write."""

    run: tyro.conf.Positional[str]  # the run's folder, with start/checkpoint in it
    ranker: str  # as stages.rank takes it
    iterations: int = 3  # how many there will be


def main(args: Show | Ready) -> None:
    (show if isinstance(args, Show) else check_ready)(args)


# --------------------------------------------------------------------------------- the table


@dataclasses.dataclass
class Answers:
    """A model's answers to the held-out prompts."""

    name: str
    scores: dict[str, list[float]]  # prompt_id → score of each answer
    rows: list[dict]

    def mean_score(self) -> tuple[float, float]:
        """(mean, half width of its interval) of the prompts' mean scores."""
        means = np.array([np.mean(s) for s in self.scores.values()])
        return float(means.mean()), float(Z * means.std(ddof=1) / math.sqrt(len(means)))

    def responses(self) -> list[dict]:
        return [response for row in self.rows for response in row["responses"]]

    def mean_words(self) -> float:
        return float(np.mean([len(r["text"].split()) for r in self.responses()]))

    def finished_share(self) -> float:
        return float(np.mean([r.get("finish_reason") == "stop" for r in self.responses()]))

    def terms(self) -> dict[str, float]:
        """The mean of each term that the reward function tells its scores consist of."""
        each = [terms for row in self.rows for terms in row.get("score_terms", [])]
        return {name: float(np.mean([t[name] for t in each])) for name in (each[0] if each else {})}


def read_answers(name: str, path: Path) -> Answers:
    rows = [row for _, row in records.read_rows(str(path))]
    if len(rows) < 2:
        raise UserError(f"{path}: a table needs at least 2 held-out prompts, here are {len(rows)}")
    return Answers(name, {row["prompt_id"]: row["scores"] for row in rows}, rows)


def win_rate(model: Answers, start: Answers) -> tuple[float, float, float]:
    """(win rate, lower, upper end of its interval), from 0 to 1, over the prompts both answered."""
    wins = []
    for prompt_id in model.scores.keys() & start.scores.keys():
        a = np.array(model.scores[prompt_id])[:, None]
        b = np.array(start.scores[prompt_id])[None, :]
        wins.append(np.mean((a > b) + 0.5 * (a == b)))
    n, p = len(wins), float(np.mean(wins))
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return p, middle - half, middle + half


def last_training(folder: Path) -> tuple[float, float]:
    """DPO loss and accuracy of an iteration: means over the second half of its steps."""
    rows = [row for _, row in records.read_rows(str(folder / "checkpoint.log/metrics.jsonl"))]
    rows = [row for row in rows if "loss" in row]
    rows = rows[len(rows) // 2 :]
    return tuple(float(np.mean([r[name] for r in rows])) for name in ("loss", "rewards/accuracies"))


def show(args: Show) -> None:
    run = Path(args.run)
    folders = [run / "start", *sorted(run.glob("iteration_*"), key=lambda p: int(p.name[10:]))]
    done = [f for f in folders if (f / "heldout.ranked.jsonl").exists()]
    if not done or done[0] != folders[0]:
        raise UserError(f"{run} has no start/heldout.ranked.jsonl yet: run scripts/iterate.sh")
    models = [read_answers(f.name, f / "heldout.ranked.jsonl") for f in done]
    # PairRM's scores say how an answer does against the others of its row, not how good it is.
    relative = any("comparisons" in row for row in models[0].rows)
    print(f"{'model':<12}  {'held-out reward':<17}  {'win rate against start':<24}  "
          f"{'words':>5}  {'finished':>8}  {'DPO loss':>8}  {'accuracy':>8}")  # fmt: skip
    for folder, model in zip(done, models):
        mean, half = model.mean_score()
        reward = "–" if relative else f"{mean:.3f} ± {half:.3f}"
        line = f"{model.name:<12}  {reward:<17}  "
        if model is models[0] or relative:
            line += f"{'–':<24}  "
        else:
            p, low, high = win_rate(model, models[0])
            line += f"{f'{p:6.1%}  [{low:.1%}, {high:.1%}]':<24}  "
        line += f"{model.mean_words():5.0f}  {model.finished_share():8.0%}"
        if folder != done[0]:
            loss, accuracy = last_training(folder)
            line += f"  {loss:8.3f}  {accuracy:8.0%}"
        print(line)
    if args.terms and models[0].terms():
        first, last = models[0].terms(), models[-1].terms()
        print("\nThe reward's terms, means over the held-out answers:")
        for name in first:
            change = last[name] - first[name]
            print(f"  {name:<14} {first[name]:.3f} → {last[name]:.3f}  ({change:+.3f})")
    if relative:
        print("a pairwise ranker scores answers against each other, so these say nothing of models")
        return
    means = [model.mean_score()[0] for model in models]
    if len(means) > 1 and means[-1] < means[-2]:
        print(f"warning: {models[-1].name} is worse than {models[-2].name} on the held-out prompts")
    if len(means) > 1:
        print(f"best so far: {models[int(np.argmax(means))].name}")


# ------------------------------------------------------------------------- before it starts


def check_ready(args: Ready) -> None:
    """Before hours of sampling, not after them.

    Checkpoints are fp32. Beside the ones that stay, the dearest moment is a save of DPO's training
    state (parameters and two moments) while the one before it is still there.
    """
    try:
        open_ranker(args.ranker)
    except RankerError as error:
        raise UserError(str(error)) from error
    run = Path(args.run)
    manifest = json.loads((run / "start/checkpoint/manifest.json").read_text())
    checkpoint = 4 * manifest["parameters"]
    missing = sum(
        not (run / f"iteration_{k}/checkpoint").exists() for k in range(1, args.iterations + 1)
    )
    needed = missing * checkpoint + (6 * checkpoint if missing else 0) + checkpoint  # + export
    free = shutil.disk_usage(run).free
    print(f"disk: up to {needed / 1e9:.1f} GB will be written, {free / 1e9:.1f} GB are free")
    if needed > free:
        raise UserError(
            f"{run}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: make room, "
            "or put runs/ on a larger disk (a symbolic link will do)"
        )


if __name__ == "__main__":
    sys.exit(records.run(main, Show | Ready))
