"""Conversations and answers to token ids and back, exactly as the checkpoint was trained.

    tokenizer = ChatTokenizer.from_folder(checkpoint, config.eos_token_ids)
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "Hello"}])
    answer = tokenizer.response_ids("Hi!")      # prompt + answer + EOS is what DPO trains on

Three traps that this file exists for:

- The text of a user or of an answer never makes special tokens: "</s>" in it becomes the ordinary
  pieces of "</s>". Only the chat template's own text makes special tokens.
- Answers are tokenised apart from the text around them: tokenising "…[/INST]Fine" at once cuts
  "Fine" in a way that a sampler, which starts after [/INST], never could.
- If a folder has a sentencepiece `tokenizer.model`, sentencepiece itself encodes. transformers 5
  orders the merges that it derives by piece id, not by score, and so cuts "a  b" (two spaces)
  differently; beside a config.json of model_type mistral it also loses a text's first space.
"""

import copy
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable

# Only transformers' tokenizers are used: it need not say that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jinja2
import sentencepiece
from etils import epath
from transformers import PreTrainedTokenizerFast

from sharding.errors import UserError

# Part of every tokenizer's identity: how it cuts this text, not only its vocabulary.
PROBE = "Hello, world!  [INST] déjà  vu\n\n\tx = 3.14159;  ﬁn① 你好 😀 </s> it's   2024"


class ChatTokenizer:
    """A tokenizer with its chat template.

    eos_ids: the ids at which an answer ends, as the checkpoint's config names them.
    identity, template_identity: sha256 of how it cuts text, and of the template; the names and the
    kind of its files do not matter.
    """

    def __init__(self, tokenizer, eos_ids: Iterable[int], tokenizer_model: str | None = None):
        """tokenizer: a transformers tokenizer. tokenizer_model: path of its sentencepiece file."""
        self._hf = tokenizer
        self._sentencepiece = tokenizer_model and _open_sentencepiece(tokenizer_model)
        if not tokenizer.is_fast:
            raise UserError(
                f"a {type(tokenizer).__name__} is not built: bring a tokenizer.json or a "
                "sentencepiece tokenizer.model"
            )
        self._fast = copy.deepcopy(tokenizer.backend_tokenizer)
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True  # a special token's text becomes plain pieces
        self.eos_ids = tuple(eos_ids)
        self._template = _template_of(tokenizer)

        vocabulary = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        added = tokenizer.added_tokens_decoder
        self._added_texts = {i: token.content for i, token in added.items()}
        self._special = {t.content: i for i, t in added.items() if t.special}
        self._special |= {t: vocabulary[t] for t in tokenizer.all_special_tokens if t in vocabulary}
        self._special_ids = set(self._special.values())
        self._special_pattern = _special_pattern(self._special, added.values())

        # Does a text get a space in front ("dummy prefix"), and is a space of its own lost then?
        self._prefixes = self._first_piece("x")[:1] in ("▁", "Ġ")
        self._loses_space = self._sentencepiece is None and self._raw(" x") == self._raw("x")
        self._bos = self._bos_to_add()

        content = {
            "vocabulary": sorted(vocabulary.items()),
            "special": sorted(self._special.items()),
            "bos": self._bos,
            "probe": self._encode(PROBE),
        }
        self.identity = _sha256(json.dumps(content, ensure_ascii=False))
        self.template_identity = _sha256(self._template)

    @classmethod
    def from_folder(cls, folder: str, eos_ids: Iterable[int]) -> "ChatTokenizer":
        """The tokenizer of a checkpoint folder. Raises UserError; asks no hub."""
        if "://" in folder:  # the libraries read only local files
            with tempfile.TemporaryDirectory() as local:
                for file in epath.Path(folder).iterdir():
                    if file.is_file():
                        file.copy(os.path.join(local, file.name))
                return cls.from_folder(local, eos_ids)
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder: give a checkpoint's folder")
        tokenizer_model = os.path.join(folder, "tokenizer.model")
        has_model = os.path.isfile(tokenizer_model)
        if not has_model and not os.path.isfile(os.path.join(folder, "tokenizer.json")):
            raise UserError(
                f"{folder} has no tokenizer.json and no tokenizer.model: "
                "copy the tokenizer's files from where the model came"
            )
        try:
            if has_model:
                from transformers import AutoTokenizer  # here: 5 seconds, where torch is installed

                tokenizer = AutoTokenizer.from_pretrained(
                    folder,
                    local_files_only=True,
                    trust_remote_code=False,  # else it asks whether to run the folder's code
                )
            else:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except BaseException as error:  # transformers raises whatever its parsers raise
            if not isinstance(error, Exception) and not _is_of_tokenizers(error):
                raise
            raise UserError(
                f"{folder}: the tokenizer cannot be read ({_one_line(error)}): copy its files again"
            ) from error
        try:
            return cls(tokenizer, eos_ids, tokenizer_model if has_model else None)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        except BaseException as error:
            if not _is_of_tokenizers(error):
                raise
            raise UserError(
                f"{folder}: the tokenizer fails ({_one_line(error)}): copy its files again"
            ) from error

    def __len__(self) -> int:
        """One more than the highest id; the model's vocabulary must be at least as large."""
        return self.vocab_size

    # ------------------------------------------------------------------ text to ids

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """The conversation, ready to be answered: rendered by the chat template, then tokenised.

        messages: [{"role", "content"}, …]. Earlier assistant turns are tokenised apart, as they
        were when they were sampled. Starts with exactly one BOS if the model has a BOS. Raises
        UserError with the template's own words if the template refuses the conversation.
        """
        ids: list[int] = []
        for kind, text in self._segments(messages):
            ids += [self._special[text]] if kind == "special" else self._encode(text)
        if self._bos is not None and ids[:1] != [self._bos]:
            ids.insert(0, self._bos)
        if self._hf.bos_token_id is not None and ids[:2] == [self._hf.bos_token_id] * 2:
            raise UserError("the chat template writes BOS twice: write it once")
        return ids

    def response_ids(self, text: str) -> list[int]:
        """The ids of an answer as the sampler would have drawn them: no BOS, no EOS."""
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of an answer's ids, without special tokens and ids that have no piece.

        Bytes that are not UTF-8 become U+FFFD: an answer may be cut off inside a character.
        """
        ids = [int(i) for i in ids if int(i) not in self._special_ids]
        if self._sentencepiece is None:
            return self._fast.decode(ids, skip_special_tokens=True)
        size = self._sentencepiece.vocab_size()
        texts = []
        for is_piece, run in itertools.groupby(ids, key=lambda i: i < size):
            if is_piece:
                texts.append(self._sentencepiece.decode(list(run)))
            else:  # tokens added to the model after the sentencepiece file was made
                texts += [self._added_texts.get(i, "") for i in run]
        return "".join(texts)

    # ------------------------------------------------------------------ the pieces of a prompt

    def _segments(self, messages: list[dict]) -> list[tuple[str, str]]:
        """The prompt in pieces: ("special", token) or ("text", a text tokenised on its own)."""
        contents = [m["content"] for m in messages]
        skeleton = self._skeleton(messages, contents)
        contents = _contents_as_rendered(skeleton, contents, self._render(messages))

        segments: list[tuple[str, str]] = []
        run: list[tuple[str, bool]] = []  # (text, is it the template's?), to be encoded together

        def close(before_answer: bool = False):
            if text := self._join(run, before_answer):
                segments.append(("text", text))
            run.clear()

        for piece in skeleton:
            if not isinstance(piece, int):
                # The pattern is a single group, so every second part is a special token.
                for i, part in enumerate(self._special_pattern.split(piece)):
                    if i % 2:
                        close()
                        part = part if part in self._special else part.strip()
                        segments.append(("special", part))
                    elif part:
                        run.append((part, True))
            elif messages[piece]["role"] == "assistant":
                close(before_answer=True)
                segments.append(("text", contents[piece]))
            elif contents[piece]:
                run.append((contents[piece], False))
        close(before_answer=True)
        return segments

    def _join(self, run: list[tuple[str, bool]], before_answer: bool) -> str:
        """The run's text, without the template's own space where the tokenizer adds one itself."""
        text = "".join(part for part, _ in run)
        if self._prefixes and run:
            if run[0][1]:
                text = text.removeprefix(" ")
            if before_answer and run[-1][1]:
                text = text.removesuffix(" ")
        return text

    def _skeleton(self, messages: list[dict], contents: list[str]) -> list[str | int]:
        """The template's own text, with a message's number in the place of its content."""
        taken = set("".join(contents))
        mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in taken)  # private use
        numbered = [m | {"content": f"{mark}{i}{mark}"} for i, m in enumerate(messages)]
        parts = re.split(f"{mark}([0-9]+){mark}", self._render(numbered))
        skeleton = [int(part) if i % 2 else part for i, part in enumerate(parts)]
        for i, message in enumerate(messages):
            if i not in skeleton:
                raise UserError(
                    f"the chat template leaves out message {i} (role {message['role']})"
                )
        return skeleton

    def _render(self, messages: list[dict]) -> str:
        try:
            return self._hf.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"the chat template refuses the conversation: {_one_line(error)}"
            ) from None

    # ------------------------------------------------------------------ one text

    def _encode(self, text: str) -> list[int]:
        """The ids of a text that stands alone; nothing in it is taken for a special token."""
        # Halves of surrogate pairs have no UTF-8: pairs are joined, single ones become U+FFFD.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if self._loses_space and text[:1] in (" ", "▁"):
            text = " " + text
        return self._raw(text)

    def _raw(self, text: str) -> list[int]:
        if self._sentencepiece is not None:
            return self._sentencepiece.encode(text)
        return self._fast.encode(text, add_special_tokens=False).ids

    def _first_piece(self, text: str) -> str:
        first = (self._raw(text) or [0])[0]
        if self._sentencepiece is not None:
            return self._sentencepiece.id_to_piece(first)
        return self._fast.id_to_token(first) or ""

    def _bos_to_add(self) -> int | None:
        """The BOS id if the tokenizer puts it before every text, else None."""
        bos = self._hf.bos_token_id
        with_bos = self._fast.encode("x", add_special_tokens=True).ids
        return bos if bos is not None and with_bos[:1] == [bos] else None


def _open_sentencepiece(path: str) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is no sentencepiece model ({_one_line(error)})") from None


def _template_of(tokenizer) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            "no chat template: add it as chat_template.jinja, or as chat_template in "
            "tokenizer_config.json"
        ) from None


def _special_pattern(special: dict[str, int], added) -> re.Pattern:
    """A pattern of one group that matches a special token in the template's text, with the white
    space that the token is declared to strip (lstrip, rstrip)."""
    strips = {t.content: (t.lstrip, t.rstrip) for t in added}
    alternatives = []
    for text in sorted(special, key=len, reverse=True):
        left, right = strips.get(text, (False, False))
        alternatives.append(r"\s*" * left + re.escape(text) + r"\s*" * right)
    return re.compile(f"({'|'.join(alternatives)})" if alternatives else r"((?!))")


def _contents_as_rendered(skeleton: list[str | int], contents: list[str], text: str) -> list[str]:
    """The contents as the template shows them: unchanged, or stripped of white space.

    Raises UserError if the template changes them in any other way: the ids would not be the text's.
    """
    shown, at = list(contents), 0
    following = [*skeleton[1:], ""]
    for piece, after in zip(skeleton, following):
        if isinstance(piece, int):
            content = contents[piece]
            tail = after if isinstance(after, str) else ""
            for candidate in (content, content.strip(), content.lstrip(), content.rstrip()):
                if text.startswith(candidate + tail, at):
                    break
            else:
                break
            shown[piece], piece = candidate, candidate
        if not text.startswith(piece, at):
            break
        at += len(piece)
    else:
        if at == len(text):
            return shown
    raise UserError(
        "the chat template changes what the messages say (beyond stripping white space), so that "
        "its own text cannot be told from theirs: use a template that shows contents as they are"
    )


def _is_of_tokenizers(error: BaseException) -> bool:
    """Whether a tokenizer's own code raised it: a bare Exception; a panic of Rust's, which is no
    Exception; and transformers looks for an unk_token without an id for ever."""
    kind = type(error)
    return kind in (Exception, RecursionError) or kind.__name__ == "PanicException"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
