"""The rows between the stages, typed: Prompt, Sample, Ranked, Pair. Runs without JAX.

`read(path, Sample)` opens a JSONL file once. One pass checks every row, gives it its key and finds
duplicates, so that every refusal comes before any work; later passes read from the same open file.
A malformed line stops the stage with file, line and field. A row keeps every field it came with
(`fields`), and a stage writes `row.fields | {what it adds}`.

The same prompt_id twice: with the same content the row is merged and counted, with other content
it is refused.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Generic, Self, TypeVar

from sharding.errors import LARGEST, UserError
from stages.files.paths import is_remote, open_input, text_sha256

Fields = dict  # a row as JSON has it
FINISH_REASONS = ("stop", "length", "stop_string")
MERGED = "merged: the same prompt again"
# Fields in which other data sets keep a part of the task beside the prompt.
NOT_ASKED = (
    *("input", "context", "passage", "documents", "history", "image", "images"),
    *("system", "system_prompt", "system_message", "tools", "functions"),
)


# ---------------------------------------------------------------------- the records


class Prompt:
    """A row of prompts.jsonl: a conversation to answer."""

    COMPARED: tuple[str, ...] = ()  # fields that rows of one prompt_id must share

    def __init__(self, fields: Fields, where: str, may_be_empty: bool = False):
        """fields: the row, which gets a prompt_id if it has none. where: "FILE, line N", for
        messages. Raises UserError."""
        self.fields, self.where = fields, where
        self.messages = messages_of(fields, where)  # [{"role", "content"}, …], a user turn last
        if not may_be_empty and not self.prompt.strip():
            raise UserError(f"{where}: the prompt is empty: write one, or remove the line")
        if fields.get("prompt_id") is None:
            fields["prompt_id"] = text_sha256(prompt_key(fields, where))
        # Interned: rows are read more than once, and their ids are kept.
        self.prompt_id = fields["prompt_id"] = sys.intern(field(fields, "prompt_id", str, where))

    @property
    def prompt(self) -> str:
        """What a reward function sees as the prompt: the turn that is answered."""
        return self.messages[-1]["content"]

    def digest(self) -> bytes:
        """Equal for rows of the same content."""
        content = [prompt_key(self.fields, self.where)]
        content += [self.fields.get(name) for name in self.COMPARED]
        return bytes.fromhex(text_sha256(json.dumps(content, sort_keys=True)))


@dataclasses.dataclass(slots=True)
class Response:
    """An answer. `token_ids` hold no EOS and end before a stop string; `logprob` sums their
    log-probs under the model that drew them, EOS included."""

    text: str
    token_ids: list[int] | None = None
    end_token_id: int | None = None  # the EOS that was drawn
    logprob: float | None = None
    finish_reason: str = "stop"  # one of FINISH_REASONS

    @classmethod
    def parse(cls, fields: Fields, where: str, prefix: str = "") -> Self:
        """From a row's `responses`, or with a prefix from a pair's fields (chosen_token_ids)."""
        kinds = {"token_ids": list, "end_token_id": int, "logprob": (int, float)}
        values = {
            name: field(fields, prefix + name, kind, where)
            for name, kind in kinds.items()
            if fields.get(prefix + name) is not None
        }
        if abs(values.get("logprob", 0)) > LARGEST:  # an int of many digits, say
            raise UserError(f"{where}: field '{prefix}logprob' is beyond {LARGEST:g}: correct it")
        values["finish_reason"] = finish_reason(fields, where, f"{prefix}finish_reason")
        response = cls(field(fields, "text", str, where), **values)
        response.check_ids(where, prefix)
        return response

    def check_ids(self, where: str, prefix: str = "", vocabulary: float = math.inf) -> None:
        """Raise UserError where the ids are no token ids, or beyond the vocabulary."""
        end = [] if self.end_token_id is None else [self.end_token_id]
        check_token_ids(self.token_ids or [], f"{prefix}token_ids", where, vocabulary)
        check_token_ids(end, f"{prefix}end_token_id", where, vocabulary)

    def with_end(self, ids: list[int], end_id: int | None) -> list[int]:
        """The answer's ids and, if it ended by itself, the EOS that was drawn. Ids of other tools
        may end with the EOS already. end_id: the EOS with which the chat template ends a turn, for
        rows without `end_token_id`."""
        end = end_id if self.end_token_id is None else self.end_token_id
        is_complete = self.finish_reason != "stop" or end is None or ids[-1:] == [end]
        return ids if is_complete else [*ids, end]


class Sample(Prompt):
    """A row of samples.jsonl: a prompt and its answers, `responses`."""

    COMPARED = ("responses",)

    def __init__(self, fields: Fields, where: str):
        super().__init__(fields, where)
        self.responses: list[Response] = []
        for i, response in enumerate(field(fields, "responses", list, where)):
            at = f"{where}, responses[{i}]"
            if not isinstance(response, dict):
                raise UserError(f"{at}: a {type(response).__name__}, not an object with a text")
            self.responses.append(Response.parse(response, at))

    @property
    def texts(self) -> list[str]:
        return [response.text for response in self.responses]


class Ranked(Sample):
    """A row of ranked.jsonl: a sample, and in `scores` a float for each of its answers, higher is
    better."""

    COMPARED = ("responses", "scores", "comparisons")

    def __init__(self, fields: Fields, where: str):
        super().__init__(fields, where)
        scores, n = field(fields, "scores", list, where), len(self.responses)
        if len(scores) != n:
            raise UserError(f"{where}: {len(scores)} scores for {n} responses: give one for each")
        for i, score in enumerate(scores):
            if type(score) not in (int, float) or not abs(score) <= LARGEST:
                raise UserError(
                    f"{where}, scores[{i}]: {score!r} is no finite number up to {LARGEST:g}: "
                    "correct the line"
                )
        self.scores = [float(score) for score in scores]


class Pair(Prompt):
    """A row of pairs.jsonl: a conversation (`messages`) and two answers to it, the Responses
    `chosen` and `rejected`. `unusable` says why a well-formed pair cannot be trained on.

    The row's fields `chosen` and `rejected` are lists of messages that end with the assistant's
    answer. What stands before it is left out, or is the row's own conversation: its `messages`, or
    one of whose user turns is its `prompt`.
    """

    COMPARED = ("chosen", "rejected", "chosen_token_ids", "rejected_token_ids")

    def __init__(self, fields: Fields, where: str):
        super().__init__(fields, where, may_be_empty=True)
        (before, self.chosen), (before_rejected, self.rejected) = (
            self._answer(side) for side in ("chosen", "rejected")
        )
        self.unusable: str | None = None
        if before != before_rejected:
            self.unusable = "chosen and rejected answer different conversations"
        elif before and before != self.messages:
            users = [turn["content"] for turn in before if turn["role"] == "user"]
            if "messages" in fields or self.prompt not in users or before[-1]["role"] != "user":
                self.unusable = (
                    "chosen and rejected answer another conversation than the row's prompt"
                )
            else:
                self.messages = before
        if not self.prompt.strip():
            self.unusable = "the prompt is empty"

    def _answer(self, side: str) -> tuple[list[dict], Response]:
        """(the messages before a side's answer, the answer)."""
        turns = _turns(field(self.fields, side, list, self.where), f"{self.where}, {side}")
        if not turns or turns[-1]["role"] != "assistant":
            raise UserError(f"{self.where}: {side!r} must end with the assistant's answer")
        *before, answer = turns
        fields = self.fields | {"text": answer["content"]}
        return before, Response.parse(fields, self.where, prefix=f"{side}_")


# ---------------------------------------------------------------------- a file of them


Kind = TypeVar("Kind", bound=Prompt)


class RowFile(Generic[Kind]):
    """What `read` gives: where the rows lie, not the rows.

    ids: the prompt_ids in the file's order. counts: "in", and what was merged. sha256: of the
    file's content. Iterating, and `file[prompt_id]`, read from the file opened at the start.
    """

    def __init__(self, path: str, kind: type[Kind], each: Callable[[Kind], None] | None):
        self.path, self._kind = path, kind
        self.counts: Counter[str] = Counter()
        self._file = open_input(path)
        self._stamp = self._modified()
        self._places: dict[str, tuple[int, int, bytes]] = {}  # offset, line number, digest
        content, offset = hashlib.sha256(), 0
        for number, line in enumerate(self._file, 1):
            content.update(line)
            if (row := self._row(line, number)) is not None:
                self.counts["in"] += 1
                if self._is_new(row, offset, number) and each:
                    each(row)
            offset += len(line)
        self.sha256 = content.hexdigest()

    @property
    def ids(self) -> list[str]:
        return list(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Kind]:
        return map(self.__getitem__, self._places)

    def __getitem__(self, prompt_id: str) -> Kind:
        offset, number, _ = self._places[prompt_id]
        self._file.seek(offset)
        line = self._file.readline()
        if self._stamp != self._modified():
            raise UserError(f"{self.path} has changed while it was read: run the command again")
        return self._row(line, number)

    def _modified(self) -> tuple[int, int] | None:
        """When the file was last changed, and its size; None in an object store: objects stay."""
        status = None if is_remote(self.path) else os.fstat(self._file.fileno())
        return status and (status.st_mtime_ns, status.st_size)

    def _row(self, line: bytes, number: int) -> Kind | None:
        where = f"{self.path}, line {number}"
        fields = decode_line(line, where, first=number == 1)
        if fields is None:
            return None
        row = self._kind(fields, where)
        refuse_unasked(fields, row.messages, where)
        return row

    def _is_new(self, row: Kind, offset: int, number: int) -> bool:
        digest = row.digest()
        if row.prompt_id not in self._places:
            self._places[row.prompt_id] = offset, number, digest
            return True
        if self._places[row.prompt_id][2] != digest:
            raise UserError(
                f"{row.where}: prompt_id {row.prompt_id!r} stood above with another "
                f"{' or other '.join(('prompt', *row.COMPARED))}: give each row its own prompt_id"
            )
        self.counts[MERGED] += 1
        return False


def read(path: str, kind: type[Kind], each: Callable[[Kind], None] | None = None) -> RowFile[Kind]:
    """The rows of a file, all checked; `each` is called with every distinct row. Raises UserError
    that names file, line and field."""
    return RowFile(path, kind, each)


# ---------------------------------------------------------------------- lines and fields


def json_rows(path: str) -> Iterator[tuple[str, Fields]]:
    """(where, row) of each line that is not blank, for JSONL files of any other kind of row."""
    with open_input(path) as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            if (fields := decode_line(line, where, first=number == 1)) is not None:
                yield where, fields


def decode_line(line: bytes, where: str, first: bool = False) -> Fields | None:
    """The JSON object of a line, None of a blank one; the first may begin with a byte order mark.
    Raises UserError."""
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte {error.start + 1}): save the file as UTF-8"
        ) from None
    if not text.strip():
        return None
    try:
        fields = parse_json(text, parse_constant=_refuse_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg}, column {error.colno}): one object per line"
        ) from None
    except ValueError as error:  # NaN, 5000 digits, a field twice
        raise UserError(f"{where}: not JSON ({error}): correct the line") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: a {type(fields).__name__}, not an object {{…}}")
    return fields


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(
            f"{text}: {number} is no finite number, and a row with it holds what JSON cannot write"
        )
    return number


def _fields_once(pairs: list[tuple]) -> Fields:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} stands twice in one object")
    return fields


MOST_NESTED = 100  # levels; Python's own limit depends on how deep the caller is


def parse_json(text: str | bytes, **options):
    """The value of a JSON text; options: of json.loads. ValueError, also where a field stands twice
    in an object, or where the text is nested deeper than MOST_NESTED."""
    try:
        value = json.loads(text, object_pairs_hook=_fields_once, **options)
    except RecursionError:
        raise ValueError("nested too deep") from None
    opening = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    level = [[value]] if sum(map(text.count, opening)) > MOST_NESTED else []
    for _ in range(MOST_NESTED + 1):
        within = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for values in within for x in values if isinstance(x, dict | list)]
    if level:
        raise ValueError("nested too deep")
    return value


def json_line(fields: Fields) -> bytes:
    """A row as a line of JSON. Raises ValueError or TypeError for what JSON cannot hold."""
    # Halves of surrogate pairs have no UTF-8; within JSON "\ud83d" is the same string.
    line = json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"
    return line.encode("utf-8", "backslashreplace")


def field(fields: Fields, name: str, kind: type | tuple[type, ...], where: str):
    """fields[name], checked to be of `kind` (a bool is no number). Raises UserError."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join(k.__name__ for k in kinds)
    if name not in fields:
        raise UserError(f"{where}: field {name!r} is missing: add it as {wanted}")
    value = fields[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(
            f"{where}: field {name!r} is {type(value).__name__}, not {wanted}: correct the line"
        )
    return value


def check_token_ids(ids: list, name: str, where: str, vocabulary: float = math.inf) -> None:
    """Raise UserError where the list in the field `name` holds anything but token ids."""
    for i in ids:
        if type(i) is not int or i < 0:
            raise UserError(f"{where}: field {name!r} holds {i!r}, which is no token id")
        if i >= vocabulary:
            raise UserError(
                f"{where}: field {name!r} holds {i}, which is beyond the model's vocabulary of "
                f"{vocabulary}: was another tokenizer used, or the line edited?"
            )


def finish_reason(fields: Fields, where: str, name: str = "finish_reason") -> str:
    """Why an answer ended: "stop" where the row does not say. Raises UserError."""
    reason = fields.get(name)
    if reason is not None and reason not in FINISH_REASONS:
        raise UserError(
            f"{where}: field {name!r} is {reason!r}, not {', '.join(FINISH_REASONS)} or null: "
            "correct the line"
        )
    return reason or "stop"


# ---------------------------------------------------------------------- conversations


def messages_of(fields: Fields, where: str) -> list[dict]:
    """A prompt row's conversation: its `messages`, or its `prompt` as one user turn."""
    if "messages" not in fields:
        return [{"role": "user", "content": field(fields, "prompt", str, where)}]
    messages = _turns(field(fields, "messages", list, where), f"{where}, messages")
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: messages must end with a user turn, the one to answer")
    return messages


def _turns(messages: list, where: str) -> list[dict]:
    """The messages, each reduced to role and content. Raises UserError."""
    for i, message in enumerate(messages):
        at = f"{where}[{i}]"
        if not isinstance(message, dict):
            raise UserError(f"{at}: not an object with role and content")
        field(message, "content", str, at)
        if field(message, "role", str, at) not in ("system", "user", "assistant"):
            raise UserError(f"{at}: role {message['role']!r} is not system, user or assistant")
        if message.get("tool_calls"):
            raise UserError(f"{at}: tool_calls are not supported: remove the row")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def refuse_unasked(fields: Fields, messages: list[dict], where: str) -> None:
    """Raise UserError where a field of NOT_ASKED holds a text that the messages do not have."""
    for name in NOT_ASKED:
        value = fields.get(name)
        if not value or value != value or not (text := str(value).strip()):  # NaN: none, by pandas
            continue
        if not any(text in message["content"] for message in messages):
            raise UserError(
                f"{where}: field {name!r} is part of the task, but only prompt or messages are "
                "asked: write the whole task there, or give the field another name"
            )


def prompt_key(fields: Fields, where: str) -> str:
    """A prompt's canonical text, whose sha256 is its prompt_id by default: `prompt`, or the
    canonical JSON of `messages`."""
    if "messages" in fields:
        return canonical(messages_of(fields, where))
    return field(fields, "prompt", str, where)


def canonical(messages: list[dict]) -> str:
    """A conversation as JSON, always spelled the same."""
    return json.dumps(messages, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
