"""Show a run: its table in the terminal, and all of it in one page. runs/NAME/ → report.html

    python -m scripts.report runs/demo

Reads what scripts/iterate.sh left in the folder, whether the run is finished or not. The page needs
no network and no other file. It shows the table of iterations, the spread of rewards and lengths,
the curves of the trainings, how sure the ranker was, each stage's time, tokens and rows left out,
what was made from what, and the models' answers to the held-out prompts side by side.
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
from sharding.errors import UserError, check_least, check_scheme
from stages.files.benchmarks import conversation_key
from stages.files.paths import check_place, write_atomically
from stages.files.rows import messages_of
from stages.files.run import run_main


@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[str]
    """The run's folder, runs/NAME."""
    terms: bool = False
    """Print the terms of the reward too, of the start model and of the newest."""
    out: str | None = None
    """The page to write, in the place of an earlier one; default: report.html in the run's
    folder."""
    answers: int = 1000
    """The page has the answers to at most this many held-out prompts, and says how many."""


PAGE = b"<!doctype html>\n<!-- scripts.report -->\n"  # every page of this command begins so


def main(args: Args) -> None:
    check_least(args, answers=0)
    check_scheme(args.run)
    if args.out is not None:
        check_place(args.out, "--out")
        out = epath.Path(args.out)
        if out.exists() and not out.read_bytes().startswith(PAGE):
            raise UserError(
                f"--out {args.out} is no page of this command: give another path, or move it"
            )
    run = gather.read(args.run)

    # ---- the terminal
    answered = [model for model in run.models if model.rows]
    if answered:
        if dtypes := tables.computed_in(run.nodes):
            print(f"{run.name}, {dtypes}:")
        print(tables.in_lines(tables.iterations(answered)))
    if args.terms:
        for line in tables.change_of_terms(answered):
            print(line)
    for line in tables.verdict(answered):
        print(line)

    # ---- the page
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    prompts = side_by_side(run.models)
    shown = min(len(prompts), args.answers)
    content = {
        "models": [{"name": m.name, "colour": colour(m.name)} for m in run.models],
        "prompts": prompts[:shown],
    }
    page = environment.get_template("page.html").render(
        run=run,
        tables=tables.page(run),
        computed_in=tables.computed_in(run.nodes),
        verdict=tables.verdict(run.models),
        plots={"held_out": held_out(run), "trained": trained(run), "curves": curves(run)},
        prompts=len(prompts),
        shown=shown,
        # Within a script element only "<" could end it, or begin a comment.
        answers=json.dumps(content).replace("<", "\\u003c"),
    )
    out = args.out or str(epath.Path(args.run) / "report.html")
    write_atomically(out, page)
    print(f"{out}: {len(run.models)} models, {shown} of {len(prompts)} held-out prompts")


# ---------------------------------------------------------------------------------- plots


def held_out(run: gather.Run) -> list[str]:
    rewards = [(m.name, colour(m.name), m.scores) for m in run.models]
    lengths = [(m.name, colour(m.name), [float(len(t)) for t in m.texts]) for m in run.models]
    return [
        *histograms("Reward of the held-out answers", rewards),
        *histograms("Characters of the held-out answers", lengths),
    ]


def trained(run: gather.Run) -> list[str]:
    scores = [(t.name, colour(t.name), t.scores) for t in run.trained]
    drawn = histograms("Scores of all answers sampled to train on", scores)
    for what in ("score", "characters"):
        sides = [
            (f"{t.name}, {side}", colour(t.name), t.pairs[f"{side}_{what}"])
            for t in run.trained
            for side in ("chosen", "rejected")
        ]
        drawn += histograms(f"The pairs' {what}", sides)
    return drawn


def histograms(title: str, series: list[tuple[str, int, list[float]]]) -> list[str]:
    """The plot of the series (label, colour, values) that have values; none where none has any."""
    filled = [one for one in series if one[2]]
    return [plots.histograms(title, filled)] if filled else []


CURVES = (  # title, metrics and the style of their lines, a level and its meaning
    ("DPO loss", {"loss": "-"}, (math.log(2), "ln 2")),
    ("Pairs ordered as the ranker did", {"rewards/accuracies": "-"}, (0.5, "chance")),
    ("Rewards: chosen —, rejected - -", {"rewards/chosen": "-", "rewards/rejected": "--"}, None),
    ("KL to the reference, per token", {"kl": "-"}, None),
    ("Gradient norm, before clipping", {"grad_norm": "-"}, None),
)


def curves(run: gather.Run) -> list[str]:
    """Steps count on from iteration to iteration; evaluations on test pairs are points."""
    drawn = []
    for title, metrics, level in CURVES:
        lines, before = [], 0
        for model in run.models:
            for metric, style in metrics.items():
                for name, line in ((metric, style), (f"eval_{metric}", "o")):
                    rows = [row for row in model.metrics if name in row]
                    x, y = [before + row["step"] for row in rows], [row[name] for row in rows]
                    if rows:
                        label = model.name if line == "-" else "_"
                        lines.append((label, colour(model.name), line, x, y))
            before += max((row["step"] for row in model.metrics), default=0)
        if lines:
            drawn.append(plots.lines(title, lines, level))
    return drawn


def colour(name: str) -> int:
    """The number of the page's colour for a model and its training: 0 for the start model."""
    kind, _, number = name.partition("_")
    return 1 + (int(number) - 1) % (plots.SERIES - 1) if kind == "iteration" else 0


# ---------------------------------------------------------------------------------- answers


def side_by_side(models: list[gather.Model]) -> list[dict]:
    """The held-out prompts: [{prompt, answers: one per model, null where it has none}, …].

    Where a model has several answers the first is shown: the one that `evaluate compare` judges.
    """
    prompts: dict[str, dict] = {}
    for i, model in enumerate(models):
        compared = model.against.get("start", {"per_instruction": []})["per_instruction"]
        # 1 where the model won, 0.5 at a tie, 0 where it lost.
        won = {row["instruction"]: row["preference"] for row in compared}
        for row in model.rows:
            messages = messages_of(row, "held-out prompts")
            entry = prompts.setdefault(
                row["prompt_id"],
                {"prompt": conversation(messages), "answers": [None] * len(models)},
            )
            first = row["responses"][0]
            entry["answers"][i] = {
                "text": first["text"],
                "finished": first.get("finish_reason") in ("stop", None),
                "score": row["scores"][0] if row.get("scores") and not model.relative else None,
                "won": won.get(conversation_key(messages)),
            }
    return list(prompts.values())


def conversation(messages: list[dict]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


if __name__ == "__main__":
    sys.exit(run_main(main, Args))
