"""One page that shows a run. runs/NAME/ → report.html

    python -m scripts.report runs/demo

Reads what scripts/iterate.sh left there, finished or not, and writes a page that needs nothing
else: no network, no other file. It has the table of iterations, how rewards and lengths are spread,
the trainings' curves, how sure the ranker was, time and tokens of each stage and the rows it left
out, what was made from what, and the models' answers to the held-out prompts side by side.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import jinja2
import tyro
from etils import epath

from scripts.report import gather, plots, tables
from sharding.errors import UserError
from stages.files.paths import write_atomically
from stages.files.rows import Row, messages_of
from stages.files.run import run_main


@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[str]
    """The run's folder, runs/NAME."""
    out: str | None = None
    """The page to write; default: report.html in the run's folder."""
    answers: int = 1000
    """So many held-out prompts have their answers in the page, which says if there are more."""


def main(args: Args) -> None:
    if args.answers < 0:
        raise UserError(f"--answers is {args.answers}: it must not be negative")
    run = gather.read(args.run)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    prompts = answers(run.models)
    shown = min(len(prompts), args.answers)
    content = {
        "models": [{"name": m.name, "colour": colour(m.name)} for m in run.models],
        "prompts": prompts[:shown],
    }
    page = environment.get_template("page.html").render(
        run=run,
        tables=tables.page(run),
        verdict=tables.verdict(run.models),
        plots=drawings(run),
        prompts=len(prompts),
        shown=shown,
        # Within a script element only "<" could end it, or begin a comment.
        answers=json.dumps(content).replace("<", "\\u003c"),
    )
    out = args.out or str(epath.Path(args.run) / "report.html")
    write_atomically(out, page)
    print(f"{out}: {len(run.models)} models, {shown} of {len(prompts)} held-out prompts")


# ---------------------------------------------------------------------------------- content


def drawings(run: gather.Run) -> dict[str, list[str]]:
    """Section → its plots."""

    def spread(title: str, values: list[tuple[str, list[float]]]) -> list[str]:
        given = [(name, colour(name), numbers) for name, numbers in values if numbers]
        return [plots.histograms(title, given)] if given else []

    lengths = [(m.name, [float(len(text)) for text in m.texts]) for m in run.models]
    held_out = spread("Reward of the held-out answers", [(m.name, m.scores) for m in run.models])
    held_out += spread("Characters of the held-out answers", lengths)
    sampled = [(t.name, t.scores) for t in run.trained]
    trained = spread("Scores of all answers sampled to train on", sampled)
    for what in ("score", "characters"):
        sides = [
            (f"{t.name}, {side}", colour(t.name), t.pairs[f"{side}_{what}"])
            for t in run.trained
            if t.pairs
            for side in ("chosen", "rejected")
        ]
        trained += [plots.histograms(f"The pairs' {what}", sides)] if sides else []
    return {"held_out": held_out, "trained": trained, "curves": curves(run)}


CURVES = (  # title, metrics and their line, level and what it means
    ("DPO loss", {"loss": "-"}, (math.log(2), "ln 2")),
    ("Pairs ordered as the ranker did", {"rewards/accuracies": "-"}, (0.5, "chance")),
    ("Rewards: chosen —, rejected - -", {"rewards/chosen": "-", "rewards/rejected": "--"}, None),
    ("KL to the reference, a token", {"kl": "-"}, None),
    ("Gradient norm, before clipping", {"grad_norm": "-"}, None),
)


def curves(run: gather.Run) -> list[str]:
    """Steps count on from iteration to iteration; evaluations on test pairs are points."""
    drawn = []
    for title, metrics, level in CURVES:
        given, before = [], 0
        for model in run.models:
            for metric, style in metrics.items():
                label = model.name if style == "-" else "_"
                for name, line in ((metric, style), (f"eval_{metric}", "o")):
                    rows = [row for row in model.metrics if name in row]
                    x, y = [before + row["step"] for row in rows], [row[name] for row in rows]
                    if rows:
                        label = "_" if line == "o" else label
                        given.append((label, colour(model.name), line, x, y))
            before += max((row["step"] for row in model.metrics), default=0)
        if given:
            drawn.append(plots.lines(title, "optimizer step", given, level))
    return drawn


def answers(models: list[gather.Model]) -> list[dict]:
    """The held-out prompts: [{prompt, answers: one a model, null where it has none}, …]. Of several
    answers of a model the first is shown, the one that `evaluate compare` judges."""
    prompts: dict[str, dict] = {}
    for i, model in enumerate(models):
        won = gather.preferences(model.against_start)
        for row in model.rows:
            entry = prompts.setdefault(
                row["prompt_id"], {"prompt": conversation(row), "answers": [None] * len(models)}
            )
            first = row["responses"][0]
            entry["answers"][i] = {
                "text": first["text"],
                "finished": first.get("finish_reason") == "stop",
                "score": row["scores"][0] if row.get("scores") and not model.relative else None,
                "won": won.get(gather.instruction(row)),
            }
    return list(prompts.values())


def conversation(row: Row) -> str:
    messages = messages_of(row, "held-out prompts")
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def colour(name: str) -> int:
    """Which of the page's colours a model and what made it has: the first is the start model's."""
    kind, _, number = name.partition("_")
    return 1 + (int(number) - 1) % (plots.SERIES - 1) if kind == "iteration" else 0


if __name__ == "__main__":
    sys.exit(run_main(main, Args))
