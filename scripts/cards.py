"""Model and dataset cards for the hub, filled from the manifests.

A card says "not known" where the manifests say nothing. Checkpoints and Parquet files carry the
manifests of what they were made from (stages/files/provenance.py), so a card needs no other file.
Every card ends with the hash of its text: a card that a user changed is not overwritten. Runs
without JAX.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from etils import epath, epy
from huggingface_hub import CardData, DatasetCard, DatasetCardData, ModelCard, ModelCardData

from sharding.errors import UserError, check_scheme
from stages.files.output import Manifest, read_manifest, with_roles
from stages.files.paths import text_sha256, write_atomically
from stages.files.provenance import Entry, provenance, short_name
from stages.files.rows import parse_json

with epy.lazy_imports():  # loading takes two seconds; only writing a card needs them
    import datasets
    import jinja2

    from stages.files import formats

UNKNOWN = "not known"
MADE = re.compile(r"\n<!-- made from the manifests, sha256 ([0-9a-f]{64}) -->\n\Z")
LICENCE = ("license", "license_name", "license_link")
HUB_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")


def source_of_hf(folder: str, src: str, commit: str | None) -> dict:
    """Where a Hugging Face folder came from, and the licence that its own card states."""
    source = {"hub_id": src, "revision": commit} if commit is not None else {}
    readme = epath.Path(folder) / "README.md"
    if readme.exists():
        try:
            data = ModelCard(readme.read_text(), ignore_metadata_errors=True).data.to_dict()
        except Exception:  # YAML raises errors of many kinds; a broken card states nothing
            data = {}
        source |= {name: data[name] for name in LICENCE if isinstance(data.get(name), str)}
    return source


# ---------------------------------------------------------------------- the model's card


def model_card(checkpoint: dict, dtype: str, rounding: str | None, results: list[str]) -> str:
    """The README.md of an exported model.

    checkpoint: the checkpoint's manifest. rounding: a sentence on what storing it as `dtype` loses.
    results: files of stages.evaluate compare, score or kl. Raises UserError for a file that is none
    of these, or has figures of another model.
    """
    chain = _chain(checkpoint)
    trainings = [made for made in chain if made["origin"].get("stage") == "dpo"]
    source = chain[0].get("source", {})
    entries = [entry for made in trainings for entry in made.get("data", [])]
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=source.get("hub_id"),
        datasets=_datasets(entries) or None,
        tags=["preference-alignment", "dpo"] if trainings else None,
        **{name: source[name] for name in LICENCE if name in source},
    )
    return _card(
        front,
        "model_card.md.jinja",
        made=checkpoint,
        dtype=dtype,
        rounding=rounding,
        start=chain[0],
        source=source,
        base=source.get("hub_id") or source.get("name"),
        files=_names(chain[0]["origin"].get("inputs", {})),
        trainings=[_training(made) for made in trainings],
        results=_results(results, chain),
    )


def _chain(checkpoint: dict) -> list[dict]:
    """The manifests of the checkpoint and of those it was trained from, oldest first."""
    parent = checkpoint.get("parent")
    return (_chain(parent) if parent else []) + [checkpoint]


def _training(made: dict) -> dict[str, str]:
    """One iteration's column of the card: {setting: value}."""
    origin, data = made["origin"], made.get("data", [])
    pairs, ranked, samples = (_entry(data, stage) for stage in ("pairs", "rank", "sample"))
    dpo, choice = origin["arguments"], pairs.get("arguments", {})
    counts, held = origin.get("counts", {}), origin.get("results", {})
    aside = sum(n for reason, n in counts.items() if reason.startswith("set aside"))
    accuracy = held.get("eval_rewards/accuracies")
    edited = any(entry["edited"] for entry in data)
    return {
        "prompts": _prompts(data),
        "answers to each": _fill(
            "{n}, temperature {temperature}, top-p {top_p}, up to {max_new_tokens} tokens",
            samples.get("arguments", {}),
        ),
        "ranker": ranked.get("results", {}).get("ranker", UNKNOWN),
        "pairs": (str(counts["in"] - aside) if "in" in counts else UNKNOWN)
        + (f", {choice['strategy']}" if choice else "")
        + (", edited by hand" if edited else ""),
        "length penalty": _fill("{length_penalty}", choice),
        "mean characters": _mean_characters(pairs),
        "loss": _fill("{loss}, β {beta}", dpo),
        "optimizer": _fill(
            "{optimizer}, learning rate {learning_rate}, {schedule}, warm-up {warmup_ratio}", dpo
        ),
        "epochs, pairs per step": _fill("{epochs}, {batch_size}", dpo),
        "longest, tokens": _fill("{max_length}, of these prompt {max_prompt_length}", dpo),
        "computed in": _fill("{dtype}", dpo),
        "test pairs ordered right": "none were held out" if accuracy is None else f"{accuracy:.1%}",
    }


def _entry(data: list[Entry], stage: str) -> Entry:
    return next((entry for entry in data if entry["stage"] == stage), {})


def _fill(form: str, values: dict) -> str:
    try:
        return form.format(**values)
    except KeyError:
        return UNKNOWN


def _mean_characters(pairs: Entry) -> str:
    lengths = pairs.get("results", {}).get("lengths", {}).get("characters", {})
    if "gap" not in lengths:
        return UNKNOWN
    return "chosen {chosen[mean]:.0f}, rejected {rejected[mean]:.0f}".format(**lengths)


def _prompts(data: list[Entry]) -> str:
    """The oldest file of prompts that the manifests name, and the number of prompts."""
    stages = ("sample", "prompts", "prompts-from-parquet", "from-parquet")
    readers = [entry for entry in data if entry["stage"] in stages]
    if not readers:
        return UNKNOWN
    return f"{_names(readers[-1]['inputs'])} ({readers[0]['counts'].get('in', UNKNOWN)})"


def _names(inputs: dict) -> str:
    return ", ".join(short_name(entry["path"]) for entry in with_roles(inputs).values())


def _datasets(entries: list[Entry]) -> list[str]:
    """Hub ids of the datasets that files were read from."""
    inputs = [one for entry in entries for one in with_roles(entry["inputs"]).values()]
    return sorted({match[1] for one in inputs if (match := HUB_DATASET.match(one["path"]))})


# ---------------------------------------------------------------------- the model's results


def _results(files: list[str], chain: list[dict]) -> list[tuple[str, list[list[str]]]]:
    """Tables (columns, rows) of the results in `files`, which must be of the last model of
    `chain`."""
    identity, rows = chain[-1]["identity"], {stage: [] for stage in RESULTS}
    names = {made["identity"]: f"iteration {k}" for k, made in enumerate(chain)}
    names |= {chain[0]["identity"]: "the base model"} | {identity: "this model"}
    for file in files:
        check_scheme(file, "--results")
        if not epath.Path(file).exists():
            raise UserError(f"--results {file} does not exist")
        manifest = read_manifest(file)
        if manifest is None or manifest.stage not in RESULTS:
            raise UserError(
                f"--results {file}: has no manifest of stages.evaluate compare, score or kl: give "
                "a file that one of these wrote"
            )
        models = _models_of(file, manifest)
        # KL measures a pair of models; the other results measure the first, against the second.
        measured = models if manifest.stage == "evaluate kl" else models[:1]
        if identity not in measured and None not in measured:
            raise UserError(
                f"--results {file}: is of another model ({measured[0][:12]}) than this "
                f"({identity[:12]})"
            )
        called = [names.get(model, model and f"`{model[:12]}`") for model in models]
        try:
            row = RESULTS[manifest.stage][1](parse_json(epath.Path(file).read_bytes()), *called)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--results {file}: damaged ({error!r}): make it again") from None
        rows[manifest.stage].append([*row, "yes" if identity in measured else UNKNOWN])
    return [
        (f"{RESULTS[stage][0]} | of these weights", lines) for stage, lines in rows.items() if lines
    ]


def _models_of(file: str, manifest: Manifest) -> list[str | None]:
    """Identities of the model judged and of its opponent, or of both models in KL(first ‖ second);
    None where the manifests do not tell."""
    if manifest.stage == "evaluate kl":
        sampler = manifest.identities["sampler"]
        return [None if sampler == "unknown" else sampler, manifest.identities["model"]]
    entries, models = provenance(file), []
    for side in ("outputs", "baseline"):
        content = next((e["identities"][side] for e in entries if side in e["identities"]), None)
        matching = (e["identities"].get("model") for e in entries if e["sha256"] == content)
        models.append(next(matching, None))
    return models


def _compare(result: dict, _: str | None, baseline: str | None) -> list[str]:
    controlled = result["length_controlled_win_rate"]
    return [
        baseline or short_name(result["generators"][1]),
        short_name(result["ranker"]),
        str(result["n"]),
        _rate(result["win_rate"], *result["interval"]),
        UNKNOWN if controlled is None else f"{controlled:.1%}",
        ", ".join(f"{length:.0f}" for length in result["mean_length"]),
    ]


def _score(result: dict, _: str | None, baseline: str | None) -> list[str]:
    controlled = result["length_controlled_winrate"]
    return [
        baseline or str(result["reference"] or UNKNOWN),
        str(result["n_total"]),
        _rate(*(value / 100 for value in (result["win_rate"], *result["interval"]))),
        UNKNOWN if controlled is None else f"{controlled:.1f}% ({result['length_control']})",
        str(result["avg_length"]),
    ]


def _kl(result: dict, sampler: str | None, model: str | None) -> list[str]:
    kl, error = result["kl_per_token"], result["standard_error"]
    return [
        f"{sampler or UNKNOWN} ‖ {model}",
        short_name(result["samples"]),
        str(result["prompts"]),
        f"{kl:.4f}" + ("" if error is None else f" ± {error:.2g}"),
    ]


def _rate(rate: float, low: float, high: float) -> str:
    return f"{rate:.1%} [{low:.1%}, {high:.1%}]"


# The stage that wrote a result → the columns of its table, and the function that fills a row.
RESULTS: dict[str, tuple[str, Callable[..., list[str]]]] = {
    "evaluate compare": (
        "against | judged by | instructions | win rate, 95% interval | length-controlled | "
        "mean characters, its and the other's",
        _compare,
    ),
    "evaluate score": (
        "annotations against | instructions | win rate, 95% interval | length-controlled | "
        "mean characters",
        _score,
    ),
    "evaluate kl": ("KL(first ‖ second) of | on | prompts | per token, and standard error", _kl),
}


# ---------------------------------------------------------------------- the dataset's card


def dataset_card(splits: list[dict], features) -> tuple[dict, str]:
    """(what `datasets` reads in the front matter, the README.md) of a dataset of pairs.

    splits: [{"name", "path": within the folder, "rows", "bytes": size of the file, "num_bytes":
    size of its values in Arrow, "data": provenance or None}, …]. features: datasets.Features.
    """
    infos = datasets.splits.SplitDict()
    for split in splits:
        infos.add(datasets.splits.SplitInfo(split["name"], split["num_bytes"], split["rows"]))
    info = datasets.info.DatasetInfo(
        features=features,
        splits=infos,
        dataset_size=sum(split["num_bytes"] for split in splits),
        download_size=sum(split["bytes"] for split in splits),
    )
    front = DatasetCardData(tags=["preference", "dpo"], task_categories=["text-generation"])
    datasets.info.DatasetInfosDict({"default": info}).to_dataset_card_data(front)
    files = [{"split": split["name"], "path": split["path"]} for split in splits]
    front["configs"] = [{"config_name": "default", "data_files": files}]
    card = _card(
        front,
        "dataset_card.md.jinja",
        splits=splits,
        making=[(split["name"], *_making(split["data"] or [])) for split in splits],
        hub_ids=_datasets([entry for split in splits for entry in split["data"] or []]),
    )
    return {name: front[name] for name in ("configs", "dataset_info")}, card


def write_dataset_card(directory: str) -> None:
    """Write DIR/README.md, the card of all splits in DIR/data. If a user changed the card, only the
    part that `datasets` reads is renewed: the list of splits in its front matter."""
    features = datasets.Features.from_arrow_schema(formats.SCHEMA)
    machine_read, card = dataset_card(formats.split_facts(directory), features)
    path = os.path.join(directory, "README.md")
    if write(path, card):
        return
    try:
        changed = DatasetCard(epath.Path(path).read_text(), ignore_metadata_errors=True)
    except Exception as error:  # YAML errors of many kinds
        raise UserError(f"{path}: its front matter cannot be read ({error}): mend it") from None
    if {name: changed.data.get(name) for name in machine_read} != machine_read:
        for name, value in machine_read.items():
            changed.data[name] = value
        write_atomically(path, str(changed))
    print(f"{path} was changed by hand: only the splits in its front matter are kept up to date")


def _making(data: list[Entry]) -> list[str]:
    """How the pairs of one split were made: the cells of its row."""
    pairs, ranked, samples = (_entry(data, stage) for stage in ("pairs", "rank", "sample"))
    model = pairs.get("identities", {}).get("model")
    return [
        _prompts(data),
        UNKNOWN if model is None else f"`{model[:12]}`",
        _fill("{n}, temperature {temperature}, top-p {top_p}", samples.get("arguments", {})),
        ranked.get("results", {}).get("ranker", UNKNOWN),
        _fill("{strategy}, length penalty {length_penalty}", pairs.get("arguments", {})),
        _mean_characters(pairs),
    ]


# ---------------------------------------------------------------------- Markdown, and writing it


def _card(front: CardData, template: str, **values) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": _cell, "table": _table}
    body = environment.get_template(template).render(values)
    text = f"---\n{front.to_yaml()}\n---\n\n{body.rstrip()}\n"
    return f"{text}\n<!-- made from the manifests, sha256 {text_sha256(text)} -->\n"


def _table(rows: list[list[str]], columns: str) -> str:
    header = columns.split(" | ")
    lines = [header, ["-"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(str(text or UNKNOWN).split()).replace("|", "\\|")


def write(path: str, card: str) -> bool:
    """Write a card to `path`; False, and nothing is written, where a user changed the old card."""
    file = epath.Path(path)
    if file.exists():
        old = file.read_text()
        if old == card:
            return True
        made = MADE.search(old)
        if made is None or text_sha256(old[: made.start()]) != made[1]:
            return False
    write_atomically(path, card)
    return True
