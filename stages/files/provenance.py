"""What a file was made from, as far as the manifests tell: one walk backward from it.

A training keeps this list in its checkpoint and a published split in its Parquet file, so that
their cards can be written when the files themselves are gone.
"""

import dataclasses

from etils import epath

from stages.files.output import read_manifest
from stages.files.paths import file_sha256

Entry = dict


def provenance(path: str, sha256: str | None = None) -> list[Entry]:
    """The manifest of the file `path`, then those of the files that it was made from, and so on.

    An entry is {"file": its name, "sha256", "edited": whether its content is no longer what its
    manifest says} and the manifest's fields. Files are named without their folders, since cards are
    published. The walk ends at files that have no manifest, are gone, or have changed since they
    were read. sha256: of the file, where it is known.
    """
    if (manifest := read_manifest(path)) is None:
        return []
    sha256 = sha256 or file_sha256(path)
    edited = manifest.results.get("sha256", sha256) != sha256
    entry = {"file": short_name(path), "sha256": sha256, "edited": edited}
    entry |= dataclasses.asdict(manifest)
    entry["inputs"] = {
        short_name(role): made_of | {"path": short_name(made_of["path"])}
        for role, made_of in manifest.inputs.items()
    }
    del entry["seconds"]
    entries = [entry]
    for made_of in manifest.inputs.values():
        file, content = made_of["path"], made_of["sha256"]
        if not on_hub(file) and epath.Path(file).exists() and file_sha256(file) == content:
            entries += provenance(file, content)
    return entries


def short_name(path: str) -> str:
    """The name of a file without its folders; the whole address of a file on the hub."""
    return path if on_hub(path) else epath.Path(path).name


def on_hub(path: str) -> bool:
    return path.startswith("hf://")
