"""PairRM in JAX: which of two answers to a prompt is better (Jiang et al. 2023, arXiv 2306.02561).

One comparison is one sequence for a DeBERTa-v3 encoder,

    [CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> first [SEP] [CLS] <|candidate2|> second [SEP]

and its logit is head([h_source; h_candidate1]) − head([h_source; h_candidate2]), where h are the
last hidden states at the three markers and the head is Linear, tanh, Linear. A logit above 0 means
that the first is better.

The logits are those of llm-blender (pair_ranker/ranker.py, collator.py) with one prompt per batch:
it cuts the prompt to 1,224 tokens, and each answer to 412 plus half of what the prompt leaves. Two
things differ from llm-blender. A logit depends on its own three texts alone: no text is padded or
cut because of others in the batch. And no text can become a marker. llm-blender breaks on a text
that holds "<|source|>" (or anything the tokenizer takes for it); here a space is put behind its
first character. "[SEP]" becomes a space in both.

Axis letters: b comparison, t token, r marker (source, candidate1, candidate2), d width.
"""

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from model.buckets import bucket
from model.precision import Precision, precision_of, product
from model.rankers import deberta, deberta_tpu
from model.tensors import Slot, check_tensors, stored_tensors, table_slots
from model.weights import local_folder, local_model, read_json, weight_files
from sharding.errors import UserError, first_line
from sharding.mesh import batch_shards, constrain, make_mesh, put_batch, replicated

MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
SOURCE_LENGTH, CANDIDATE_LENGTH = 1224, 412  # in tokens, with [CLS], the marker and [SEP]
TOKENIZER_FILES = ("tokenizer.json", "spm.model")  # the first that exists is read
FILES = ["config.json", *TOKENIZER_FILES]

TABLE = {f"pretrained_model.{name}": entry for name, entry in deberta.TABLE.items()} | {
    "head_layer.1.weight": ("head_in", "d w", "w d"),
    "head_layer.1.bias": ("head_in_bias", "d", "d"),
    "head_layer.4.weight": ("head_out", "o d", "d o"),
    "head_layer.4.bias": ("head_out_bias", "o", "o"),
}


@dataclasses.dataclass(frozen=True)
class PairrmConfig:
    encoder: deberta.DebertaConfig
    tasks: int = 1  # how many outputs the head has; they are averaged
    source_length: int = SOURCE_LENGTH
    candidate_length: int = CANDIDATE_LENGTH

    def __post_init__(self):
        for name, least in (("tasks", 1), ("source_length", 4), ("candidate_length", 4)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(f"{name} is {value!r}: it must be a whole number from {least}")

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The encoder's, w (the head's input) and o (its output)."""
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
    h_brd = markers_brd.astype(jnp.float32)

    def score(candidate):
        x_bw = jnp.concatenate([h_brd[:, 0], h_brd[:, candidate]], axis=-1)
        x_bd = product("bw,wd->bd", x_bw, params["head_in"], jnp.float32)
        x_bd = jnp.tanh(x_bd + params["head_in_bias"])
        return product("bd,do->bo", x_bd, params["head_out"], jnp.float32) + params["head_out_bias"]

    return constrain((score(1) - score(2)).mean(axis=-1), None)  # every process reads them all


def compare(
    params: dict, config: PairrmConfig, tokens_bt, lengths_b, markers_br, kernel: bool = False
) -> jax.Array:
    """fp32 logits [b] of whole comparisons. tokens_bt: ids, text first and padding behind;
    lengths_b: how many are text; markers_br: where the three markers stand; params: from `load`;
    kernel: as in deberta.py."""
    h_brd = deberta.encode(
        params["encoder"], config.encoder, tokens_bt, lengths_b, markers_br, kernel
    )
    return head({k: v for k, v in params.items() if k != "encoder"}, h_brd)


class PairRM:
    """A PairRM on a mesh: every device holds the weights and computes its rows of each batch.

    Every process of the mesh calls `logits` with the same comparisons, and gets all logits.
    """

    on_mesh = True

    def __init__(
        self,
        folder: str,
        dtype=jnp.float32,
        tokens_per_batch: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """folder: as on the hub, or a hub id. dtype: the encoder's, float32 or bfloat16.
        tokens_per_batch: about how many tokens a device computes in one call (a longer comparison
        goes alone); default: as many as fit a CPU's cache, or keep an accelerator busy. mesh:
        default: all devices."""
        self._files = open_folder(folder)
        self.config, self.identity = self._files.config, self._files.identity
        self.layout = Layout(self._files.tokenizer, self.config)
        self.encode = self.layout.encode
        self.mesh = make_mesh(-1, 1, 1) if mesh is None else mesh
        device = self.mesh.devices.flat[0]
        self._precision = precision_of(dtype, device.platform)
        self._on_cpu = device.platform == "cpu"
        self._kernel = deberta_tpu.runs_on(device.device_kind)
        if device.platform == "tpu" and not self._kernel:
            print(
                f"PairRM is slow on a {device.device_kind}, which looks up every pair of tokens: "
                "use a TPU v5 or newer, which has a kernel for it, or try --device host",
                file=sys.stderr,
            )
        self.tokens_per_batch = tokens_per_batch or (1024 if self._on_cpu else 16384)

    @functools.cached_property
    def params(self) -> dict:
        """The parameters, loaded at the first `logits`."""
        return load(self._files, replicated(self.mesh), self._precision)

    def logits(
        self, comparisons: list[Comparison], done: Callable[[int], None] = lambda n: None
    ) -> list[float]:
        """The logit of each comparison. `done(n)` is called when a batch of n is finished; it may
        raise to stop the run. Raises UserError for a logit that is not finite."""
        logits, computing = [0.0] * len(comparisons), []

        def take(batch: list[int], logits_b: jax.Array) -> None:
            if not np.isfinite(logits_b := np.asarray(logits_b)).all():
                raise UserError(
                    f"{self._files.weights} gives logits that are not finite: download it again"
                )
            for i, logit in zip(batch, logits_b):
                logits[i] = float(logit)
            done(len(batch))

        with jax.set_mesh(self.mesh):
            for batch, arrays in self.batches(comparisons):
                arrays = put_batch(self.mesh, arrays)
                logits_b = compare(self.params, self.config, **arrays, kernel=self._kernel)
                computing.append((batch, logits_b))
                if len(computing) > 1:  # read while the next batch is computed
                    take(*computing.pop(0))
            for batch, logits_b in computing:
                take(batch, logits_b)
        return logits

    def enough(self, comparisons: list[Comparison]) -> bool:
        """Whether the comparisons fill 8 batches: enough to put similar lengths together, and not
        so many that much is lost when a run is stopped."""
        tokens = sum(e.length(i, j) for e, i, j in comparisons)
        return tokens >= 8 * self.tokens_per_batch * batch_shards(self.mesh)

    def _padded(self, length: int) -> int:
        """The length to compile for. On CPU there are many lengths, since compiling costs less than
        a comparison there."""
        if self._on_cpu:
            return -(-length // 32) * 32
        return bucket(length, deberta_tpu.BLOCK if self._kernel else 32)

    def batches(self, comparisons: list[Comparison]) -> Iterator[tuple[list[int], dict]]:
        """(indices, the arrays that `compare` takes) of batches, the longest comparisons first.

        A batch takes the next comparisons by length, as many as `tokens_per_batch` allows, rounded
        down to a power of two per device, so that few shapes are compiled. The last batch is filled
        up with its first comparison; on CPU, where computing takes longer than compiling, only
        until each device has as many rows as the others.
        """
        length_of = {n: e.length(i, j) for n, (e, i, j) in enumerate(comparisons)}
        waiting = sorted(length_of, key=lambda n: -length_of[n])
        devices = batch_shards(self.mesh)
        while waiting:
            length = self._padded(length_of[waiting[0]])
            most = max(1, self.tokens_per_batch // length)
            if self._on_cpu:
                most = min(most, -(-len(waiting) // devices))
            rows = devices << (most.bit_length() - 1)
            batch, waiting = waiting[:rows], waiting[rows:]
            filled = batch + [batch[0]] * (rows - len(batch))
            yield batch, self.layout.join([comparisons[n] for n in filled], length)


# ---------------------------------------------------------------------------- the layout


class Layout:
    """Turns texts into the token ids that PairRM reads."""

    def __init__(self, folder: str, config: PairrmConfig):
        self.tokenizer = open_tokenizer(folder)
        self.config = config
        self.sep_id = self.tokenizer.token_to_id("[SEP]")
        self.pad_id = self.tokenizer.token_to_id("[PAD]")
        self.unknown_id = self.tokenizer.token_to_id("[UNK]")
        self.marker_ids = [self.tokenizer.token_to_id(marker) for marker in MARKERS]
        ids, vocabulary = self.tokenizer.get_vocab().values(), config.encoder.vocab_size
        if sorted(ids) != list(range(vocabulary)):
            raise UserError(
                f"{folder}: the tokenizer's {len(ids):,} tokens do not have the ids 0 to "
                f"{vocabulary - 1} of the weights: the two belong to different models"
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
        if ids[1] not in self.marker_ids:  # the text's first accent joined the marker's last sign
            ids = self.tokenizer.encode(f"{marker} {text}").ids
        reserved = {self.sep_id, *self.marker_ids}
        if not reserved.isdisjoint(ids[2:-1]):
            # A marker may appear only when the text is normalised: "＜|source|＞".
            if self.tokenizer.normalizer is not None:
                text = self.tokenizer.normalizer.normalize_str(text).replace("[SEP]", " ")
            for name in MARKERS:
                text = text.replace(name, f"{name[0]} {name[1:]}")
            ids = self.tokenizer.encode(f"{marker} {text}").ids
            ids[2:-1] = [self.unknown_id if i in reserved else i for i in ids[2:-1]]
        if len(ids) <= most:
            return ids, False
        return [*ids[: most - 1], self.sep_id], True

    def join(self, comparisons: list[Comparison], length: int) -> dict[str, np.ndarray]:
        """tokens_bt [b, length], lengths_b [b] and the places of the three markers, markers_br
        [b, 3], int32."""
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
        return {"tokens_bt": tokens_bt, "lengths_b": lengths_b, "markers_br": markers_br}


def open_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a folder, with the markers added behind its tokens as llm-blender does.

    It is made from tokenizer.json, or from spm.model as transformers 4 did
    (convert_slow_tokenizer.py). transformers 5 builds its own from either and leaves out the
    model's normaliser: "…" or "ﬁ", which the encoder was trained to read as "..." and "fi", would
    become unknown tokens.
    """
    path = epath.Path(folder)
    try:
        if (path / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_str((path / "tokenizer.json").read_text())
        else:
            tokenizer = _from_sentencepiece((path / "spm.model").read_bytes())
    except Exception as error:  # the Rust library raises plain Exceptions
        raise UserError(f"{folder}: the tokenizer cannot be opened ({first_line(error)})") from None
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
    """The parts of a PairRM: where they lie, and the sha256 of all of them."""

    config: PairrmConfig
    weights: epath.Path
    tokenizer: str  # folder
    stored: dict  # tensor name → StoredTensor
    identity: str


def open_folder(name: str) -> Files:
    """The parts of the PairRM in a folder, or under a hub id. Raises UserError.

    Two layouts are read. In the published one, config.json holds the ranker's settings; its
    `model_name` (a folder or hub id) is the encoder, whose folder has the encoder's config.json,
    and the tokenizer if the ranker's folder has none. In PairRM-hf's, config.json is the encoder's.
    """
    folder = epath.Path(local_model(name, FILES)[0])
    if not (folder / "config.json").exists():
        raise UserError(f"{name}: config.json is missing: give the folder of a PairRM")
    settings = read_json(folder / "config.json")
    encoder_name = settings.get("model_name")
    encoder, source = settings, folder / "config.json"
    if "hidden_size" not in settings:
        if settings.get("ranker_type") != "pairranker" or not isinstance(encoder_name, str):
            raise UserError(
                f"{source} is not PairRM's: it names neither an encoder nor "
                '"ranker_type": "pairranker" with a "model_name"'
            )
        base = epath.Path(local_folder(encoder_name, FILES[:1])[0])
        source = base / "config.json"
        if not source.exists():
            raise UserError(f"{base}: config.json is missing: it describes {name}'s encoder")
        encoder = read_json(source)

    weights = weight_files(str(folder))
    stored = stored_tensors(*weights)
    embedding = stored.get("pretrained_model.embeddings.word_embeddings.weight")
    if embedding is None or "head_layer.4.weight" not in stored:
        raise UserError(
            f"{weights[0]} is not PairRM's: it has no encoder under pretrained_model, or no head"
        )
    try:
        config = PairrmConfig(
            # llm-blender enlarges the encoder's vocabulary by the markers: the tensor decides.
            deberta.from_hf({**encoder, "vocab_size": embedding.shape[0]}),
            tasks=settings.get("n_tasks") or 1,
            source_length=settings.get("source_maxlength") or SOURCE_LENGTH,
            candidate_length=settings.get("candidate_maxlength") or CANDIDATE_LENGTH,
        )
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (TypeError, ValueError, ArithmeticError, IndexError) as error:
        raise UserError(f"{source} cannot be read ({error}): download it again") from None
    check_tensors(str(folder), config, _slots(config), stored, set())
    for tensor in _slots(config):  # now, since the weights may be loaded hours later
        if not np.isfinite(np.asarray(stored[tensor].read(), np.float32)).all():
            raise UserError(
                f"{stored[tensor].file}: tensor {tensor} is not finite: download it again"
            )

    tokenizer = folder
    own = any((folder / file).exists() for file in TOKENIZER_FILES)
    if not own and isinstance(encoder_name, str):
        tokenizer = epath.Path(local_folder(encoder_name, list(TOKENIZER_FILES))[0])
    if not any((tokenizer / file).exists() for file in TOKENIZER_FILES):
        raise UserError(f"{tokenizer}: {' or '.join(TOKENIZER_FILES)} is missing: add it")

    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for part in (*weights, source, *(tokenizer / file for file in TOKENIZER_FILES)):
        if part.exists():
            with part.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
    return Files(config, weights[0], str(tokenizer), stored, digest.hexdigest())


def load(files: Files, sharding: jax.sharding.NamedSharding, precision: Precision) -> dict:
    """The parameters with this sharding: the encoder prepared for `precision`, the head fp32."""
    layers = [{} for _ in range(files.config.encoder.num_hidden_layers)]
    params: dict = {"encoder": {"layers": layers}}
    for name, slot in _slots(files.config).items():
        array = slot.to_ours(files.config, np.asarray(files.stored[name].read()))
        parent = params if name.startswith("head_layer") else params["encoder"]
        for key in slot.path[:-1]:
            parent = parent[key]
        array = np.ascontiguousarray(array, np.float32)
        parent[slot.path[-1]] = jax.make_array_from_callback(
            array.shape, sharding, array.__getitem__
        )
    params["encoder"] = deberta.prepare(params["encoder"], files.config.encoder, precision)
    return params


def _slots(config: PairrmConfig) -> dict[str, Slot]:
    return table_slots(TABLE, config.encoder.num_hidden_layers)
