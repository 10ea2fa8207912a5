"""What was made from what in a run: its manifests, joined into a graph.

Every file of a stage has its manifest beside it, every checkpoint has one inside. Manifests name
inputs by content: a file by its sha256, a checkpoint by the identity of its weights. A file is
marked as changed where its content is no longer the one that its manifest, or the manifest of what
was made from it, names.
"""

import dataclasses
from collections.abc import Iterator
from graphlib import TopologicalSorter

from etils import epath

from sharding.errors import UserError
from stages.files.output import Manifest, manifest_path, read_manifest
from stages.files.paths import file_sha256
from stages.files.rows import parse_json

# Identities of weights or code that a stage reads itself; the others come with its input files.
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
    unknown = []  # inputs whose content no file of the run has now
    for node in nodes:
        made = node.manifest
        files = {entry["sha256"]: entry["path"] for entry in made.inputs.values()}
        models = {made.identities.get(name): name for name in READS.get(made.stage, ())}
        for content, name in (files | models).items():
            if content in by_content:
                _add_parent(node, by_content[content])
            elif content is not None:
                unknown.append((node, name, content, content in files))
    for node, name, content, is_file in unknown:
        if content not in by_content:
            by_content[content] = Node(name, content, None)
            if is_file and (edited := _edited(folder, name, content, nodes, node)):
                by_content[content] = edited
            if by_content[content] not in nodes:
                nodes.append(by_content[content])
        _add_parent(node, by_content[content])
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
        content = parse_json(file.read_bytes())
        names = {field.name for field in dataclasses.fields(Manifest)}
        origin = {name: value for name, value in content["origin"].items() if name in names}
        made = Manifest(**{"stage": "?", "arguments": {}, "inputs": {}, "identities": {}} | origin)
        return Node(_within(folder, path), content["identity"], made)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): make the checkpoint again") from None


def _add_parent(node: Node, parent: Node) -> None:
    if parent not in node.parents:
        node.parents.append(parent)


def _edited(folder, path: str, sha256: str, nodes: list[Node], made: Node) -> Node | None:
    """The run's file that `path`, an input of `made`, names, if its content has changed since; None
    for a file outside the run."""
    parts = [part for part in epath.Path(path).parts if part != "/"]
    # The manifest may name it from another working folder: the longest tail that is in this run.
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    within = next((tail for tail in tails if (folder / tail).is_file()), None)
    if within is None:
        return None
    node = next((node for node in nodes if node.path == within), Node(within, sha256, None))
    if _is_made_from(node, made):  # another file of the same name
        return None
    node.changed |= file_sha256(str(folder / within)) != sha256
    return node


def _is_made_from(node: Node, source: Node) -> bool:
    return node is source or any(_is_made_from(parent, source) for parent in node.parents)


def _within(folder, path) -> str:
    return str(path).removeprefix(str(folder)).strip("/")
