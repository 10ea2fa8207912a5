"""Headers of GGUF files: those of gguf's own writer are read as its reader does; others refused."""

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from model.gguf_file import part_names, read_file, read_model
from sharding.errors import UserError

UINT32, STRING, ARRAY = 4, 8, 9


def text(string: str | bytes) -> bytes:
    string = string.encode() if isinstance(string, str) else string
    return struct.pack("<Q", len(string)) + string


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def number(name: str, value: int) -> bytes:
    return key(name, UINT32, struct.pack("<I", value))


def tensor(name="t", shape=(4,), kind=0, offset=0) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def raw(keys=(), tensors=(), data=b"", version=3, magic=b"GGUF", counts=None) -> bytes:
    """A file, byte for byte. counts: what the header claims, where it lies."""
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


WHOLE = dict(keys=[number("a", 1)], tensors=[tensor()], data=bytes(16))


def write(folder: Path, content: bytes) -> str:
    (folder / "m.gguf").write_bytes(content)
    return str(folder / "m.gguf")


def test_all_kinds_of_values_and_tensors_are_read_as_gguf_reads_them(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint8("u8", 7)
    writer.add_int8("i8", -7)
    writer.add_uint16("u16", 700)
    writer.add_int16("i16", -700)
    writer.add_int32("i32", -70000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 1e-5)
    writer.add_float64("f64", 1e-5)
    writer.add_bool("yes", True)
    writer.add_string("text", "日本語 ▁")
    writer.add_array("strings", ["a", "", "▁b"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.5])
    writer.add_array("flags", [True, False])
    rng = np.random.default_rng(0)
    for name, kind in (
        ("f32", None),
        ("f16", gguf.GGMLQuantizationType.F16),
        ("bf16", gguf.GGMLQuantizationType.BF16),
        ("q8", gguf.GGMLQuantizationType.Q8_0),
        ("q4", gguf.GGMLQuantizationType.Q4_0),
    ):
        values = rng.standard_normal((3, 64)).astype(np.float32)
        data = values if kind is None else gguf.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    theirs, ours = gguf.GGUFReader(tmp_path / "m.gguf"), read_file(str(tmp_path / "m.gguf"))
    names = [name for name in theirs.fields if not name.startswith("GGUF.")]
    assert {name: theirs.fields[name].contents() for name in names} == ours.keys
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert (mine.kind, mine.shape) == (t.tensor_type, tuple(t.shape[::-1].tolist()))
        assert mine.data.tobytes() == t.data.tobytes()
        read = gguf.dequantize(mine.data, mine.kind)
        np.testing.assert_array_equal(read, gguf.dequantize(t.data, t.tensor_type))
        assert read.shape == mine.shape


def test_the_smallest_file_is_read_in_versions_2_and_3(tmp_path):
    for version in (2, 3):
        file = read_file(write(tmp_path, raw(**WHOLE, version=version)))
        assert (file.keys, file.tensors["t"].shape) == ({"a": 1}, (4,))


BIG_ENDIAN = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
HUGE = 2**60


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", r"is no GGUF file: it begins with b''"),
        (raw(**WHOLE, magic=b"GGML"), r"is no GGUF file: it begins with b'GGML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "begins with b'version '"),
        (b"<!DOCTYPE html>", "is no GGUF file"),
        (b"GGUF", "of GGUF version 0"),
        (raw(**WHOLE, version=1), "of GGUF version 1: little-endian versions 2 and 3"),
        (raw(**WHOLE, version=4), "of GGUF version 4"),
        (BIG_ENDIAN, "is big-endian: little-endian"),
        (raw(counts=(HUGE, 0)), f"ends before its {HUGE} tensors"),
        (raw(counts=(0, HUGE)), f"ends before its {HUGE} keys"),
        (raw(**WHOLE, counts=(1, 0)), "no whole GGUF file"),
        (raw(**WHOLE, counts=(2, 1)), "no whole GGUF file"),
        (raw([struct.pack("<Q", HUGE) + b"name"], counts=(0, 1)), f"its {HUGE} bytes of the name"),
        (raw([key("a", STRING, struct.pack("<Q", HUGE))]), f"its {HUGE} bytes of key a"),
        (raw([key("a", ARRAY, struct.pack("<IQ", UINT32, HUGE))]), "bytes of key a"),
        (raw([key("a", ARRAY, struct.pack("<IQ", STRING, HUGE))]), f"{HUGE} strings of key a"),
        (raw([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "key a has .* unknown type 9"),
        (raw([key("a", 99, b"")]), "key a has a value of the unknown type 99"),
        (raw([key("a", STRING, text(b"\xff"))]), "key a is no UTF-8"),
        (raw([number("a", 1), number("a", 2)]), "key a is there twice"),
        (raw(tensors=[tensor(), tensor(offset=32)], data=bytes(64)), "tensor t is there twice"),
        (raw(tensors=[tensor(shape=())]), "tensor t has 0 axes"),
        (raw(tensors=[tensor(shape=(1,) * 5)]), "tensor t has 5 axes"),
        (raw(tensors=[tensor(shape=(HUGE, HUGE, 0))]), r"tensor t has the shape \(0, "),
        (raw(tensors=[tensor(shape=(HUGE,))]), "it ends before tensor t"),
        (raw(tensors=[tensor(shape=(2**32, 2**32))], data=bytes(16)), "it ends before tensor t"),
        (raw(tensors=[tensor(shape=(2**63, 2))], data=bytes(16)), "it ends before tensor t"),
        (raw(tensors=[tensor(offset=HUGE)], data=bytes(16)), "it ends before tensor t"),
        (raw(tensors=[tensor(offset=2)], data=bytes(32)), "tensor t lies at 2: unaligned"),
        (
            raw(tensors=[tensor(), tensor("u")], data=bytes(16)),
            "tensor u lies at 0: .*over another",
        ),
        (raw(tensors=[tensor(shape=(33,), kind=2)], data=bytes(64)), "whole blocks of Q4_0"),
        (raw(tensors=[tensor(kind=4)]), "tensor t is of quantization type 4, which is not built"),
        (raw(tensors=[tensor(kind=9999)]), "quantization type 9999"),
        (raw([number("general.alignment", 0)]), "general.alignment is 0 and no power of two"),
        (raw([number("general.alignment", 48)]), "general.alignment is 48"),
        (raw([key("general.alignment", STRING, text("32"))]), "general.alignment is '32'"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, content, problem):
    begun = time.monotonic()
    with pytest.raises(UserError, match=problem):
        read_file(write(tmp_path, content))
    assert time.monotonic() - begun < 1  # nothing is allocated by what a header claims


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    content = raw(**WHOLE)
    for size in range(len(content)):
        with pytest.raises(UserError, match=r"m\.gguf is (no|of GGUF version 0)"):
            read_file(write(tmp_path, content[:size]))


@pytest.mark.parametrize("path", ["gs://bucket/m.gguf", "/", "/dev/zero", "none.gguf"])
def test_what_is_no_file_is_refused(path):
    with pytest.raises(UserError, match=r"copy it here first|does not exist: give the path"):
        read_model(path)


# ---------------------------------------------------------------------- parts


def write_parts(folder: Path, count: int, total: int | None = None, name="m") -> list[str]:
    """A model of one tensor per part, as llama.cpp's gguf-split writes it."""
    paths = []
    for part in range(count):
        keys = [number("split.no", part), number("split.count", count)]
        keys += [number("split.tensors.count", count if total is None else total)]
        keys += [number("a", 1)] if part == 0 else []
        data = np.full(4, part, np.float32).tobytes()
        paths.append(folder / f"{name}-{part + 1:05}-of-{count:05}.gguf")
        paths[-1].write_bytes(raw(keys, [tensor(f"t{part}")], data))
    return [str(path) for path in paths]


@pytest.mark.parametrize("named", range(3))
def test_all_parts_are_read_whichever_is_named(tmp_path, named):
    parts = write_parts(tmp_path, 3)
    assert part_names(parts[named]) == parts
    file = read_model(parts[named])
    assert file.keys["a"] == 1
    assert [t.data.view(np.float32)[0] for t in file.tensors.values()] == [0, 1, 2]


@pytest.mark.parametrize("count", [0, 1])  # 0: put together by gguf-split --merge
def test_a_model_in_one_part_is_read_by_any_name(tmp_path, count):
    keys = [number("split.count", count), number("split.no", 0), number("split.tensors.count", 1)]
    content = raw(keys, [tensor()], bytes(16))
    assert list(read_model(write(tmp_path, content)).tensors) == ["t"]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ([key("split.count", STRING, text("2"))], "split.count is '2'"),
        ([key("split.count", STRING, text(""))], "split.count is ''"),
        ([key("split.count", 6, struct.pack("<f", 2.0))], "split.count is 2.0"),
        ([key("split.count", 12, struct.pack("<d", 1.0))], "split.count is 1.0"),
        ([key("split.count", 7, b"\x01")], "split.count is True"),
        ([key("split.count", 5, struct.pack("<i", -2))], "split.count is -2"),
        ([key("split.count", ARRAY, struct.pack("<IQI", UINT32, 1, 2))], r"split.count is \[2\]"),
        ([number("split.no", 1)], "split.no and split.count are 1 and None"),
        ([number("split.no", 2), number("split.count", 1)], "split.no and .* are 2 and 1"),
        ([number("split.tensors.count", 9)], "it holds 1 tensors, not 9"),
        ([number("split.count", 1), number("split.tensors.count", 2)], "it holds 1 .* not 2"),
        ([key("split.tensors.count", STRING, text("2"))], "it holds 1 tensors, not 2"),
    ],
)
def test_a_part_is_not_taken_for_a_whole_model(tmp_path, keys, problem):
    with pytest.raises(UserError, match=rf"m\.gguf: .*{problem}.*: download "):
        read_model(write(tmp_path, raw(keys, [tensor()], bytes(16))))


def test_what_is_missing_of_a_split_model_is_named(tmp_path):
    parts = write_parts(tmp_path, 3)
    Path(parts[2]).unlink()
    for named in parts[:2]:
        with pytest.raises(
            UserError, match=r"one of 3 parts, and .*m-00003-of-00003\.gguf is miss"
        ):
            read_model(named)
    Path(parts[0]).unlink()
    with pytest.raises(UserError, match=r"m-00001-of-00003\.gguf is missing \(and 1 more\)"):
        read_model(parts[1])
    Path(parts[1]).rename(tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match=r"one of the 3 parts of a split model: name them"):
        read_model(str(tmp_path / "renamed.gguf"))


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    parts = write_parts(tmp_path, 3)
    second, third = Path(parts[1]).read_bytes(), Path(parts[2]).read_bytes()
    Path(parts[1]).write_bytes(third)
    with pytest.raises(UserError, match=r"00002-of-00003\.gguf: its keys split.no .* are 2 and 3"):
        read_model(parts[0])
    Path(parts[1]).write_bytes(second)
    Path(parts[2]).write_bytes(raw(**WHOLE))
    with pytest.raises(UserError, match=r"split.no and split.count are None and None"):
        read_model(parts[0])
    Path(parts[2]).write_bytes(third.replace(b"t2", b"t1"))
    with pytest.raises(UserError, match=r"00003-of-00003\.gguf: tensor t1 is in .*00002-of-00003"):
        read_model(parts[0])
    with pytest.raises(UserError, match=r"its parts hold 3 tensors, not 4"):
        read_model(write_parts(tmp_path, 3, total=4)[0])
    (tmp_path / "x-00001-of-00002.gguf").write_bytes(Path(parts[0]).read_bytes())
    with pytest.raises(UserError, match=r"one of the 3 parts of a split model: name them"):
        read_model(str(tmp_path / "x-00001-of-00002.gguf"))


def test_a_part_cut_off_is_named(tmp_path):
    parts = write_parts(tmp_path, 2)
    Path(parts[1]).write_bytes(Path(parts[1]).read_bytes()[:-1])
    with pytest.raises(UserError, match=r"m-00002-of-00002\.gguf is no whole GGUF file"):
        read_model(parts[0])
