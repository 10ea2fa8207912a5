"""Files of answers, one answer an instruction: AlpacaEval's model_outputs.json, or samples.jsonl.

- model_outputs.json: [{"instruction", "output", "generator", "dataset"}, …]; ours also say how an
  answer ended (finish_reason), which reward functions may ask for
- samples.jsonl of stages.sample, of whose rows one response each is taken
"""

import dataclasses
import json
from collections import Counter

from etils import epath

from sharding.errors import UserError
from stages.files.rows import Row, field, messages_of, prompt_text, read_rows


@dataclasses.dataclass
class Answer:
    """One answer; `key` is what the same instruction has in other files."""

    where: str
    key: str
    messages: list[dict]
    prompt: str  # what a reward function sees
    text: str
    finish_reason: str = "stop"
    dataset: str | None = None
    generator: str | None = None


def read_answers(path: str, response: int = 0) -> dict[str, Answer]:
    """key → answer, in the file's order. response: which one of a samples.jsonl's rows.

    Raises UserError where an instruction comes twice.
    """
    answers: dict[str, Answer] = {}
    rows = read_json_list(path) if is_json_list(path) else read_rows(path)
    for where, row in rows:
        answer = _from_outputs(row, where) if "instruction" in row else None
        answer = answer or _from_samples(row, where, response)
        if answer.key in answers:
            raise UserError(
                f"{where}: this instruction stood above ({answers[answer.key].where}): "
                "leave one answer to each"
            )
        answers[answer.key] = answer
    if not answers:
        raise UserError(f"{path} holds no answers")
    return answers


def _from_outputs(row: Row, where: str) -> Answer:
    instruction = field(row, "instruction", str, where)
    return Answer(
        where=where,
        key=instruction,
        messages=[{"role": "user", "content": instruction}],
        prompt=instruction,
        text=field(row, "output", str, where),
        finish_reason=row.get("finish_reason") or "stop",
        dataset=row.get("dataset"),
        generator=row.get("generator"),
    )


def _from_samples(row: Row, where: str, response: int) -> Answer:
    messages = messages_of(row, where)
    responses = field(row, "responses", list, where)
    if not 0 <= response < len(responses):
        raise UserError(
            f"{where}: there is no response {response}, but {len(responses)} of them, from 0 on"
        )
    at = f"{where}, responses[{response}]"
    if not isinstance(responses[response], dict):
        raise UserError(f"{at}: {type(responses[response]).__name__}, not an object with a text")
    return Answer(
        where=where,
        key=conversation_key(messages),
        messages=messages,
        prompt=prompt_text(row, where),
        text=field(responses[response], "text", str, at),
        finish_reason=responses[response].get("finish_reason") or "stop",
        dataset=row.get("dataset"),
    )


def conversation_key(messages: list[dict]) -> str:
    """The text of a single user turn, or a conversation's canonical JSON."""
    if len(messages) == 1:
        return messages[0]["content"]
    return json.dumps(messages, ensure_ascii=False, sort_keys=True)


def align(
    ours: dict[str, Answer],
    baseline: dict[str, Answer],
    names: tuple[str, str],
    common: bool,
    counts: Counter,
) -> list[tuple[Answer, Answer]]:
    """Pairs of answers to the same instruction, in our order, and their counts. Raises UserError
    where an instruction is answered in one file alone, unless only `common` ones are asked for."""
    shared = [key for key in ours if key in baseline]
    lone = [
        [a for key, a in one.items() if key not in other]
        for one, other in ((ours, baseline), (baseline, ours))
    ]
    if not shared:
        raise UserError(f"{names[0]} and {names[1]} have no instruction in common")
    if any(lone) and not common:
        first = (lone[0] or lone[1])[0]
        raise UserError(
            f"{len(lone[0])} instructions are answered in {names[0]} alone and {len(lone[1])} in "
            f"{names[1]} alone, the first at {first.where}: answer all of them, or pass "
            f"--common-only to compare the {len(shared)} that both answer"
        )
    counts["in"] = len(ours) + len(baseline) - len(shared)
    counts["out"] = len(shared)
    for name, rest in zip(("outputs", "baseline"), lone):
        if rest:
            counts[f"set aside: answered in --{name} alone"] = len(rest)
    return [(ours[key], baseline[key]) for key in shared]


def generator_of(answers: dict[str, Answer], path: str) -> str:
    """The model's name that the file gives, or else the file's own."""
    named = {a.generator for a in answers.values() if a.generator}
    return named.pop() if len(named) == 1 else epath.Path(path).stem


def generator_of_rows(rows: list[tuple[str, Row]], name: str) -> str | None:
    """The one value of a field of annotations that names a model; None where there is none."""
    named = {str(row[name]) for _, row in rows if row.get(name)}
    if len(named) > 1:
        where = rows[0][0].rpartition(",")[0]
        raise UserError(f"{where}: {name} has {len(named)} values: score one model at a time")
    return named.pop() if named else None


# ------------------------------------------------------------------------- whole JSON files


def is_json_list(path: str) -> bool:
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"{path} does not exist: give the path of a file")
    if file.is_dir():
        raise UserError(f"{path} is a folder: give the path of a file")
    with file.open("rb") as opened:
        return opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def read_json_list(path: str) -> list[tuple[str, Row]]:
    """(where, row) of a JSON file that holds a list of objects."""
    if not is_json_list(path):
        raise UserError(f"{path}: not a JSON list [{{…}}, …]")
    try:
        rows = json.loads(epath.Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): correct the file") from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}, item {i}: a {type(row).__name__}, not an object {{…}}")
    return [(f"{path}, item {i}", row) for i, row in enumerate(rows)]
