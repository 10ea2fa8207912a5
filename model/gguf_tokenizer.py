"""The tokenizer that a GGUF file holds, as files that transformers reads.

Built with `tokenizers` from the file's own tokens, token types, merges or scores, and
`tokenizer.ggml.pre`, which names the pattern that splits a text before merging. A kind that is not
built is refused by name: with another pattern the same text would get other ids.
"""

import json
from collections import Counter
from collections.abc import Callable

from etils import epath
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from sharding.errors import UserError

CONTROL, USER_DEFINED = 3, 4  # token types that a text holds whole

# How the published tokenizers split a text. None: GPT-2's pattern, which `tokenizers` has built in.
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
)
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)
PATTERNS = {
    "gpt-2": None,
    "smollm": None,  # as transformers reads it; llama.cpp cuts digits off first ("\n 1.", "  1")
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "tekken": TEKKEN,
}

Value = Callable[[str], object]  # the value of a key of the file; None for a missing key


def write_tokenizer(value: Value, folder: str) -> None:
    """Put tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`. Raises
    UserError for what is missing or not built."""
    template = value("tokenizer.chat_template")
    if not isinstance(template, str):
        raise UserError("no chat template: take the file of an instruction-tuned model")
    path = epath.Path(folder)
    (path / "tokenizer.json").write_text(build(value).to_str(pretty=True))
    (path / "chat_template.jinja").write_text(template)
    config = {**_named_tokens(value), "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    )


def build(value: Value) -> Tokenizer:
    tokens, kind = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"tokenizer.ggml.model {kind!r} is not built: gpt2 and llama are")
    _check_lists(value)
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = _byte_level(value, ids) if kind == "gpt2" else _sentencepiece(value, ids)

    types = value("tokenizer.ggml.token_type") or []
    named = _named_tokens(value)
    special = [t for t, type_ in zip(tokens, types) if type_ == CONTROL]
    special += [t for t in named.values() if t not in special]
    added = [t for t, type_ in zip(tokens, types) if type_ == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in added])

    adds_bos = value("tokenizer.ggml.add_bos_token")
    if adds_bos is None:
        adds_bos = kind == "llama"  # as llama.cpp reads a file without the key
    bos = named.get("bos_token") if adds_bos else None
    tokenizer.post_processor = processors.TemplateProcessing(
        single="bos:0 $A:0" if bos else "$A:0",
        pair="bos:0 $A:0 bos:1 $B:1" if bos else "$A:0 $B:1",
        special_tokens=[{"id": "bos", "ids": [ids[bos]], "tokens": [bos]}] if bos else [],
    )
    return tokenizer


def _check_lists(value: Value) -> None:
    """Raise UserError unless the file's lists are of one length and of the kinds they should be."""
    tokens = value("tokenizer.ggml.tokens")
    for name, kind in (("tokens", str), ("token_type", int), ("scores", float), ("merges", str)):
        values = value(f"tokenizer.ggml.{name}")
        if values is None and name != "tokens":
            continue
        if not isinstance(values, list) or not all(type(x) is kind for x in values):
            raise UserError(f"key tokenizer.ggml.{name} is missing, or no list of {kind.__name__}")
        if name != "merges" and len(values) != len(tokens):
            raise UserError(
                f"key tokenizer.ggml.{name} has {len(values)} values for {len(tokens)} tokens"
            )
    if len(set(tokens)) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise UserError(f"key tokenizer.ggml.tokens has {twice!r} twice")


def _byte_level(value: Value, ids: dict[str, int]) -> Tokenizer:
    """BPE over bytes, in GPT-2's spelling of them."""
    pre, merges = value("tokenizer.ggml.pre"), value("tokenizer.ggml.merges")
    if not isinstance(pre, str) or pre not in PATTERNS:
        raise UserError(f"tokenizer.ggml.pre {pre!r} is not built: {', '.join(PATTERNS)} are")
    if merges is None:
        raise UserError("key tokenizer.ggml.merges is missing")
    pattern = PATTERNS[pre]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for merge, pair in zip(merges, pairs):
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise UserError(f"key tokenizer.ggml.merges has {merge!r}, which merges no two tokens")
    bpe = models.BPE(
        ids,
        pairs,
        continuing_subword_prefix="",
        end_of_word_suffix="",
        ignore_merges=pattern is not None,  # these models take a word as it is if it is a token
    )
    tokenizer = Tokenizer(bpe)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        bytes_ = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.pre_tokenizer = bytes_
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(value: Value, ids: dict[str, int]) -> Tokenizer:
    """sentencepiece's BPE: a space is written as ▁, and the pair whose piece scores best is merged
    first. Characters without a piece fall back to bytes."""
    scores = value("tokenizer.ggml.scores")
    if scores is None:
        raise UserError("key tokenizer.ggml.scores is missing")
    merges = []
    for piece, score in zip(ids, scores):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((score, len(left), len(right), (left, right)))
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    bpe = models.BPE(ids, [pair for *_, pair in merges], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    prefix = value("tokenizer.ggml.add_space_prefix") is not False
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="always" if prefix else "never",  # as llama.cpp: behind special tokens too
        split=False,
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _named_tokens(value: Value) -> dict[str, str]:
    """transformers' names of the tokens that the file gives a role."""
    tokens = value("tokenizer.ggml.tokens") or []
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {}
    for name, key in keys.items():
        token_id = value(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            continue
        if type(token_id) is not int or not 0 <= token_id < len(tokens):
            raise UserError(f"key tokenizer.ggml.{key}_token_id is {token_id}: no such token")
        named[f"{name}_token"] = tokens[token_id]
    return named
