"""Model and dataset cards for the hub, filled from the manifests; what these do not say, the card
says it does not know. Runs without JAX.

A checkpoint and each Parquet file carry the manifests of what they were made from
(stages/files/provenance.py), so that a card needs no other file. A card ends with the hash of its
text: one that a user changed is not written over.
"""

import json
import re
from collections.abc import Callable, Iterable

from etils import epath

from sharding.errors import UserError
from stages.files.output import Manifest, read_manifest
from stages.files.paths import text_sha256, write_atomically
from stages.files.provenance import Entry, provenance, short_name

UNKNOWN = "not known"
MADE = re.compile(r"\n<!-- made from the manifests, sha256 ([0-9a-f]{64}) -->\n\Z")
Rows = Iterable[Iterable[str]]


def source_of_hf(folder: str, src: str, commit: str | None) -> dict:
    """What is known of a Hugging Face folder: its licence is that of its card's front matter."""
    from huggingface_hub import ModelCard

    source = {"hub_id": src, "revision": commit} if commit is not None else {}
    readme = epath.Path(folder) / "README.md"
    if readme.exists():
        try:
            data = ModelCard(readme.read_text(), ignore_metadata_errors=True).data.to_dict()
        except Exception:  # YAML errors of many kinds; a card that is none says nothing
            data = {}
        source |= {name: data[name] for name in LICENCE if isinstance(data.get(name), str)}
    return source


LICENCE = ("license", "license_name", "license_link")


# ---------------------------------------------------------------------- the model's card


def model_card(checkpoint: dict, dtype: str, rounding: str | None, results: list[str]) -> str:
    """The README.md of an exported model. checkpoint: its manifest. rounding: what storing it as
    `dtype` takes away, if anything. results: files of stages.evaluate compare, score or kl."""
    from huggingface_hub import ModelCardData

    chain = _chain(checkpoint)
    trainings = [made for made in chain if made["origin"].get("stage") == "dpo"]
    source = chain[0].get("source", {})
    base = source.get("hub_id") or source.get("name")
    steps = [_training(made) for made in trainings]
    entries = [entry for made in trainings for entry in made.get("data", [])]
    told = _results(results, chain)
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=source.get("hub_id"),
        datasets=_datasets(entries) or None,
        tags=["preference-alignment", "dpo"] if trainings else None,
        **{name: source[name] for name in LICENCE if name in source},
    )
    count = len(trainings)
    iterations = f"{count} iteration{'s' if count != 1 else ''} of preference alignment"
    aligned = "its answers to prompts ranked, the best and the worst a pair, DPO on the pairs"
    files = ", ".join(chain[0]["origin"].get("inputs", {}))
    title = f"{base or 'A language model'}" + (f" after {iterations}" if count else "")
    blocks = [
        f"# {title}",
        f"{checkpoint['parameters']:,} parameters, stored as {dtype}."
        + (f" {iterations.capitalize()}: {aligned}." if count else ""),
        _table(
            ["what", "which"],
            [
                ("base model", base or UNKNOWN),
                ("its revision", source.get("revision") or UNKNOWN),
                ("its files", f"{files or UNKNOWN}"),
                ("identity of its weights", f"`{chain[0]['identity']}`"),
                ("identity of these weights", f"`{checkpoint['identity']}` (before rounding)"),
            ],
        ),
        "## Use",
        "```python\nfrom transformers import pipeline\n\n"
        'generate = pipeline("text-generation", model="FOLDER OR HUB ID")\n'
        'print(generate([{"role": "user", "content": "…"}]))\n```',
    ]
    if trainings:
        header = ["", *(f"iteration {k}" for k in range(1, count + 1))]
        rows = [[name, *(step[name] for step in steps)] for name in steps[0]]
        blocks += ["## Training and data", _table(header, rows)]
    blocks += ["## Results", *(told or ["None were given."])]
    blocks += ["## Licence", _licence(source), "## Limits", _limits(trainings, rounding, told)]
    return _card(front.to_yaml(), blocks)


def _chain(checkpoint: dict) -> list[dict]:
    """The checkpoint's manifest and those of the checkpoints it was trained from, oldest first."""
    parent = checkpoint.get("parent")
    return (_chain(parent) if parent else []) + [checkpoint]


def _training(made: dict) -> dict[str, str]:
    """What a card tells of one iteration, {setting: value}."""
    origin, data = made["origin"], made.get("data", [])
    pairs, ranked, samples = (_entry(data, stage) for stage in ("pairs", "rank", "sample"))
    a, drawn, chosen = origin["arguments"], samples.get("arguments", {}), pairs.get("arguments", {})
    lengths = pairs.get("results", {}).get("lengths", {}).get("characters", {})
    held = origin.get("results", {}).get("eval_rewards/accuracies")
    return {
        "prompts": _prompts(data),
        "answers to each": _say(
            drawn, "{n}, temperature {temperature}, top-p {top_p}, up to {max_new_tokens} tokens"
        ),
        "ranker": ranked.get("results", {}).get("ranker", UNKNOWN),
        "pairs": _trained_on(origin.get("counts", {}))
        + (f", {chosen['strategy']}" if chosen else "")
        + (", edited by hand" if any(entry["edited"] for entry in data) else ""),
        "length penalty": _say(chosen, "{length_penalty}"),
        "mean characters": f"chosen {lengths['chosen']['mean']:.0f}, rejected "
        f"{lengths['rejected']['mean']:.0f}"
        if "gap" in lengths
        else UNKNOWN,
        "loss": _say(a, "{loss}, β {beta}"),
        "optimizer": _say(
            a, "{optimizer}, learning rate {learning_rate}, {schedule}, warm-up {warmup_ratio}"
        ),
        "epochs, pairs a step": _say(a, "{epochs}, {batch_size}"),
        "longest, tokens": _say(a, "{max_length}, of these prompt {max_prompt_length}"),
        "computed in": _say(a, "{dtype}"),
        "test pairs ordered right": "none were held out" if held is None else f"{held:.1%}",
    }


def _trained_on(counts: dict[str, int]) -> str:
    if "in" not in counts:
        return UNKNOWN
    return str(counts["in"] - sum(n for k, n in counts.items() if k.startswith("set aside")))


def _entry(data: list[Entry], stage: str) -> Entry:
    return next((entry for entry in data if entry["stage"] == stage), {})


def _say(values: dict, form: str) -> str:
    try:
        return form.format(**values)
    except KeyError:
        return UNKNOWN


def _prompts(data: list[Entry]) -> str:
    """Where the prompts came from, as far back as the manifests tell, and how many there were."""
    known = [e for e in data if e["stage"] in ("sample", "prompts-from-parquet", "from-parquet")]
    if not known:
        return UNKNOWN
    return f"{', '.join(known[-1]['inputs'])} ({known[0]['counts'].get('in', UNKNOWN)})"


def _datasets(entries: list[Entry]) -> list[str]:
    """Hub ids of the datasets that files were read from."""
    found = [
        re.match(r"hf://datasets/([\w.-]+/[\w.-]+)", file)
        for entry in entries
        for file in entry["inputs"]
    ]
    return sorted({match[1] for match in found if match})


def _licence(source: dict) -> str:
    named = source.get("license_name") or source.get("license")
    if named is None:
        return (
            "Not known: nothing that the model was made from states one. Look before you publish."
        )
    link = f" ({source['license_link']})" if "license_link" in source else ""
    return f"{named}{link}, as the base model's own metadata state."


def _limits(trainings: list[dict], rounding: str | None, results: list[str]) -> str:
    limits = []
    if trainings:
        limits += [
            "Its preferences are the ranker's, not people's: what that overrates, it learned.",
            "The manifests record no test of truth, safety or bias.",
        ]
    if rounding:
        limits.append(f"{rounding[0].upper()}{rounding[1:]}.")
    if not results:
        limits.append("Nothing here says that it is better than its base: no results were given.")
    return "\n".join(f"- {limit}" for limit in limits) or "None are recorded."


# ---------------------------------------------------------------------- its results


def _results(files: list[str], chain: list[dict]) -> list[str]:
    """Tables of results: UserError where a file is none, or is of another model than the last."""
    identity, rows = chain[-1]["identity"], {stage: [] for stage in RESULTS}
    names = {made["identity"]: f"iteration {k}" for k, made in enumerate(chain)}
    names |= {chain[0]["identity"]: "the base model"} | {identity: "this model"}
    for file in files:
        if not epath.Path(file).exists():
            raise UserError(f"--results {file} does not exist")
        manifest = read_manifest(file)
        if manifest is None or manifest.stage not in RESULTS:
            raise UserError(
                f"--results {file}: has no manifest of stages.evaluate compare, score or kl: give "
                "a file that one of these wrote"
            )
        models = _models_of(file, manifest)
        ours = models if manifest.stage == "evaluate kl" else models[:1]
        if identity not in ours and None not in ours:
            raise UserError(
                f"--results {file}: is of another model ({ours[0][:12]}) than this "
                f"({identity[:12]})"
            )
        called = [names.get(model, model and f"`{model[:12]}`") for model in models]
        try:
            row = RESULTS[manifest.stage][1](json.loads(epath.Path(file).read_text()), *called)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--results {file}: damaged ({error!r}): make it again") from None
        rows[manifest.stage].append([*row, "yes" if identity in ours else UNKNOWN])
    return [
        _table([*RESULTS[stage][0], "of these weights"], found)
        for stage, found in rows.items()
        if found
    ]


def _models_of(file: str, manifest: Manifest) -> tuple[str | None, str | None]:
    """The identities, where the manifests tell, of the model judged and the one it was set against;
    of KL(first ‖ second)."""
    if manifest.stage == "evaluate kl":
        sampler = manifest.identities["sampler"]
        return None if sampler == "unknown" else sampler, manifest.identities["model"]
    entries = provenance(file)
    sides: dict[str, str | None] = {"outputs": None, "baseline": None}
    for side in sides:
        content = next((e["identities"][side] for e in entries if side in e["identities"]), None)
        found = (e["identities"].get("model") for e in entries if e["sha256"] == content)
        sides[side] = next(found, None)
    return sides["outputs"], sides["baseline"]


def _compare(found: dict, _: str | None, baseline: str | None) -> list[str]:
    controlled = found["length_controlled_win_rate"]
    return [
        baseline or short_name(found["generators"][1]),
        short_name(found["ranker"]),
        str(found["n"]),
        _rate(found["win_rate"], *found["interval"]),
        UNKNOWN if controlled is None else f"{controlled:.1%}",
        ", ".join(f"{length:.0f}" for length in found["mean_length"]),
    ]


def _score(found: dict, _: str | None, baseline: str | None) -> list[str]:
    controlled = found["length_controlled_winrate"]
    return [
        baseline or str(found["reference"] or UNKNOWN),
        str(found["n_total"]),
        _rate(*(value / 100 for value in (found["win_rate"], *found["interval"]))),
        UNKNOWN if controlled is None else f"{controlled:.1f}% ({found['length_control']})",
        str(found["avg_length"]),
    ]


def _kl(found: dict, sampler: str | None, model: str | None) -> list[str]:
    a_token, error = found["kl_per_token"], found["standard_error"]
    return [
        f"{sampler or UNKNOWN} ‖ {model}",
        short_name(found["samples"]),
        str(found["prompts"]),
        f"{a_token:.4f}" + ("" if error is None else f" ± {error:.2g}"),
    ]


RESULTS: dict[str, tuple[list[str], Callable[..., list[str]]]] = {
    "evaluate compare": (
        [
            "against",
            "judged by",
            "instructions",
            "win rate, 95% interval",
            "length-controlled",
            "mean characters, its and the other's",
        ],
        _compare,
    ),
    "evaluate score": (
        [
            "annotations against",
            "instructions",
            "win rate, 95% interval",
            "length-controlled",
            "mean characters",
        ],
        _score,
    ),
    "evaluate kl": (["KL(first ‖ second) of", "on", "prompts", "a token, and standard error"], _kl),
}


def _rate(rate: float, low: float, high: float) -> str:
    return f"{rate:.1%} [{low:.1%}, {high:.1%}]"


# ---------------------------------------------------------------------- the dataset's card


def dataset_card(splits: list[dict], features) -> tuple[dict, str]:
    """(what datasets needs in the front matter, the README.md) of a dataset of pairs.

    splits: [{"name", "path": within the folder, "rows", "bytes": of the file, "num_bytes": of its
    values in Arrow, "data": provenance or None}, …]. features: datasets.Features.
    """
    from datasets.info import DatasetInfo, DatasetInfosDict
    from datasets.splits import SplitDict, SplitInfo
    from huggingface_hub import DatasetCardData

    infos = SplitDict()
    for split in splits:
        infos.add(SplitInfo(split["name"], split["num_bytes"], split["rows"]))
    info = DatasetInfo(
        features=features,
        splits=infos,
        dataset_size=sum(s["num_bytes"] for s in splits),
        download_size=sum(s["bytes"] for s in splits),
    )
    front = DatasetCardData(tags=["preference", "dpo"], task_categories=["text-generation"])
    DatasetInfosDict({"default": info}).to_dataset_card_data(front)
    files = [{"split": split["name"], "path": split["path"]} for split in splits]
    front["configs"] = [{"config_name": "default", "data_files": files}]
    entries = [entry for split in splits for entry in split["data"] or []]
    blocks = [
        "# Preference pairs",
        "Of several answers to each prompt a ranker's best is `chosen` and its worst `rejected`. "
        "`all_generated_responses` and `all_rm_scores` hold every answer and its score.",
        "## Splits",
        _table(
            ["split", "rows", "bytes"],
            [(s["name"], f"{s['rows']:,}", f"{s['bytes']:,}") for s in splits],
        ),
        "## How they were made",
        _table(
            [
                "split",
                "prompts",
                "sampled by",
                "answers to each",
                "ranker",
                "choice",
                "mean characters",
            ],
            [(s["name"], *_making(s["data"] or [])) for s in splits],
        ),
        "## Licence",
        "Not known: the manifests record none of the prompts"
        + (f" ({', '.join(_datasets(entries))})" if _datasets(entries) else "")
        + " or of the model that answered them. Look before you publish.",
        "## Limits",
        "- The answers are a model's; the manifests record no check of them by a person.\n"
        "- The preferences are the ranker's, not people's.",
    ]
    return {name: front[name] for name in ("configs", "dataset_info")}, _card(
        front.to_yaml(), blocks
    )


def _making(data: list[Entry]) -> list[str]:
    pairs, ranked, samples = (_entry(data, stage) for stage in ("pairs", "rank", "sample"))
    lengths = pairs.get("results", {}).get("lengths", {}).get("characters", {})
    model = pairs.get("identities", {}).get("model")
    return [
        _prompts(data),
        UNKNOWN if model is None else f"`{model[:12]}`",
        _say(samples.get("arguments", {}), "{n}, temperature {temperature}, top-p {top_p}"),
        ranked.get("results", {}).get("ranker", UNKNOWN),
        _say(pairs.get("arguments", {}), "{strategy}, length penalty {length_penalty}"),
        f"chosen {lengths['chosen']['mean']:.0f}, rejected {lengths['rejected']['mean']:.0f}"
        if "gap" in lengths
        else UNKNOWN,
    ]


# ---------------------------------------------------------------------- Markdown, and writing it


def _card(front: str, blocks: list[str]) -> str:
    text = f"---\n{front}\n---\n\n" + "\n\n".join(blocks) + "\n"
    return f"{text}\n<!-- made from the manifests, sha256 {text_sha256(text)} -->\n"


def _table(header: Iterable[str], rows: Rows) -> str:
    header = list(header)
    lines = [header, ["-"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def write(path: str, card: str) -> bool:
    """Write a card to `path` unless a card that a user changed is there; whether it is `card`."""
    file = epath.Path(path)
    if file.exists():
        there = file.read_text()
        if there == card:
            return True
        made = MADE.search(there)
        if made is None or text_sha256(there[: made.start()]) != made[1]:
            return False
    write_atomically(path, card)
    return True
