"""Damaged model files of every kind: each is read as the reference reads it, or refused in a line.

A file comes from a valid one by a few changes (tests/fuzzing.py).
"""

import dataclasses
import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from model import hf
from model.config import DecoderConfig, from_hf, read_config, to_hf
from model.gguf import read_gguf
from model.gguf_file import read_file
from model.gguf_tokenizer import build
from model.tensors import stored_tensors
from model.tokenizer import ChatTokenizer
from sharding.errors import UserError
from tests import tiny
from tests.fuzzing import cases, changed, damaged, refusal
from tests.model.test_config import BUILT, HARMLESS, MISTRAL_V1, SMOLLM2
from tests.model.test_gguf import tiny_tensors, write_file
from tests.model.test_gguf_tokenizer import byte_level, sentencepiece_bpe

KEYS = (
    *(field.name for field in dataclasses.fields(DecoderConfig)),
    *BUILT,
    *sorted(HARMLESS),
    *"rope_scaling rope_parameters layer_types eos_token_id unk_token_id temperature".split(),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------------- config.json


def check_config(text: bytes, folder: Path):
    """What is read is what transformers reads, and it is written as it was read."""
    (folder / "config.json").write_bytes(text)
    config, error = refusal(read_config, str(folder))
    if error is not None:
        assert str(error).startswith(str(folder))
        return
    assert from_hf(to_hf(config, config.torch_dtype)) == config
    content = json.loads(text)
    try:
        theirs = transformers.AutoConfig.for_model(**content)
    except Exception:  # it also checks the kinds of keys that change nothing
        return
    rope = theirs.rope_parameters
    assert rope["rope_type"] in ("default", "linear") and rope.get("factor", 1) == 1
    assert rope["rope_theta"] == config.rope_theta
    for name in """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings
        bos_token_id pad_token_id hidden_act""".split():
        assert getattr(theirs, name) == getattr(config, name, "silu"), name
    if "layer_types" not in content:
        assert getattr(theirs, "sliding_window", None) == config.sliding_window


@pytest.mark.parametrize("base", [MISTRAL_V1, SMOLLM2], ids=["mistral", "llama"])
@given(data=st.data())
@cases(60)
def test_config_json(folder, base, data):
    content = data.draw(changed(base, KEYS))
    check_config(json.dumps(content).encode("utf-8", "surrogatepass"), folder)


@given(text=damaged(json.dumps(MISTRAL_V1).encode()))
@cases(60)
def test_the_text_of_config_json(folder, text):
    check_config(text, folder)


@given(content=changed({"eos_token_id": [1, 2], "bos_token_id": 1}, ("eos_token_id",)))
@cases()
def test_generation_config_json(folder, content):
    other = folder / "generation"
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text(json.dumps(MISTRAL_V1))
    text = json.dumps(content).encode("utf-8", "surrogatepass")
    (other / "generation_config.json").write_bytes(text)
    config, _ = refusal(read_config, str(other))
    if config is not None:
        eos = content.get("eos_token_id") if isinstance(content, dict) else None
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        assert config.eos_token_ids == tuple(dict.fromkeys(eos or [2]))


# ---------------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def gguf_bytes(folder) -> bytes:
    kinds = {"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q8_0}
    return Path(write_file(folder / "whole.gguf", dtypes=kinds)).read_bytes()


def check_gguf(content: bytes, folder: Path):
    path = folder / "m.gguf"
    path.write_bytes(content)
    file, _ = refusal(read_file, str(path))
    if file is not None:  # then gguf's reader sees the same in it
        theirs = gguf.GGUFReader(path)
        assert {t.name for t in theirs.tensors} == file.tensors.keys()
        for tensor in theirs.tensors:
            assert file.tensors[tensor.name].data.tobytes() == tensor.data.tobytes()
        names = [name for name in theirs.fields if not name.startswith("GGUF.")]
        read = {name: theirs.fields[name].contents() for name in names}
        assert repr(read) == repr(file.keys)
    model, error = refusal(read_gguf, str(path))
    if error is None:
        config, params = model
        assert params.keys() == hf.empty_params(config).keys()
        assert np.isfinite(params["embed"]).all()


@given(data=st.data())
@cases(60)
def test_gguf_files(folder, gguf_bytes, data):
    header = gguf_bytes[: gguf_bytes.index(b"output.weight") + 100]
    content = data.draw(damaged(header))
    check_gguf(content + gguf_bytes[len(header) :], folder)


@given(data=st.data())
@cases(30)
def test_gguf_keys(folder, data):
    """Files whose keys have values of other kinds: whole, but of another model."""
    whole = {"llama.block_count": 2, "llama.embedding_length": 32, "llama.feed_forward_length": 64}
    whole |= {"llama.context_length": 64, "llama.attention.head_count": 4}
    whole |= {"llama.attention.head_count_kv": 2, "llama.rope.freq_base": 1e4}
    whole |= {"llama.attention.layer_norm_rms_epsilon": 1e-6, "tokenizer.ggml.eos_token_id": 2}
    keys = data.draw(changed(whole, (*whole, "split.count", "general.alignment", "split.no")))
    writer = gguf.GGUFWriter(folder / "keys.gguf", "llama")
    for name, value in keys.items() if isinstance(keys, dict) else ():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int) and 0 <= value < 2**64:
            (writer.add_uint32 if value < 2**32 else writer.add_uint64)(name, value)
        elif isinstance(value, float):
            writer.add_float64(name, value)
        elif isinstance(value, str) and name and "\ud800" not in value:
            writer.add_string(name, value)
        elif isinstance(value, list) and value and all(type(x) is int for x in value):
            writer.add_array(name, [x % 2**31 for x in value])
    for name, tensor in tiny_tensors().items():
        writer.add_tensor(name, tensor)
    writer.data_alignment = 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refusal(read_gguf, str(folder / "keys.gguf"))


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@given(data=st.data())
@cases(30)
def test_the_tokenizer_of_a_gguf_file(kind, data):
    keys = byte_level("smollm") if kind == "bytes" else sentencepiece_bpe()[0]
    few = {name: value[:300] if isinstance(value, list) else value for name, value in keys.items()}
    if kind == "bytes":  # merges of tokens that are left
        tokens = set(few["tokens"])
        few["merges"] = [m for m in keys["merges"] if {*m.split(), m.replace(" ", "")} <= tokens]
    few |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    content = data.draw(changed(few, (*few, "add_space_prefix", "padding_token_id")))
    named = {f"tokenizer.ggml.{name}": value for name, value in dict(content).items()}
    tokenizer, _ = refusal(build, named.get)
    if tokenizer is not None:
        assert all(i < len(content["tokens"]) for i in tokenizer.encode("the model </s> é").ids)


# ---------------------------------------------------------------------- weights


def check_weights(path: Path, theirs):
    """The tensors are those of `theirs(path)`, as far as ours are read at all."""

    def read(file):
        return {name: (tensor, tensor.read()) for name, tensor in stored_tensors(file).items()}

    tensors, error = refusal(read, epath.Path(path))
    if error is None:
        reference = theirs(path)
        for name, (tensor, values) in tensors.items():
            assert values.shape == tensor.shape == tuple(reference[name].shape)
            assert values.dtype == tensor.dtype
            flat = reference[name].contiguous().flatten()
            assert values.tobytes() == bytes(flat.view(torch.uint8).numpy())


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F16", "shape": [], "data_offsets": [32, 34]},
}


@given(header=changed(HEADER, ("d", "__metadata__", "a")), cut=st.integers(0, 3))
@cases(60)
def test_safetensors_headers(folder, header, cut):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    path = folder / "header.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(34 - cut)))
    check_weights(path, safetensors.torch.load_file)


SAVED = safetensors.torch.save({"a": torch.arange(6.0), "b": torch.ones(2, 2).bfloat16()})


@given(content=damaged(SAVED))
@cases(60)
def test_safetensors_files(folder, content):
    (folder / "m.safetensors").write_bytes(content)
    check_weights(folder / "m.safetensors", safetensors.torch.load_file)


def test_a_record_of_a_zip_file_that_torch_would_map_to_other_bytes_is_refused(folder):
    path = folder / "pytorch_model.bin"
    torch.save({"a": torch.arange(6.0)}, path)
    content = bytearray(path.read_bytes())
    header = content.index(b"/data/0") - len("pytorch_model") - 30  # of the record, in front of it
    content[header + 28] ^= 4  # the length of its extra field: its values begin elsewhere
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: it is damaged"):
        stored_tensors(epath.Path(path))


@pytest.mark.parametrize("zipped", [True, False])
@given(data=st.data())
@cases(30)
def test_pytorch_files(folder, zipped, data):
    path = folder / "pytorch_model.bin"
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 2).bfloat16()[:, 1]}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    check_weights(path, lambda path: torch.load(path, "cpu", weights_only=True))


@given(
    content=changed({"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})
)
@cases(30)
def test_the_index_of_weights(folder, content):
    other = folder / "index"
    other.mkdir(exist_ok=True)
    for name in "ab":
        (other / f"{name}.safetensors").write_bytes(SAVED)
    text = json.dumps(content).encode("utf-8", "surrogatepass")
    (other / "model.safetensors.index.json").write_bytes(text)
    files, _ = refusal(hf.weight_files, str(other))
    assert files is None or {file.parent for file in files} <= {epath.Path(other)}


# ---------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def tokenizer_files(folder) -> dict[str, bytes]:
    tiny.write_tokenizer(folder / "tokenizer")
    return {file.name: file.read_bytes() for file in (folder / "tokenizer").iterdir()}


def check_tokenizer(folder: Path, files: dict[str, bytes]):
    other = folder / "damaged-tokenizer"
    other.mkdir(exist_ok=True)
    for file in other.iterdir():
        file.unlink()
    for name, content in files.items():
        (other / name).write_bytes(content)

    def read():
        tokenizer = ChatTokenizer.from_folder(str(other), (2,))
        return tokenizer, tokenizer.prompt_ids([{"role": "user", "content": "the model </s> é"}])

    opened, error = refusal(read)
    if error is None:
        tokenizer, ids = opened
        assert ids and all(0 <= i < len(tokenizer) for i in ids)
        tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@given(data=st.data())
@cases(30)
def test_tokenizer_files(folder, tokenizer_files, name, data):
    content = data.draw(changed(json.loads(tokenizer_files[name])))
    text = json.dumps(content).encode("utf-8", "surrogatepass")
    check_tokenizer(folder, tokenizer_files | {name: text})


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@given(data=st.data())
@cases(30)
def test_the_text_of_tokenizer_files(folder, tokenizer_files, name, data):
    text = data.draw(damaged(tokenizer_files[name]))
    check_tokenizer(folder, tokenizer_files | {name: text})


@given(data=st.data())
@cases(30)
def test_sentencepiece_files(folder, tokenizer_files, data):
    model = sentencepiece_bpe()[1].serialized_model_proto()
    files = {name: text for name, text in tokenizer_files.items() if name != "tokenizer.json"}
    check_tokenizer(folder, files | {"tokenizer.model": data.draw(damaged(model))})


def template(*texts: str) -> dict:
    """A post_processor that puts these texts, A alone for a single one, behind each other."""
    of = {name: [{"Sequence": {"id": x, "type_id": 0}} for x in name] for name in ("A", "AB")}
    single = [part for text in texts for part in of[text]]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": of["AB"],
        "special_tokens": {},
    }


# Inputs that a search like those above came upon.
@pytest.mark.parametrize(
    "file, changes, problem",
    [
        ("tokenizer.json", {"normalizer": [""]}, r"the tokenizer fails \(index out of bounds"),
        (
            "tokenizer_config.json",
            {"bos_token": "", "unk_token": ""},
            r"the tokenizer fails \(maximum recursion depth",
        ),
        (
            "tokenizer_config.json",
            {"unk_token": ""},
            r"the tokenizer fails \(maximum recursion depth",
        ),
        ("tokenizer.json", {"post_processor": template()}, "leaves out a text"),
        ("tokenizer.json", {"post_processor": template("A", "A")}, "leaves out a text"),
    ],
)
def test_tokenizers_whose_own_code_fails_are_refused(
    tmp_path, tokenizer_files, file, changes, problem
):
    content = json.loads(tokenizer_files[file]) | changes
    for name, text in (tokenizer_files | {file: json.dumps(content).encode()}).items():
        (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=problem):
        ChatTokenizer.from_folder(str(tmp_path), (2,))
