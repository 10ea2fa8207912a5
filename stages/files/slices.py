"""The files of a stage's slices become the file of one run. Runs without JAX."""

import dataclasses
import re
from collections import Counter

from etils import epath

from sharding.errors import UserError
from stages.files.output import Manifest, Output, manifest_path, read_manifest, refuse_other
from stages.files.paths import check_distinct, file_sha256
from stages.files.rows import Fields, json_rows


def join(out: str, paths: tuple[str, ...]) -> None:
    """Write `out` and its manifest from the outputs `paths` of all slices 0/n … (n − 1)/n.

    Raises UserError where they are not all slices of one run, each finished and as it was written.
    """
    check_distinct({f"PART {path}": path for path in paths}, {"OUT": out})
    if not paths:
        raise UserError("PART: give the files of all slices")
    parts: dict[int, tuple[str, Manifest]] = {}
    for path in paths:
        manifest, number = _slice_of(path, len(paths))
        if number in parts:
            raise UserError(f"{path}: slice {number} is given twice, also as {parts[number][0]}")
        parts[number] = path, manifest
    parts = dict(sorted(parts.items()))
    whole, *others = (_without_slice(manifest) for _, manifest in parts.values())
    for (path, _), other in zip(list(parts.values())[1:], others):
        refuse_other(whole, other, path, "give slices of one run")

    rows = [_in_order(path, manifest) for path, manifest in parts.values()]
    order = [
        of_slice[n][0]["prompt_id"]
        for n in range(max(map(len, rows)))
        for of_slice in rows
        if n < len(of_slice)
    ]
    if len(set(order)) < len(order):
        raise UserError(f"{paths[0]} and the other slices hold a prompt twice: sample them again")
    output = Output.open(out, whole)
    if output.finished:
        return
    for row, reason in (entry for of_slice in rows for entry in of_slice):
        if not output.has(row["prompt_id"]):
            output.write(row) if reason is None else output.set_aside(row, reason)
    counts: Counter = Counter()
    sittings = []
    for _, manifest in parts.values():
        merged = {k: n for k, n in manifest.counts.items() if k == "in" or k.startswith("merged")}
        counts.update(merged)
        sittings.append(manifest.results.get("last_sitting", {}))
    sums = {k: sum(s.get(k, 0) for s in sittings) for k in ("tokens", "seconds")}
    slots = max(s.get("slots", 0) for s in sittings)
    output.finish(order, counts, {"last_sitting": sums | {"slots": slots}})
    # The time of the sampling, without that of joining.
    output.manifest.seconds = sum(manifest.seconds or 0 for _, manifest in parts.values())
    output.manifest.write(manifest_path(out))


def _slice_of(path: str, slices: int) -> tuple[Manifest, int]:
    """The manifest of a finished slice, and the slice's number. slices: how many there are."""
    if not epath.Path(path).exists():
        unfinished = epath.Path(f"{path}.partial").exists()
        raise UserError(f"{path} {'is not finished' if unfinished else 'does not exist'}")
    manifest = read_manifest(path)
    text = (manifest.arguments if manifest else {}).get("slice")
    if text is None:
        raise UserError(f"{path} is no slice: give files of stages.sample --slice")
    numbers = re.fullmatch("([0-9]+)/([0-9]+)", str(text))
    number, of = map(int, numbers.groups()) if numbers else (0, 0)
    if number >= of or not {"sha256", "set_aside"} <= manifest.results.keys():
        raise UserError(f"{manifest_path(path)} was edited: sample the slice again")
    if of != slices:
        raise UserError(f"{path} is slice {text}, of {slices} files: give those of all {of} slices")
    if manifest.results["sha256"] != file_sha256(path):
        raise UserError(f"{path} has changed since it was written: sample the slice again")
    return manifest, number


def _without_slice(manifest: Manifest) -> Manifest:
    arguments = {name: x for name, x in manifest.arguments.items() if name != "slice"}
    return dataclasses.replace(manifest, arguments=arguments, counts={}, results={})


def _in_order(path: str, manifest: Manifest) -> list[tuple[Fields, str | None]]:
    """(row, why it was set aside or None) of all rows of a slice, in the prompts' order."""
    rows = ((row, None) for _, row in json_rows(path))
    aside_path, places = f"{path}.set_aside.jsonl", set(manifest.results["set_aside"])
    changed = f"{aside_path} has changed since it was written: sample the slice again"
    if places and manifest.results.get("set_aside_sha256") != file_sha256(aside_path):
        raise UserError(changed)
    aside = json_rows(aside_path) if places else iter(())
    entries = ((entry["row"], entry["reason"]) for _, entry in aside if "row" in entry)
    total = manifest.counts["out"] + len(places)
    merged = [next(entries if n in places else rows, None) for n in range(total)]
    if None in merged or next(rows, None) or next(entries, None):
        raise UserError(changed)
    return merged
