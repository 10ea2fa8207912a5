"""Paths: local and remote, whole files, and what is one file under two names."""

import bz2
import gzip
import io
import lzma
import subprocess
import sys
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding.errors import UserError
from stages.files import paths, rows
from stages.files.paths import local_path


def test_a_file_in_a_folders_place_is_named(tmp_path):
    (tmp_path / "file").write_text("mine\n")
    with pytest.raises(UserError, match=r"file cannot be made \(a file is there\): give another"):
        paths.make_folder(tmp_path / "file")
    with pytest.raises(UserError, match=r"under cannot be made \(Not a directory\)"):
        paths.make_folder(tmp_path / "file" / "under")


def test_unfinished_files_of_object_stores_grow_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = (local_path(f"gs://bucket/{x}/out.jsonl") for x in "ab")
    assert first != second and not first.startswith("gs:") and first.endswith("-out.jsonl")
    assert local_path("a/out.jsonl") == "a/out.jsonl"


def test_an_inputs_manifest_and_the_files_of_an_input_folder_are_never_written_over(tmp_path):
    folder, file = tmp_path / "C", tmp_path / "s.jsonl"
    folder.mkdir()
    for path in (folder / "manifest.json", file, tmp_path / "s.jsonl.manifest.json"):
        path.write_text("{}")
    (tmp_path / "link").symlink_to(folder)
    for source, out in (
        (folder, folder / "manifest.json"),
        (folder, tmp_path / "link" / "manifest.json"),
        (tmp_path / "link", folder / "manifest.json"),
        (file, f"{file}.manifest.json"),
    ):
        with pytest.raises(UserError, match=r"--out .* the input .*--in"):
            paths.check_distinct({"--in": str(source)}, {"--out": str(out)})
    # What a stage wrote into a checkpoint's folder is finished, or overwritten.
    answers = folder / "answers.jsonl"
    paths.check_distinct({"--in": str(folder)}, {"--out": str(answers)})
    answers.write_text("")
    (folder / "answers.jsonl.manifest.json").write_text("{}")
    paths.check_distinct({"--in": str(folder)}, {"--out": str(answers)})


def test_two_spellings_of_an_object_are_one_file():
    with pytest.raises(UserError, match="is the input"):
        paths.check_distinct({"--in": "gs://b/./x//y"}, {"--out": "gs://b/x/y"})


def test_a_full_disk_names_the_file(tmp_path):
    code = f"""
import resource
from stages.files.paths import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    write_atomically("{tmp_path}/x", "x" * 1000)
except OSError as error:
    print(error.filename, error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/x File too large\n"


# ---------------------------------------------------------------------- what holds no lines


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("p.jsonl", content)
    return file.getvalue()


def parquet(content: bytes) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"prompt": [content.decode()]}), file)
    return file.getvalue()


def packed_by(codec: str):
    return lambda content: pa.compress(content, codec, asbytes=True)


@pytest.mark.parametrize(
    ("pack", "words"),
    [
        (gzip.compress, "is compressed by gzip: unpack it first (gunzip)"),
        (bz2.compress, "is compressed by bzip2: unpack it first (bunzip2)"),
        (lzma.compress, "is compressed by xz: unpack it first (unxz)"),
        (packed_by("zstd"), "is compressed by zstd: unpack it first (unzstd)"),
        (packed_by("lz4"), "is compressed by lz4: unpack it first (unlz4)"),
        (lambda content: b"7z\xbc\xaf\x27\x1c" + content, "is compressed by 7-Zip"),
        (zipped, "is compressed by zip: unpack it first (unzip)"),
        (parquet, "is a Parquet file"),
    ],
)
def test_a_compressed_input_is_refused_by_its_name_and_can_be_hashed(tmp_path, pack, words):
    path = tmp_path / "p.jsonl"
    path.write_bytes(pack(b'{"prompt": "a"}\n'))
    with pytest.raises(UserError) as error:
        rows.read(str(path), rows.Prompt)
    assert str(error.value).startswith(f"{path} {words}")
    assert len(paths.file_sha256(str(path))) == 64
