"""Several processes share a file: of n, each does every nth row; process 0 joins their parts."""

import json
from collections import Counter
from collections.abc import Callable

import jax
from etils import epath

from sharding import processes
from sharding.errors import UserError
from sharding.watch import Flags
from stages.files.output import (
    Manifest,
    Output,
    manifest_path,
    read_manifest,
    refuse_other,
    share_path,
)
from stages.files.paths import Busy
from stages.files.rows import RowFile, json_rows


def join(flags: Flags, on_host: bool = False) -> tuple[int, int]:
    """(this process's number, how many there are), once all have come; (0, 1) for one alone.
    on_host: it computes on the CPU alone."""
    if flags.place() is None:
        return 0, 1
    if on_host:
        jax.config.update("jax_platforms", "cpu")  # before the first device is asked for
    processes.start(flags)
    return jax.process_index(), jax.process_count()


def check_same(manifest: Manifest) -> None:
    """Raise UserError in every process unless all read the same inputs and models. (`join` has
    compared their flags.)"""
    if not processes.agree(json.dumps(manifest.key())):
        raise UserError("the processes were given different inputs or models")


def finish_share(
    output: Output,
    manifest: Manifest,
    path: str,
    rows: RowFile,
    share: int,
    shares: int,
    results: Callable[[Output], dict],
) -> None:
    """Finish a process's part of `path`, and, in process 0, `path` itself. results: of an output's
    rows, for the manifest."""
    if not output.finished:
        mine = rows.ids[share::shares]
        counts = rows.counts if shares == 1 else Counter({"in": len(mine)})
        output.finish(mine, counts, results(output))
    if shares > 1:
        processes.wait()
        if share == 0:
            merge(
                path,
                manifest,
                shares,
                lambda whole: whole.finish(rows.ids, rows.counts, results(whole)),
            )
        processes.wait()


def merge(path: str, manifest: Manifest, shares: int, finish: Callable[[Output], None]) -> None:
    """Make `path` of all shares, if they are all there; else say which are missing. `finish` writes
    `path` from the Output that holds all their rows."""
    if epath.Path(path).exists():
        return
    files = [share_path(path, i, shares) for i in range(shares)]
    missing = [str(i) for i, file in enumerate(files) if not epath.Path(file).exists()]
    if missing:
        print(f"{path}: waits for share {', '.join(missing)} of {shares}")
        return
    try:
        output = Output.open(path, manifest)
    except Busy:
        print(f"{path}: another process is putting the shares together")
        return
    seconds = 0.0
    for file in files:
        theirs = read_manifest(file) or manifest
        refuse_other(manifest, theirs, file, f"remove {file}")
        seconds += theirs.seconds or 0
        aside = f"{file}.set_aside.jsonl"
        for _, row in json_rows(file):
            if not output.has(row["prompt_id"]):
                output.write(row)
        for _, entry in json_rows(aside) if epath.Path(aside).exists() else ():
            if not output.has(entry["row"]["prompt_id"]):
                output.set_aside(entry["row"], entry["reason"])
    finish(output)
    manifest.seconds = seconds  # what was computed, not what putting it together took
    manifest.write(manifest_path(path))
    for file in files:
        for leftover in (file, manifest_path(file), f"{file}.set_aside.jsonl"):
            epath.Path(leftover).unlink(missing_ok=True)
