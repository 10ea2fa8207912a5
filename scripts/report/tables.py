"""A run's tables as texts: the table of iterations for the terminal, all tables for the page."""

import textwrap

from scripts.report.gather import Model, Run, mean
from scripts.report.graph import Node

Cells = dict[str, str]  # column → text; every row of a table has all of its columns
OTHERS = ("start", "previous")  # models that a model is measured against


# ----------------------------------------------------------------------------- the iterations


def iterations(models: list[Model]) -> list[Cells]:
    """One row per model. Rewards, words, finished and distinct answers are means over the held-out
    prompts. Win rates are per 100 prompts, ties count half; intervals are 95%. KL is per token."""
    rows = [_cells(model) for model in models]
    if all(row["reward"] == "–" for row in rows):  # a pairwise ranker's scores are no rewards
        for row in rows:
            del row["reward"]
    return rows


def _cells(model: Model) -> Cells:
    reward, texts = model.reward(), model.texts
    ended = [answer.get("finish_reason") in ("stop", None) for answer in model.answers]
    return {
        "model": model.name,
        "reward": "–" if reward is None else f"{reward[0]:.3f} ± {reward[1]:.3f}",
        **{f"won against {other}": _win_rate(model.against.get(other)) for other in OTHERS},
        "words": _text(mean([len(text.split()) for text in texts]), ".0f"),
        "finished": _text(mean(ended), ".0%"),
        "distinct": _text(len(set(texts)) / len(texts) if texts else None, ".0%"),
        **{
            f"KL to {other}": _text(model.kl_to.get(other, {}).get("kl_per_token"), ".3f")
            for other in OTHERS
        },
        "DPO loss": _text(model.training("loss"), ".3f"),
        "DPO accuracy": _text(model.training("rewards/accuracies"), ".0%"),
    }


def _win_rate(compared: dict | None) -> str:
    if compared is None:
        return "–"
    low, high = compared["interval"]
    return f"{100 * compared['win_rate']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def in_lines(rows: list[Cells]) -> str:
    """The rows as lines with aligned columns; a heading wider than its column is wrapped."""
    columns = []
    for name in rows[0]:
        cells = [row[name] for row in rows]
        width = max(map(len, [*cells, *name.split()]))
        columns.append([f"{text:<{width}}" for text in [*textwrap.wrap(name, width), *cells]])
    deepest = max(map(len, columns))
    padded = [[" " * len(column[0])] * (deepest - len(column)) + column for column in columns]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded))


def computed_in(nodes: list[Node]) -> str:
    """In which dtypes the run sampled and trained; empty where that is not known."""
    made = [node.manifest for node in nodes if node.manifest]
    dtypes = {}
    for stage in ("sample", "dpo"):
        tables = (manifest.arguments for manifest in made if manifest.stage == stage)
        if names := sorted({table["dtype"] for table in tables if "dtype" in table}):
            dtypes[stage] = " and ".join(names)
    if len({*dtypes.values()}) == 1:
        return f"computed in {next(iter(dtypes.values()))}"
    return ", ".join(f"{stage} in {names}" for stage, names in dtypes.items())


def verdict(models: list[Model]) -> list[str]:
    """Lines that say whether the newest model is worse than the one before, and which is best."""
    judged = [model for model in models if "start" in model.against]
    if not judged:
        return []
    won = {model.name: model.against["start"]["win_rate"] for model in judged}
    lines, newest = [], judged[-1]
    if newest.against.get("previous", {"win_rate": 1})["win_rate"] < 0.5:
        lines.append(f"warning: {newest.name} loses to the model before it more often than it wins")
    best = max(won, key=won.get)
    best = best if won[best] >= 0.5 else models[0].name
    return [*lines, f"best so far: {best}"]


def change_of_terms(models: list[Model]) -> list[str]:
    """Lines with each term of the reward, from the first model to the last."""
    first, last = (models[0].terms(), models[-1].terms()) if models else ({}, {})
    lines = [
        f"  {name:<14} {value:.3f} → {last[name]:.3f}  ({last[name] - value:+.3f})"
        for name, value in first.items()
        if name in last
    ]
    return ["", "The reward's terms, means over the held-out answers:", *lines] if lines else []


# ------------------------------------------------------------------------------- the page

RANKER = {  # results in the manifests of stages.rank → the page's words
    "pairs": "pairs compared",
    "swap_consistency": "both orders agree",
    "tie_rate": "ties",
    "truncation_rate": "lost text to its length",
    "score_length_correlation": "score with length",
}


def page(run: Run) -> dict[str, list[Cells]]:
    """Name → table; empty where there is nothing to show yet."""
    terms = {model.name: model.terms() for model in run.models}
    names = list(dict.fromkeys(name for values in terms.values() for name in values))
    return {
        "iterations": iterations(run.models),
        "terms": [
            {"model": model} | {name: _text(values.get(name), ".3f") for name in names}
            for model, values in terms.items()
            if values
        ],
        "trained": [
            {
                "iteration": t.name,
                "answers": f"{len(t.scores):,}",
                "distinct, of a prompt's": _text(mean(t.distinct), ".0%"),
                "finished": _text(mean(t.finished), ".0%"),
                "pairs": f"{len(t.pairs['chosen_characters']):,}",
            }
            for t in run.trained
        ],
        "ranker": _ranker(run),
        "stages": [_stage(node, run.tokens.get(node.path)) for node in run.nodes if node.manifest],
        "lineage": [
            {
                "file": node.path,
                "made by": node.manifest.stage if node.manifest else "not the run",
                "of": ", ".join(parent.path for parent in node.parents),
                "identity": node.identity[:12],
                "changed since": "yes" if node.changed else "",
            }
            for node in run.nodes
        ],
    }


def _stage(node: Node, tokens: int | None) -> Cells:
    """A file that a stage wrote. tokens: of the answers in it."""
    made, rate, counts = node.manifest, None, dict(node.manifest.counts)
    if made.stage == "sample" and (sitting := made.results.get("last_sitting")):
        rate = sitting["tokens"] / max(sitting["seconds"], 0.1)
    elif made.stage == "dpo" and tokens:  # before texts are cut to the lengths
        tokens *= made.arguments["epochs"]
        rate = tokens / max(made.results["train_seconds"], 0.1)
    return {
        "file": node.path,
        "stage": made.stage,
        "time": duration(made.seconds),
        "tokens": _text(tokens or made.results.get("tokens"), ","),
        "tokens a second": _text(rate, ",.0f"),
        "rows in": _text(counts.pop("in", None), ","),
        "rows out": _text(counts.pop("out", None), ","),
        "left out": "; ".join(
            f"{n:,} {reason}"
            for reason, n in counts.items()
            if reason not in ("test in", "test out")
        ),
    }


def _ranker(run: Run) -> list[Cells]:
    """One row per file that a ranker's comparisons went into."""
    rows = []
    for node in run.nodes:
        if node.manifest is None or node.manifest.stage not in ("rank", "evaluate compare"):
            continue
        results = node.manifest.results
        values = {title: results.get(name) for name, title in RANKER.items()}
        if any(value is not None for value in values.values()):
            rows.append({"file": node.path} | {t: _text(v, ".3g") for t, v in values.items()})
    return rows


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
