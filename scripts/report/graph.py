"""What was made from what in a run: its manifests, joined into a graph.

Each file that a stage wrote has its manifest beside it, each checkpoint one inside; both name what
they were made from by content: the sha256 of files, the identity of a checkpoint's weights. A file
whose content is no longer what its manifest or what was made from it says is marked. Runs without
JAX.
"""

import dataclasses
import json
from collections.abc import Iterator

from etils import epath

from sharding.errors import UserError
from stages.files.output import Manifest, manifest_path, read_manifest
from stages.files.paths import file_sha256

# Whose weights or code a stage reads itself; other identities come with its input files.
READS = {
    "sample": ("model",),
    "rank": ("ranker",),
    "dpo": ("model", "reference"),
    "evaluate compare": ("ranker",),
    "evaluate kl": ("model",),
}


@dataclasses.dataclass
class Node:
    """A file or a checkpoint, or something from outside the run."""

    path: str  # within the run; as its users name it, where it lies outside
    identity: str  # sha256 of the content, or a checkpoint's identity, that was recorded
    manifest: Manifest | None  # None: no stage of the run wrote it
    parents: list["Node"] = dataclasses.field(default_factory=list)
    changed: bool = False  # the file has another content now


def read(run: str) -> list[Node]:
    """Every file of the run that has a manifest, and what these were made from, parents first."""
    folder = epath.Path(run)
    nodes, known = [], {}
    for node, contents in _written(folder):
        nodes.append(node)
        for content in contents:  # two checkpoints may be equal: the first one stands for both
            known.setdefault(content, node)
    for node in nodes[:]:
        made = node.manifest
        for path, sha256 in made.inputs.items():
            if sha256 not in known:
                known[sha256] = _input(folder, path, sha256, nodes)
            node.parents.append(known[sha256])
        for name in READS.get(made.stage, ()):
            identity = made.identities.get(name)
            if identity is None:
                continue
            if identity not in known:
                known[identity] = Node(name, identity, None)
                nodes.append(known[identity])
            if known[identity] not in node.parents:
                node.parents.append(known[identity])
    return _parents_first(nodes)


def _written(folder) -> Iterator[tuple[Node, set[str]]]:
    """Each node of the run's own, and the contents by which others may name it."""
    suffix = manifest_path("")
    for place in (folder, *sorted((p for p in folder.iterdir() if p.is_dir()), key=_place)):
        for file in sorted(place.glob(f"*{suffix}")):
            path = str(file).removesuffix(suffix)
            if not epath.Path(path).exists():  # the stage is still at it
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
    """A file that no manifest describes in this content: the user's own, or changed since."""
    parts = [part for part in epath.Path(path).parts if part != "/"]
    within = next(
        (inner for i in range(len(parts)) if (folder / (inner := "/".join(parts[i:]))).is_file()),
        None,
    )
    node = next((node for node in nodes if within is not None and node.path == within), None)
    if node is None:
        nodes.append(node := Node(within or path, sha256, None))
    node.changed |= within is not None and file_sha256(str(folder / within)) != sha256
    return node


def _within(folder, path) -> str:
    return str(path).removeprefix(str(folder)).strip("/")


def _place(folder) -> tuple[int, int, str]:
    """start, then the iterations by number, then the rest."""
    kind, _, number = folder.name.partition("_")
    if kind == "iteration" and number.isdigit():
        return 1, int(number), ""
    return (0 if folder.name == "start" else 2), 0, folder.name


def _parents_first(nodes: list[Node]) -> list[Node]:
    order: list[Node] = []
    begun: set[int] = set()

    def visit(node: Node):
        if id(node) not in begun:
            begun.add(id(node))
            for parent in node.parents:
                visit(parent)
            order.append(node)

    for node in nodes:
        visit(node)
    return order
