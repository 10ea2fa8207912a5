"""Rows of JSONL files: reading and checking them. Runs without JAX."""

import json
import sys
from collections import Counter
from collections.abc import Iterator

from sharding.errors import UserError
from stages.files.paths import open_input, text_sha256

Row = dict


def read_rows(path: str) -> Iterator[tuple[str, Row]]:
    """(where, row) of each line that is not blank; `where` is "FILE, line N", for messages."""
    with open_input(path) as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: not UTF-8 (byte {error.start + 1}): save the file as UTF-8"
                ) from None
            if not text.strip():
                continue
            try:
                row = json.loads(text, parse_constant=_refuse_constant)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: not JSON ({error.msg}, column {error.colno}): one object a line"
                ) from None
            except (ValueError, RecursionError) as error:  # NaN, 5000 digits, 1000 brackets
                raise UserError(f"{where}: not JSON ({error}): correct the line") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: a {type(row).__name__}, not an object {{…}}")
            yield where, row


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON number")


def field(row: Row, name: str, kind: type | tuple[type, ...], where: str):
    """row[name], checked to be of `kind` (bool never passes for a number)."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join(k.__name__ for k in kinds)
    if name not in row:
        raise UserError(f"{where}: field {name!r} is missing: add it as {wanted}")
    value = row[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(
            f"{where}: field {name!r} is {type(value).__name__}, not {wanted}: correct the line"
        )
    return value


def messages_of(row: Row, where: str) -> list[dict]:
    """The conversation of a prompt row: its `messages`, or its `prompt` as one user turn."""
    if "messages" not in row:
        return [{"role": "user", "content": field(row, "prompt", str, where)}]
    messages = field(row, "messages", list, where)
    for i, message in enumerate(messages):
        at = f"{where}, messages[{i}]"
        if not isinstance(message, dict):
            raise UserError(f"{at}: not an object with role and content")
        field(message, "content", str, at)
        if field(message, "role", str, at) not in ("system", "user", "assistant"):
            raise UserError(f"{at}: role {message['role']!r} is not system, user or assistant")
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: messages must end with a user turn, the one to answer")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def prompt_text(row: Row, where: str) -> str:
    """What a reward function sees as the prompt: `prompt`, or the last user turn."""
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    return messages_of(row, where)[-1]["content"]


def prompt_key(row: Row, where: str) -> str:
    """The prompt's canonical text: the prompt itself, or the messages' canonical JSON."""
    if "messages" in row:
        return json.dumps(
            messages_of(row, where), ensure_ascii=False, sort_keys=True, separators=(",", ":")
        )
    return field(row, "prompt", str, where)


def read_prompts(
    path: str, counts: Counter, agree: tuple[str, ...] = ()
) -> Iterator[tuple[str, Row]]:
    """(where, row) of each distinct prompt, its prompt_id filled in.

    The same prompt under the same id twice is merged and counted ("merged: …"); one id with two
    prompts, or an empty prompt, is an error. `agree` names further fields that must be the same in
    rows that are merged, e.g. ("responses", "scores"), so that none is lost. Holds a few hundred
    bytes a prompt, not the prompts.
    """
    seen: dict[str, bytes] = {}
    for where, row in read_rows(path):
        key = prompt_key(row, where)
        if not messages_of(row, where)[-1]["content"].strip():
            raise UserError(f"{where}: the prompt is empty: write one, or remove the line")
        if row.get("prompt_id") is None:
            row["prompt_id"] = text_sha256(key)
        # Interned: a file is read more than once, and its ids are kept.
        prompt_id = row["prompt_id"] = sys.intern(field(row, "prompt_id", str, where))
        content = [key, *(row.get(name) for name in agree)]
        digest = bytes.fromhex(text_sha256(json.dumps(content, sort_keys=True)))
        counts["in"] += 1
        if prompt_id not in seen:
            seen[prompt_id] = digest
            yield where, row
        elif seen[prompt_id] == digest:
            counts["merged: the same prompt again"] += 1
        else:
            raise UserError(
                f"{where}: prompt_id {prompt_id!r} stood above with another "
                f"{' or other '.join(('prompt', *agree))}: give each row its own prompt_id"
            )


def json_line(row: Row) -> bytes:
    # Halves of surrogate pairs have no UTF-8; within JSON "\ud83d" is the same string.
    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    return line.encode("utf-8", "backslashreplace")
