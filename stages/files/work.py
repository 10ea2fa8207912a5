"""What a training leaves on disk while it runs, so that it can be stopped and go on.

    OUT.work/   manifest.json, and state-N/ for each saved step N: gone when the training is done
    OUT.log/    metrics.jsonl, TensorBoard events, set_aside.jsonl: for the user

Process 0 writes all of it except the shards of a state; all processes see the same file system.
Where OUT is in an object store, the log grows in a local folder and is copied at each save.
"""

import contextlib
import dataclasses
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from etils import epath, epy

from model import checkpoint, checkpoint_writing, disk
from sharding import processes
from sharding.errors import UserError
from stages.files.lock import lock, lock_file
from stages.files.output import Manifest, begins, parse_manifest, refuse_other
from stages.files.paths import is_remote, local_path, make_folder, write_atomically

with epy.lazy_imports():  # slow: it imports torch where that is installed
    from tensorboardX import event_file_writer, proto

STATE = re.compile(r"state-(\d+)")
# File of OUT.log → how it begins.
LOGGED = {"metrics.jsonl": b'{"step": ', "set_aside.jsonl": b'{"file": '}


def is_finished(out: str, manifest: Manifest) -> bool:
    """Whether `out` is the checkpoint that this run makes. UserError: it is something else."""
    if not checkpoint_writing.is_taken(out):
        return False
    try:
        made = Manifest(**checkpoint.read_manifest(out)["origin"])
    except (UserError, TypeError) as error:
        raise UserError(
            f"--out {out} exists and is no checkpoint of this stage: choose another ({error})"
        ) from error
    _refuse_other_run(manifest, made, out, "choose another --out")
    left = epath.Path(f"{out}.work"), epath.Path(lock_file(out))  # by a process killed here
    if processes.is_first() and any(path.exists() for path in left):
        with contextlib.suppress(UserError), lock(out):
            _remove(out)
    return True


def read_begun(out: str, manifest: Manifest) -> Iterator[Manifest]:
    """The manifest of the finished or unfinished training of `out`, if it can be read. Nothing is
    refused here: `is_finished` and `open_work` do that."""
    unfinished = epath.Path(f"{out}.work") / "manifest.json"
    with contextlib.suppress(UserError, TypeError, KeyError, AttributeError):
        if checkpoint_writing.is_taken(out):
            yield _without_unknown(Manifest(**checkpoint.read_manifest(out)["origin"]), manifest)
        elif unfinished.exists():
            yield _without_unknown(parse_manifest(unfinished, ""), manifest)


def _without_unknown(made: Manifest, manifest: Manifest) -> Manifest:
    """`made` without arguments that only earlier versions recorded; they change no result."""
    known = {k: v for k, v in made.arguments.items() if k in manifest.arguments}
    return dataclasses.replace(made, arguments=known)


def _refuse_other_run(manifest: Manifest, made: Manifest, path: str, mend: str) -> None:
    refuse_other(manifest, _without_unknown(made, manifest), path, mend)


@contextlib.contextmanager
def open_work(
    out: str, manifest: Manifest, total_steps: int, keep: int, aside: list[dict]
) -> "Iterator[Work]":
    """OUT.work and OUT.log of a training, held by a lock. keep: how many saved states stay. aside:
    rows for OUT.log/set_aside.jsonl.

    with open_work(…) as work:
        begun = work.load_state(shapes)
        …work.log(step, metrics); work.save_state(step, state)…
        work.finish_saving(); …write OUT…; work.done()
    """
    work = Work(out, total_steps, keep)
    with contextlib.ExitStack() as held:
        if processes.is_first():
            held.enter_context(lock(out))
            work.begin(manifest, aside)
            work.open_log(max(work.states(), default=0))
            held.callback(work.close_log)
        processes.wait()
        yield work


class Work:
    """What `open_work` gives."""

    def __init__(self, out: str, total_steps: int, keep: int):
        self.out, self.total_steps, self.keep = out, total_steps, keep
        self.folder = epath.Path(f"{out}.work")
        self.log_folder = Path(local_path(f"{out}.log"))
        self._remote_log = f"{out}.log" if is_remote(out) else None
        self._finish: Callable[[], None] = lambda: None  # ends the saving in progress
        self._metrics = self._board = None

    def begin(self, manifest: Manifest, aside: list[dict]) -> None:
        """Refuse files that are not ours, then make OUT.work and remove an unfinished save."""
        if checkpoint_writing.is_taken(self.out):
            raise UserError(f"{self.out} was finished by another process just now")
        for folder in (self.folder, epath.Path(self.log_folder)):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is in the way: choose another --out, or move it")
        for name, start in LOGGED.items():
            file = self.log_folder / name
            if file.exists() and not (file.is_file() and begins(str(file), start)):
                raise UserError(f"{file} is not of this stage: choose another --out, or move it")
        file, states = self.folder / "manifest.json", self.states()
        if file.exists():
            made = parse_manifest(file, f"remove {self.folder} to begin anew")
            if states:
                _refuse_other_run(manifest, made, str(self.folder), f"remove {self.folder}")
        elif self.folder.exists() and not all(  # a manifest that was cut off bears our mark
            path.name.endswith(disk.MARK) for path in self.folder.iterdir()
        ):
            raise UserError(f"{self.folder} is not of this stage: choose another --out, or move it")
        manifest.write(str(file))
        for path in self.folder.glob("state-*"):
            if path not in map(self._state, states):
                path.rmtree() if path.is_dir() else path.unlink()
        if self._remote_log and states and not self.log_folder.exists():  # begun elsewhere
            _copy(self._remote_log, self.log_folder)
        make_folder(self.log_folder)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in aside)
        aside_file = self.log_folder / "set_aside.jsonl"
        with disk.naming(str(aside_file)):
            aside_file.write_text(lines) if lines else aside_file.unlink(missing_ok=True)

    # ------------------------------------------------------------------------ the states

    def states(self) -> list[int]:
        """The steps whose state is whole, ascending. (A save that was cut off has another name.)"""
        names = (STATE.fullmatch(path.name) for path in self.folder.glob("state-*"))
        steps = sorted(int(name[1]) for name in names if name)
        return [n for n in steps if checkpoint_writing.is_whole_state(self._state(n))]

    def _state(self, step: int) -> epath.Path:
        return self.folder / f"state-{step}"

    def load_state(self, shapes) -> tuple[int, dict] | None:
        """(step, state) of the last whole state; None where there is none. shapes: of the state's
        arrays, with shardings."""
        step = int(processes.from_first(np.array(max(self.states(), default=-1))))
        if step < 0:
            return None
        return step, checkpoint_writing.load_state(str(self._state(step)), shapes)

    def save_state(self, step: int, state: dict) -> None:
        """Begin to save in the background; the next call, or `finish_saving`, waits for the end."""
        self.finish_saving()
        self._sync_log()
        if not processes.from_first(np.array(step in self.states())):
            self._finish = checkpoint_writing.save_state(str(self._state(step)), state)

    def finish_saving(self) -> None:
        """Wait until the state is whole, then remove all states but the newest `keep`."""
        finish, self._finish = self._finish, lambda: None
        finish()
        if processes.is_first():
            self._keep_log()
            for old in self.states()[: -self.keep]:
                self._state(old).rmtree()

    def done(self) -> None:
        """Remove OUT.work: OUT is whole, and nothing is needed to go on."""
        if processes.is_first():
            self._keep_log()
            _remove(self.out)

    # --------------------------------------------------------------------------- the log

    def open_log(self, step: int) -> None:
        """Drop the metrics of steps after `step`, which will be computed again, and the evaluation
        after the last step, since no state is saved after it."""
        file = self.log_folder / "metrics.jsonl"
        kept = []
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            evaluated = step < self.total_steps or "loss" in row
            if row["step"] < step or (row["step"] == step > 0 and evaluated):
                kept.append(line + "\n")
        write_atomically(str(file), "".join(kept))
        self._metrics = open(file, "a")
        # tensorboardX's SummaryWriter writes in a thread. If a full disk ends that thread, the next
        # call waits for ever, so events are written here.
        folder = self.log_folder / "tensorboard"
        make_folder(folder)
        self._board = event_file_writer.EventsWriter(str(folder / "events"))
        # TensorBoard forgets what an earlier sitting wrote for steps from `step` on.
        start = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
        self._event(step, session_log=start)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write a step's metrics to metrics.jsonl and for TensorBoard."""
        if self._metrics is None:  # not process 0
            return
        with disk.naming(self._metrics.name):
            self._metrics.write(json.dumps({"step": step, **values}) + "\n")
            self._metrics.flush()
        Value = proto.summary_pb2.Summary.Value
        scalars = [Value(tag=name, simple_value=x) for name, x in values.items()]
        self._event(step, summary=proto.summary_pb2.Summary(value=scalars))
        if step == self.total_steps:
            self._sync_log()

    def _event(self, step: int, **content) -> None:
        event = proto.event_pb2.Event(wall_time=time.time(), step=step, **content)
        with disk.naming(str(self.log_folder / "tensorboard")):
            self._board.write_event(event)
            self._board.flush()

    def _sync_log(self) -> None:
        """Sync the log: steps before a saved state, or before OUT, are not computed again."""
        if self._metrics is not None:
            disk.sync(str(self.log_folder))

    def close_log(self) -> None:
        with disk.naming(self._metrics.name):  # writes what a full disk refused before
            self._metrics.close()
        with disk.naming(str(self.log_folder / "tensorboard")):
            self._board.close()

    def _keep_log(self) -> None:
        if self._remote_log is not None and self.log_folder.exists():
            _copy(self.log_folder, self._remote_log)


def _remove(out: str) -> None:
    """Remove OUT.work, the manifest last: if the process is killed here, the manifest shows that
    the folder is ours."""
    folder = epath.Path(f"{out}.work")
    if (folder / "manifest.json").exists():
        for path in folder.iterdir():
            if path.name != "manifest.json":
                path.rmtree() if path.is_dir() else path.unlink()
        folder.rmtree()


def _copy(source: epath.PathLike, target: epath.PathLike) -> None:
    """All files of a folder into another. (An epath's walk loses the gs:// of its paths.)"""
    make_folder(target)
    for path in epath.Path(source).iterdir():
        to = epath.Path(target) / path.name
        if path.is_dir():
            _copy(path, to)
        else:
            with disk.naming(str(to)):
                path.copy(to, overwrite=True)


def kept_array(
    places: list[str], shape: tuple[int, ...], compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """The fp32 array of this shape that was kept in one of `places` before, in all processes; else
    what `compute` gives, which is kept in the first of them that can be written."""
    array = None
    for place in places if processes.is_first() else ():
        with contextlib.suppress(OSError, ValueError, EOFError):  # none, or damaged
            kept = np.load(io.BytesIO(epath.Path(place).read_bytes()), allow_pickle=False)
            if kept.shape == shape and kept.dtype == np.float32:
                print(f"computed before: {place}")
                array = kept
                break
    if processes.from_first(np.array(array is not None)):
        return processes.from_first(np.zeros(shape, np.float32) if array is None else array)
    array, content = compute(), io.BytesIO()
    np.save(content, array)
    for place in places if processes.is_first() else ():
        try:
            write_atomically(place, content.getvalue())
            break
        except (OSError, UserError):
            if place == places[-1]:
                raise
    return array
