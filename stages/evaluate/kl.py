"""How far a model is from the one that sampled. samples.jsonl + checkpoint → kl.json

python -m stages.evaluate kl --checkpoint C --samples runs/me/samples.jsonl --out kl.json
"""

import dataclasses
from collections import Counter
from functools import partial
from itertools import islice

import numpy as np
from etils import epy
from tqdm import tqdm

from model.batches import Batcher
from model.packing import Sequence
from sharding import processes
from sharding.errors import UserError, check_least
from stages.evaluate.winrates import standard_error
from stages.files.dtypes import Dtype, settle_dtype
from stages.files.output import Manifest, Output, an_input, read_begun, read_lineage
from stages.files.paths import check_distinct
from stages.files.rows import Sample, check_token_ids, field, read
from stages.files.run import STOPPED_TOGETHER, stop_signal
from stages.files.together import Elsewhere, open_output

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import jax

    from model import checkpoint, logprobs
    from model import precision as precisions
    from sharding import mesh as meshes


@dataclasses.dataclass
class Kl(processes.Flags):
    """KL(the model that sampled ‖ --checkpoint) per token and per answer, estimated from samples.

    It is the mean over the samples of their log-prob under the model that drew them, which they
    record, less the log-prob of the same tokens under --checkpoint. For samples drawn at
    temperature 1 without top-p and the like this estimates the KL divergence without bias; for
    others it is the same difference over likelier answers. Standard errors are over prompts.
    """

    checkpoint: str
    """The other model: a checkpoint folder."""
    samples: str
    """The samples.jsonl, with token_ids and logprob, as stages.sample writes them."""
    out: str
    """The JSON file to write."""
    prompts: int | None = None
    """Only this many prompts from the start of the file, for a cheap estimate. Default: all."""
    batch_size: int = 32
    """Answers in memory at a time, or those of one prompt if they are more."""
    dtype: Dtype = "auto"
    """The dtype of computation. auto: as in stages.sample; a run that goes on keeps the dtype it
    began with."""
    mesh: tuple[int, int, int] | None = None
    """Devices along data, fsdp, tensor; -1: the rest. Default: as in stages.dpo."""
    overwrite: bool = False
    """Replace --out if it exists."""


@dataclasses.dataclass
class Answered:
    """A prompt's answers as token ids, with the sampler's log-probs."""

    prompt_id: str
    sequence: Sequence  # the responses include the EOS that ended them
    logprobs: list[float]


def main(args: Kl) -> None:
    # ------------------------------------------------------------------------------ inputs
    check_flags(args)
    check_distinct({"--checkpoint": args.checkpoint}, {"--out": args.out})
    processes.start(args)
    config, tokenizer = checkpoint.open_folder(args.checkpoint)
    samples = read(args.samples, Sample)
    lineage = read_lineage(args.samples, samples.sha256)
    sampler = lineage.identities if lineage else {}
    if sampler.get("tokenizer", tokenizer.identity) != tokenizer.identity:
        raise UserError(
            f"{args.samples}: sampled with another tokenizer than {args.checkpoint}'s: its token "
            "ids mean something else there"
        )
    counts: Counter = Counter()
    prompts = []
    for row in islice(samples, args.prompts):
        counts["in"] += 1
        answered = _tokens_of(row, tokenizer, config)
        if isinstance(answered, str):
            counts[f"set aside: {answered}"] += 1
        else:
            prompts.append(answered)
    counts["out"] = len(prompts)
    if not prompts:
        raise UserError(f"{args.samples}: no answers can be used")

    # ------------------------------------------------------------------------------ output
    manifest = Manifest(
        stage="evaluate kl",
        arguments={"dtype": args.dtype, "prompts": args.prompts},
        inputs={"samples": an_input(args.samples, samples.sha256)},
        identities={
            "sampler": sampler.get("model", "unknown"),
            "model": checkpoint.identity(args.checkpoint),
        },
    )
    args = dataclasses.replace(args, dtype=settle_dtype(manifest, read_begun(args.out)))
    ids = [prompt.prompt_id for prompt in prompts]
    output, left = open_output(args.out, manifest, args.overwrite, ids)

    # ------------------------------------------------------------------------------ log-probs
    if left:
        compute(args, config, prompts, set(left), output)

    # ------------------------------------------------------------------------------ finish
    if not output.finished:
        logprobs_of = {row["prompt_id"]: row["logprobs"] for row, _ in output.rows()}
        arguments = lineage.arguments if lineage else {}
        drawn_with = {name: arguments[name] for name in PLAIN if name in arguments}
        content = estimate(prompts, [np.array(logprobs_of[p.prompt_id]) for p in prompts]) | {
            "checkpoint": args.checkpoint,
            "samples": args.samples,
            "first_prompts": args.prompts,
            "drawn_with": drawn_with,
        }
        output.finish_as(content, counts, content)
        print(
            f"KL per token {content['kl_per_token']:.4f} ± {_text(content['standard_error'])}, "
            f"per answer {content['kl_per_answer']:.3f} ± "
            f"{_text(content['standard_error_per_answer'])}"
        )
        if any(value != PLAIN[name] for name, value in drawn_with.items()):
            print("(drawn more sharply than the model itself: an estimate for likelier answers)")


def check_flags(args: Kl) -> None:
    check_least(args, batch_size=1, prompts=1)


# Settings of the sampler with which it draws from the model's own distribution.
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


def _text(error: float | None) -> str:
    return "?" if error is None else f"{error:.2g}"


def _tokens_of(row: Sample, tokenizer, config) -> Answered | str:
    """The row's token ids and log-probs, or the reason why it is set aside."""
    vocabulary = config.vocab_size
    prompt = field(row.fields, "prompt_token_ids", list, row.where)
    check_token_ids(prompt, "prompt_token_ids", row.where, vocabulary)
    responses, recorded = [], []
    for i, response in enumerate(row.responses):
        where = f"{row.where}, responses[{i}]"
        for name, kind in (("token_ids", list), ("logprob", (int, float))):
            field(row.fields["responses"][i], name, kind, where)
        response.check_ids(where, vocabulary=vocabulary)
        responses.append(response.with_end(response.token_ids, tokenizer.end_id))
        recorded.append(float(response.logprob))
    longest = max(map(len, responses), default=0)
    if not prompt or not responses or not all(responses):
        return "empty prompt or response"
    if len(prompt) + longest > config.max_position_embeddings:
        return "beyond the model's context"
    return Answered(row.prompt_id, Sequence(prompt, responses), recorded)


def compute(
    args: Kl, config, prompts: list[Answered], left: set[str], output: Output | Elsewhere
) -> None:
    """Write a row {prompt_id, logprobs} for each prompt that is `left`: log π(response | prompt) of
    its answers under --checkpoint. All prompts share the batches, so that a restart changes no bit.
    Raises UserError for NaN."""
    mesh = meshes.make_mesh(*args.mesh or meshes.training_sizes(len(meshes.list_devices()), config))
    widest = max(len(p.logprobs) for p in prompts)
    most = max(args.batch_size, widest)
    shards = meshes.batch_shards(mesh)
    batcher = Batcher(0, len(prompts), most // widest, rows="packed", shards=shards)
    precision = precisions.precision_of(args.dtype)
    with jax.set_mesh(mesh), stop_signal() as check_stop:
        check_together = processes.loop_check(check_stop, STOPPED_TOGETHER)
        params = checkpoint.load(args.checkpoint, mesh)[1]

        @partial(jax.jit, out_shardings=meshes.replicated(mesh))
        def response_logprobs(params, batch):
            return logprobs.response_logprobs(params, config, batch, most, precision)

        batches = [
            indices
            for indices in batcher.cut(prompts, range(len(prompts)))
            if any(prompts[i].prompt_id in left for i in indices)
        ]
        for indices in tqdm(batches, desc="kl", unit=" batches", disable=not processes.is_first()):
            batch = meshes.put_batch(mesh, batcher.pack(prompts, indices))
            values = response_logprobs(params, batch)
            values = np.asarray(jax.device_get(values))
            ends = np.cumsum([len(prompts[i].logprobs) for i in indices])
            if not np.isfinite(values[: ends[-1]]).all():
                raise UserError(
                    f"{args.checkpoint}: its log-probs are not finite: its weights are damaged, or "
                    f"too large for {args.dtype}"
                )
            for i, mine in zip(indices, np.split(values[: ends[-1]], ends[:-1])):
                if prompts[i].prompt_id in left:
                    output.write({"prompt_id": prompts[i].prompt_id, "logprobs": mine.tolist()})
            check_together()


def estimate(prompts: list[Answered], theirs: list[np.ndarray]) -> dict:
    """The divergence per token and per answer: ratios of means over prompts, with the standard
    errors of their residuals (Cochran 1977, 6.4). theirs: the other model's log-probs of each
    prompt's answers."""
    answers = np.array([len(p.logprobs) for p in prompts], float)
    ahead = np.array([np.sum(np.array(p.logprobs) - q) for p, q in zip(prompts, theirs)])
    tokens = np.array([sum(map(len, p.sequence.responses)) for p in prompts], float)

    def ratio(units: np.ndarray) -> tuple[float, float | None]:
        rate = ahead.sum() / units.sum()
        error = standard_error(ahead - rate * units)
        return float(rate), None if error is None else error / float(units.mean())

    per_token, token_error = ratio(tokens)
    per_answer, answer_error = ratio(answers)
    return {
        "kl_per_token": per_token,
        "standard_error": token_error,
        "kl_per_answer": per_answer,
        "standard_error_per_answer": answer_error,
        "n": int(answers.sum()),
        "prompts": len(prompts),
        "tokens": int(tokens.sum()),
    }
