"""Conversations and answers to token ids and back, exactly as the checkpoint was trained.

    tokenizer = ChatTokenizer.from_folder(checkpoint, config.eos_token_ids)
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "Hello"}])
    answer = tokenizer.response_ids("Hi!")      # prompt + answer + EOS is what DPO trains on

Three traps that this file exists for:

- The text of a user or of an answer never makes special tokens: "</s>" in it becomes the ordinary
  pieces of "</s>". Only the chat template's own text makes them, and every added token in that text
  counts as special, whatever the tokenizer's files call it.
- Answers are tokenised apart from the text around them: tokenising "…[/INST]Fine" at once cuts
  "Fine" in a way that a sampler, which starts after [/INST], never could.
- If a folder has a sentencepiece `tokenizer.model`, sentencepiece itself encodes. transformers 5
  orders the merges that it derives by piece id, not by score, and so cuts "a  b" (two spaces)
  differently; beside a config.json of model_type mistral it also loses a text's first space.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable

# Only transformers' tokenizers are used: it need not say that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jinja2
from etils import epath
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from sharding.errors import UserError, at, first_line

# Part of every tokenizer's identity: how it cuts this text, not only its vocabulary.
PROBE = "Hello, world!  [INST] déjà  vu\n\n\tx = 3.14159;  ﬁn① 你好 😀 </s> it's   2024"
TEMPLATES = "additional_chat_templates"  # the folder of named templates, beside the default one
# Characters that no standard gives a meaning: marks between texts, or in the place of one.
PRIVATE_USE = range(0xE000, 0xF900), range(0x100000, 0x10FFFE)
MARK = "\ue000"
# What the code of a chat template may raise.
TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError),
    *(TypeError, ValueError),
)


class ChatTokenizer:
    """A tokenizer with its chat template.

    eos_ids: the ids at which an answer ends: those that the checkpoint's config names, else the
        tokenizer's own.
    end_id: the one of them with which the chat template ends an assistant's turn. An answer that
        was not sampled ends with it. If the template ends turns with none of them, it is the
        tokenizer's eos_token, or, where that is none of them, the first.
    identity, template_identity: sha256 of how it cuts text, and of the template; the names and the
        kind of its files do not matter.
    """

    def __init__(self, tokenizer, eos_ids: Iterable[int], tokenizer_model: str | None = None):
        """tokenizer: a transformers tokenizer. tokenizer_model: path of its sentencepiece file."""
        if not tokenizer.is_fast:
            raise UserError(
                f"a {type(tokenizer).__name__} is not built: bring a tokenizer.json or a "
                "sentencepiece tokenizer.model"
            )
        self._hf = tokenizer
        self._template = _template_of(tokenizer)
        self._sentencepiece = tokenizer_model and _open_sentencepiece(tokenizer_model)
        own_eos = tokenizer.eos_token_id
        self.eos_ids = tuple(eos_ids) or (() if own_eos is None else (own_eos,))

        # Tokens that a text holds whole, beside a tokenizer that cuts as transformers does.
        vocabulary = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self._added = dict(tokenizer.added_tokens_decoder)
        # (transformers counts all pieces that a sentencepiece file defines whole as special ones)
        others = {text: True for text in tokenizer.all_special_tokens}
        others |= {text: False for text in _user_defined(self._sentencepiece)}
        for text, special in others.items():
            if text in vocabulary and vocabulary[text] not in self._added:
                token = AddedToken(text, special=special, normalized=False)
                self._added[vocabulary[text]] = token
        self._full = copy.deepcopy(tokenizer.backend_tokenizer)
        self._full.no_truncation()
        self._full.no_padding()
        self._full.encode_special_tokens = False
        self._full.add_tokens(
            [self._added[vocabulary[text]] for text in others if text in vocabulary]
        )

        self._unknown = tokenizer.unk_token_id
        self._check_post_processor()

        # One that finds nothing but them, which takes no time.
        self._finder = Tokenizer(WordLevel({"": 0}, unk_token=""))
        if self._full.normalizer is not None:
            self._finder.normalizer = self._full.normalizer
        self._finder.add_tokens(list(self._added.values()))
        self._id_of = {self._finder.token_to_id(t.content): i for i, t in self._added.items()}

        # Those that only the chat template's text may make.
        self._skipped = {i for i, token in self._added.items() if token.special}
        self._skipped |= {vocabulary[t] for t in others if others[t] and t in vocabulary}
        self._made = self._tokens_of_template()
        self._special = {i: self._added[i].content for i in sorted(self._skipped | self._made)}

        # The encoder of texts knows the special tokens by names that nobody can guess.
        self._names = {i: f"<{secrets.token_hex(16)}-{i}>" for i in self._special}
        if self._sentencepiece is not None:
            self._raw = _without(self._sentencepiece, self._special).encode
        else:
            by_text = {text: self._names[i] for i, text in self._special.items()}
            self._encoders = [_renamed(self._full, by_text, {"single_word": False})]
            if any(self._added[i].normalized for i in self._special):
                sure = {"single_word": False, "normalized": False}
                self._encoders.append(_renamed(self._full, by_text, sure))
            self._raw = lambda text: self._encoders[0].encode(text, add_special_tokens=False).ids

        # Does a text get a space in front ("dummy prefix"), and is a space of its own lost then?
        first = self._full.id_to_token((self._raw("x") or [0])[0]) or ""
        self._prefixes = first[:1] in ("▁", "Ġ")
        self._loses_space = self._sentencepiece is None and self._raw(" x") == self._raw("x")
        bos = tokenizer.bos_token_id  # where the tokenizer puts it before every text
        begins = self._full.encode("x", add_special_tokens=True).ids[:1]
        self._bos = bos if begins == [bos] else None
        self.end_id = self._end_of_turn()

        content = {
            "vocabulary": sorted(vocabulary.items()),
            "special": sorted((text, i) for i, text in self._special.items()),
            "bos": self._bos,
            "probe": self.response_ids(PROBE),
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
                for file in epath.Path(folder).glob(f"{TEMPLATES}/*.jinja"):
                    os.makedirs(os.path.join(local, TEMPLATES), exist_ok=True)
                    file.copy(os.path.join(local, TEMPLATES, file.name))
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
            if tokenizer.chat_template is None and os.path.isfile(f"{folder}/chat_template.json"):
                with open(f"{folder}/chat_template.json", encoding="utf-8") as file:
                    tokenizer.chat_template = json.load(file)["chat_template"]
        except BaseException as error:  # transformers raises whatever its parsers raise
            if not isinstance(error, Exception) and not _is_of_tokenizers(error):
                raise
            raise UserError(
                f"{folder}: the tokenizer cannot be read ({first_line(error)}): copy its files "
                "again"
            ) from error
        try:
            with at(folder):
                return cls(tokenizer, eos_ids, tokenizer_model if has_model else None)
        except BaseException as error:
            if not _is_of_tokenizers(error):
                raise
            raise UserError(
                f"{folder}: the tokenizer fails ({first_line(error)}): copy its files again"
            ) from error

    def _check_post_processor(self) -> None:
        """UserError where the last step of tokenizer.json leaves out a text, or repeats it."""
        whole, step = self._full.encode(PROBE, add_special_tokens=False), self._full.post_processor
        self._full.post_processor = None
        if whole.ids != self._full.encode(PROBE, add_special_tokens=False).ids:
            raise UserError(
                "the post_processor of tokenizer.json leaves out a text, or repeats it: copy the "
                "file again"
            )
        self._full.post_processor = step

    def __len__(self) -> int:
        """One more than the highest id; the model's vocabulary must be at least as large."""
        return self.vocab_size

    def check_vocabulary(self, size: int) -> None:
        """Raise UserError for a token beyond a model's vocabulary of `size`. Only a pad token that
        nothing uses may lie beyond."""
        used = {*self.eos_ids, self._hf.bos_token_id, self._hf.unk_token_id, *self._made}
        unused = {self._hf.pad_token_id} - used
        for text, i in self._hf.get_vocab().items():
            if i >= size and i not in unused:
                raise UserError(
                    f"token {text!r} has the id {i}, but the model's vocabulary ends at "
                    f"{size - 1}: bring the tokenizer that the model was trained with"
                )

    # ------------------------------------------------------------------ text to ids

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """The conversation, ready to be answered: rendered by the chat template, then tokenised.

        messages: [{"role", "content"}, …]. Earlier assistant turns are tokenised apart, as they
        were when they were sampled. Starts with exactly one BOS if the model has a BOS. Raises
        UserError with the template's own words if the template refuses the conversation.
        """
        messages = [m | {"content": _clean(m["content"])} for m in messages]
        pieces = self._pieces(messages)
        special = self._find_special("".join(text for text, _ in pieces))
        ids: list[int] = []
        run: list[tuple[str | int, bool]] = []  # (text or special id, is it the template's?)
        start = 0  # of the piece
        for text, number in pieces:
            if number is None:
                run += _cut(text, start, special)
            elif number >= 0 and messages[number]["role"] == "assistant":
                ids += [*self._encode_run(run), *self.response_ids(text)]
                run = []
            else:
                run.append((text, False))
            start += len(text)
        ids += self._encode_run(run)
        if self._bos is not None and ids[:1] != [self._bos]:
            ids.insert(0, self._bos)
        if self._hf.bos_token_id is not None and ids[:2] == [self._hf.bos_token_id] * 2:
            raise UserError("the chat template writes BOS twice: write it once")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of an answer's ids, without special tokens and ids that have no piece.

        Bytes that are not UTF-8 become U+FFFD: an answer may be cut off inside a character.
        """
        ids = [int(i) for i in ids if int(i) not in self._skipped]
        if self._sentencepiece is None:
            return self._full.decode(ids, skip_special_tokens=True)
        size = self._sentencepiece.vocab_size()
        texts = []
        for is_piece, run in itertools.groupby(ids, key=lambda i: i < size):
            if is_piece:
                texts.append(self._sentencepiece.decode(list(run)))
            else:  # tokens added to the model after the sentencepiece file was made
                texts += [self._added[i].content for i in run if i in self._added]
        return "".join(texts)

    # ------------------------------------------------------------------ the pieces of a prompt

    def _pieces(self, messages: list[dict]) -> list[tuple[str, int | None]]:
        """The conversation as the template shows it, cut into (text, the number of its message);
        None: the template's own text; -1: some message's."""
        shown = self._render(messages)
        contents = [m["content"] for m in messages]
        taken = set("".join([self._template, *contents]))
        private = map(chr, itertools.chain(*PRIVATE_USE))
        mark, end = itertools.islice((c for c in private if c not in taken), 2)

        def rendered(contents: list[str]) -> str:
            """The conversation with other contents; "" if the template refuses them."""
            try:
                return self._render([m | {"content": c} for m, c in zip(messages, contents)])
            except UserError:
                return ""

        # Where each message's text lies: between two marks with its number, if these change nothing
        # else. A template that strips white space shows the marks within it.
        for texts in (contents, [c.strip() for c in contents]):
            marked = [
                c.replace(text, f"{mark}{i}{mark}{text}{mark}{i}{mark}", 1) if c.strip() else c
                for i, (c, text) in enumerate(zip(contents, texts))
            ]
            parts = re.split(f"{mark}([0-9]+){mark}", rendered(marked))
            pieces, numbers = parts[::2], [int(part) for part in parts[1::2]]
            if (
                "".join(pieces) == shown
                and numbers[::2] == numbers[1::2]
                and pieces[1::2] == [texts[i] for i in numbers[::2]]
            ):
                break
        else:
            pieces = None
        for i, content in enumerate(contents):
            if content.strip() and i not in numbers:
                without = [mark if i == j else c for j, c in enumerate(contents)]
                if rendered(without) == shown:
                    role = messages[i]["role"]
                    raise UserError(f"the chat template leaves out message {i} (role {role})")
        if pieces is not None:
            owners = [None] * len(pieces)
            owners[1::2] = numbers[::2]
            return list(zip(pieces, owners))

        # A template that rewrites the texts, or looks into them: only what would be a special token
        # in a message is marked. A part of one, which the template cut, is ordinary text.
        tokens = "|".join(map(re.escape, sorted(self._special.values(), key=len, reverse=True)))
        marked = [re.sub(tokens or "(?!)", rf"{mark}\g<0>{end}", c) for c in contents]
        text = rendered(marked)
        if marked != contents and text.translate({ord(mark): None, ord(end): None}) != shown:
            raise UserError(
                "the chat template changes what the messages say, so that the text of a special "
                "token in them cannot be told from its own: remove it from them"
            )
        parts = re.split(f"{mark}({tokens}){end}|[{mark}{end}]", text)
        return [(p, -1 if i % 2 else None) for i, p in enumerate(parts) if p is not None]

    def _find_special(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of the special tokens that transformers finds in a text."""
        found = []
        encoding = self._finder.encode(text, add_special_tokens=False)
        for i, (start, end) in zip(map(self._id_of.get, encoding.ids), encoding.offsets):
            if i in self._special:
                token = text[start:end].strip()  # without white space that it is declared to strip
                start = text.index(token, start)
                found.append((start, start + len(token), i))
        return found

    def _encode_run(self, run: list[tuple[str | int, bool]]) -> list[int]:
        """The ids of what stands before an answer. The template's own space is left out where the
        tokenizer adds one itself."""
        if self._prefixes and run and run[-1][1] and isinstance(run[-1][0], str):
            run = [*run[:-1], (run[-1][0].removesuffix(" "), True)]
        if self._sentencepiece is None:
            text = "".join(self._names.get(part, part) for part, _ in run)
            known = self._names.keys() - {self._unknown}
            wanted = [part for part, _ in run if part in known]
            for encoder in self._encoders:  # the last one finds each name, wherever it stands
                ids = encoder.encode(text, add_special_tokens=False).ids
                if [i for i in ids if i in known] == wanted:
                    break
            return ids
        ids = []
        groups = [list(g) for _, g in itertools.groupby(run, lambda part: isinstance(part[0], int))]
        for before, parts, after in zip([[], *groups], groups, [*groups[1:], []]):
            if isinstance(parts[0][0], int):
                ids += [i for i, _ in parts]
                continue
            text = "".join(part for part, _ in parts)
            if before and self._added[before[-1][0]].rstrip:
                text = text.lstrip()
            if after and self._added[after[0][0]].lstrip:
                text = text.rstrip()
            if self._prefixes and parts[0][1]:
                text = text.removeprefix(" ")
            ids += self._raw(text)
        return ids

    def _render(self, messages: list[dict], to_be_answered: bool = True) -> str:
        try:
            return self._hf.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=to_be_answered,
            )
        except TEMPLATE_ERRORS as error:
            raise UserError(
                f"the chat template refuses the conversation: {first_line(error)}"
            ) from None

    def _tokens_of_template(self) -> set[int]:
        """The added tokens in the template's own text: in its literals, and in what it puts around
        messages, since it may put them together ("<|" + role + "|>"). White space is none of them:
        it is ordinary text everywhere."""
        try:
            lexed = list(jinja2.Environment().lex(self._template))
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template cannot be read: {first_line(error)}") from None
        texts = [text for _, kind, text in lexed if kind in ("data", "string")]
        turns = [{"role": r, "content": MARK} for r in ("system", "user", "assistant", "user")]
        for messages in (turns, turns[1:], turns[1:2]):
            with contextlib.suppress(UserError):
                texts.append(self._render(messages))
        text = "\0".join(texts)
        return {i for i, t in self._added.items() if t.content.strip() and t.content in text}

    def _end_of_turn(self) -> int | None:
        """What `end_id` is."""
        turns = [{"role": r, "content": "-"} for r in ("user", "assistant", "user")]
        turns[1]["content"] = MARK
        for messages in (turns[:2], turns):
            with contextlib.suppress(UserError):
                after = self._render(messages, to_be_answered=False).rpartition(MARK)[2].lstrip()
                for start, _, i in self._find_special(after)[:1]:
                    if start == 0 and i in self.eos_ids:
                        return i
        own = self._hf.eos_token_id
        return own if own in self.eos_ids else next(iter(self.eos_ids), None)

    # ------------------------------------------------------------------ one text

    def response_ids(self, text: str) -> list[int]:
        """The ids of an answer as the sampler would have drawn them: no BOS, no EOS, and nothing in
        it is taken for a special token."""
        text = _clean(text)
        if self._loses_space and text[:1] in (" ", "▁"):
            text = " " + text
        return self._raw(text)


def _cut(text: str, at: int, tokens: list[tuple[int, int, int]]) -> list[tuple[str | int, bool]]:
    """A piece of the template's text as parts of a run, with ids in the place of its tokens. at:
    where it starts in the whole, in which `tokens` are (start, end, id)."""
    parts, done = [], 0
    for start, end, i in tokens:
        if at <= start and end <= at + len(text):
            parts += [(text[done : start - at], True), (i, True)]
            done = end - at
    return [part for part in (*parts, (text[done:], True)) if part[0] != ""]


def _clean(text: str) -> str:
    """Halves of surrogate pairs have no UTF-8: pairs are joined, single ones become U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# ---------------------------------------------------------------------- the tokenizer's files


def _open_sentencepiece(path: str) -> SentencePieceProcessor:
    try:
        return SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is no sentencepiece model ({first_line(error)})") from None


def _user_defined(model: SentencePieceProcessor | None) -> list[str]:
    """The pieces that sentencepiece finds in a text before it cuts the rest."""
    pieces = ModelProto.FromString(model.serialized_model_proto()).pieces if model else []
    return [piece.piece for piece in pieces if piece.type == piece.USER_DEFINED]


def _without(model: SentencePieceProcessor, ids: Iterable[int]) -> SentencePieceProcessor:
    """A copy that makes none of these ids of a text."""
    proto = ModelProto.FromString(model.serialized_model_proto())
    for i in ids:
        if i < len(proto.pieces) and proto.pieces[i].type != ModelProto.SentencePiece.UNKNOWN:
            proto.pieces[i].type = ModelProto.SentencePiece.CONTROL
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def _renamed(tokenizer: Tokenizer, names: dict[str, str], changes: dict) -> Tokenizer:
    """A copy in which these tokens have other names, and these attributes. Their old names are
    ordinary text."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], **changes}
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        merges = (merge for merge in model["merges"] if names.keys().isdisjoint(merge))
        model["merges"] = [merge for merge in merges if "".join(merge) not in names]
    return Tokenizer.from_str(json.dumps(content))


def _template_of(tokenizer) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(
                f"the chat templates are named {', '.join(sorted(template))}, and none of them "
                "default: save the one to use as chat_template.jinja"
            )
        template = template["default"]
    if not template:
        raise UserError(
            "no chat template: add it as chat_template.jinja, or as chat_template in "
            "tokenizer_config.json"
        )
    return template


def _is_of_tokenizers(error: BaseException) -> bool:
    """Whether a tokenizer's own code raised it: a bare Exception; a panic of Rust's, which is no
    Exception; and transformers looks for an unk_token without an id for ever."""
    kind = type(error)
    return kind in (Exception, RecursionError) or kind.__name__ == "PanicException"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
