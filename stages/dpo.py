"""Train on pairs with DPO against a frozen reference. checkpoint + pairs.jsonl → checkpoint

    python -m stages.dpo --checkpoint C --pairs pairs.jsonl --out C2 --beta 0.1 --learning-rate 5e-7

The reference's log-probs are computed once, before training, by the function that training uses.
They are kept beside the pairs, in PAIRS.reference/, so that another training on the same pairs,
e.g. with another beta or loss, does not compute them again. Then the reference's parameters are
freed. The policy's parameters are fp32 whatever the dtype of computation.

OUT is a checkpoint folder. OUT.log/ holds metrics.jsonl (TRL's names), TensorBoard events and the
pairs that were set aside. OUT.work/ holds what a stopped run needs to go on, and is removed when
the training is done.

A model too large for the devices of one host spans several: run the same command on each, with
--coordinator HOST:PORT --processes 4 and --process-id 0 to 3, on a file system that all of them
see. Each process writes its shards, process 0 writes everything else.
"""

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from etils import epy

from sharding import processes
from sharding.errors import UserError, check_least
from stages.files.dtypes import Dtype, dtypes_of, settle_dtype
from stages.files.output import Manifest, an_input, counts_line, read_lineage
from stages.files.paths import check_distinct, normalised
from stages.files.provenance import provenance
from stages.files.rows import RowFile
from stages.files.run import STOPPED_TOGETHER, run_main, stop_signal

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import jax

    from model import batches, checkpoint, checkpoint_writing, decoder, gates, logprobs, losses
    from model import precision as precisions
    from model import train as training
    from sharding import mesh as meshes
    from sharding import table
    from stages.files import examples as reading
    from stages.files import loop
    from stages.files import work as working


@dataclasses.dataclass
class Args(processes.Flags):
    checkpoint: str
    """The policy's start: a checkpoint folder."""
    pairs: str
    """pairs.jsonl, as stages.pairs writes it, or a file of your own with the same fields."""
    out: str
    """The trained checkpoint: a folder that does not exist yet."""
    reference: str | None = None
    """The frozen reference: a checkpoint folder. Default: --checkpoint."""
    test_pairs: str | None = None
    """Pairs to evaluate on before and after the training."""
    loss: Literal["sigmoid", "robust", "ipo", "hinge", "sppo", "sigmoid_norm", "simpo"] = "sigmoid"
    """sigmoid is DPO; sigmoid_norm normalises it by length; simpo needs no reference.
    model/losses.py has the formulas and papers."""
    beta: float = 0.1
    """β: how strongly the policy is tied to the reference."""
    label_smoothing: float = 0.0
    """The share of pairs assumed to be in the wrong order, for sigmoid and robust."""
    gamma: float = 0.0
    """SimPO's target margin."""
    nll_weight: float = 0.0
    """The weight of the chosen response's negative log-likelihood per token, added to the loss."""
    learning_rate: float = 5e-7
    """The learning rate at its peak."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = 0.1
    """The share of all steps over which the learning rate rises from 0."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """RMSprop keeps half as much state as AdamW."""
    weight_decay: float = 0.0
    """Weight decay of the matrices; norms have none."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    epochs: int = 1
    """How often each pair is trained on."""
    batch_size: int = 64
    """Pairs per optimizer step."""
    micro_batch_size: int = 4
    """Pairs in memory at a time; their gradients are summed in fp32. May change when a run goes
    on: lower it when memory runs out."""
    max_length: int = 1024
    """Tokens of prompt and response together. A longer response loses its end."""
    max_prompt_length: int = 512
    """Tokens of a prompt. A longer one loses tokens behind the template's head."""
    seed: int = 0
    """Seed of the order of the pairs."""
    dtype: Dtype = "auto"
    """The dtype of computation. auto: bfloat16 on accelerators, and on CPUs that multiply in it
    (amx_bf16 or avx512_bf16), else float32; a run that goes on keeps the dtype it began with.
    Parameters are always float32."""
    remat: Literal["none", "full"] = "none"
    """What the backward pass computes again instead of keeping it: elementwise results only, or all
    but each layer's input (a fifth of the memory, a quarter slower). May change when a run goes
    on."""
    rows: Literal["packed", "pairs", "responses"] = "packed"
    """What a row of a batch holds: all pairs that one device gets of a micro-batch, one pair, or
    one response after its own prompt. Packed is the fastest by far; the numbers are the same."""
    mesh: tuple[int, int, int] | None = None
    """Devices along data, fsdp, tensor; -1: the rest. Default: all along fsdp, as far as the
    model's width divides, the rest along data."""
    shardings: bool = False
    """Print a table of what lies where: shapes, cuts, bytes per device."""
    save_every: int = 100
    """Steps between two saves of the training state; 0: save only when stopped by a signal."""
    keep_states: int = 1
    """How many saved states are kept until the training is done."""
    eval_every: int = 0
    """Steps between two evaluations on --test-pairs; 0: only before and after."""
    allow_other_model: bool = False
    """Accept pairs that were sampled by another model than the reference."""


# Flags that do not change the result, only where, how fast or whether it is computed: they may
# change when a stopped run goes on. Paths are among them: the files' contents are compared.
MAY_CHANGE = {
    *("checkpoint", "reference", "pairs", "test_pairs", "out", "allow_other_model"),
    *("micro_batch_size", "remat", "rows", "mesh", "shardings"),
    *("save_every", "keep_states", "eval_every", "coordinator", "processes", "process_id"),
}


def main(args: Args) -> None:
    begun = time.monotonic()

    # ----------------------------------------------------------------------------- inputs
    args, loss, optimization = checked(args)
    processes.start(args)
    reference = args.reference or args.checkpoint
    config, tokenizer = checkpoint.open_folder(args.checkpoint)
    of_reference = checkpoint.load_config(reference)
    if dataclasses.replace(of_reference, eos_token_ids=config.eos_token_ids) != config:
        raise UserError(f"--reference {reference} is of another architecture than --checkpoint")
    identities = {
        "model": checkpoint.identity(args.checkpoint),
        "reference": checkpoint.identity(reference),
        "tokenizer": tokenizer.identity,
        "chat_template": tokenizer.template_identity,
    }
    starts_at_reference = identities["model"] == identities["reference"]
    print(f"reference: {reference} ({identities['reference'][:12]})")
    examples, files, aside = {"pairs": [], "test_pairs": []}, {}, []
    for role in examples:
        if path := getattr(args, role):
            limits = config.vocab_size, args.max_length, args.max_prompt_length
            examples[role], files[role] = reading.read_pairs(path, tokenizer, *limits, aside)
            print(f"{path}: {counts_line(files[role].counts)}")
    check_examples(args, examples, files)
    train, test = examples.values()
    on_policy = [check_lineage(file, identities, args) for file in files.values()]

    manifest = manifest_of(args, files, identities)
    dtype = settle_dtype(manifest, working.read_begun(args.out, manifest))
    args = dataclasses.replace(args, dtype=dtype)
    if not processes.agree(json.dumps(manifest.key())):
        raise UserError("the processes were given different pairs or checkpoints")
    if working.is_finished(args.out, manifest):
        print(f"{args.out} is finished already")
        return
    # For the model card. Read now, since these files may be gone when the training ends.
    made_of = provenance(args.pairs, files["pairs"].sha256)
    known = {"parent": checkpoint.read_manifest(args.checkpoint), "data": made_of}

    # ------------------------------------------------------------ mesh, model, optimizer
    mesh = meshes.make_mesh(*args.mesh or meshes.training_sizes(len(meshes.list_devices()), config))
    shapes = decoder.abstract(config, mesh)
    batcher = batches.Batcher(
        args.seed, args.batch_size, args.micro_batch_size, args.rows, meshes.batch_shards(mesh)
    )
    total_steps = args.epochs * batcher.steps_per_epoch(train)
    model = {"config": config, "precision": precisions.precision_of(args.dtype)}
    pair_loss = partial(losses.pair_loss, loss=loss, **model, remat=args.remat)
    trainer = training.Trainer(pair_loss, optimization, total_steps, shapes)
    pair_logprobs = jax.jit(
        partial(losses.pair_logprobs, **model, pairs=args.micro_batch_size),
        out_shardings=meshes.replicated(mesh),
    )
    longest = batcher.pack(train, batcher.cut(train, range(len(train)))[0])
    tell = table.table if args.shardings else table.summary
    print(tell(mesh, training.arrays_held(optimization, shapes, longest)))

    def logprobs_of(params, role: str, *title_and_check) -> np.ndarray:
        """The summed log-probs of every pair's chosen and rejected response, fp32 [pairs, 2]."""
        compute = partial(pair_logprobs, params)
        return training.for_each(compute, mesh, batcher, examples[role], *title_and_check)

    with (
        jax.set_mesh(mesh),
        stop_signal() as check_stop,
        working.open_work(args.out, manifest, total_steps, args.keep_states, aside) as work,
    ):
        # ------------------------------------------------------------ reference log-probs
        params = None  # the reference's, loaded only if its log-probs are not kept already
        check_together = processes.loop_check(check_stop, STOPPED_TOGETHER)

        def compute(role: str) -> np.ndarray:
            nonlocal params
            params = checkpoint.load(reference, mesh)[1] if params is None else params
            return logprobs_of(params, role, f"reference, {role}", check_together)

        reference_p2 = {role: np.zeros((len(e), 2), np.float32) for role, e in examples.items()}
        if loss.needs_reference:
            reference_p2 |= reference_logprobs(args, manifest, work, examples, compute)
            if all(on_policy):
                computed_in = args.dtype, dtypes_of(made_of, "sample")
                manifest.results |= gates.check_sampler(
                    args.pairs, train, reference_p2["pairs"], *computed_in
                )
        if not starts_at_reference:
            params = None  # frees the reference's memory

        def sides_of(role: str, indices: np.ndarray) -> dict[str, np.ndarray]:
            return reading.sides([examples[role][i] for i in indices], reference_p2[role][indices])

        # ----------------------------------------------------------------- start or resume
        processes.all_check(check_stop, STOPPED_TOGETHER)
        if saved := work.load_state({"params": shapes, "optimizer": trainer.optimizer_state}):
            step, state = saved
            print(f"{work.folder}: going on after step {step} of {total_steps}")
        else:
            params = checkpoint.load(args.checkpoint, mesh)[1] if params is None else params
            step, state = 0, {"params": params, "optimizer": trainer.init_optimizer(params)}
        del params  # donated at the first step

        # ---------------------------------------------------------------------------- loop
        def metrics(step: int, values: dict[str, np.ndarray]) -> dict[str, float]:
            means = losses.metrics(values)
            if step == 0 and starts_at_reference and args.loss == "sigmoid" and not args.nll_weight:
                gates.check_ln_2(means["loss"], args.dtype, args.beta, len(values["loss"]))
            return means

        def evaluate(params) -> dict[str, float]:
            policy_p2 = logprobs_of(params, "test_pairs", "eval")
            pairs = losses.Pairs(*policy_p2.T, **sides_of("test_pairs", np.arange(len(test))))
            values = jax.device_get(losses.pair_values(loss, pairs))
            return {f"eval_{name}": x for name, x in losses.metrics(values).items()}

        if step == 0 and test:
            work.log(0, evaluate(state["params"]))
        loop_begun = time.monotonic()
        state = loop.train(
            trainer,
            work,
            step,
            state,
            batches_of=partial(batcher.of_step, train, partial(sides_of, "pairs")),
            metrics=metrics,
            evaluate=evaluate,
            check_stop=check_stop,
            steps_per_epoch=batcher.steps_per_epoch(train),
            eval_every=args.eval_every if test else 0,
            save_every=args.save_every,
        )

        # -------------------------------------------------------------------------- finish
        manifest.results["steps"] = total_steps
        manifest.results["train_seconds"] = round(time.monotonic() - loop_begun, 1)
        del state["optimizer"]
        gates.check_parameters(float(trainer.norm(state["params"])))
        if test:
            after = evaluate(state["params"])
            work.log(total_steps, after)
            manifest.results |= after
        manifest.seconds = round(time.monotonic() - begun, 1)
        known["origin"] = dataclasses.asdict(manifest)
        identity = checkpoint_writing.save(
            args.out, config, state["params"], args.checkpoint, **known
        )
        work.done()
    print(f"{args.out}: trained {total_steps} steps, identity {identity[:12]}")


# ------------------------------------------------------------------- refusals and checks


def checked(args: Args) -> "tuple[Args, losses.Loss, training.Optimization]":
    """(the flags with normalised paths, the loss, the optimizer's settings). Raises UserError for a
    flag that makes no sense."""
    check_least(args, epochs=1, batch_size=1, micro_batch_size=1)
    check_least(args, save_every=0, keep_states=1, eval_every=0)
    for name, ok, rule in (
        ("learning_rate", 0 < args.learning_rate < math.inf, "above 0"),
        ("warmup_ratio", 0 <= args.warmup_ratio <= 1, "between 0 and 1"),
        ("weight_decay", 0 <= args.weight_decay < math.inf, "at least 0"),
        ("max_grad_norm", args.max_grad_norm > 0, "above 0"),
        ("max_prompt_length", 1 <= args.max_prompt_length < args.max_length, "below --max-length"),
    ):
        if not ok:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {getattr(args, name)}: it must be {rule}")
    args = dataclasses.replace(args, out=normalised(args.out, "--out"))
    names = "checkpoint", "pairs", "reference", "test_pairs"
    inputs = {f"--{n.replace('_', '-')}": path for n in names if (path := getattr(args, n))}
    check_distinct(inputs, {"--out": args.out})
    loss = losses.Loss(args.loss, args.beta, args.label_smoothing, args.gamma, args.nll_weight)
    fields = [field.name for field in dataclasses.fields(training.Optimization)]
    return args, loss, training.Optimization(**{name: getattr(args, name) for name in fields})


def check_examples(
    args: Args, examples: "dict[str, list[reading.Example]]", files: dict[str, RowFile]
) -> None:
    """Refuse pairs that this training cannot use."""
    if not examples["pairs"]:
        counts = counts_line(files["pairs"].counts)
        raise UserError(f"{args.pairs}: no pair can be trained on ({counts})")
    unknown = sum(e.win_probability is None for pairs in examples.values() for e in pairs)
    if args.loss == "sppo" and unknown:
        raise UserError(
            f"--loss sppo: {unknown} pairs have no win_probability, and no comparisons by PairRM "
            "of the two answers to take it from (stages.rank --comparisons full): add the field, "
            "or take another loss"
        )


def check_lineage(file: RowFile, identities: dict[str, str], args: Args) -> bool:
    """Refuse pairs whose lineage contradicts the arguments; True if the reference sampled them."""
    lineage = read_lineage(file.path, file.sha256)
    theirs = lineage.identities if lineage else {}
    for name in ("tokenizer", "chat_template"):
        if theirs.get(name, identities[name]) != identities[name]:
            raise UserError(
                f"{file.path}: its token ids were made with another {name.replace('_', ' ')} than "
                f"{args.checkpoint}'s: sample with that checkpoint, or remove the *token_ids "
                "fields and the manifest to have the texts tokenised again"
            )
    model = theirs.get("model")
    if model is not None and model != identities["reference"] and not args.allow_other_model:
        raise UserError(
            f"{file.path}: sampled from another model ({model[:12]}) than the reference "
            f"({identities['reference'][:12]}): give the checkpoint that sampled them, or pass "
            "--allow-other-model to train off-policy"
        )
    return model == identities["reference"]


def manifest_of(args: Args, files: dict[str, RowFile], identities: dict[str, str]) -> Manifest:
    """The manifest of this training, with the rows of its files counted."""
    manifest = Manifest(
        stage="dpo",
        arguments={k: v for k, v in dataclasses.asdict(args).items() if k not in MAY_CHANGE},
        inputs={role: an_input(file.path, file.sha256) for role, file in files.items()},
        identities=identities,
    )
    for role, file in files.items():
        prefix = "test " if role == "test_pairs" else ""
        manifest.counts |= {f"{prefix}{name}": count for name, count in file.counts.items()}
    return manifest


def reference_logprobs(
    args: Args,
    manifest: Manifest,
    work: "working.Work",
    examples: "dict[str, list[reading.Example]]",
    compute: Callable[[str], np.ndarray],
) -> dict[str, np.ndarray]:
    """The reference's log-probs of each file's pairs, fp32 [pairs, 2]: kept ones, else computed.

    They are kept beside the pairs, or, where nothing can be written there, in OUT.work, under a
    name made of everything that decides them.
    """
    reference_p2 = {}
    for role, entry in manifest.inputs.items():
        if not examples[role]:
            continue
        activations = str(precisions.precision_of(args.dtype).activations)
        flags = args.max_length, args.max_prompt_length, args.dtype, activations
        makers = (manifest.identities[n] for n in ("reference", "tokenizer", "chat_template"))
        content = [entry["sha256"], *flags, logprobs.VERSION, *makers]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        folders = f"{entry['path']}.reference", work.folder / "reference"
        places = [f"{folder}/{name}.npy" for folder in folders]
        shape = len(examples[role]), 2
        reference_p2[role] = working.kept_array(places, shape, partial(compute, role))
    return reference_p2


if __name__ == "__main__":
    sys.exit(run_main(main, Args, several=processes))
