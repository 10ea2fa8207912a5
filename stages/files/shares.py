"""Rows of which each of several processes does every so-manieth, and one file of their parts."""

import json
from collections import Counter
from collections.abc import Callable

from etils import epath

from sharding.errors import UserError
from sharding.watch import Flags
from stages.files.output import (
    Busy,
    Manifest,
    Output,
    manifest_path,
    read_manifest,
    refuse_other,
    share_path,
)
from stages.files.rows import read_rows


def join(flags: Flags, on_host: bool = False) -> tuple[int, int]:
    """(which, of how many) processes this one is, once all are there; (0, 1) where it is alone:
    then JAX is not loaded. on_host: it computes on the CPU alone."""
    try:
        if flags.place() is None:
            return 0, 1
        import jax

        from sharding import processes

        if on_host:
            jax.config.update("jax_platforms", "cpu")  # before the first device is asked for
        processes.start(flags)
    except ValueError as error:
        raise UserError(str(error)) from error
    return jax.process_index(), jax.process_count()


def check_same(manifest: Manifest) -> None:
    """UserError in all processes of `join`, unless each of them found the same inputs and models;
    that their flags are the same, `join` has seen to."""
    from sharding import processes

    if not processes.agree(json.dumps(manifest.key())):
        raise UserError("the processes were given different inputs or models")


def merge(
    path: str,
    manifest: Manifest,
    shares: int,
    order: list[str],
    counts: Counter,
    results: Callable[[Output], dict] = lambda output: {},
):
    """Make `path` of the processes' shares, rows in `order`, once all of them are there. Where some
    are not, or another process is at it, say so. `counts`, and `results` of all rows: as for
    `Output.finish`."""

    def finish(output: Output) -> None:
        output.finish(order, counts, results(output))

    merge_as(path, manifest, shares, finish)


def merge_as(path: str, manifest: Manifest, shares: int, finish: Callable[[Output], None]):
    """`merge`, where `finish` writes `path` of the Output with all the shares' rows."""
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
    for file in files:
        there = read_manifest(file) or manifest
        refuse_other(manifest, there, file, f"remove {file}")
        aside = f"{file}.set_aside.jsonl"
        for _, row in read_rows(file):
            if not output.has(row["prompt_id"]):
                output.write(row)
        for _, entry in read_rows(aside) if epath.Path(aside).exists() else ():
            if not output.has(entry["row"]["prompt_id"]):
                output.set_aside(entry["row"], entry["reason"])
    finish(output)
    # What was computed, not what putting it together took.
    parts = [there.seconds or 0 for f in files if (there := read_manifest(f))]
    manifest.seconds = sum(parts)
    manifest.write(manifest_path(path))
    for file in files:
        for leftover in (file, manifest_path(file), f"{file}.set_aside.jsonl"):
            epath.Path(leftover).unlink(missing_ok=True)
