"""What each stage computes, reads, exchanges and holds, counted for one chip.

A program is a list of pieces; a piece is work that runs by itself, so that either its products or
its bytes decide how long it takes (the roofline; Williams et al. 2009). A multiplication and an
addition are two operations. Numbers are those of the longest row or the fullest chip: the others
wait for it.

Axis letters: b row, t token of a row, u unfolded row, s token of an unfolded row or cache position.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from model.config import DecoderConfig
from model.packing import Sequence, bucket, coarse_bucket, pack
from model.rankers import deberta_tpu
from model.rankers.deberta import DebertaConfig
from scripts.plan.slices import Slice
from stages import dpo, rank, sample

# PairRM's encoder, microsoft/deberta-v3-large, with PairRM's markers in the vocabulary.
PAIRRM = DebertaConfig(
    vocab_size=128005,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    layer_norm_eps=1e-7,
    position_buckets=256,
    max_relative_positions=512,
)
PAIRRM_TOKENS = 16384  # a call, as model/rankers/pairrm.py gives an accelerator


def itemsize(dtype: str) -> int:
    return 2 if dtype in ("bfloat16", "bf16") else 4


# ------------------------------------------------------------------------------- lengths


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long the texts are, in tokens. Answers end by themselves at a constant rate, so that
    their lengths fall off exponentially up to the limit; prompts are given, or do the same."""

    prompt: float  # mean
    answer: float  # mean, its EOS included
    prompts: tuple[int, ...] = ()  # each one, where they are known
    longest_prompt: int = 4096

    def draw_prompts(self, count: int, limit: int) -> np.ndarray:
        """Lengths of `count` prompts: the known ones over and over, or spread as above."""
        if self.prompts:
            return np.minimum(np.resize(self.prompts, count), limit)
        return quantiles(self.prompt, limit, count)

    def longest(self) -> int:
        return max(self.prompts, default=self.longest_prompt)


def rate(mean: float, limit: int) -> float:
    """τ of the exponential whose part below the limit, with all beyond it put there, has this
    mean; infinite where every answer reaches the limit."""
    if mean >= limit:
        return math.inf
    low, high = 1e-3, 1e6
    for _ in range(100):
        middle = math.sqrt(low * high)
        found = middle * -math.expm1(-limit / middle)
        low, high = (middle, high) if found < mean else (low, middle)
    return low


def alive(mean: float, limit: int, steps: np.ndarray) -> np.ndarray:
    """The share of answers that are longer than so many tokens."""
    return np.where(steps < limit, np.exp(-steps / rate(mean, limit)), 0.0)


def quantiles(mean: float, limit: int, count: int) -> np.ndarray:
    """`count` lengths spread evenly over that distribution, in an order that mixes them."""
    shares = (np.arange(count) + 0.5) / count
    tau = rate(mean, limit)
    lengths = np.full(count, float(limit)) if tau == math.inf else -tau * np.log(shares)
    lengths = np.clip(np.rint(lengths), 1, limit).astype(int)
    return np.random.default_rng(0).permutation(lengths)


# ------------------------------------------------------------------------------- pieces


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a program, on one chip, `times` over."""

    name: str
    flops: float = 0.0  # of matrix products
    bytes: float = 0.0  # read and written in memory
    gathered: float = 0.0  # bytes from other chips that can come while others are used
    awaited: float = 0.0  # bytes from other chips that the next piece waits for
    times: float = 1.0


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of pieces on a chip at its full rates: a piece counts as what it is bound by."""

    compute: float
    memory: float
    exchange: float
    total: float


def seconds(pieces: Iterable[Piece], on: Slice, dtype: str) -> Seconds:
    compute = memory = gathered = awaited = 0.0
    for piece in pieces:
        by_products = piece.flops / on.chip.flops(dtype)
        by_bytes = piece.bytes / on.chip.read
        if by_products >= by_bytes:
            compute += piece.times * by_products
        else:
            memory += piece.times * by_bytes
        if on.size > 1:
            gathered += piece.times * piece.gathered / on.exchange
            awaited += piece.times * piece.awaited / on.exchange
    total = max(compute + memory, gathered) + awaited
    return Seconds(compute, memory, gathered + awaited, total)


def total(pieces: Iterable[Piece], what: str) -> float:
    return sum(getattr(piece, what) * piece.times for piece in pieces)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes alone: what sharding/mesh.py's rules make of them."""

    data: int
    fsdp: int
    tensor: int

    @property
    def batch(self) -> int:
        return self.data * self.fsdp

    def others(self, axis: str) -> float:
        """The share of an array, cut over this axis, that lies on the other chips."""
        return 1 - 1 / getattr(self, axis)


def mesh_of(sizes: tuple[int, int, int], chips: int) -> Mesh:
    known = math.prod(s for s in sizes if s != -1)
    filled = [s if s != -1 else chips // known for s in sizes]
    if math.prod(filled) != chips:
        raise ValueError(f"--mesh {' '.join(map(str, sizes))} does not cover {chips} chips")
    return Mesh(*filled)


# ---------------------------------------------------------------------- the decoder's parts


@dataclasses.dataclass(frozen=True)
class DecoderCost:
    """Counts of a DecoderConfig."""

    config: DecoderConfig

    @property
    def layer_weights(self) -> int:
        """Of matrices, all layers."""
        c = self.config
        heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
        each = c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)
        return c.num_hidden_layers * each

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    @property
    def parameters(self) -> int:
        c = self.config
        tables = 1 if c.tie_word_embeddings else 2
        norms = (2 * c.num_hidden_layers + 1) * c.hidden_size
        return self.layer_weights + tables * self.vocabulary + norms

    @property
    def attention(self) -> int:
        """Operations of both products of a query with one key, all layers."""
        c = self.config
        return 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim

    def causal(self, s: int) -> float:
        """Query and key pairs that are computed of a row of s, in the blocks of attention.py."""
        block = max(128, -(-s // 8))
        return sum(min(block, s - at) * min(at + block, s) for at in range(0, s, block))

    def kept(self, dtype: str, remat: str) -> int:
        """Bytes a token that the forward pass leaves for the backward pass."""
        c = self.config
        products = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
        products += 2 * c.hidden_size + 2 * c.intermediate_size + c.num_attention_heads * c.head_dim
        inputs = c.hidden_size  # of each layer
        width = inputs if remat == "full" else inputs + products
        return c.num_hidden_layers * width * itemsize(dtype)


# ------------------------------------------------------------------------------- sampling


@dataclasses.dataclass(frozen=True)
class SamplingCost:
    """One run of stages.sample."""

    decoder: DecoderCost
    args: sample.Args
    lengths: Lengths
    prompts: int
    mesh: Mesh

    @property
    def answers(self) -> int:
        return self.prompts * self.args.n

    @property
    def slots(self) -> int:
        asked = min(self.args.slots or 256, self.answers)
        return -(-asked // self.mesh.batch) * self.mesh.batch

    @property
    def cache_length(self) -> int:
        """Positions at its longest."""
        return -(-(self.lengths.longest() + self.args.max_new_tokens) // 16) * 16

    def cache_at(self, steps: int) -> int:
        """Positions that answers of so many tokens need, where their prompts are longest."""
        needed = self.lengths.longest() + steps + 32
        return min(max(128, coarse_bucket(needed)), self.cache_length)

    @property
    def usual_cache(self) -> int:
        """Positions while slots are refilled: what the longest of them needs, which of n lengths
        that fall off exponentially is the mean times ln n."""
        times = max(1.0, math.log(self.slots))
        prompt = min(self.lengths.longest(), self.lengths.prompt * times)
        answer = min(self.args.max_new_tokens, self.lengths.answer * times)
        return min(max(128, coarse_bucket(round(prompt + answer))), self.cache_length)

    def cache_bytes(self, slots: int, length: int) -> float:
        """On one chip."""
        c = self.decoder.config
        whole = c.num_key_value_heads % self.mesh.tensor  # heads that the axis does not divide
        cut = self.mesh.batch * (1 if whole else self.mesh.tensor)
        numbers = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
        return numbers * slots * length * itemsize(self.args.dtype) / cut

    def decode(self, slots: int, length: int, times: float = 1.0) -> list[Piece]:
        """One step of `slots` answers with a cache of `length` positions."""
        d, mesh, size = self.decoder, self.mesh, itemsize(self.args.dtype)
        rows = -(-slots // mesh.batch)
        weights = (d.layer_weights + d.vocabulary) / mesh.tensor
        exchanges = 2 * d.config.num_hidden_layers * rows * d.config.hidden_size * size
        words = rows * d.config.vocab_size
        return [
            Piece(
                "weights",
                2 * weights * rows,
                weights * size,
                gathered=weights * size * mesh.others("fsdp"),
                awaited=2 * exchanges * mesh.others("tensor"),
                times=times,
            ),
            Piece(
                "cache",
                d.attention * rows * length / mesh.tensor,
                self.cache_bytes(slots, length),
                times=times,
            ),
            # Logits are written, scaled, weighted, searched and summed up: about ten times.
            Piece(
                "draw",
                0,
                40 * words / mesh.tensor,
                awaited=4 * words * mesh.others("tensor"),
                times=times,
            ),
        ]

    def prefill(self, prompts: int, times: float = 1.0) -> list[Piece]:
        """One call; a row of prompts lies whole on every part of the batch axes."""
        d, mesh, size = self.decoder, self.mesh, itemsize(self.args.dtype)
        t = coarse_bucket(round(prompts * self.lengths.prompt))
        weights = d.layer_weights / mesh.tensor
        exchanges = 2 * d.config.num_hidden_layers * t * d.config.hidden_size * size
        return [
            Piece(
                "prompts",
                2 * weights * t + d.attention * d.causal(t) / mesh.tensor,
                weights * size,
                gathered=weights * size * mesh.others("fsdp"),
                awaited=2 * exchanges * mesh.others("tensor"),
                times=times,
            ),
        ]

    def pieces(self) -> list[Piece]:
        """All of it: a first filling of the slots, refills one prompt at a time, and the end, when
        no prompt waits and the slots are halved, twice at most, as their answers end."""
        limit, mean = self.args.max_new_tokens, min(self.lengths.answer, self.args.max_new_tokens)
        together = min(8, max(1, int(512 // self.lengths.prompt)))  # generate.PREFILL_*
        first = min(self.prompts, max(1, self.slots // self.args.n))
        found = self.prefill(min(together, first), times=math.ceil(first / together))
        refilled = self.answers - min(self.slots, self.answers)
        if refilled:
            found += self.prefill(1, times=refilled / self.args.n)
            # A prompt waits until as many slots are free as it has answers.
            busy = 1 - (self.args.n - 1) / 2 / self.slots
            found += self.decode(self.slots, self.usual_cache, refilled * mean / self.slots / busy)
        steps = np.arange(limit)
        going = self.slots * alive(mean, limit, steps)
        rows = self.slots
        for step in steps[going >= 0.5]:  # until the last one has ended
            while rows > max(1, self.slots // 4) and going[step] <= rows // 2:
                rows //= 2
            length = self.usual_cache if refilled else self.cache_at(step)
            found += self.decode(rows, length)
        return found

    def memory(self) -> dict[str, float]:
        """Bytes a chip."""
        d, size = self.decoder, itemsize(self.args.dtype)
        chips = self.mesh.fsdp * self.mesh.tensor
        layer = d.layer_weights / d.config.num_hidden_layers * size / self.mesh.tensor
        gathered = 2 * layer + d.vocabulary * size / self.mesh.tensor if self.mesh.fsdp > 1 else 0
        logits = 6 * 4 * d.config.vocab_size * self.slots / self.mesh.batch
        return {
            "parameters": d.parameters * size / chips,
            "cache": self.cache_bytes(self.slots, self.cache_length),
            "activations": gathered + logits,
        }


# ------------------------------------------------------------------------------- ranking


@dataclasses.dataclass(frozen=True)
class RankingCost:
    """One run of stages.rank with PairRM, a copy on each chip."""

    args: rank.Args
    lengths: Lengths
    prompts: int
    n: int
    on: Slice

    @property
    def dtype(self) -> str:
        return self.args.dtype or "float32"

    @property
    def comparisons(self) -> int:
        """Of bubble: the best in n−1 duels, the worst among about half the answers; both orders."""
        n = self.n
        each = n * (n - 1) if self.args.comparisons != "bubble" else 2 * (n - 1) + n - 2
        return self.prompts * each

    @property
    def length(self) -> int:
        """Tokens of a mean comparison, padded."""
        length = round(min(self.lengths.prompt, 1224) + 2 * self.lengths.answer + 9)
        return bucket(length, deberta_tpu.BLOCK if self.kernel else 32)

    @property
    def kernel(self) -> bool:
        """Whether attention is the one kernel of model/rankers/deberta_tpu.py."""
        return any(map(deberta_tpu.runs_on, self.on.chip.kinds))

    def attention(self, length: int) -> tuple[float, float]:
        """(operations, bytes) of a layer over one comparison."""
        c, d = PAIRRM, PAIRRM.hidden_size
        if self.kernel:
            # Content to content, weights to values, and both terms of relative positions for all
            # distances of a block; the kernel reads and writes no more than queries, keys, values.
            keys = length + length + (length + deberta_tpu.BLOCK) + 2 * length
            return 2 * d * length * keys, 4 * 2 * d * length * itemsize(self.dtype)
        # Both terms look up what is computed for each row of the tables. Scores in fp32: three
        # products write them, two look-ups, mask, softmax and the last product read and write them.
        flops = 2 * d * (2 * length * length + 2 * length * 2 * c.position_buckets)
        return flops, 12 * c.num_attention_heads * length * length * 4

    def pieces(self, count: float | None = None) -> list[Piece]:
        c, length = PAIRRM, self.length
        d, layers = c.hidden_size, c.num_hidden_layers
        weights = layers * (4 * d * d + 2 * d * c.intermediate_size)
        flops, traffic = self.attention(length)
        calls = max(1, PAIRRM_TOKENS // length)
        times = (self.comparisons if count is None else count) / self.on.size
        size = itemsize(self.dtype)
        return [
            Piece("weights", 2 * weights * length, weights * size / calls, times=times),
            Piece("attention", layers * flops, layers * traffic, times=times),
        ]

    def memory(self) -> dict[str, float]:
        c, size = PAIRRM, itemsize(self.dtype)
        d = c.hidden_size
        layers = c.num_hidden_layers * (4 * d * d + 2 * d * c.intermediate_size)
        table = c.vocab_size * d
        positions = c.num_hidden_layers * 2 * 2 * c.position_buckets * d
        longest = 2048  # PairRM's own limit on three texts
        if self.kernel:  # the MLP's hidden states, the tokens' in and out, queries, keys, values
            activations = PAIRRM_TOKENS * (c.intermediate_size + 7 * d) * size
        else:  # what compilers hold of a layer's scores at a time
            scores = PAIRRM_TOKENS // longest * c.num_attention_heads * longest**2
            activations = 3.7 * 4 * scores
        return {
            "parameters": (layers + table + positions) * size,
            "activations": activations,
        }


# ------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class TrainingCost:
    """One run of stages.dpo."""

    decoder: DecoderCost
    args: dpo.Args
    lengths: Lengths
    pairs: int
    test_pairs: int
    mesh: Mesh

    @property
    def steps(self) -> int:
        return self.args.epochs * math.ceil(self.pairs / self.args.batch_size)

    @property
    def micro_batches(self) -> int:
        return math.ceil(min(self.args.batch_size, self.pairs) / self.args.micro_batch_size)

    def sequences(self, count: int) -> list[Sequence]:
        """`count` pairs of the assumed lengths, cut as stages/files/examples.py cuts them."""
        a, mean = self.args, self.lengths.answer
        asked = self.lengths.draw_prompts(count, a.max_prompt_length)
        # The longest that the sampler made; --max-length cuts below.
        said = quantiles(mean, max(a.max_length, round(4 * mean)), 2 * count).reshape(count, 2)
        said = np.minimum(said, (a.max_length - asked)[:, None])
        return [Sequence([3] * p, [[4] * c, [5] * r]) for p, (c, r) in zip(asked, said)]

    def batches(self) -> list[list[Sequence]]:
        """Micro-batches, each of about as many tokens, as stages/dpo.py makes them."""
        count = min(self.pairs, 256)
        batches = max(1, round(count / self.args.micro_batch_size))
        by_length = sorted(self.sequences(count), key=len, reverse=True)
        return [by_length[i::batches] for i in range(batches)]

    def shape(self) -> dict[str, float]:
        """Means over micro-batches: rows, tokens of a row (padded), unfolded rows and their length,
        response tokens of the longest row, and tokens that are no padding."""
        made = [pack(batch, self.mesh.batch) for batch in self.batches()]

        def mean(of):
            return float(np.mean([of(batch) for batch in made]))

        return {
            "rows": mean(lambda b: len(b["tokens"])),
            "t": mean(lambda b: b["tokens"].shape[1]),
            "u": mean(lambda b: b["unfold"].shape[1]),
            "s": mean(lambda b: b["unfold"].shape[2]),
            "responses": mean(lambda b: (b["owners"] >= 0).sum(axis=1).max()),
            "real": mean(lambda b: (b["copies"][..., 0] >= 0).sum()),
        }

    def pass_over(self, shape, times: float, backward: bool, name: str) -> list[Piece]:
        """One micro-batch: the forward pass, with the backward pass where asked."""
        d, mesh, a = self.decoder, self.mesh, self.args
        size, again = itemsize(a.dtype), a.remat == "full"
        rows = shape["rows"] / mesh.batch
        tokens, c = rows * shape["t"], d.config
        # Forward 1, the gradients 2, what is computed again 1; the chunked vocabulary product
        # always is (model/logprobs.py), and attention's weights (model/attention.py).
        layers, words = (1, 1) if not backward else (3 + again, 4)
        keys = (2 if not backward else 7 + 2 * again) / 2
        pairs = rows * shape["u"] * d.causal(round(shape["s"]))
        weights, vocabulary = d.layer_weights / mesh.tensor, d.vocabulary / mesh.tensor
        passes = 1 if not backward else 2
        traffic = (4 if not backward else 12 + 4 * again) * 4  # scores and weights, fp32
        exchanged = 2 * c.num_hidden_layers * tokens * c.hidden_size * size
        found = [
            Piece(
                f"{name}, layers",
                2 * weights * tokens * layers,
                weights * size * layers,
                gathered=passes * weights * size * mesh.others("fsdp"),
                awaited=2 * exchanged * layers * mesh.others("tensor"),
                times=times,
            ),
            Piece(
                f"{name}, attention",
                d.attention * pairs * keys / mesh.tensor,
                pairs * c.num_attention_heads * c.num_hidden_layers * traffic / mesh.tensor,
                times=times,
            ),
            Piece(
                f"{name}, vocabulary",
                2 * vocabulary * rows * shape["responses"] * words,
                vocabulary * size * words,
                gathered=passes * vocabulary * size * mesh.others("fsdp"),
                times=times,
            ),
        ]
        if backward:
            held = d.parameters / mesh.tensor
            found.append(
                Piece(
                    "gradients",
                    0,
                    12 * held / mesh.fsdp,  # read, add, write in fp32
                    gathered=held * size * mesh.others("fsdp")
                    + 2 * held * size / mesh.fsdp * mesh.others("data"),
                    times=times,
                )
            )
        return found

    def step(self, times: float = 1.0) -> list[Piece]:
        """One optimizer step."""
        shape = self.shape()
        moments = 2 if self.args.optimizer == "adamw" else 1
        held = self.decoder.parameters / (self.mesh.fsdp * self.mesh.tensor)
        # The norm reads gradients; the update reads and writes parameters and moments.
        update = Piece("update", 0, held * 4 * (2 + 2 + 2 * moments), times=times)
        whole = self.pass_over(shape, times * self.micro_batches, True, "step")
        return [*whole, update]

    def reference(self, pairs: int) -> list[Piece]:
        """Log-probs of so many pairs."""
        return self.pass_over(
            self.shape(), math.ceil(pairs / self.args.micro_batch_size), False, "reference"
        )

    def pieces(self) -> list[Piece]:
        found = self.step(self.steps) + self.reference(self.pairs)
        if self.test_pairs:  # the reference's, and before and after training
            found += 3 * self.reference(self.test_pairs)
        return found

    def model_flops(self) -> float:
        """Of a step: products with weights, forward and backward, no padding, nothing twice; as
        the metric `mfu` of stages.dpo counts."""
        tokens = responses = 0
        for sequence in self.sequences(256):
            tokens += len(sequence)
            responses += sum(map(len, sequence.responses))
        d = self.decoder
        a_pair = 6 * (d.layer_weights * tokens + d.vocabulary * responses) / 256
        return a_pair * self.args.batch_size

    def memory(self) -> dict[str, float]:
        """Bytes a chip at the longest texts that --max-length allows."""
        d, a, mesh = self.decoder, self.args, self.mesh
        size = itemsize(a.dtype)
        cut = mesh.fsdp * mesh.tensor
        each = 4 * d.parameters / cut  # fp32
        pairs = -(-a.micro_batch_size // mesh.batch)
        tokens = pairs * (2 * a.max_length - a.max_prompt_length)
        c = d.config
        s = coarse_bucket(a.max_length)
        layer = d.layer_weights / c.num_hidden_layers / mesh.tensor
        # Of one layer, as TPU compilers hold it: its products and their gradients, partly in fp32,
        # and attention's scores, weights and their gradients of both responses.
        working = 4 * d.kept(a.dtype, "none") / c.num_hidden_layers * tokens / mesh.tensor
        working += 5 * 4 * 2 * pairs * c.num_attention_heads / mesh.tensor * s * s
        vocabulary = d.vocabulary / mesh.tensor
        chunk = 3 * 512 * c.vocab_size * 4 / mesh.tensor
        gathered = 2 * layer * size if mesh.fsdp > 1 else 0
        return {
            "parameters": each,
            "moments": each * (2 if a.optimizer == "adamw" else 1),
            "gradients": each,
            # Where there are several micro-batches, the sum and the next one's gradient.
            "next gradients": each if self.micro_batches > 1 else 0.0,
            "activations": d.kept(a.dtype, a.remat) * tokens
            + max(working + gathered, vocabulary * (size + 4) + chunk),
        }
