"""Pairs as Parquet, in the columns of snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset: both ways.

`write_split` puts a pairs.jsonl into DIR/data/SPLIT-00000-of-00001.parquet. The splits of several
iterations share one DIR, and datasets.load_dataset(DIR, split="train_iteration_1") takes a split's
name from its file's. `read_dataset` and `read_prompts_dataset` make pairs.jsonl and prompts.jsonl
of such a folder, or of any dataset that `datasets` reads, row by row. Runs without JAX.
"""

import contextlib
import datetime
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath, epy

from model.disk import MARK, naming
from sharding.errors import UserError, first_line
from stages.files.lock import lock
from stages.files.output import Manifest, Output, an_input
from stages.files.paths import (
    file_sha256,
    local_path,
    make_folder,
    publish,
    text_sha256,
)
from stages.files.provenance import provenance
from stages.files.rows import Fields, Pair, field, json_rows, parse_json, refuse_unasked
from stages.files.run import stop_signal

with epy.lazy_imports():  # takes a second, and only reading needs it
    import datasets

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
KINDS = dict(zip(SCHEMA.names, (str, str, list, list, list, list)))
ROWS_AT_ONCE = 1000
# In the file's metadata: the sha256 of the pairs.jsonl, and its provenance as JSON.
SOURCE, PROVENANCE = b"pairs_sha256", b"provenance"
FILE_END = "-00000-of-00001.parquet"


# ---------------------------------------------------------------------- writing


def write_split(pairs: str, directory: str, split: str, overwrite: bool = False) -> str:
    """Write the rows of the pairs.jsonl `pairs` as the split `split` of the dataset in `directory`,
    and return the path of the file.

    Columns beyond the published ones stay in the pairs.jsonl. Halves of surrogate pairs, which
    Parquet's UTF-8 cannot hold, become U+FFFD. Raises UserError.
    """
    path = os.path.join(directory, "data", f"{split}{FILE_END}")
    make_folder(epath.Path(path).parent)
    with lock(path):
        source = file_sha256(pairs).encode()
        if epath.Path(path).exists() and not overwrite:
            with (
                epath.Path(path).open("rb") as file,
                contextlib.suppress(pa.ArrowException, OSError),
            ):
                if (pq.read_schema(file).metadata or {}).get(SOURCE) == source:
                    print(f"{path} is finished already")
                    return path
            raise UserError(f"{path} exists from other pairs: choose another folder or --overwrite")
        metadata = {SOURCE: source, PROVENANCE: json.dumps(provenance(pairs)).encode()}
        temporary = f"{local_path(path)}{MARK}"
        rows = 0
        schema = SCHEMA.with_metadata(metadata)
        with naming(path), pq.ParquetWriter(temporary, schema) as writer:
            for table in _tables(pairs):
                writer.write_table(table)
                rows += table.num_rows
        publish(temporary, path)
    print(f"{path}: {rows} rows")
    return path


def _tables(pairs: str) -> Iterator[pa.Table]:
    """The published columns of all rows, ROWS_AT_ONCE at a time."""
    lines = json_rows(pairs)
    while batch := list(islice(lines, ROWS_AT_ONCE)):
        rows = []
        for where, row in batch:
            columns = {name: field(row, name, kind, where) for name, kind in KINDS.items()}
            scores = columns["all_rm_scores"]
            if not all(type(x) in (int, float) and abs(x) < math.inf for x in scores):
                raise UserError(f"{where}: all_rm_scores must hold finite numbers only")
            rows.append(_valid_unicode(columns))
        try:
            yield pa.Table.from_pylist(rows, schema=SCHEMA)
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise UserError(
                f"{batch[0][0]}, or one of the {len(batch) - 1} rows below: not the published "
                f"columns ({error}): correct it"
            ) from None


def _valid_unicode(value):
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_valid_unicode(v) for v in value]
    if isinstance(value, dict):
        return {name: _valid_unicode(v) for name, v in value.items()}
    return value


def split_facts(directory: str) -> list[dict]:
    """What a dataset card tells of each split in a folder, iteration by iteration, train before
    test: {"name", "path" within the folder, "rows", "bytes" of the file, "num_bytes" of its values
    in Arrow, "data": the provenance that the file carries, or None}. Raises UserError."""
    facts = []
    for file in (epath.Path(directory) / "data").glob(f"*{FILE_END}"):
        try:
            with file.open("rb") as opened:
                parquet = pq.ParquetFile(opened)
                data = (parquet.schema_arrow.metadata or {}).get(PROVENANCE)
                facts.append(
                    {
                        "name": file.name.removesuffix(FILE_END),
                        "path": f"data/{file.name}",
                        "rows": parquet.metadata.num_rows,
                        "bytes": file.stat().length,
                        "num_bytes": sum(batch.nbytes for batch in parquet.iter_batches()),
                        "data": None if data is None else parse_json(data),
                    }
                )
        except (pa.ArrowException, ValueError, OSError) as error:  # OSError: a damaged footer
            raise UserError(
                f"{file} cannot be read ({first_line(error)}): remove it, or copy it again"
            ) from None

    def place(split: dict) -> tuple:
        kind, _, number = split["name"].partition("_iteration_")
        return (int(number) if number.isdecimal() else 0, kind != "train", kind, number)

    return sorted(facts, key=place)


# ---------------------------------------------------------------------- reading


def read_dataset(source: str, out: str, split: str | None = None) -> None:
    """Write the preference pairs of a dataset to the pairs.jsonl `out`.

    source: a folder in the hub's layout, or the name of a dataset on the hub. split: SPLIT or
    CONFIG/SPLIT, needed where there are several. The columns prompt, chosen and rejected (lists of
    {role, content}, the answer last) are needed; others are carried. There are no token ids, so DPO
    tokenises such pairs. A prompt of several turns gets `messages`; a column of that name is
    carried as `source_messages`. A second pair under one prompt_id gets the id "ID#2"; a row that
    repeats another is merged. Raises UserError.
    """
    shards, counts = Shards(source, split), Counter()

    def pairs() -> Iterator[tuple[Fields, str | None]]:
        seen: dict[str, str] = {}
        for where, source_row in shards.rows(("prompt", "chosen", "rejected")):
            counts["in"] += 1
            row, reason = _pair(_json_values(source_row, where, counts), where)
            digest = text_sha256(repr(sorted(row.items())))
            base, n = row["prompt_id"], 1
            while seen.get(row["prompt_id"], digest) != digest:
                n += 1
                row["prompt_id"] = f"{base}#{n}"
            if row["prompt_id"] in seen:
                counts["merged: the same row again"] += 1
                continue
            seen[row["prompt_id"]] = digest
            yield row, reason

    manifest = Manifest("from-parquet", {"split": shards.split}, shards.inputs(), {})
    write_rows(out, manifest, pairs(), counts)


def read_prompts_dataset(
    source: str, out: str, split: str | None = None, first: int = 0, last: int | None = None
) -> None:
    """Write the prompts (prompt_id, prompt) of a dataset's rows [first, last) to `out`.

    The column prompt is needed; prompt_id is made where it is missing. The published recipe takes
    them from any split of the published dataset, or from HuggingFaceH4/ultrafeedback_binarized.
    Empty prompts are set aside, a repeated prompt is merged. Raises UserError.
    """
    if first < 0:
        raise UserError(f"--first is {first}: rows are counted from 0")
    if last is not None and last <= first:
        raise UserError(f"--last is {last}: it must be above --first, which is {first}")
    shards, counts = Shards(source, split), Counter()

    def prompts() -> Iterator[tuple[Fields, str | None]]:
        seen: dict[str, str] = {}  # prompt_id → sha256 of the prompt
        for where, source_row in islice(shards.rows(("prompt",)), first, last):
            counts["in"] += 1
            prompt = field(source_row, "prompt", str, where)
            refuse_unasked(source_row, [{"content": prompt}], where)
            prompt_id, digest = _prompt_id(source_row, where), text_sha256(prompt)
            if seen.get(prompt_id, digest) != digest:
                raise UserError(f"{where}: prompt_id {prompt_id!r} stood above with another prompt")
            if prompt_id in seen:
                counts["merged: the same prompt again"] += 1
                continue
            seen[prompt_id] = digest
            row = {"prompt_id": prompt_id, "prompt": prompt}
            yield row, None if prompt.strip() else "the prompt is empty"
        if not seen and first:
            raise UserError(f"{source}, split {shards.split} has no row {first} (--first)")

    arguments = {"split": shards.split, "first": first, "last": last}
    manifest = Manifest("prompts-from-parquet", arguments, shards.inputs(), {})
    write_rows(out, manifest, prompts(), counts)


def write_rows(
    out: str,
    manifest: Manifest,
    rows: Iterable[tuple[Fields, str | None]],
    counts: Counter,
    overwrite: bool = False,
) -> None:
    """Write `rows`: (row, why it is set aside or None), with different prompt_ids. counts: filled
    while the rows are made."""
    output = Output.open(out, manifest, overwrite)
    if output.finished:
        return
    order: list[str] = []
    with stop_signal() as check_stop:
        for row, reason in rows:
            check_stop()
            order.append(row["prompt_id"])
            if not output.has(row["prompt_id"]):
                output.write(row) if reason is None else output.set_aside(row, reason)
    output.finish(order, counts)


class Shards:
    """One split of a dataset, read file by file.

    Each file's types are taken from the file itself, so that a column that is missing or of another
    type in another file is no obstacle.
    """

    def __init__(self, source: str, split: str | None):
        """split: SPLIT or CONFIG/SPLIT; None where there is only one. Raises UserError."""
        is_folder = os.path.isdir(source)
        if not is_folder and (os.path.exists(source) or source.count("/") != 1):
            raise UserError(
                f"{source} is no folder: give one that holds data/SPLIT-….parquet files"
            )
        if is_folder and set(os.path.abspath(source)) & set("[]*?"):
            raise UserError(
                f"{source}: the library datasets reads [ ] * ? in a path as a pattern: rename the "
                "folder, or give a symbolic link to it"
            )
        config, _, name = (split or "").rpartition("/")
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # each error is told here, once
        try:
            self.builder = datasets.load_dataset_builder(source, config or None)
        except Exception as error:  # no network, no such name, no such config, a script, …
            raise UserError(_why_not_opened(source, config, error)) from None
        files = {str(key): list(x) for key, x in (self.builder.config.data_files or {}).items()}
        if not name and len(files) == 1:
            name = next(iter(files))
        prefix = f"{config}/" if config else ""
        if name not in files:
            problem = f"has no split {split!r}" if name else "has several splits"
            splits = ", ".join(prefix + key for key in sorted(files))
            raise UserError(f"{source} {problem}: give one of {splits}")
        self.source, self.name, self.split, self.files = source, name, prefix + name, files[name]

    def inputs(self) -> dict[str, dict]:
        """The files for a manifest; those on the hub by their address, which has the revision."""
        return {
            f"{self.split} {i}": an_input(file, None if os.path.isfile(file) else file)
            for i, file in enumerate(self.files, 1)
        }

    def rows(self, needed: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
        """(where, row) of the split, streamed: the dataset is never in memory. Raises UserError
        where a file cannot be read, or a row lacks a column of `needed`."""
        place, number = f"{self.source}, split {self.split}", 0
        for file in self.files:
            try:
                for row in self._read(file):
                    number += 1
                    if missing := [name for name in needed if name not in row]:
                        raise UserError(
                            f"{place}, row {number} ({os.path.basename(file)}): no column "
                            f"{', '.join(missing)}, but {', '.join(row)}"
                        )
                    yield f"{place}, row {number}", row
            except UserError:
                raise
            except Exception as error:  # Parquet, CSV and JSON readers raise many kinds
                raise UserError(
                    f"{place}: {os.path.basename(file)} cannot be read ({first_line(error)}): "
                    "correct it, or copy it again"
                ) from None

    def _read(self, file: str) -> Iterator[dict]:
        self.builder.config.data_files = {self.name: [file]}
        self.builder.info.features = None
        if hasattr(self.builder.config, "batch_size"):  # of Parquet; else a file without rows fails
            self.builder.config.batch_size = ROWS_AT_ONCE
        stream = self.builder.as_streaming_dataset(self.name)
        # Images and sounds stay as they are stored: their libraries are not installed.
        yield from stream.decode(False) if stream.features else stream


def _why_not_opened(source: str, config: str, error: Exception) -> str:
    try:
        configs = datasets.get_dataset_config_names(source)
    except Exception:  # of many kinds: `error` says it better
        configs = []
    if (config and configs) or len(configs) > 1:
        problem = f"has no config {config!r}" if config else "has several configs"
        names = ", ".join(configs)
        return f"{source} {problem}: give --split CONFIG/SPLIT with one of the configs {names}"
    return f"{source} is neither a folder with a dataset nor one on the hub ({first_line(error)})"


# ---------------------------------------------------------------------- values and rows


def _json_values(row: dict, where: str, counts: Counter) -> Fields:
    """The row with values that JSON can hold: dates as ISO text; null for NaN, infinities and
    bytes, each counted in `counts`. Raises UserError where a published column holds one of these
    three."""

    def convert(value, column: str):
        if value is None or isinstance(value, str | bool | int):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        if isinstance(value, list | tuple):
            return [convert(v, column) for v in value]
        if isinstance(value, dict):
            return {str(name): convert(v, column) for name, v in value.items()}
        if isinstance(value, np.ndarray | np.generic):
            return convert(value.tolist(), column)
        if isinstance(value, datetime.date | datetime.time):  # datetime.datetime is a date
            return value.isoformat()
        if not isinstance(value, float | bytes):
            return str(value)
        what = "bytes" if isinstance(value, bytes) else "NaN or infinity"
        if column in KINDS and column != "prompt_id":
            raise UserError(f"{where}: column {column} holds {what}: correct or remove the row")
        counts[f"null for {what} in column {column}"] += 1
        return None

    return {name: convert(value, name) for name, value in row.items()}


def _prompt_id(row: dict, where: str) -> str:
    """The row's prompt_id as a text; where it has none, the sha256 of its prompt."""
    value = row.get("prompt_id")
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)  # integers of a column with gaps come as floats
    if value is None or value == "" or value != value:
        return text_sha256(field(row, "prompt", str, where))
    if isinstance(value, bool | list | dict | bytes):
        raise UserError(f"{where}: prompt_id is a {type(value).__name__}, not a text or a number")
    return str(value)


def _pair(source_row: Fields, where: str) -> tuple[Fields, str | None]:
    """The row of pairs.jsonl, and why it cannot be used (None where it can)."""
    prompt = field(source_row, "prompt", str, where)
    chosen, rejected = (_turns(source_row, name, where) for name in ("chosen", "rejected"))
    single_turn = [{"role": "user", "content": prompt}]
    conversation = chosen[:-1] or single_turn
    row = {"prompt_id": _prompt_id(source_row, where), "prompt": prompt}
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
    pair = Pair(row, where)  # refuses here what the next stage would refuse
    refuse_unasked(row, pair.messages, where)
    return row, pair.unusable


def _turns(row: Fields, name: str, where: str) -> list[dict]:
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
