"""The pieces of `scripts.bench accelerator` that need a training state: DPO steps, and a save and a
restore of it."""

import dataclasses
import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from model import checkpoint_writing, decoder, losses, packing, train
from model.precision import precision_of
from scripts.bench import measuring, shapes
from scripts.bench.machine import timed
from scripts.bench.measuring import Given, Row, Skip
from scripts.bench.shapes import Sizes
from sharding import chips
from sharding.mesh import make_mesh, put_batch, replicated


class Training:
    """A DPO training: fp32 masters and moments, products in `dtype`."""

    def __init__(
        self, config, pairs: int, dtype, mesh, load=None, learning_rate: float = 5e-7, steps=100
    ):
        """load: gives the parameters on a mesh; default: random ones."""
        self.config, self.pairs, self.mesh, self.whole = config, pairs, mesh, replicated(mesh)
        model = {"config": config, "precision": precision_of(dtype)}
        self.logprobs = jax.jit(
            partial(losses.pair_logprobs, pairs=pairs, **model), out_shardings=self.whole
        )
        loss = partial(losses.pair_loss, loss=losses.Loss(), **model)
        optimization = train.Optimization(learning_rate, "linear", 0.0, "adamw", 0.0, 1.0)
        placed = decoder.abstract(config, mesh)
        self.trainer = train.Trainer(loss, optimization, steps, placed)
        shardings = jax.tree.map(lambda x: x.sharding, placed)
        if load is None:
            self.params = jax.device_put(shapes.Random().weights(placed), shardings)
        else:
            self.params = load(mesh)
        self.state = self.trainer.init_optimizer(self.params)
        self.accumulate = self.trainer.accumulate

    def with_reference(self, batch: dict, logps: tuple, response: int = 1) -> dict:
        """The batch and all that the loss needs beside the policy's log-probs. response: tokens."""
        ones = jax.device_put(jnp.ones(self.pairs), self.whole)
        named = dict(zip(("ref_chosen", "ref_rejected"), logps))
        named |= dict.fromkeys(("chosen_tokens", "rejected_tokens"), ones * response)
        return batch | named | {"win_probability": ones, "weights": ones}

    def compile(self, batch: dict) -> None:
        """Compile `gradients` beforehand, so that the program tells of its memory."""
        count = jnp.float32(self.pairs)
        self.accumulate = self.accumulate.lower(self.params, None, batch, count).compile()

    def gradients(self, batch: dict):
        return self.accumulate(self.params, None, batch, jnp.float32(self.pairs))

    def update(self, gradients) -> None:
        norm = self.trainer.norm(gradients)
        self.params, self.state, _ = self.trainer.apply(self.params, self.state, gradients, norm)
        jax.block_until_ready((self.params, self.state))


def on_one_device(config, pairs: int) -> Training:
    return Training(config, pairs, jnp.bfloat16, make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def training_layers(sizes: Sizes, limit: int) -> int:
    """As many layers, up to all, as fit into `limit` bytes with fp32 masters, both moments and
    gradients (16 bytes per parameter), and what the backward pass keeps of each layer.

    At 7B's widths and 8,960 tokens the GPU's compiler asks for 0.83 GiB per layer and 2.1 GiB more;
    this counts 0.85 and 3, and leaves a sixteenth of the memory free.
    """
    c, tokens = sizes.model, sum(map(len, shapes.pairs(sizes)))
    one, two = (
        shapes.parameters(dataclasses.replace(c, num_hidden_layers=layers)) for layers in (1, 2)
    )
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads  # queries and outputs; k and v
    kept = 2 * tokens * (heads * c.head_dim + 3 * c.hidden_size + 2 * c.intermediate_size)
    once, per_layer = 16 * (2 * one - two) + 3 * 2**30, 16 * (two - one) + kept
    return max(1, min(c.num_hidden_layers, int((limit * 15 / 16 - once) / per_layer)))


def checkpointing(given: Given) -> Iterator[Row]:
    """One save and one restore of a training state, on the disk of temporary files (TMPDIR)."""
    layers = min(given.sizes.model.num_hidden_layers, 1 if not given.tiny else 2)
    config = dataclasses.replace(given.sizes.model, num_hidden_layers=layers)
    training = on_one_device(config, pairs=1)
    random = shapes.Random()
    moments = jax.tree.map(  # they begin at zero, which a file system may store as nothing
        lambda x: random.normal(x.shape) if x.ndim else x, training.state
    )
    state = {"params": training.params, "optimizer": jax.device_put(moments, training.whole)}
    size = shapes.nbytes(state)
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if free < 1.1 * size:
            raise Skip(f"{folder} has {free / 1e9:.1f} GB free, the state needs {size / 1e9:.1f}")
        jax.block_until_ready(state)
        begun = time.perf_counter()
        finish = checkpoint_writing.save_state(f"{folder}/state", state)
        held = time.perf_counter() - begun
        finish()
        saving = time.perf_counter() - begun
        yield {
            "name": "save",
            "gb_per_second": size / saving / 1e9,
            "state_bytes": size,
            "seconds_until_training_goes_on": held,
        }
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        seconds, loaded = timed(
            lambda: jax.block_until_ready(
                checkpoint_writing.load_state(f"{folder}/state", abstract)
            )
        )
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), state, loaded)
    yield {
        "name": "restore (from the page cache)",
        "gb_per_second": size / seconds / 1e9,
        "equal": all(jax.tree.leaves(same)),
    }


def dpo(given: Given) -> Iterator[Row]:
    """Steps of DPO on packed pairs; fewer layers where the first try finds no memory."""
    layers = given.sizes.training_layers or training_layers(given.sizes, measuring.memory_limit())
    while True:
        try:
            return (yield from _dpo_steps(given, layers))
        except jax.errors.JaxRuntimeError as error:
            if not measuring.out_of_memory(error) or layers == 1 or given.sizes.training_layers:
                raise
            failed = measuring.reason(error)
        gc.collect()
        yield {"name": f"{layers} layers", "failed": failed}
        layers = layers * 3 // 4


def _dpo_steps(given: Given, layers: int) -> Iterator[Row]:
    sizes = given.sizes
    config = dataclasses.replace(sizes.model, num_hidden_layers=layers)
    sequences = shapes.pairs(sizes)
    count = len(sequences)
    training = on_one_device(config, count)
    packed = packing.pack(sequences)
    parts = {"reference": [], "gradients": [], "update": []}

    def timed_part(part, run, *args):
        seconds, made = timed(lambda: jax.block_until_ready(run(*args)))
        parts[part].append(seconds)
        return made

    def step():
        logps = timed_part("reference", training.logprobs, training.params, tokens)
        batch = training.with_reference(tokens, logps, sizes.length - sizes.prompt)
        gradients, values = timed_part("gradients", training.gradients, batch)
        timed_part("update", training.update, gradients)
        return values["loss"]

    with jax.set_mesh(training.mesh):
        tokens = put_batch(training.mesh, packed)
        begun = time.perf_counter()
        logps = training.logprobs(training.params, tokens)
        training.compile(training.with_reference(tokens, logps))
        compiling = time.perf_counter() - begun
        losses_p = [step(), step()]  # they compile the rest, and warm up
        for took in parts.values():
            took.clear()
        begun = time.perf_counter()
        while len(parts["update"]) < 2 or (
            len(parts["update"]) < 7 and time.perf_counter() - begun < min(15, given.left())
        ):
            step()
    seconds = {part: statistics.median(took) for part, took in parts.items()}
    memory = training.accumulate.memory_analysis()
    # While gradients are computed, the moments lie beside the program's own memory.
    compiled = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
        + shapes.nbytes(training.state)
    )
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    yield {
        "name": f"{layers} layers",
        "pairs": count,
        "tokens": sum(map(len, sequences)),
        "padded_tokens": int(packed["tokens"].size),
        "ms_gradients": 1e3 * seconds["gradients"],
        "ms_update": 1e3 * seconds["update"],
        "ms_reference": 1e3 * seconds["reference"],
        **speed(given, config, sequences, seconds),
        "peak_bytes": peak,
        "memory_analysis_bytes": compiled,
        "temporary_bytes": memory.temp_size_in_bytes,
        "seconds_to_compile": compiling,
        "first_loss": float(jnp.mean(losses_p[0])),
    }


def speed(given: Given, config, sequences, seconds: dict[str, float]) -> dict:
    """Shares of the peak, and pairs per second of the whole model: what a step computes is scaled
    by operations, the update by parameters.

    A step's operations are three forward passes' (forward, and twice that backward): products with
    weights, attention and the vocabulary. What rematerialisation repeats is not counted.
    """
    whole = given.sizes.model
    forward = shapes.pairs_operations(config, sequences)
    longer = shapes.pairs_operations(whole, sequences) / forward
    larger = shapes.parameters(whole) / shapes.parameters(config)
    step = seconds["gradients"] * longer + seconds["update"] * larger
    chip = chips.of_kind(jax.devices()[0].device_kind)
    peak = chip.bf16 if chip else given.rate("bfloat16")
    return {
        "operations": 3 * forward,
        "reference_operations": forward,
        "mfu": 3 * forward / (seconds["gradients"] + seconds["update"]) / peak,
        "mfu_gradients": 3 * forward / seconds["gradients"] / peak,
        "mfu_reference": forward / seconds["reference"] / peak,
        "mfu_of": "the data sheet's peak" if chip else "the measured product rate",
        f"pairs_per_second_at_{whole.num_hidden_layers}_layers": len(sequences) / step,
        "pairs_per_second_with_reference": len(sequences) / (step + seconds["reference"] * longer),
    }
