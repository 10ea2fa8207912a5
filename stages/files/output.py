"""A stage's output file: resumable while it is written, atomic when it is done; its manifest."""

import dataclasses
import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from etils import epath

from sharding.errors import UserError
from stages.files.paths import file_sha256, local_path, publish, text_sha256, write_atomically
from stages.files.rows import Row, json_line


class Busy(UserError):
    """Another process is writing the same file."""


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
        say_if_edited(path, manifest)
    return manifest


def say_if_edited(path: str, manifest: Manifest):
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
        """share (i, n): write only this process's share; shares.py makes `path` of all."""
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
            say_if_edited(path, there)
            for leftover in (partial, partial_manifest):  # killed just before it removed them
                epath.Path(leftover).unlink(missing_ok=True)
            print(f"{path} is finished already: {counts_line(there.counts)}")
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
            line = json_line(entry)
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
                target.write(json_line(row))
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
        print(f"{self.path}: {counts_line(self.manifest.counts)}")


def share_path(path: str, share: int, shares: int) -> str:
    return f"{path}.share-{share}-of-{shares}"


def counts_line(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())
