"""PairRM in Flax: which of two answers to a prompt is better (Jiang et al. 2023, arXiv 2306.02561).

One comparison is one sequence for a DeBERTa-v3 encoder,

    [CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> first [SEP] [CLS] <|candidate2|> second [SEP]

and its logit is head([h_source; h_candidate1]) − head([h_source; h_candidate2]), where h are the
last hidden states at the three markers and the head is Linear, tanh, Linear. Above 0, the first is
better.

The numbers are llm-blender's (pair_ranker/ranker.py, collator.py) at one prompt a batch, where it
cuts the prompt to 1,224 tokens and each answer to 412 and half of what the prompt leaves. Two
things are ours. A logit here depends on its own three texts alone: nothing is padded to or cut by
what shares the batch. And a user's text can never become a marker: where llm-blender breaks on a
text that holds "<|source|>" (or what the tokenizer takes for it), here a space is put behind its
first character; "[SEP]" becomes a space, as there.

Axis letters: b comparison, t token, r marker (source, candidate1, candidate2), d width.
"""

import dataclasses
import functools
import hashlib
import json
import os
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from model import config as model_config
from model import hf
from model.config import DebertaConfig
from model.packing import bucket
from model.rankers import deberta, deberta_tpu
from sharding.errors import UserError

MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
SOURCE_LENGTH, CANDIDATE_LENGTH = 1224, 412  # tokens, [CLS], the marker and [SEP] among them
TOKENIZER_FILES = ("tokenizer.json", "spm.model")  # one of them; the first that is there
FILES = ["config.json", "model.safetensors", *TOKENIZER_FILES]

TABLE = {f"pretrained_model.{name}": entry for name, entry in deberta.TABLE.items()} | {
    "head_layer.1.weight": ("head_in", "d w", "w d"),
    "head_layer.1.bias": ("head_in_bias", "d", "d"),
    "head_layer.4.weight": ("head_out", "o d", "d o"),
    "head_layer.4.bias": ("head_out_bias", "o", "o"),
}


@dataclasses.dataclass(frozen=True)
class PairrmConfig:
    encoder: DebertaConfig
    tasks: int = 1  # outputs of the head, averaged
    source_length: int = SOURCE_LENGTH
    candidate_length: int = CANDIDATE_LENGTH

    def __post_init__(self):
        for name, least in (("tasks", 1), ("source_length", 4), ("candidate_length", 4)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(f"{name} is {value!r}: it must be a whole number from {least}")

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The encoder's, and w the head's input, o its output."""
        sizes = self.encoder.axis_sizes
        return {**sizes, "w": 2 * sizes["d"], "o": self.tasks}


@dataclasses.dataclass
class Encoded:
    """The token ids of a prompt and its answers, [CLS], marker and [SEP] included, cut to length.

    The answers carry `<|candidate|>`, which a comparison replaces by 1 or 2.
    """

    source: list[int]
    candidates: list[list[int]]
    truncated: dict  # {"prompt": bool, "responses": [bool]}

    def length(self, i: int, j: int) -> int:
        return len(self.source) + len(self.candidates[i]) + len(self.candidates[j])


# (encoded, i, j): answer i first, j second.
Comparison = tuple[Encoded, int, int]


# --------------------------------------------------------------------------- the network


@jax.jit
def head(params: dict, markers_brd: jax.Array) -> jax.Array:
    """fp32 logits [b] of the hidden states at the three markers (ranker.py, `reduce`)."""
    precision = jax.lax.Precision.HIGHEST
    h_brd = markers_brd.astype(jnp.float32)

    def score(candidate):
        x_bw = jnp.concatenate([h_brd[:, 0], h_brd[:, candidate]], axis=-1)
        x_bd = jnp.tanh(
            jnp.dot(x_bw, params["head_in"], precision=precision) + params["head_in_bias"]
        )
        return jnp.dot(x_bd, params["head_out"], precision=precision) + params["head_out_bias"]

    return (score(1) - score(2)).mean(axis=-1)


def compare(
    params: dict, config: PairrmConfig, tokens_bt, lengths_b, markers_br, kernel: bool = False
) -> jax.Array:
    """fp32 logits [b] of whole comparisons: ids, text first and padding behind; how many are text;
    where the three markers stand. params: from `load`; kernel: as in deberta.py."""
    h_brd = deberta.encode(
        params["encoder"], config.encoder, tokens_bt, lengths_b, markers_br, kernel
    )
    return head({k: v for k, v in params.items() if k != "encoder"}, h_brd)


class PairRM:
    """A PairRM on each of its devices. Its weights are loaded when the first logits are asked
    for."""

    def __init__(
        self,
        folder: str,
        dtype=jnp.float32,
        tokens_a_batch: int | None = None,
        devices: list[jax.Device] | None = None,
    ):
        """folder: as the hub holds it, or its hub id; dtype: of the encoder, fp32 or bf16;
        tokens_a_batch: about how many tokens one call computes (a longer comparison goes alone);
        default: what keeps a CPU's cache, or an accelerator, busy. devices: default all that this
        process has; of a CPU one, since others would be the same cores."""
        self._files, self._dtype = open_folder(folder), dtype
        self.config, self.identity = self._files.config, self._files.identity
        self.layout = Layout(self._files.tokenizer, self.config)
        here = jax.local_devices()
        self._on_cpu = here[0].platform == "cpu"
        self.devices = devices or (here[:1] if self._on_cpu else here)
        self._kernel = deberta_tpu.runs_on(self.devices[0].device_kind)
        self.tokens_a_batch = tokens_a_batch or (1024 if self._on_cpu else 16384)
        # Batches computed at a time, each on one device: on two cores two of them take a seventh
        # less than one after the other, since what XLA leaves to one core is done on both.
        cores = min(8, os.cpu_count() or 1) if self._on_cpu else 1
        self.at_a_time = max(cores, len(self.devices))

    @functools.cached_property
    def copies(self) -> list[dict]:
        """The parameters on each device."""
        first = load(self._files, self.devices[0], self._dtype)
        return [first, *(jax.device_put(first, device) for device in self.devices[1:])]

    def encode(self, source: str, candidates: list[str]) -> Encoded:
        return self.layout.encode(source, candidates)

    def logits(
        self, comparisons: list[Comparison], done: Callable[[int], None] = lambda n: None
    ) -> list[float]:
        """The logit of each comparison; `done(n)` is called as batches of n are finished. Raises
        UserError where one is not finite."""
        found = [0.0] * len(comparisons)
        copies = self.copies  # loaded once, before the threads ask for them
        free = queue.SimpleQueue()  # the devices that wait for a batch, by their numbers
        for thread in range(self.at_a_time):
            free.put(thread % len(self.devices))

        def compute(batch_and_arrays):
            batch, arrays = batch_and_arrays
            number = free.get()
            try:
                with jax.default_device(self.devices[number]):  # the others' queues are long
                    found_b = compare(
                        copies[number], self.config, *map(jnp.asarray, arrays), kernel=self._kernel
                    )
                    return batch, np.asarray(found_b)
            finally:
                free.put(number)

        with ThreadPoolExecutor(self.at_a_time) as pool:
            try:
                for batch, logits_b in pool.map(compute, self.batches(comparisons)):
                    if not np.isfinite(logits_b).all():
                        raise UserError(
                            f"{self._files.weights} gives logits that are not finite: "
                            "download it again"
                        )
                    for i, logit in zip(batch, logits_b):
                        found[i] = float(logit)
                    done(len(batch))
            except BaseException:  # `done` may stop the run: what waits is not computed first
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def enough(self, comparisons: list[Comparison]) -> bool:
        """Whether there are several batches a device of them, so that those of a like length go
        together; not so many that much is lost when a run is stopped."""
        tokens = sum(e.length(i, j) for e, i, j in comparisons)
        return tokens >= 8 * self.tokens_a_batch * len(self.devices)

    def _padded(self, length: int) -> int:
        """The length that is compiled. On CPU compiling one costs less than a comparison."""
        if self._on_cpu:
            return -(-length // 32) * 32
        return bucket(length, deberta_tpu.BLOCK if self._kernel else 32)

    def batches(self, comparisons: list[Comparison]):
        """(indices, (tokens_bt, lengths_b, markers_br)) of batches of one padded length each.

        As many comparisons as `tokens_a_batch` allows, in powers of two: few shapes to compile, and
        no row is padding. An accelerator's programs take longer to compile than to run, so there
        every batch of a length has as many rows, the last one's filled with its first comparison.
        """
        by_length: dict[int, list[int]] = {}
        for index, (encoded, i, j) in enumerate(comparisons):
            by_length.setdefault(self._padded(encoded.length(i, j)), []).append(index)
        for length in sorted(by_length, reverse=True):
            waiting = by_length[length]
            while waiting:
                most = max(1, self.tokens_a_batch // length)
                if self._on_cpu:
                    most = min(len(waiting), most)
                rows = 1 << (most.bit_length() - 1)
                batch, waiting = waiting[:rows], waiting[rows:]
                filled = batch + [batch[0]] * (rows - len(batch))
                yield batch, self.layout.join([comparisons[i] for i in filled], length)


# ---------------------------------------------------------------------------- the layout


class Layout:
    """Texts to token ids as PairRM reads them."""

    def __init__(self, folder: str, config: PairrmConfig):
        self.tokenizer = open_tokenizer(folder)
        self.config = config
        self.sep_id = self.tokenizer.token_to_id("[SEP]")
        self.pad_id = self.tokenizer.token_to_id("[PAD]")
        self.unknown_id = self.tokenizer.token_to_id("[UNK]")
        self.marker_ids = [self.tokenizer.token_to_id(marker) for marker in MARKERS]
        tokens, vocabulary = self.tokenizer.get_vocab_size(), config.encoder.vocab_size
        if tokens != vocabulary:
            raise UserError(
                f"{folder}: the tokenizer has {tokens:,} tokens, the weights {vocabulary:,}: "
                "the two belong to different models"
            )
        ends = [self.tokenizer.token_to_id("[CLS]"), self.sep_id]
        if self.tokenizer.encode(MARKERS[0]).ids != [ends[0], self.marker_ids[0], ends[1]]:
            raise UserError(
                f"{folder}: the tokenizer puts no [CLS] and [SEP] around a text, as DeBERTa's does"
            )

    def encode(self, source: str, candidates: list[str]) -> Encoded:
        """Tokenise and cut as CrossCompareCollator does at batch size 1."""
        c = self.config
        source_ids, cut = self._ids(MARKERS[0], source, c.source_length)
        most = c.candidate_length + (c.source_length - len(source_ids)) // 2
        answers = [self._ids(MARKERS[3], text, most) for text in candidates]
        truncated = {"prompt": cut, "responses": [was_cut for _, was_cut in answers]}
        return Encoded(source_ids, [ids for ids, _ in answers], truncated)

    def _ids(self, marker: str, text: str, most: int) -> tuple[list[int], bool]:
        """([CLS] marker text [SEP] in at most `most` tokens, whether text was cut off)."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = text.replace("[SEP]", " ")
        ids = self.tokenizer.encode(marker + text).ids
        if ids[1] not in self.marker_ids:  # an accent in front joined the marker's last sign
            ids = self.tokenizer.encode(f"{marker} {text}").ids
        reserved = {self.sep_id, *self.marker_ids}
        if not reserved.isdisjoint(ids[2:-1]):
            # The marker may be there only once the text is normalised: "＜|source|＞".
            if self.tokenizer.normalizer is not None:
                text = self.tokenizer.normalizer.normalize_str(text).replace("[SEP]", " ")
            for name in MARKERS:
                text = text.replace(name, f"{name[0]} {name[1:]}")
            ids = self.tokenizer.encode(f"{marker} {text}").ids
            ids[2:-1] = [self.unknown_id if i in reserved else i for i in ids[2:-1]]
        if len(ids) <= most:
            return ids, False
        return [*ids[: most - 1], self.sep_id], True

    def join(self, comparisons: list[Comparison], length: int):
        """(tokens [b, length], lengths [b], places of the three markers [b, 3]), int32."""
        b = len(comparisons)
        tokens_bt = np.full((b, length), self.pad_id, np.int32)
        lengths_b, markers_br = np.zeros(b, np.int32), np.ones((b, 3), np.int32)
        for row, (encoded, i, j) in enumerate(comparisons):
            ids = list(encoded.source)
            for place, candidate in ((1, encoded.candidates[i]), (2, encoded.candidates[j])):
                markers_br[row, place] = len(ids) + 1
                ids += [candidate[0], self.marker_ids[place], *candidate[2:]]
            tokens_bt[row, : len(ids)] = ids
            lengths_b[row] = len(ids)
        return tokens_bt, lengths_b, markers_br


def open_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a folder, the markers added behind its tokens as llm-blender adds them.

    Made from tokenizer.json, or from spm.model as transformers 4 did (convert_slow_tokenizer.py).
    transformers 5 builds its own from either and leaves out the model's normaliser, so that "…" or
    "ﬁ", which the encoder was trained to read as "..." and "fi", become unknown tokens.
    """
    path = epath.Path(folder)
    try:
        if (path / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_str((path / "tokenizer.json").read_text())
        else:
            tokenizer = _from_sentencepiece((path / "spm.model").read_bytes())
    except Exception as error:  # of the Rust library: a plain Exception
        line = next((s.strip() for s in str(error).splitlines() if s.strip()), repr(error))
        raise UserError(f"{folder}: the tokenizer cannot be opened ({line})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    missing = [token for token in special if tokenizer.token_to_id(token) is None]
    if missing:
        raise UserError(f"{folder}: the tokenizer has no {missing[0]}, so it is not DeBERTa's")
    tokenizer.add_special_tokens([*special, "[MASK]"])
    tokenizer.add_tokens([AddedToken(marker, normalized=True) for marker in MARKERS])
    return tokenizer


def _from_sentencepiece(model: bytes) -> Tokenizer:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id))
    steps = [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if proto.normalizer_spec.precompiled_charsmap:
        charsmap = proto.normalizer_spec.precompiled_charsmap
        steps.insert(1, normalizers.Precompiled(charsmap))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    return tokenizer


# --------------------------------------------------------------------------- the folder


@dataclasses.dataclass
class Files:
    """Where a PairRM's parts lie, and what they are: the sha256 of all of them."""

    config: PairrmConfig
    weights: epath.Path
    tokenizer: str  # folder
    stored: dict  # tensor name → hf.StoredTensor or its like
    identity: str


def open_folder(name: str) -> Files:
    """The parts of the PairRM in a folder, or under a hub id. Raises UserError.

    Two layouts are read. The published one, whose config.json holds the ranker's settings and, as
    `model_name`, the encoder (a folder or hub id) that its config.json, and the tokenizer where the
    folder has none, come from. And PairRM-hf's, whose config.json is the encoder's.
    """
    try:
        folder = epath.Path(hf.local_folder(name, FILES)[0])
        if not (folder / "model.safetensors").exists():
            folder = epath.Path(hf.local_folder(name, [*FILES, "pytorch_model.bin"])[0])
        if not (folder / "config.json").exists():
            raise UserError(f"{name}: config.json is missing: give the folder of a PairRM")
        settings = hf.read_json(folder / "config.json")
        encoder, source = settings, folder / "config.json"
        if "hidden_size" not in settings:
            if settings.get("ranker_type") != "pairranker" or not isinstance(
                settings.get("model_name"), str
            ):
                raise UserError(
                    f"{folder / 'config.json'} is not PairRM's: it names neither an encoder nor "
                    '"ranker_type": "pairranker" with a "model_name"'
                )
            base = epath.Path(hf.local_folder(settings["model_name"], FILES[:1])[0])
            source = base / "config.json"
            if not source.exists():
                raise UserError(f"{base}: config.json is missing: it describes {name}'s encoder")
            encoder = hf.read_json(source)
        weights, stored = _stored(folder)
        embedding = stored.get("pretrained_model.embeddings.word_embeddings.weight")
        if embedding is None or "head_layer.4.weight" not in stored:
            raise UserError(
                f"{weights} is not PairRM's: it has no encoder under pretrained_model, or no head"
            )
        # llm-blender enlarges the encoder's vocabulary by the markers, so the tensor decides.
        try:
            config = PairrmConfig(
                model_config.deberta_from_hf({**encoder, "vocab_size": embedding.shape[0]}),
                tasks=settings.get("n_tasks") or 1,
                source_length=settings.get("source_maxlength") or SOURCE_LENGTH,
                candidate_length=settings.get("candidate_maxlength") or CANDIDATE_LENGTH,
            )
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        except (TypeError, ValueError, ArithmeticError, IndexError) as error:
            raise UserError(f"{source} cannot be read ({error}): download it again") from None
        hf.check_tensors(str(folder), config, _slots(config), stored, set())
        tokenizer = folder
        own = any((folder / file).exists() for file in TOKENIZER_FILES)
        if not own and isinstance(settings.get("model_name"), str):
            base = hf.local_folder(settings["model_name"], list(TOKENIZER_FILES))[0]
            tokenizer = epath.Path(base)
        if not any((tokenizer / file).exists() for file in TOKENIZER_FILES):
            raise UserError(f"{tokenizer}: {' or '.join(TOKENIZER_FILES)} is missing: add it")
    except hf.UserError as error:
        raise UserError(str(error)) from None
    parts = [weights, source, *(tokenizer / file for file in TOKENIZER_FILES)]
    return Files(config, weights, str(tokenizer), stored, _sha256(parts, config))


def load(files: Files, device, dtype) -> dict:
    """The parameters on `device`: the encoder prepared in `dtype`, the head fp32."""
    params: dict = {
        "encoder": {"layers": [{} for _ in range(files.config.encoder.num_hidden_layers)]}
    }
    for key, slot in _slots(files.config).items():
        array = np.asarray(files.stored[key].read())
        array = np.ascontiguousarray(hf.to_ours(files.config, slot, array), np.float32)
        parent = params if key.startswith("head_layer") else params["encoder"]
        for step in slot.path[:-1]:
            parent = parent[step]
        parent[slot.path[-1]] = jax.device_put(array, device)
    params["encoder"] = deberta.prepare(params["encoder"], files.config.encoder, dtype)
    return params


def _slots(config: PairrmConfig) -> dict[str, hf.Slot]:
    return hf.table_slots(TABLE, config.encoder.num_hidden_layers)


@dataclasses.dataclass(frozen=True)
class _TorchTensor:
    """One tensor of a pytorch_model.bin, with the face of hf.StoredTensor."""

    file: str
    tensor: object

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self) -> np.ndarray:
        return self.tensor.detach().float().numpy()


def _stored(folder: epath.Path) -> tuple[epath.Path, dict]:
    """(the file of weights, its tensors by name)."""
    file = folder / "model.safetensors"
    if file.exists():
        return file, {tensor.name: tensor for tensor in hf.read_header(file)}
    file = folder / "pytorch_model.bin"
    if not file.exists():
        raise UserError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there")
    import torch  # the only way into its pickle; weights_only runs none of it

    try:
        state = torch.load(str(file), map_location="cpu", weights_only=True, mmap=True)
        tensors = {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}
        return file, {name: _TorchTensor(str(file), tensor) for name, tensor in tensors.items()}
    except Exception as error:
        line = next((s.strip() for s in str(error).splitlines() if s.strip()), repr(error))
        raise UserError(f"{file} is damaged or no state dict ({line}): download it again") from None


def _sha256(parts: list[epath.Path], config: PairrmConfig) -> str:
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for part in parts:
        if part.exists():
            with part.open("rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
    return digest.hexdigest()
