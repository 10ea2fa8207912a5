"""What a stage writes: one file, resumable while it grows, whole when it is done; its manifest.

- A row in is a row out, or is counted with its reason: a well-formed row that cannot be used is set
  aside, to OUT.set_aside.jsonl.
- Rows are appended to OUT.partial as they are done, so a killed stage goes on where it was. OUT
  itself appears whole, rows in input order, by an atomic rename.
- Beside OUT lies OUT.manifest.json: stage, arguments, counts, every input by its role with its
  sha256, and the identities of what made it. OUT.partial.manifest.json holds the same while the
  stage runs, so that a run with other arguments is never mixed into it.

Runs without JAX.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from etils import epath

from model.disk import naming
from sharding.errors import UserError, check_scheme
from stages.files.paths import (
    check_distinct,
    check_place,
    file_sha256,
    local_path,
    make_folder,
    publish,
    try_lock,
    write_atomically,
)
from stages.files.rows import Fields, json_line, parse_json

# ---------------------------------------------------------------------- manifests


@dataclasses.dataclass
class Manifest:
    """What made a file. `arguments` are those that decide its content: no paths, no speed flags."""

    stage: str
    arguments: dict
    inputs: dict[str, dict]  # role, e.g. "samples" → {"path", "sha256"}
    identities: dict[str, str]  # "model", "tokenizer", "chat_template", "ranker", … → identity
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    results: dict = dataclasses.field(default_factory=dict)  # what the stage measured
    seconds: float | None = None  # of the last sitting alone, if the stage was stopped

    def __post_init__(self) -> None:
        self.inputs = with_roles(self.inputs)

    def key(self) -> dict:
        """What must agree for two runs to be the same run. Paths do not matter, roles do."""
        inputs = {role: entry["sha256"] for role, entry in self.inputs.items()}
        key = {"stage": self.stage, "arguments": self.arguments, "inputs": inputs}
        return json.loads(json.dumps(key | {"identities": self.identities}))

    def write(self, path: str) -> None:
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False))


def an_input(path: str, sha256: str | None = None) -> dict:
    """A value of `Manifest.inputs`. sha256: of the file's content; None: it is hashed here."""
    return {"path": str(path), "sha256": sha256 or file_sha256(path)}


def with_roles(inputs: dict) -> dict[str, dict]:
    """A manifest's inputs, role → {"path", "sha256"}. Earlier versions wrote path → sha256: the
    path is then also the role. Raises TypeError for anything else."""
    if not isinstance(inputs, dict):
        raise TypeError(f"its inputs are {inputs!r}")
    return {
        role: entry if isinstance(entry, dict) else {"path": role, "sha256": entry}
        for role, entry in inputs.items()
    }


def manifest_path(path: str) -> str:
    return f"{path}.manifest.json"


def read_manifest(path: str) -> Manifest | None:
    """The manifest beside the file `path`; None where there is none (a user's own file)."""
    check_scheme(path)
    file = epath.Path(manifest_path(path))
    return parse_manifest(file, "restore it, or delete it") if file.exists() else None


def parse_manifest(file: epath.Path, mend: str) -> Manifest:
    """The manifest in a file. Raises UserError that ends with `mend`."""
    try:
        manifest = Manifest(**parse_json(file.read_bytes()))
        manifest.key()
        return manifest
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: not a manifest ({error}): {mend}") from None


def read_begun(path: str) -> Iterator[Manifest]:
    """The manifests of the finished and of the unfinished output at `path`, if they can be read.
    Nothing is refused here: `Output.open` does that."""
    for file in (path, f"{local_path(path)}.partial"):
        with contextlib.suppress(UserError):
            if (manifest := read_manifest(file)) and epath.Path(file).exists():
                yield manifest


def read_lineage(path: str, sha256: str | None = None) -> Manifest | None:
    """The manifest of a stage's input. Prints a line if there is none, or if the file was edited
    since it was written, which users may do. sha256: the file's."""
    manifest = read_manifest(path)
    if manifest is None:
        print(f"{path}: no manifest, so its lineage is not checked (taken as your own file)")
    else:
        say_if_edited(path, manifest, sha256)
    return manifest


def say_if_edited(path: str, manifest: Manifest, sha256: str | None = None) -> None:
    if manifest.results.get("sha256") not in (None, sha256 or file_sha256(path)):
        print(f"{path}: changed since its manifest was written (taken as your own edit)")


def refuse_other(ours: Manifest, theirs: Manifest, path: str, mend: str | None = None) -> None:
    """Raise UserError, naming every difference, unless both manifests describe the same run."""
    ours_key, theirs_key = ours.key(), theirs.key()
    if theirs.inputs and all(entry["path"] == x for x, entry in theirs.inputs.items()):  # no roles
        for key in (ours_key, theirs_key):
            key["inputs"] = sorted(key["inputs"].values())
    if differences := _differences(ours_key, theirs_key):
        raise UserError(
            f"{path} exists from other arguments ({'; '.join(differences)}): "
            f"{mend or 'choose another --out, or pass --overwrite'}"
        )


def _differences(ours: dict, theirs: dict, prefix: str = "") -> list[str]:
    """The names whose values differ between two manifest keys, with both values."""
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if name == "inputs" and not prefix:
            if a != b:
                lines.append("the input's content differs")
        elif isinstance(a, dict) and isinstance(b, dict):
            lines += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name} {_short(b)} there, {_short(a)} here")
    return lines


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:36]}…"


# ---------------------------------------------------------------------- the file

NO_MANIFEST = "exists and has no manifest: move it, or pass --overwrite"


def check_before(path: str, stage: str, arguments: dict, overwrite: bool) -> None:
    """Refuse what `Output.open` would refuse, as far as that is known before the work whose result
    the file will hold. arguments: those of the manifest that are known. Raises UserError."""
    check_place(path, "--out")
    if overwrite or not epath.Path(path).exists():
        return
    if (theirs := read_manifest(path)) is None:
        raise UserError(f"{path} {NO_MANIFEST}")
    known = {name: x for name, x in theirs.arguments.items() if name in arguments}
    theirs = Manifest(theirs.stage, known, {}, {})
    refuse_other(Manifest(stage, arguments, {}, {}), theirs, path)


class Output:
    """One stage's output file.

        output = Output.open(path, manifest, overwrite=False)
        if output.finished: return
        for …: if not output.has(prompt_id): output.write(fields) or output.set_aside(fields, why)
        output.finish(order, counts)

    A row is known by its prompt_id.
    """

    def __init__(self, path: str, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self.finished, self._opened = False, time.monotonic()
        self.partial = f"{local_path(path)}.partial"
        self._offsets: dict[str, int] = {}  # prompt_id → where its line starts in the partial file
        self._reasons: dict[str, str] = {}
        self._file = None

    @classmethod
    def open(cls, path: str, manifest: Manifest, overwrite: bool = False) -> "Output":
        """Begin the file, or go on with it, under a lock; or find it finished.

        overwrite: replace a file of other arguments, finished or not, or an edited one. The old
        file stays until the new one is whole. A file of this very run is never replaced, so that
        the same command can be given again.
        Raises UserError.
        """
        check_place(path, "--out")
        inputs = {role: entry["path"] for role, entry in manifest.inputs.items()}
        check_distinct(inputs, {"--out": path})
        output = cls(path, manifest)
        if epath.Path(path).exists() and not (overwrite and output._is_another()):
            output._recognise()
            return output
        for folder in (epath.Path(path).parent, epath.Path(output.partial).parent):
            make_folder(folder)
        output._begin(overwrite)
        return output

    def _is_another(self) -> bool:
        """Whether the existing file is another one than this run would write."""
        try:
            theirs = read_manifest(self.path)
        except UserError:
            return True
        same = theirs is not None and theirs.key() == self.manifest.key()
        return not same or theirs.results.get("sha256") != file_sha256(self.path)

    def _recognise(self) -> None:
        """Check that the existing file is the finished one of this very run."""
        theirs = read_manifest(self.path)
        if theirs is None:
            raise UserError(f"{self.path} {NO_MANIFEST}")
        refuse_other(self.manifest, theirs, self.path)
        say_if_edited(self.path, theirs)
        if epath.Path(self.partial).exists():  # killed just before it removed the partial file?
            with open(self.partial, "rb") as file:
                try_lock(file, self.path)
                self._remove_partial()
        print(f"{self.path} is finished already: {counts_line(theirs.counts)}")
        self.finished, self.manifest = True, theirs

    def _begin(self, overwrite: bool) -> None:
        """Open and lock the partial file, and go on with what it holds of this very run."""
        while self._file is None or not _is_at(self._file, self.partial):
            try:
                self._file = open(self.partial, "ab")  # again, if its owner finished meanwhile
            except OSError as error:
                raise UserError(f"{self.path} cannot be written ({error.strerror})") from None
            try_lock(self._file, self.path)
        theirs = read_manifest(self.partial)
        if theirs is not None and os.path.getsize(self.partial):
            try:
                refuse_other(self.manifest, theirs, self.partial)
                return self._resume()
            except UserError:
                if not overwrite:
                    raise
        elif not begins(self.partial, b'{"row": '):
            raise UserError(
                f"{self.partial} is in the way, and not of this project: move it, or choose "
                "another --out"
            )
        self._file.seek(self._file.truncate(0))
        self.manifest.write(manifest_path(self.partial))

    def _resume(self) -> None:
        """Read the rows so far; a line cut off by a kill is dropped, and its row made again."""
        end = 0
        with open(self.partial, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    self._remember(json.loads(line), end)
                except (ValueError, KeyError, TypeError, RecursionError):
                    break
                end += len(line)
        self._file.truncate(end)
        self._file.seek(end)
        if self._offsets:
            print(f"{self.partial}: going on after {len(self._offsets)} rows")

    def _remember(self, entry: dict, offset: int) -> None:
        prompt_id = entry["row"]["prompt_id"]
        self._offsets[prompt_id] = offset
        if "reason" in entry:
            self._reasons[prompt_id] = entry["reason"]

    def has(self, prompt_id: str) -> bool:
        return prompt_id in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def write(self, row: Fields) -> None:
        """Append a finished row."""
        self._append({"row": row})

    def set_aside(self, row: Fields, reason: str) -> None:
        """Count a row that cannot be used under `reason` (the same words for the same cause)."""
        self._append({"row": row, "reason": reason})

    def _append(self, entry: dict) -> None:
        offset = self._file.tell()
        try:
            line = json_line(entry)
        except (ValueError, TypeError) as error:  # 1e999 reads as infinite; a column of dates
            raise UserError(
                f"prompt_id {entry['row']['prompt_id']!r} holds what JSON cannot ({error}): "
                "correct or remove that field"
            ) from None
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.partial} cannot be written ({error.strerror})") from None
        self._remember(entry, offset)

    def rows(self) -> Iterator[tuple[Fields, str | None]]:
        """(row, why it was set aside or None) of all rows so far, in the order written."""
        with open(self.partial, "rb") as file:
            for line in file:
                entry = json.loads(line)
                yield entry["row"], entry.get("reason")

    def finish(self, order: Iterable[str], counts: Counter, results: dict | None = None) -> None:
        """Write OUT in the input's order of prompt_ids, then its manifest; print the counts.

        counts: "in", whatever the stage merged ("merged: …") and what it wrote to another file
        ("split off: …"). "out" and the rows set aside are added here, and the sum is checked:
        nothing is dropped in silence.
        """
        self._file.flush()
        aside = Counter(f"set aside: {reason}" for reason in self._reasons.values())
        out = len(self._offsets) - len(self._reasons)
        gone = sum(n for name, n in counts.items() if name.startswith(("merged", "split off")))
        if counts["in"] != out + aside.total() + gone:
            raise RuntimeError(f"{self.path}: rows were lost: {counts}, {out} out, {aside}")
        self.manifest.counts = {"in": counts["in"], "out": out}
        self.manifest.counts |= {k: n for k, n in counts.items() if k != "in"} | dict(aside)
        whole, set_aside = f"{self.partial}.sorted", f"{self.partial}.set_aside"
        with (
            naming(self.path),
            open(self.partial, "rb") as rows,
            open(whole, "wb") as file,
            open(set_aside, "wb") as aside_file,
        ):
            for prompt_id in order:
                rows.seek(self._offsets[prompt_id])
                entry = json.loads(rows.readline())
                if "reason" in entry:
                    aside_file.write(json_line(entry))
                else:
                    file.write(json_line(entry["row"]))
        self._publish(whole, set_aside if aside else None, results)

    def finish_as(self, content: dict | list, counts: dict[str, int], results: dict | None = None):
        """Write as OUT the JSON `content` that was made of the rows, not the rows themselves."""
        text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        self.manifest.counts = dict(counts)
        whole = f"{self.partial}.sorted"
        write_atomically(whole, text)
        self._publish(whole, None, results)

    def _publish(self, whole: str, set_aside: str | None, results: dict | None):
        """Put the finished files in their places, in an order such that a kill between two steps
        never leaves an output that seems finished and is not."""
        self.manifest.seconds = round(time.monotonic() - self._opened, 1)
        self.manifest.results = dict(results or {}) | {"sha256": file_sha256(whole)}
        if set_aside is not None:
            self.manifest.results["set_aside_sha256"] = file_sha256(set_aside)
        # The files that --overwrite replaces are removed first: beside the new manifest they would
        # look like the new ones. The manifest is written before the file, which without one would
        # look like a user's own.
        for old in (self.path, f"{self.path}.set_aside.jsonl"):
            epath.Path(old).unlink(missing_ok=True)
        if set_aside is not None:
            publish(set_aside, f"{self.path}.set_aside.jsonl")
        self.manifest.write(manifest_path(self.path))
        publish(whole, self.path)
        self._remove_partial()
        self._file.close()
        self.finished = True
        print(f"{self.path}: {counts_line(self.manifest.counts)}")

    def _remove_partial(self) -> None:
        aside = f"{self.partial}.set_aside"
        for leftover in (aside, manifest_path(self.partial), self.partial):
            epath.Path(leftover).unlink(missing_ok=True)


def _is_at(file, path: str) -> bool:
    """Whether the open file is the one that lies at `path` now."""
    return os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))


def begins(path: str, start: bytes) -> bool:
    """Whether a file begins with `start`, or was cut off within it."""
    with open(path, "rb") as file:
        return start.startswith(file.read(len(start)))


def counts_line(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())
