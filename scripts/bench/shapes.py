"""What `scripts.bench accelerator` measures with: sizes, random weights made on the device, and how
many operations and bytes a piece of work takes.

Axis letters as in model/decoder.py and model/rankers/deberta.py.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from model import decoder
from model.config import DecoderConfig
from model.packing import Sequence
from model.rankers import deberta
from model.rankers.deberta import DebertaConfig

MISTRAL_7B = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    max_position_embeddings=32768,
    torch_dtype="bfloat16",
)
PAIRRM = DebertaConfig(
    vocab_size=128100,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    layer_norm_eps=1e-7,
    position_buckets=256,
    max_relative_positions=512,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    model: DecoderConfig = MISTRAL_7B
    training_layers: int | None = None  # None: as many as fit
    slots: tuple[int, ...] = (16, 64, 256)
    length: int = 1024  # positions of the cache; also tokens of a prompt with its response
    prompt: int = 256  # tokens of a pair's prompt
    prefill: tuple[int, ...] = (512, 2048)  # tokens of a row of prompts
    tokens: int = 8192  # of a training step, at least
    encoder: DebertaConfig = PAIRRM
    comparisons: int = 8  # of a call of PairRM
    compared: int = 1143  # tokens of a comparison
    copied: int = 2**27  # fp32 numbers of each array that is copied
    product: int = 8192  # rows and columns of the matrices that are multiplied
    generate: int = 64  # answers of transformers' generate


TINY = Sizes(
    model=dataclasses.replace(
        MISTRAL_7B,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
    training_layers=2,
    slots=(4,),
    length=64,
    prompt=16,
    prefill=(64,),
    tokens=256,
    encoder=dataclasses.replace(
        PAIRRM,
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        position_buckets=16,
        max_relative_positions=48,
    ),
    comparisons=2,
    compared=100,
    copied=2**16,
    product=128,
    generate=2,
)


def sizes(
    tiny: bool = False,
    layers: int | None = None,
    slots: list[int] | None = None,
    tokens: int | None = None,
    comparisons: int | None = None,
) -> Sizes:
    """The sizes that these flags ask for; None: as they are."""
    found = TINY if tiny else Sizes()
    if layers:
        model = dataclasses.replace(found.model, num_hidden_layers=layers)
        found = dataclasses.replace(found, model=model, training_layers=layers)
    given = {"slots": slots and tuple(slots), "tokens": tokens, "comparisons": comparisons}
    return dataclasses.replace(found, **{name: x for name, x in given.items() if x})


# ------------------------------------------------------------------------------- arrays


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key, shape, dtype, scale):
    # Drawn by the device's own generator: threefry would take most of a minute on a CPU.
    return (scale * jax.random.normal(key, shape)).astype(dtype)


class Random:
    """Random arrays, made on the device, another one at each call."""

    def __init__(self):
        self.key, self.count = jax.random.key(0, impl="rbg"), 0

    def normal(self, shape, dtype=jnp.float32, scale: float = 1.0) -> jax.Array:
        self.count += 1
        key = jax.random.fold_in(self.key, self.count)
        return _normal(key, tuple(shape), jnp.dtype(dtype), scale)

    def weights(self, shapes, dtype=jnp.float32):
        """A tree of weights: norms at one, the rest normal with a deviation of 0.02."""

        def one(path, x):
            if path[-1].key.endswith("norm"):
                return jnp.ones(x.shape, dtype)
            return self.normal(x.shape, dtype, 0.02)

        return jax.tree_util.tree_map_with_path(one, shapes)


def unstacked(config: DecoderConfig) -> decoder.Params:
    """The shapes of the parameters, as `kv_cache.unstack_layers` leaves them."""
    shapes = decoder.abstract(config)
    layer = jax.tree.map(lambda x: x.update(shape=x.shape[1:]), shapes["layers"])
    return shapes | {"layers": [layer] * config.num_hidden_layers}


def encoder(config: DebertaConfig) -> deberta.Params:
    """The shapes of an encoder's parameters, as `deberta.prepare` takes them."""
    shapes: dict = {"layers": [{} for _ in range(config.num_hidden_layers)]}
    for path, _, axes in deberta.TABLE.values():
        shape = tuple(config.axis_sizes[axis] for axis in axes.split())
        name, of_layer = path.split("/")[-1], path.startswith("layers/")
        for parent in shapes["layers"] if of_layer else [shapes]:
            parent[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return shapes


def pairs(sizes: Sizes) -> list[Sequence]:
    """So many pairs that a step has at least `sizes.tokens` tokens, padding not counted. Each text,
    a prompt with a response, has `sizes.length` tokens."""
    numbers, response = np.random.default_rng(0), sizes.length - sizes.prompt
    count = -(-sizes.tokens // (sizes.prompt + 2 * response))

    def drawn(length):
        return numbers.integers(3, sizes.model.vocab_size, length)

    return [Sequence(drawn(sizes.prompt), [drawn(response), drawn(response)]) for _ in range(count)]


# -------------------------------------------------------------------- operations and bytes


def layer_weights(c: DecoderConfig) -> int:
    """Weights of one layer's matrices."""
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads  # q, o, k, v
    return c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)


def parameters(c: DecoderConfig) -> int:
    return sum(x.size for x in jax.tree.leaves(decoder.abstract(c)))


def forward_operations(c: DecoderConfig, tokens: int, texts: list[int], words: int = 0) -> int:
    """Floating-point operations of a forward pass, a multiplication and an addition counted as two:
    products with the layers' weights over `tokens` tokens, attention of causal texts of these
    lengths, and the vocabulary product for `words` tokens. Norms and softmax are not counted."""
    attended = sum(length * (length + 1) // 2 for length in texts)
    attention = 4 * c.num_attention_heads * c.head_dim * attended  # scores, and weights · values
    layers = c.num_hidden_layers * (2 * layer_weights(c) * tokens + attention)
    return layers + 2 * c.hidden_size * c.vocab_size * words


def pairs_operations(c: DecoderConfig, sequences: list[Sequence]) -> int:
    """The operations of a forward pass over pairs. The responses share their prompt's products."""
    texts = [len(s.prompt) + len(r) for s in sequences for r in s.responses]
    words = sum(len(r) for s in sequences for r in s.responses)
    return forward_operations(c, sum(map(len, sequences)), texts, words)


def layer_operations(c: DebertaConfig, tokens: int, queries: int) -> int:
    """The operations of one encoder layer that is needed at `queries` of its tokens: products with
    the weights, content to content, content to position both ways, and weights · values."""
    d, rows = c.hidden_size, min(c.axis_sizes["p"], 2 * tokens - 1)
    products = queries * (2 * d * d + 2 * d * c.intermediate_size) + tokens * 2 * d * d
    attention = d * (2 * queries * tokens + (queries + tokens) * rows)
    return 2 * (products + attention)


def comparison_operations(c: DebertaConfig, tokens: int) -> int:
    """The operations of one comparison, the last layer counted whole."""
    return c.num_hidden_layers * layer_operations(c, tokens, tokens)


def nbytes(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))
