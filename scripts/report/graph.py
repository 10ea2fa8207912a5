"""What was made from what in a run: its manifests, joined into a graph.

Every file of a stage has its manifest beside it, every checkpoint has one inside. Manifests name
inputs by content: a file by its sha256, a checkpoint by the identity of its weights. A file is
marked as changed where its content is no longer the one that its manifest, or the manifest of what
was made from it, names.
"""

import dataclasses
import json
from collections.abc import Iterator
from graphlib import TopologicalSorter

from etils import epath

from sharding.errors import UserError
from stages.files.output import Manifest, manifest_path, read_manifest
from stages.files.paths import file_sha256
from stages.files.provenance import with_roles

# The weights or code that a stage reads itself; its other identities come with its input files.
READS = {
    "sample": ("model",),
    "rank": ("ranker",),
    "dpo": ("model", "reference"),
    "evaluate compare": ("ranker",),
    "evaluate kl": ("model",),
}


@dataclasses.dataclass(eq=False)
class Node:
    """A file or a checkpoint, or something from outside the run."""

    path: str  # within the run; for a file outside, the path that the manifest names
    identity: str  # the recorded sha256 of a file, or identity of a checkpoint
    manifest: Manifest | None  # None: no stage of the run wrote it
    parents: list["Node"] = dataclasses.field(default_factory=list)
    changed: bool = False  # the file has another content now


def read(run: str) -> list[Node]:
    """Every file of the run that has a manifest, and what these were made from, parents first."""
    folder = epath.Path(run)
    nodes, by_content = [], {}
    for node, contents in _written(folder):
        nodes.append(node)
        for content in contents:  # of equal checkpoints the first one stands for all
            by_content.setdefault(content, node)
    for node in nodes[:]:
        made = node.manifest
        files = {entry["sha256"]: entry["path"] for entry in with_roles(made.inputs).values()}
        models = {made.identities.get(name): name for name in READS.get(made.stage, ())}
        for content, name in (files | models).items():
            if content is None:
                continue
            if content not in by_content and content in files:
                by_content[content] = _input(folder, name, content, nodes)
            elif content not in by_content:
                nodes.append(Node(name, content, None))
                by_content[content] = nodes[-1]
            if by_content[content] not in node.parents:
                node.parents.append(by_content[content])
    return list(TopologicalSorter({node: node.parents for node in nodes}).static_order())


def places(folder) -> list[epath.Path]:
    """start/ and iteration_K/ of a run, in order."""
    if not (folder / "start").is_dir():
        raise UserError(
            f"{folder} is no run: give the folder runs/NAME that scripts/iterate.sh makes"
        )
    iterations = [p for p in folder.glob("iteration_*") if p.name[10:].isdigit()]
    return [folder / "start", *sorted(iterations, key=lambda p: int(p.name[10:]))]


def _written(folder) -> Iterator[tuple[Node, set[str]]]:
    """Each node that the run itself wrote, and the contents by which other manifests name it."""
    suffix, first = manifest_path(""), [folder, *places(folder)]
    rest = sorted(p for p in folder.iterdir() if p.is_dir() and p not in first)
    for place in (*first, *rest):
        for file in sorted(place.glob(f"*{suffix}")):
            path = str(file).removesuffix(suffix)
            if not epath.Path(path).exists():  # the stage has not finished it
                continue
            manifest, now = read_manifest(path), file_sha256(path)
            then = manifest.results.get("sha256", now)
            yield Node(_within(folder, path), then, manifest, changed=then != now), {then, now}
        if (place / "checkpoint/manifest.json").exists():
            node = _checkpoint(folder, place / "checkpoint")
            yield node, {node.identity}


def _checkpoint(folder, path) -> Node:
    file = path / "manifest.json"
    try:
        content = json.loads(file.read_text())
        names = {field.name for field in dataclasses.fields(Manifest)}
        origin = {name: value for name, value in content["origin"].items() if name in names}
        made = Manifest(**{"stage": "?", "arguments": {}, "inputs": {}, "identities": {}} | origin)
        return Node(_within(folder, path), content["identity"], made)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): make the checkpoint again") from None


def _input(folder, path: str, sha256: str, nodes: list[Node]) -> Node:
    """An input whose content no manifest describes: the user's own file, or one changed since."""
    parts = [part for part in epath.Path(path).parts if part != "/"]
    # The manifest may name it from another working folder: the longest tail that is in this run.
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    within = next((tail for tail in tails if (folder / tail).is_file()), None)
    node = next((node for node in nodes if within is not None and node.path == within), None)
    if node is None:
        nodes.append(node := Node(within or path, sha256, None))
    node.changed |= within is not None and file_sha256(str(folder / within)) != sha256
    return node


def _within(folder, path) -> str:
    return str(path).removeprefix(str(folder)).strip("/")
