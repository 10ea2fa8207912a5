"""The files of AlpacaEval and MT-Bench, and files of prompts and answers that stand in for them.

    alpaca_eval.json, model_outputs.json   [{"instruction", "output", "generator", "dataset"}, …];
                                           ours also have finish_reason, and messages where a
                                           conversation has several turns
    annotations.json                       a judge's preference for each pair of outputs
    instruction_difficulty.csv             what the length-controlled win rate needs of the 805
    df_gamed.csv                           instructions: data set tatsu-lab/alpaca_eval on the hub
    question.jsonl                         MT-Bench: {"question_id", "category", "turns"}

A JSON list and JSONL are both read. An instruction may come with an `input`, as in Alpaca's data:
the two are joined by a blank line, which is how AlpacaEval made its instructions from AlpacaFarm's.
Runs without JAX.
"""

import csv
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
from etils import epath, epy

from sharding.errors import UserError, check_scheme, first_line
from stages.files.paths import open_input
from stages.files.rows import (
    Fields,
    Prompt,
    Sample,
    canonical,
    field,
    finish_reason,
    json_rows,
    messages_of,
    parse_json,
    refuse_unasked,
)

with epy.lazy_imports():  # takes half a second, and only a download needs it
    import huggingface_hub

HUB, HUB_FILE = "tatsu-lab/alpaca_eval", "alpaca_eval.json"


def local_file(benchmark: str) -> str:
    """The file of a benchmark: a path, alpaca_eval.json in a folder, or the hub's for the name
    "alpaca_eval" (its JSON file, since `datasets` no longer runs its loading script)."""
    if benchmark != "alpaca_eval":
        check_scheme(benchmark, "benchmark")
        folder = epath.Path(benchmark)
        return str(folder / HUB_FILE) if folder.is_dir() else benchmark
    try:
        return huggingface_hub.hf_hub_download(HUB, HUB_FILE, repo_type="dataset")
    except Exception as error:  # of many kinds: no network, gated, no space
        raise UserError(
            f"the hub does not give {HUB}'s {HUB_FILE} ({first_line(error)}): download it "
            "elsewhere, and give its path"
        ) from None


# ---------------------------------------------------------------------- JSON lists and JSONL


def is_json_list(path: str) -> bool:
    """Whether a file's first character is that of a JSON list."""
    with open_input(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def read_json_list(path: str) -> list[tuple[str, Fields]]:
    """(where, row) of a JSON file that holds a list of objects. NaN, which pandas writes for a
    missing value, is read as such."""
    if not is_json_list(path):
        raise UserError(f"{path}: not a JSON list [{{…}}, …]")
    rows = [(f"{path}, item {i}", row) for i, row in enumerate(_parse(path))]
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: a {type(row).__name__}, not an object {{…}}")
    return rows


def rows_of(path: str) -> Iterable[tuple[str, Fields]]:
    """(where, row) of a JSON list or of JSONL."""
    return read_json_list(path) if is_json_list(path) else json_rows(path)


def _parse(path: str):
    try:
        return parse_json(_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): correct the file") from None


# ---------------------------------------------------------------------- what is asked


def read_instructions(path: str, counts: Counter) -> list[Fields]:
    """The instructions of a benchmark, or of any file of prompts, as rows of prompts.jsonl:
    {prompt or messages, prompt_id, dataset}, each instruction once. Adds to `counts`.

    MT-Bench's first turns alone are asked, since a second turn asks about an answer.
    """
    rows: list[Fields] = []
    seen: dict[str, str] = {}
    ids: set[str] = set()
    for where, row in rows_of(path):
        counts["in"] += 1
        fields = _prompt_fields(row, where, counts)
        prompt = Prompt(fields, where)
        refuse_unasked(row, prompt.messages, where)
        key = conversation_key(prompt.messages)
        if key in seen:
            raise UserError(f"{where}: this instruction stood above ({seen[key]}): remove one")
        if prompt.prompt_id in ids:
            raise UserError(f"{where}: prompt_id {prompt.prompt_id!r} stood above: change one")
        seen[key] = where
        ids.add(prompt.prompt_id)
        rows.append(fields)
    if not rows:
        raise UserError(f"{path} holds no instructions")
    counts["out"] = len(rows)
    return rows


def _prompt_fields(row: Fields, where: str, counts: Counter) -> Fields:
    kept = {name: row[name] for name in ("prompt_id", "dataset") if row.get(name) is not None}
    if "messages" in row:
        return kept | {"messages": messages_of(row, where)}
    if "turns" in row:
        turns = _turns(row, where)
        counts["second turns not asked"] += len(turns) > 1
        fields = {"prompt": turns[0], "dataset": row.get("category")}
        if row.get("question_id") is not None:
            fields["prompt_id"] = f"question {field(row, 'question_id', (int, str), where)}"
        return fields
    if "prompt" in row or "instruction" not in row:
        return kept | {"prompt": field(row, "prompt", str, where)}
    return kept | {"prompt": instruction_of(row, where)}


def asked_texts(row: Fields, where: str) -> list[str]:
    """The user turns of a row of any of these files."""
    if "turns" in row:
        texts = _turns(row, where)
    elif "prompt" in row or not ("messages" in row or "instruction" in row):
        texts = [field(row, "prompt", str, where)]
    else:
        texts = [] if "messages" in row else [instruction_of(row, where)]
    messages = [{"role": "user", "content": text} for text in texts] or messages_of(row, where)
    refuse_unasked(row, messages, where)
    return [message["content"] for message in messages if message["role"] == "user"]


def instruction_of(row: Fields, where: str) -> str:
    """A row's `instruction`, and below it its `input` where that has text."""
    instruction = field(row, "instruction", str, where)
    if row.get("input") is None:
        return instruction
    further = field(row, "input", str, where)
    return f"{instruction}\n\n{further}" if further.strip() else instruction


def conversation_key(messages: list[dict]) -> str:
    """Equal for the same conversation in any file: the text of a single user turn, or the canonical
    JSON of several turns."""
    return messages[0]["content"] if len(messages) == 1 else canonical(messages)


def _turns(row: Fields, where: str) -> list[str]:
    turns = field(row, "turns", list, where)
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise UserError(f"{where}: field 'turns' must be a list of texts")
    return turns


# ---------------------------------------------------------------------- answers


@dataclasses.dataclass
class ModelOutput:
    """A model's answer to an instruction."""

    where: str
    messages: list[dict]
    text: str
    finish_reason: str = "stop"  # one of FINISH_REASONS
    dataset: str | None = None
    generator: str | None = None

    @property
    def key(self) -> str:
        """Equal for the same instruction in another file."""
        return conversation_key(self.messages)

    @property
    def prompt(self) -> str:
        """The prompt that a reward function sees."""
        return self.messages[-1]["content"]


def read_outputs(path: str, response: int = 0) -> dict[str, ModelOutput]:
    """key → answer, in the file's order, from a model_outputs.json or a samples.jsonl.

    response: which response of each row of a samples.jsonl is taken. Raises UserError where an
    instruction has two answers.
    """
    outputs: dict[str, ModelOutput] = {}
    for where, row in rows_of(path):
        if "responses" in row or "instruction" not in row:
            output = _sampled(Sample(row, where), response)
        else:
            output = _model_output(row, where)
        if output.key in outputs:
            raise UserError(
                f"{where}: this instruction stood above ({outputs[output.key].where}): leave one "
                "answer to each"
            )
        outputs[output.key] = output
    if not outputs:
        raise UserError(f"{path} holds no answers")
    return outputs


def _model_output(row: Fields, where: str) -> ModelOutput:
    messages = [{"role": "user", "content": instruction_of(row, where)}]
    if "messages" in row and canonical(row["messages"]) == row["instruction"]:
        messages = messages_of(row, where)
    return ModelOutput(
        where,
        messages,
        field(row, "output", str, where),
        finish_reason(row, where),
        row.get("dataset"),
        None if row.get("generator") is None else field(row, "generator", str, where),
    )


def _sampled(row: Sample, number: int) -> ModelOutput:
    if not 0 <= number < len(row.responses):
        raise UserError(
            f"{row.where}: there is no response {number}: the row has {len(row.responses)}, "
            "counted from 0"
        )
    response, dataset = row.responses[number], row.fields.get("dataset")
    return ModelOutput(row.where, row.messages, response.text, response.finish_reason, dataset)


# ---------------------------------------------------------------------- a judge's annotations


@dataclasses.dataclass
class Annotations:
    """A judge's preferences for one model's answers, in the file's order."""

    model: str | None
    reference: str | None
    preferences: np.ndarray  # float64 [n]: 1 the model wins, 0 the reference; NaN: none
    lengths: np.ndarray  # int [n, 2]: characters of the model's and of the reference's answer


def read_annotations(path: str) -> Annotations:
    """annotations.json, as alpaca_eval or `judge` writes it. Raises UserError."""
    rows = read_json_list(path)
    if not rows:
        raise UserError(f"{path} holds no annotations")
    lengths = [
        [len(field(row, name, str, where)) for name in ("output_2", "output_1")]
        for where, row in rows
    ]
    return Annotations(
        model=_one_name(path, rows, "generator_2"),
        reference=_one_name(path, rows, "generator_1"),
        preferences=np.array([_preference(row, where) for where, row in rows]),
        lengths=np.array(lengths),
    )


def _preference(row: Fields, where: str) -> float:
    """Between 0 and 1; NaN where the judge gave none."""
    value = row.get("preference")
    if value is None or value != value:
        return math.nan
    value = field(row, "preference", (int, float), where)
    value = 1.5 if value == 0 else value  # a draw, in early files
    if not 1 <= value <= 2:
        raise UserError(f"{where}: preference is {value}, not between 1 and 2: correct the file")
    return value - 1


def _one_name(path: str, rows: list[tuple[str, Fields]], name: str) -> str | None:
    """The model that a field of all rows names; None where no row names one."""
    names = {str(row[name]) for _, row in rows if row.get(name)}
    if len(names) > 1:
        raise UserError(f"{path}: {name} has {len(names)} values: score one model at a time")
    return names.pop() if names else None


# ---------------------------------------------------------------------- for length control


def read_difficulties(path: str, instructions: int) -> np.ndarray:
    """instruction_difficulty.csv (an index and a value per row), or a JSON file
    {"instruction_difficulty": […]}: one value per instruction, in their order."""
    if path.endswith(".json"):
        content = _parse(path)
        (values,) = _numbers("--difficulty", path, lambda: [content["instruction_difficulty"]])
    else:
        lines = _lines(path)[1:]
        (values,) = _numbers("--difficulty", path, lambda: [[r[1] for r in csv.reader(lines)]])
    if len(values) != instructions:
        raise UserError(
            f"--difficulty {path} has {len(values)} values, but {instructions} instructions are "
            "compared: leave it out unless these are AlpacaEval's, all of them, in its order"
        )
    return values


def read_gamed(path: str) -> list[np.ndarray]:
    """df_gamed.csv: preferences (0 to 1), length differences in standard deviations, and
    difficulties."""
    names = ("preference", "std_delta_len", "instruction_difficulty")
    rows = list(csv.DictReader(_lines(path)))
    return _numbers("--gamed", path, lambda: [[row[name] for row in rows] for name in names])


def _numbers(flag: str, path: str, columns: Callable[[], list[list]]) -> list[np.ndarray]:
    """Columns of a file as finite float64 arrays. Raises UserError."""
    try:
        arrays = [np.array([float(value) for value in column]) for column in columns()]
    except (ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
        raise UserError(f"{flag} {path}: not the file that AlpacaEval gives ({error!r})") from None
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(f"{flag} {path}: a value is not finite: correct the file")
    return arrays


def _lines(path: str) -> list[str]:
    try:
        return _bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}): give a CSV file") from None


def _bytes(path: str) -> bytes:
    with open_input(path) as file:
        return file.read()
