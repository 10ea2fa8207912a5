"""The files between the stages: JSONL rows, their checks, resuming, and manifests.

The only file that knows JSONL; runs without JAX. Three rules hold for everything written here:

- A row in is a row out or is counted with its reason. A malformed line stops the stage with its
  file, line and field; a well-formed row that cannot be used is set aside (`Output.set_aside`).
- Rows are appended to OUT.partial as they are done, so a killed stage goes on where it was; OUT
  itself appears whole, rows in input order, by an atomic rename.
- Beside OUT lies OUT.manifest.json: stage, arguments, counts, the sha256 of every input, and the
  identities of what made it. OUT.partial.manifest.json holds the same while the stage runs, so
  that a run with other arguments can never be mixed into it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from etils import epath

from sharding import watch

Row = dict


class UserError(Exception):
    """The caller's mistake: one line that says what, where and how to mend. Exit code 2."""


class Busy(UserError):
    """Another process is writing the same file."""


class Stopped(Exception):
    """Stopped by a signal, all work saved: the same command goes on. Exit code 75."""


# ---------------------------------------------------------------------- running a stage


def run(main: Callable, args_type: type, argv: list[str] | None = None) -> int:
    """Parse `args_type` (a dataclass) from the command line, run main(args), give the exit code."""
    import tyro

    args = tyro.cli(args_type, args=argv, description=sys.modules[main.__module__].__doc__)
    code = 1
    try:
        code = _run(main, args)
    finally:
        watch.end(code)
    return code


def _run(main: Callable, args) -> int:
    try:
        main(args)
    except UserError as error:
        watch.settle()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        print(f"error: {error.filename}: {error.strerror}: give another path", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt) as stop:
        note = str(stop) or "stopped"
        print(f"{note}: run the same command again to go on", file=sys.stderr)
        return 75
    return 0


STOPPED_TOGETHER = Stopped("stopped with the other processes, the work is saved")


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], None]]:
    """Turn SIGTERM and SIGINT into a flag; yields `check()`, which raises Stopped once it is up.

    Call it where the work is saved: between steps, never inside a write. A second SIGINT
    interrupts at once.
    """
    received: list[int] = []

    def handler(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    def check():
        if received:
            raise Stopped(f"stopped by {signal.Signals(received[0]).name}, the work is saved")

    previous = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield check
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


# ---------------------------------------------------------------------- reading rows


def read_rows(path: str) -> Iterator[tuple[str, Row]]:
    """(where, row) of each line that is not blank; `where` is "FILE, line N", for messages."""
    with _open_input(path) as lines:
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


def _open_input(path: str):
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"{path} does not exist: give the path of a file")
    if file.is_dir():
        raise UserError(f"{path} is a folder: give the path of a file")
    opened = file.open("rb")
    # An object store's file asks for its data anew at each line, where it is not buffered.
    return io.BufferedReader(opened, 1 << 22) if is_remote(path) else opened


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


def parse_bytes(text: str, flag: str) -> int:
    """Bytes that a text like 8GiB, 500MB or 4096 names."""
    units = {
        "": 1,
        **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
        **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
    }
    number = text.rstrip("KMGTiB")
    unit = text[len(number) :].strip()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"{flag} is {text!r}: give a size such as 8GiB or 500MB")
    return size


def file_sha256(path: str) -> str:
    digest = hashlib.sha256()
    with _open_input(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ---------------------------------------------------------------------- manifests


@dataclasses.dataclass
class Manifest:
    """What made a file. `arguments` are those that decide its content: no paths, no speed flags."""

    stage: str
    arguments: dict
    inputs: dict[str, str]  # path → sha256
    identities: dict[str, str]  # "model", "tokenizer", "chat_template", "ranker", … → identity
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    results: dict = dataclasses.field(default_factory=dict)  # what the stage measured
    seconds: float | None = None  # that the last sitting took: a stopped stage has more of them

    def key(self) -> dict:
        """What must agree for two runs to be the same run. The inputs' names do not matter."""
        content = {
            "stage": self.stage,
            "arguments": self.arguments,
            "inputs": sorted(self.inputs.values()),
            "identities": self.identities,
        }
        return json.loads(json.dumps(content))

    def write(self, path: str):
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False))


def manifest_path(path: str) -> str:
    return f"{path}.manifest.json"


def read_manifest(path: str) -> Manifest | None:
    """The manifest beside the file `path`; None where there is none (a user's own file)."""
    file = epath.Path(manifest_path(path))
    if not file.exists():
        return None
    try:
        return Manifest(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not a manifest ({error}): restore it, or delete it") from None


def read_lineage(path: str) -> Manifest | None:
    """`read_manifest` of a stage's input, and a line on the screen where there is none.

    A file that no longer has the content its manifest describes was edited: that is allowed (the
    files are there to be edited), and said.
    """
    manifest = read_manifest(path)
    if manifest is None:
        print(f"{path}: no manifest, so its lineage is not checked (taken as your own file)")
    else:
        _say_if_edited(path, manifest)
    return manifest


def _say_if_edited(path: str, manifest: Manifest):
    if manifest.results.get("sha256") not in (None, file_sha256(path)):
        print(f"{path}: changed since its manifest was written (taken as your own edit)")


def refuse_other(here: Manifest, there: Manifest, path: str, mend: str | None = None) -> None:
    """UserError, naming every difference, unless both manifests describe the same run."""
    differences = _differences(here.key(), there.key())
    if differences:
        raise UserError(
            f"{path} exists from other arguments ({'; '.join(differences)}): "
            f"{mend or 'choose another --out, or pass --overwrite'}"
        )


def _differences(ours: dict, theirs: dict, prefix: str = "") -> list[str]:
    """The names whose values differ between two manifest keys, with both values."""
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _differences(a, b, f"{prefix}{name}.")
        elif name == "inputs" and not prefix:
            if a != b:
                lines.append("the input's content differs")
        elif a != b:
            lines.append(f"{prefix}{name} {_short(b)} there, {_short(a)} here")
    return lines


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:36]}…"


# ---------------------------------------------------------------------- writing


class Output:
    """One stage's output file: resumable while it is written, atomic when it is done.

        output = Output.open(path, manifest, overwrite=False)
        if output.finished: return
        for … if not output.has(prompt_id): output.write(row)   or   output.set_aside(row, reason)
        output.finish(order)

    A row is known by its prompt_id. What is set aside is written too, to OUT.set_aside.jsonl, with
    its reason.
    """

    def __init__(self, path: str, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self.finished, self._opened = False, time.monotonic()
        self.partial = f"{local_path(path)}.partial"
        self._offsets: dict[str, int] = {}  # prompt_id → where its line starts in the partial file
        self._reasons: dict[str, str] = {}
        self._file = None

    @classmethod
    def open(
        cls, path: str, manifest: Manifest, overwrite: bool = False, share: tuple[int, int] = (0, 1)
    ) -> "Output":
        """share (i, n): write only this process's share; stages/shares.py makes `path` of all."""
        output = cls(path, manifest)
        if epath.Path(path).is_dir():
            raise UserError(f"{path} is a folder: give the path of the file to write")
        if path in manifest.inputs:
            raise UserError(f"{path} is the input: give another path to write to")
        partial, partial_manifest = epath.Path(output.partial), manifest_path(output.partial)
        if overwrite:
            for file in (
                path,
                manifest_path(path),
                f"{path}.set_aside.jsonl",
                partial,
                partial_manifest,
            ):
                epath.Path(file).unlink(missing_ok=True)
        if epath.Path(path).exists():
            there = read_manifest(path)
            if there is None:
                raise UserError(f"{path} exists and has no manifest: move it, or pass --overwrite")
            refuse_other(manifest, there, path)
            _say_if_edited(path, there)
            for leftover in (partial, partial_manifest):  # killed just before it removed them
                epath.Path(leftover).unlink(missing_ok=True)
            print(f"{path} is finished already: {_counts_line(there.counts)}")
            output.finished, output.manifest = True, there
            return output
        if share[1] > 1:
            return cls.open(share_path(path, *share), manifest, overwrite)
        for folder in (epath.Path(path).parent, partial.parent):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder} cannot be made ({error.strerror})") from None
        output._file = open(output.partial, "ab")
        try:
            fcntl.flock(output._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{path} is being written by another process: wait for it") from None
        except OSError:
            pass  # a file system without locks
        there = read_manifest(output.partial)
        # Begin anew where nothing was done yet, or nothing says what made the rows in there.
        if there is None or not partial.stat().length:
            output._file.seek(output._file.truncate(0))
            manifest.write(partial_manifest)
        else:
            refuse_other(manifest, there, output.partial)
            output._resume()
        return output

    def _resume(self):
        """Read what is there; a line cut off by the kill is dropped and will be made again."""
        end = 0
        with open(self.partial, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    self._remember(json.loads(line), end)
                except (ValueError, KeyError, TypeError):
                    break
                end += len(line)
        self._file.truncate(end)
        self._file.seek(end)
        if self._offsets:
            print(f"{self.partial}: going on after {len(self._offsets)} rows")

    def _remember(self, row: Row, offset: int):
        prompt_id = row["row"]["prompt_id"]
        self._offsets[prompt_id] = offset
        if "reason" in row:
            self._reasons[prompt_id] = row["reason"]

    def has(self, prompt_id: str) -> bool:
        return prompt_id in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def write(self, row: Row):
        """Append a finished row."""
        self._append({"row": row})

    def set_aside(self, row: Row, reason: str):
        """Count a row that cannot be used under `reason` (the same words for the same cause)."""
        self._append({"row": row, "reason": reason})

    def _append(self, entry: dict):
        offset = self._file.tell()
        try:
            line = _json_line(entry)
        except (ValueError, TypeError) as error:  # 1e999 reads as infinite; a column of dates
            raise UserError(
                f"prompt_id {entry['row']['prompt_id']!r} holds what JSON cannot ({error}): "
                "correct or remove that field"
            ) from None
        self._file.write(line)
        self._file.flush()
        self._remember(entry, offset)

    def rows(self) -> Iterator[tuple[Row, str | None]]:
        """(row, why it was set aside or None) of all rows so far, in the order written."""
        with open(self.partial, "rb") as file:
            for line in file:
                entry = json.loads(line)
                yield entry["row"], entry.get("reason")

    def finish(self, order: Iterable[str], counts: Counter, results: dict | None = None):
        """Write OUT in the input's order of prompt_ids, then its manifest; print the counts.

        `counts` holds "in", whatever the stage merged ("merged: …") and what it wrote to another
        file ("split off: …"); "out" and the rows set aside are added here, and the sum is checked:
        nothing is dropped in silence.
        """
        self._file.close()
        self.manifest.seconds = round(time.monotonic() - self._opened, 1)
        aside = Counter(f"set aside: {reason}" for reason in self._reasons.values())
        out = len(self._offsets) - len(self._reasons)
        gone = sum(n for name, n in counts.items() if name.startswith(("merged", "split off")))
        assert counts["in"] == out + sum(aside.values()) + gone, (counts, out, aside)
        self.manifest.counts = {"in": counts["in"], "out": out}
        self.manifest.counts |= {k: n for k, n in counts.items() if k != "in"} | dict(aside)
        temporary, set_aside = f"{self.partial}.sorted", f"{self.partial}.set_aside"
        with (
            open(self.partial, "rb") as rows,
            open(temporary, "wb") as file,
            open(set_aside, "wb") as aside_file,
        ):
            for prompt_id in order:
                rows.seek(self._offsets[prompt_id])
                entry = json.loads(rows.readline())
                reason = entry.get("reason")
                target, row = (file, entry["row"]) if reason is None else (aside_file, entry)
                target.write(_json_line(row))
            for opened in (file, aside_file):
                opened.flush()
                os.fsync(opened.fileno())
        self.manifest.results = dict(results or {}) | {"sha256": file_sha256(temporary)}
        if aside:
            publish(set_aside, f"{self.path}.set_aside.jsonl")
        else:
            os.unlink(set_aside)
            epath.Path(f"{self.path}.set_aside.jsonl").unlink(missing_ok=True)  # an older run's
        # The manifest first: an OUT without one would be refused as somebody else's file.
        self.manifest.write(manifest_path(self.path))
        publish(temporary, self.path)
        self._done()

    def finish_as(self, content: dict | list, counts: dict[str, int], results: dict | None = None):
        """Write OUT as the JSON `content` that was made of the rows, not as the rows."""
        self._file.close()
        self.manifest.seconds = round(time.monotonic() - self._opened, 1)
        text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        self.manifest.counts = dict(counts)
        self.manifest.results = dict(results or {}) | {"sha256": text_sha256(text)}
        self.manifest.write(manifest_path(self.path))
        write_atomically(self.path, text)
        self._done()

    def _done(self):
        for leftover in (self.partial, manifest_path(self.partial)):
            os.unlink(leftover)
        self.finished = True
        print(f"{self.path}: {_counts_line(self.manifest.counts)}")


def share_path(path: str, share: int, shares: int) -> str:
    return f"{path}.share-{share}-of-{shares}"


def _json_line(row: Row) -> bytes:
    # Halves of surrogate pairs have no UTF-8; within JSON "\ud83d" is the same string.
    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    return line.encode("utf-8", "backslashreplace")


def _counts_line(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())


def is_remote(path: str) -> bool:
    """Whether `path` is in an object store, gs://… say: what can be written once, whole."""
    return "://" in str(path)


def local_path(path: str) -> str:
    """Where the unfinished file of `path` grows: beside it, or, since object stores cannot append,
    in the user's cache folder under a name made from the whole path: the same machine goes on from
    it, another one begins anew."""
    if not is_remote(path):
        return str(path)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(cache, "iterative-preference-alignment")
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, f"{text_sha256(str(path))[:16]}-{os.path.basename(path)}")


def publish(local: str, path: str):
    """Move a finished local file to where it belongs, whole or not at all."""
    if is_remote(path):
        epath.Path(local).copy(path, overwrite=True)
        os.unlink(local)
    else:
        os.replace(local, path)


def write_atomically(path: str, text: str):
    """Write a whole file, or leave what was there."""
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        epath.Path(path).write_text(text)
        return
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
