"""What a training leaves on disk while it runs, so that it can be stopped and goes on."""

import io
import json
import os
from pathlib import Path

import numpy as np
from etils import epath

from sharding import processes
from sharding.errors import UserError
from stages.files.output import Manifest, refuse_other
from stages.files.paths import is_remote, local_path


class Work:
    """OUT.work/: what a stopped run needs to go on; OUT.log/: what a user reads. Of several
    processes the first writes, to a file system that all of them see. Where OUT is in an object
    store, the log grows in a local folder, and is copied there whenever the state is saved."""

    def __init__(self, out: str, manifest: Manifest, keep: int = 1):
        self.keep, self._finish = keep, lambda: None
        self.out, self.folder = out, epath.Path(f"{out}.work")
        self.log = Path(local_path(f"{out}.log"))
        self.remote_log = f"{out}.log" if is_remote(out) else None
        self.finished = False
        from model import checkpoint

        if checkpoint.is_taken(out):
            try:
                origin = checkpoint.read_manifest(out)["origin"]
                there = Manifest(**origin)
            except (checkpoint.UserError, TypeError) as error:
                raise UserError(
                    f"--out {out} exists and is no checkpoint of this stage: "
                    f"choose another ({error})"
                ) from error
            refuse_other(manifest, there, out, "choose another --out")
            self.finished = True
            if processes.is_first():
                self.done()
            return
        if self.states():  # work that other arguments must not go on with
            there = Manifest(**json.loads((self.folder / "manifest.json").read_text()))
            refuse_other(manifest, there, str(self.folder), f"remove {self.folder}")

    def begin(self, manifest: Manifest, aside: list[dict]) -> None:
        """Make the folders, once the input is known to be sound, and write what was set aside."""
        if processes.is_first():
            self._begin(manifest, aside)
        processes.wait()

    def _begin(self, manifest: Manifest, aside: list[dict]) -> None:
        if self.remote_log and self.states() and not self.log.exists():  # of another machine
            _copy(self.remote_log, self.log)
        self.log.mkdir(parents=True, exist_ok=True)
        if not self.states():
            self.folder.rmtree(missing_ok=True)
            self.folder.mkdir(parents=True)
            manifest.write(str(self.folder / "manifest.json"))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in aside)
        file = self.log / "set_aside.jsonl"
        file.write_text(text) if aside else file.unlink(missing_ok=True)

    # The training state, one folder a save: the new one is whole before the old one goes.

    def states(self) -> list[int]:
        """The steps of the states there are, ascending."""
        from model import checkpoint

        found = filter(checkpoint.is_whole_state, self.folder.glob("state-*"))
        return sorted(int(path.name[6:]) for path in found)

    def save_state(self, step: int, state: dict) -> None:
        """Begin to save; the next call, or `finish_saving`, waits for its end."""
        from model import checkpoint

        self.finish_saving()
        self._finish = checkpoint.save_state(str(self.folder / f"state-{step}"), state)

    def finish_saving(self) -> None:
        self._finish()
        self._finish = lambda: None
        if processes.is_first():
            self._keep_log()
            for old in self.states()[: -self.keep]:
                (self.folder / f"state-{old}").rmtree()

    def log_from(self, step: int, evaluated: bool) -> None:
        """Forget the metrics of steps after `step`, and, unless it was `evaluated` before it was
        saved, its evaluation: they will be made again."""
        file = self.log / "metrics.jsonl"
        if file.exists():
            rows = [
                json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")
            ]
            kept = [
                r
                for r in rows
                if r["step"] < step or (r["step"] == step > 0 and (evaluated or "loss" in r))
            ]
            file.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def _keep_log(self) -> None:
        if self.remote_log is not None and self.log.exists():
            _copy(self.log, self.remote_log)

    def done(self) -> None:
        self._keep_log()
        self.folder.rmtree(missing_ok=True)


def _copy(source: epath.PathLike, target: epath.PathLike) -> None:
    """All files of a folder into another. (An epath's walk loses the gs:// of its paths.)"""
    epath.Path(target).mkdir(parents=True, exist_ok=True)
    for path in epath.Path(source).iterdir():
        to = epath.Path(target) / path.name
        if path.is_dir():
            _copy(path, to)
        else:
            path.copy(to, overwrite=True)


def save_array(path: epath.Path, array: np.ndarray) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.save(content, array)
    if is_remote(path):
        path.write_bytes(content.getvalue())
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(content.getvalue())
    temporary.rename(path)
