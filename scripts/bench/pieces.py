"""The pieces of `scripts.bench accelerator`: generators of rows, each a name and figures.

A piece runs in the worker process. It looks at its clock between steps: one that does not fit any
more is left out and named.
"""

import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from model import generate, kv_cache, packing, slot_state
from model.precision import precision_of
from model.prompt_rows import PREFILL_TOKENS
from model.rankers import deberta, deberta_tpu
from scripts.bench import kernel_profile, measuring, shapes
from scripts.bench.machine import timed
from scripts.bench.measuring import Given, Row, Skip
from scripts.bench.shapes import Sizes
from scripts.bench.training_pieces import checkpointing, dpo
from sharding import chips

SAMPLING = generate.Sampling(temperature=0.7, top_p=0.9)


# --------------------------------------------------------------------------------- rates


def rates(given: Given) -> Iterator[Row]:
    chip = chips.of_kind(jax.devices()[0].device_kind)
    copied = given.rate("copy")
    yield {"name": "copy", "gb_per_second": copied / 1e9} | (
        {"share_of_data_sheet": copied / chip.read} if chip else {}
    )
    for name, dtype, out, peak in (
        ("bfloat16", jnp.bfloat16, None, chip and chip.bf16),
        ("bfloat16 to float32", jnp.bfloat16, jnp.float32, chip and chip.bf16),
        ("float32", jnp.float32, None, chip and chip.fp32),
    ):
        rate = given.rates[name] = measuring.product_rate(given, dtype, out)
        yield {"name": f"product, {name}", "tflop_per_second": rate / 1e12} | (
            {"share_of_data_sheet": rate / peak} if peak else {}
        )


# -------------------------------------------------------------------------------- decoder


def decode(given: Given) -> Iterator[Row]:
    """Steps of the sampling engine over a nearly full cache."""
    sizes, config = given.sizes, given.sizes.model
    copy, limit = given.rate("copy"), measuring.memory_limit()
    weights_bytes = 2 * shapes.parameters(config)
    slot_bytes = kv_cache.cache_bytes(config, sizes.length, jnp.bfloat16)
    needed = weights_bytes + sizes.slots[0] * slot_bytes
    if needed > limit:
        raise Skip(f"{needed / 1e9:.1f} GB do not fit into {limit / 1e9:.1f}: pass --layers")
    params = shapes.Random().weights(shapes.unstacked(config), jnp.bfloat16)
    # A step looks up a few rows of the embedding and reads every other weight.
    read_bytes = shapes.nbytes(params) - params["embed"].nbytes
    took = 0.0
    for slots in sizes.slots:
        name, begun = f"{slots} slots", time.monotonic()
        if weights_bytes + slots * slot_bytes > limit:
            yield {"name": name, "left_out": "it does not fit into the device's memory"}
        elif given.left() < took:
            yield {"name": name, "left_out": "no time"}
        else:
            profile = slots == sizes.slots[len(sizes.slots) // 2]
            try:
                yield from _decode_steps(given, params, slots, read_bytes, copy, profile)
            except jax.errors.JaxRuntimeError as error:
                if not measuring.out_of_memory(error):
                    raise
                yield {"name": name, "failed": measuring.reason(error)}
            took = time.monotonic() - begun


def _decode_steps(given: Given, params, slots, read_bytes, copy, profile: bool) -> Iterator[Row]:
    sizes, config, steps = given.sizes, given.sizes.model, slot_state.STEPS_PER_CALL
    call = measuring.DecodeCall(config, params, SAMPLING, slots, sizes.length, jnp.bfloat16)
    took = [call()]  # the first one warms up
    while len(took) < 6 and given.left() > 2 * steps * took[-1]:
        took.append(call())
    if call.steps != steps:
        raise RuntimeError(f"{call.steps} tokens were drawn in a call, not {steps}")
    step = statistics.median(took[1:] or took)
    # Positions from length - steps on, and one more at each step.
    live = slots * kv_cache.cache_bytes(config, 1, jnp.bfloat16) * (sizes.length - (steps - 1) / 2)
    memory = call.program.memory_analysis()
    yield {
        "name": f"{slots} slots",
        "ms_per_step": 1e3 * step,
        "tokens_per_second": slots / step,
        "share_of_limit": (read_bytes + live) / copy / step,
        "weights_bytes": read_bytes,
        "live_cache_bytes": int(live),
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "seconds_to_compile": call.compiling,
    }
    if profile:
        with tempfile.TemporaryDirectory() as folder:
            try:
                kernel_profile.profiled(call, folder)
                scope_of = kernel_profile.scopes(call.program.as_text())
                kernels = kernel_profile.largest(folder, scope_of, steps)
                yield {"name": f"kernels of a step of {slots} slots", "kernels": kernels}
            except Exception as error:  # a profile is no reason to lose what follows
                yield {
                    "name": f"kernels of a step of {slots} slots",
                    "failed": measuring.reason(error),
                }


def prefill(given: Given) -> Iterator[Row]:
    """Rows of prompts, as the sampling engine packs them: several short prompts, one long one."""
    config, bf16 = given.sizes.model, given.rate("bfloat16")
    params = shapes.Random().weights(shapes.unstacked(config), jnp.bfloat16)
    run = partial(slot_state.WHOLE[0], config=config, precision=precision_of(jnp.bfloat16))
    for tokens in given.sizes.prefill:
        count = 4 if tokens <= PREFILL_TOKENS else 1
        length = tokens // count
        row = {
            "tokens": np.random.default_rng(0).integers(3, config.vocab_size, (1, tokens)),
            "positions": np.tile(np.arange(length), count)[None],
            "prompts": np.repeat(np.arange(1, count + 1), length)[None],
        }
        row = {name: x.astype(np.int32) for name, x in row.items()}
        seconds = given.seconds(partial(run, params, row, np.arange(1, count + 1) * length - 1))
        operations = shapes.forward_operations(config, tokens, [length] * count)
        yield {
            "name": f"{tokens} tokens, {count} prompts",
            "ms": 1e3 * seconds,
            "tokens_per_second": tokens / seconds,
            "share_of_product_rate": operations / seconds / bf16,
        }


# -------------------------------------------------------------------------------- rankers


def pairrm(given: Given) -> Iterator[Row]:
    """PairRM's encoder at its three markers; its head, two small products, is left out."""
    sizes, config = given.sizes, given.sizes.encoder
    kernel = deberta_tpu.runs_on(jax.devices()[0].device_kind)
    b, t = sizes.comparisons, packing.bucket(sizes.compared, deberta_tpu.BLOCK if kernel else 32)
    numbers = np.random.default_rng(0)
    tokens_bt = jnp.asarray(numbers.integers(3, config.vocab_size, (b, t)), jnp.int32)
    lengths_b = jnp.full(b, sizes.compared, jnp.int32)
    markers_br = jnp.tile(jnp.array([1, sizes.compared // 3, sizes.compared // 2]), (b, 1))
    operations = b * shapes.comparison_operations(config, sizes.compared)
    took = 0.0
    for name, dtype in (("bfloat16", jnp.bfloat16), ("float32", jnp.float32)):
        if given.left() < took:
            yield {"name": name, "left_out": "no time"}
            continue
        begun, rate = time.monotonic(), given.rate(name)
        params = shapes.Random().weights(shapes.encoder(config))
        params = deberta.prepare(params, config, precision_of(dtype))

        def run(params=params):
            return deberta.encode(params, config, tokens_bt, lengths_b, markers_br, kernel)

        compiling, finite = timed(lambda run=run: bool(jnp.isfinite(run()).all()))
        seconds = given.seconds(run)
        yield {
            "name": f"{name}, {sizes.compared} tokens, {b} at a time",
            "comparisons_per_second": b / seconds,
            "share_of_product_rate": operations / seconds / rate,
            "operations": operations,
            "finite": finite,
            "seconds_to_compile": compiling - seconds,
        }
        took = time.monotonic() - begun


# ------------------------------------------------------------------------------ kernels


def _disentangled_attention(sizes: Sizes):
    b, t, c = sizes.comparisons, packing.bucket(sizes.compared, deberta_tpu.BLOCK), sizes.encoder
    n, h, p = c.num_attention_heads, c.head_dim, c.axis_sizes["p"]
    random, by_distance = shapes.Random(), deberta.relative_rows(c, t)
    all_shapes = (n, b, t, h), (n, b, h, t), (n, b, t, h), (n, h, p), (n, p, h)
    arrays = [random.normal(shape, jnp.bfloat16) for shape in all_shapes]
    real_bs = jnp.broadcast_to(jnp.arange(t) < sizes.compared, (b, t))
    rows_bts = jnp.asarray(by_distance)[t - 1 + jnp.arange(t)[:, None] - jnp.arange(t)][None]
    return (
        jax.jit(lambda *a: deberta.attention(*a[:5], rows_bts, a[5])),
        jax.jit(lambda *a: deberta_tpu.attention(*a[:5], by_distance, a[5])),
        (*arrays, real_bs),
    )


# Name → (whether it runs on a kind of device, make(sizes) → (plain form, kernel, their arguments)).
KERNELS: dict[str, tuple[Callable[[str], bool], Callable[[Sizes], tuple]]] = {
    "PairRM's attention (deberta_tpu.py)": (deberta_tpu.runs_on, _disentangled_attention),
}


def kernels(given: Given) -> Iterator[Row]:
    """Each fused kernel that runs on this device against the plain form: values and time."""
    kind = jax.devices()[0].device_kind
    here = {name: make for name, (runs_on, make) in KERNELS.items() if runs_on(kind)}
    if not here:
        yield {"name": "none for this device"}
    for name, make in here.items():
        plain, fused, arrays = make(given.sizes)
        wanted, got = (f(*arrays).astype(jnp.float32) for f in (plain, fused))
        plain_seconds, fused_seconds = (given.seconds(partial(f, *arrays)) for f in (plain, fused))
        yield {
            "name": name,
            "ms_plain": 1e3 * plain_seconds,
            "ms_fused": 1e3 * fused_seconds,
            "times_as_fast": plain_seconds / fused_seconds,
            "relative_difference": float(
                jnp.linalg.norm((got - wanted).ravel()) / jnp.linalg.norm(wanted.ravel())
            ),
            "largest_difference": float(jnp.max(jnp.abs(got - wanted))),
        }


# --------------------------------------------------------------------------- transformers


def transformers_generate(given: Given) -> Iterator[Row]:
    """Hugging Face's generate over as many positions as `decode` looks at."""
    try:
        import torch  # optional, and it takes seconds
        from transformers import AutoModelForCausalLM, MistralConfig
    except ImportError as error:
        raise Skip(f"package {error.name} is not installed") from None
    if not torch.cuda.is_available() and not given.tiny:
        raise Skip("torch sees no GPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    c, answers, steps = given.sizes.model, given.sizes.generate, slot_state.STEPS_PER_CALL
    names = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim rms_norm_eps max_position_embeddings"""
    config = MistralConfig(
        sliding_window=None, **{name: getattr(c, name) for name in names.split()}
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
        prompt = torch.randint(3, c.vocab_size, (answers, given.sizes.length - steps))
    model.generation_config.eos_token_id = None  # no answer ends early

    def seconds(new_tokens: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            made = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=SAMPLING.temperature,
                top_p=SAMPLING.top_p,
                top_k=0,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        if device.type == "cuda":
            torch.cuda.synchronize()
        if made.shape[1] != prompt.shape[1] + new_tokens:
            raise RuntimeError(f"generate drew {made.shape[1] - prompt.shape[1]} tokens")
        return time.perf_counter() - start

    seconds(2)  # warms up
    first, all_steps = seconds(1), seconds(1 + steps)
    if given.left() > first + all_steps:
        first, all_steps = min(first, seconds(1)), min(all_steps, seconds(1 + steps))
    step = (all_steps - first) / steps
    yield {
        "name": f"generate, batch {answers}",
        "ms_per_step": 1e3 * step,
        "tokens_per_second": answers / step,
        "ms_prefill": 1e3 * first,
        "prefill_tokens_per_second": prompt.numel() / first,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


PIECES = {
    "rates": rates,
    "kernels": kernels,
    "prefill": prefill,
    "pairrm": pairrm,
    "decode": decode,
    "checkpoint": checkpointing,
    "dpo": dpo,
    "transformers": transformers_generate,
}
