"""Pairs as Parquet, in the columns of snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset: both ways.

`write_split` puts a pairs.jsonl into DIR/data/SPLIT-00000-of-00001.parquet; several iterations
gather in one DIR, and datasets.load_dataset(DIR, split="train_iteration_1") reads the split's name
from the file's. `read_dataset` and `read_prompts_dataset` make pairs.jsonl and prompts.jsonl from
such a folder or from a dataset on the hub, row by row.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from scripts import cards
from sharding.errors import UserError
from stages.files.output import Manifest, Output
from stages.files.paths import file_sha256, local_path, publish, text_sha256, write_atomically
from stages.files.provenance import provenance
from stages.files.rows import field, read_rows
from stages.files.run import stop_signal

MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("all_generated_responses", pa.list_(pa.string())),
        ("all_rm_scores", pa.list_(pa.float64())),
    ]
)
ROWS_AT_ONCE = 1000
# In the file's metadata: the pairs.jsonl it was made from, and the provenance of that (JSON).
SOURCE, PROVENANCE = b"pairs_sha256", b"provenance"


# ---------------------------------------------------------------------- writing


def write_split(pairs: str, directory: str, split: str, overwrite: bool = False) -> str:
    """Write the rows of the pairs.jsonl `pairs` as the split `split` of the dataset in `directory`.

    Gives the path of the file. Columns beyond the published ones stay in the pairs.jsonl. Halves of
    surrogate pairs, which Parquet's UTF-8 cannot hold, become U+FFFD.
    """
    path = os.path.join(directory, "data", f"{split}-00000-of-00001.parquet")
    source = file_sha256(pairs).encode()
    if epath.Path(path).exists() and not overwrite:
        with epath.Path(path).open("rb") as file:
            if (pq.read_schema(file).metadata or {}).get(SOURCE) == source:
                print(f"{path} is finished already")
                return path
        raise UserError(f"{path} exists from other pairs: choose another folder or --overwrite")
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{local_path(path)}.tmp"
    rows = 0
    known = {SOURCE: source, PROVENANCE: json.dumps(provenance(pairs)).encode()}
    with pq.ParquetWriter(temporary, SCHEMA.with_metadata(known)) as writer:
        for batch in _batches(pairs):
            writer.write_table(pa.Table.from_pylist(batch, schema=SCHEMA))
            rows += len(batch)
    publish(temporary, path)
    print(f"{path}: {rows} rows")
    return path


def write_card(directory: str) -> None:
    """Write DIR/README.md, the dataset's card, of all splits there. Of a card that a user changed
    only what `datasets` reads is renewed, the list of splits in its front matter."""
    from datasets import Features
    from huggingface_hub import DatasetCard

    files = sorted(
        (epath.Path(directory) / "data").glob("*-00000-of-00001.parquet"), key=_split_order
    )
    machine_read, card = cards.dataset_card(
        [_split_facts(file) for file in files], Features.from_arrow_schema(SCHEMA)
    )
    path = os.path.join(directory, "README.md")
    if cards.write(path, card):
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


def _split_facts(file) -> dict:
    with file.open("rb") as opened:
        parquet = pq.ParquetFile(opened)
        known = (parquet.schema_arrow.metadata or {}).get(PROVENANCE)
        return {
            "name": _split_name(file),
            "path": f"data/{file.name}",
            "rows": parquet.metadata.num_rows,
            "bytes": file.stat().length,
            "num_bytes": sum(batch.nbytes for batch in parquet.iter_batches()),
            "data": None if known is None else json.loads(known),
        }


def _split_name(file) -> str:
    return file.name.removesuffix("-00000-of-00001.parquet")


def _split_order(file) -> tuple:
    """Iteration by iteration, train before test."""
    kind, _, number = _split_name(file).partition("_iteration_")
    return (int(number) if number.isdigit() else 0, kind != "train", kind, number)


def _batches(pairs: str) -> Iterator[list[dict]]:
    batch = []
    for where, row in read_rows(pairs):
        columns = {name: field(row, name, object, where) for name in SCHEMA.names}
        batch.append(_valid_unicode(columns))
        if len(batch) == ROWS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _valid_unicode(value):
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_valid_unicode(v) for v in value]
    if isinstance(value, dict):
        return {name: _valid_unicode(v) for name, v in value.items()}
    return value


# ---------------------------------------------------------------------- reading


def read_dataset(source: str, out: str, split: str | None = None, overwrite: bool = False) -> None:
    """Write the preference pairs of a dataset to the pairs.jsonl `out`.

    source: a folder in the hub's layout, or the name of a dataset on the hub. split: needed where
    there are several. Needs the columns prompt, chosen and rejected (lists of {role, content}, the
    answer last); other columns are carried. There are no token ids: DPO tokenises such pairs.
    A prompt of several turns gets `messages`; a column of that name is carried as
    `source_messages`. A further pair under one prompt_id gets the id "ID#2"; a row that repeats
    another is merged. Raises UserError.
    """
    split, inputs = _find_split(source, split)
    manifest = Manifest("from-parquet", {"split": split}, inputs, identities={})
    output = Output.open(out, manifest, overwrite)
    if output.finished:
        return
    counts, order, seen = Counter(), [], {}
    with stop_signal() as check_stop:
        for where, source_row in _rows(source, split, ("prompt", "chosen", "rejected")):
            check_stop()
            counts["in"] += 1
            row, reason = _pair(source_row, where)
            digest = text_sha256(repr(sorted(row.items())))
            base, n = row["prompt_id"], 1
            while seen.get(row["prompt_id"], digest) != digest:
                n += 1
                row["prompt_id"] = f"{base}#{n}"
            if row["prompt_id"] in seen:
                counts["merged: the same row again"] += 1
                continue
            seen[row["prompt_id"]] = digest
            order.append(row["prompt_id"])
            if output.has(row["prompt_id"]):
                continue
            if reason is None:
                output.write(row)
            else:
                output.set_aside(row, reason)
    output.finish(order, counts)


def read_prompts_dataset(
    source: str,
    out: str,
    split: str | None = None,
    first: int = 0,
    last: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write the prompts (prompt_id, prompt) of a dataset's rows [first, last) to `out`.

    Needs the column prompt; prompt_id is made where it is missing. For the published recipe: any
    split of the published dataset, or of HuggingFaceH4/ultrafeedback_binarized. Empty prompts are
    set aside, the same prompt again is merged. Raises UserError.
    """
    split, inputs = _find_split(source, split)
    arguments = {"split": split, "first": first, "last": last}
    manifest = Manifest("prompts-from-parquet", arguments, inputs, identities={})
    output = Output.open(out, manifest, overwrite)
    if output.finished:
        return
    counts, order, seen = Counter(), [], {}
    with stop_signal() as check_stop:
        for where, source_row in islice(_rows(source, split, ("prompt",)), first, last):
            check_stop()
            counts["in"] += 1
            prompt = field(source_row, "prompt", str, where)
            prompt_id = source_row.get("prompt_id") or text_sha256(prompt)
            digest = text_sha256(prompt)
            if seen.setdefault(prompt_id, digest) != digest:
                raise UserError(f"{where}: prompt_id {prompt_id!r} stood above with another prompt")
            if len(seen) == len(order):
                counts["merged: the same prompt again"] += 1
                continue
            order.append(prompt_id)
            row = {"prompt_id": prompt_id, "prompt": prompt}
            if output.has(prompt_id):
                continue
            if prompt.strip():
                output.write(row)
            else:
                output.set_aside(row, "the prompt is empty")
    output.finish(order, counts)


def _find_split(source: str, split: str | None) -> tuple[str, dict[str, str]]:
    """(split, {file: sha256, or the file's address and revision on the hub})."""
    import datasets  # here, since it takes a second and writing does without it

    if not os.path.isdir(source) and (os.path.exists(source) or source.count("/") != 1):
        raise UserError(f"{source} is no folder: give one that holds data/SPLIT-….parquet files")
    try:
        files = datasets.load_dataset_builder(source).config.data_files or {}
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{source} is neither a folder with a dataset nor one on the hub ({reason})"
        ) from None
    if split is None and len(files) == 1:
        split = next(iter(files))
    if split not in files:
        problem = "has several splits" if split is None else f"has no split {split!r}"
        raise UserError(f"{source} {problem}: give one of {', '.join(sorted(files))}")
    return split, {f: file_sha256(f) if os.path.isfile(f) else f for f in files[split]}


def _rows(source: str, split: str, needed: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """(where, row) of a split, streamed: the dataset is never in memory."""
    import datasets

    try:
        stream = datasets.load_dataset(source, split=split, streaming=True)
        for number, row in enumerate(stream, 1):
            missing = [name for name in needed if name not in row]
            if missing:
                raise UserError(
                    f"{source}, split {split}: no column {', '.join(missing)} "
                    f"(there are {', '.join(row)})"
                )
            yield f"{source}, split {split}, row {number}", row
    except pa.ArrowException as error:
        raise UserError(f"{source}, split {split}: {error}: copy the file again") from None


def _pair(source_row: dict, where: str) -> tuple[dict, str | None]:
    """The pairs.jsonl row, and why it cannot be used (None where it can)."""
    prompt = field(source_row, "prompt", str, where)
    chosen, rejected = (_turns(source_row, name, where) for name in ("chosen", "rejected"))
    single_turn = [{"role": "user", "content": prompt}]
    conversation = chosen[:-1] or single_turn
    row = {"prompt_id": source_row.get("prompt_id") or text_sha256(prompt)}
    row["prompt"] = prompt
    if conversation != single_turn:
        row["messages"] = conversation
    row["chosen"] = [*conversation, chosen[-1]]
    row["rejected"] = [*(rejected[:-1] or single_turn), rejected[-1]]
    texts = source_row.get("all_generated_responses")
    for name, answer in (("chosen", chosen[-1]), ("rejected", rejected[-1])):
        if isinstance(texts, list) and answer["content"] in texts:
            row[f"{name}_index"] = texts.index(answer["content"])
    for name, value in source_row.items():
        if name == "messages":
            row["source_messages"] = value
        elif name not in row:
            row[name] = value

    answers = (chosen[-1]["content"], rejected[-1]["content"])
    if row["chosen"][:-1] != row["rejected"][:-1]:
        return row, "chosen and rejected answer different conversations"
    if conversation[-1]["role"] != "user" or not conversation[-1]["content"].strip():
        return row, "there is no user turn to answer"
    if not all(text.strip() for text in answers):
        return row, "an answer is empty"
    if answers[0] == answers[1]:
        return row, "chosen and rejected are the same text"
    return row, None


def _turns(row: dict, name: str, where: str) -> list[dict]:
    """row[name] as [{"role", "content"}, …] that ends with the assistant's answer."""
    turns = field(row, name, list, where)
    for turn in turns:
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise UserError(f"{where}: {name} is no list of {{role, content}}")
    if not turns or turns[-1]["role"] != "assistant":
        raise UserError(f"{where}: {name} does not end with the assistant's answer")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
