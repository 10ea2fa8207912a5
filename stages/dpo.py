"""Train on pairs with DPO against a frozen reference. checkpoint + pairs.jsonl → checkpoint

    python -m stages.dpo --checkpoint C --pairs pairs.jsonl --out C2 --beta 0.1 --learning-rate 5e-7

The reference's log-probs are computed once, before training, by the function that training uses,
and kept beside the pairs (PAIRS.reference/): another training on the same pairs, with another beta
or loss say, finds them there. Then its parameters are freed. The policy is held in fp32 whatever
the dtype of computation.

OUT is a checkpoint folder. OUT.log/ holds metrics.jsonl (TRL's names), TensorBoard events and what
was set aside; OUT.work/ holds what a stopped run needs to go on, and is gone when it is done.

A model too large for one host's devices spans those of several: --coordinator HOST:PORT
--processes 4 and --process-id 0 to 3, the rest of the command the same, on a file system that all
of them see. Each writes its shards, process 0 all else.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from etils import epath
from tqdm import tqdm

from model.ahead import ahead
from model.packing import Sequence, pack
from sharding.errors import UserError
from sharding.watch import Flags
from stages.files.examples import Example, read_pairs
from stages.files.output import Manifest, read_lineage
from stages.files.paths import file_sha256, is_remote
from stages.files.provenance import provenance
from stages.files.run import STOPPED_TOGETHER, Stopped, run_main, stop_signal
from stages.files.work import Work, save_array

# Of log-prob a token, mean over the pairs, between sampler and trainer: what one of them being in
# bfloat16 may bring about, and what only another model, template or text can.
WARN_DISAGREEMENT, STOP_DISAGREEMENT = 1e-2, 2e-1


@dataclasses.dataclass
class Args(Flags):
    checkpoint: str  # the policy's start: a checkpoint folder
    pairs: str  # pairs.jsonl
    out: str  # the trained checkpoint: a folder that does not exist yet
    reference: str | None = None  # the frozen reference; default: --checkpoint
    test_pairs: str | None = None  # pairs to evaluate on before and after
    # sigmoid: DPO. robust, hinge, ipo, sppo, sigmoid_norm (length-normalised), simpo (without a
    # reference): model/losses.py has the formulas and papers.
    loss: Literal["sigmoid", "robust", "ipo", "hinge", "sppo", "sigmoid_norm", "simpo"] = "sigmoid"
    beta: float = 0.1  # strength of the tie to the reference
    label_smoothing: float = 0.0  # assumed share of wrongly ordered pairs, for sigmoid and robust
    gamma: float = 0.0  # SimPO's target margin
    nll_weight: float = 0.0  # of the chosen response's negative log-likelihood a token, added
    learning_rate: float = 5e-7  # at its peak
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # after warm-up
    warmup_ratio: float = 0.1  # share of all steps over which the learning rate rises from 0
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # gradients are clipped to this global norm
    epochs: int = 1
    batch_size: int = 64  # pairs an optimizer step
    micro_batch_size: int = 4  # pairs in memory at a time; their gradients are summed in fp32
    max_length: int = 1024  # tokens of prompt and response; a longer response is cut at its end
    max_prompt_length: int = 512  # a longer prompt is cut at its left, behind the template's head
    seed: int = 0  # of the order of the pairs
    dtype: Literal["float32", "bfloat16"] = "float32"  # of computation; masters are always fp32
    # What the backward pass computes again instead of keeping it: only what is elementwise, or all
    # but each layer's input (a fifth of the memory, a quarter slower).
    remat: Literal["none", "full"] = "none"
    # What a row of a batch holds: all pairs that one device gets of a micro-batch, one pair, or
    # one response behind its own prompt. The numbers are the same; the first is the fastest by far.
    rows: Literal["packed", "pairs", "responses"] = "packed"
    mesh: tuple[int, int, int] | None = None
    """Devices along data, fsdp, tensor; -1: the rest. Default: all along fsdp, as far as the
    model's width divides, the rest along data."""
    shardings: bool = False  # print a table of what lies where: shapes, cuts, bytes a device
    save_every: int = 100  # steps between two saves of the training state; 0: only at a signal
    keep_states: int = 1  # so many of the saved states are kept until the training is done
    eval_every: int = 0  # steps between two evaluations on --test-pairs; 0: before and after alone
    allow_other_model: bool = False  # train on pairs that another model than the reference sampled


def main(args: Args) -> None:
    from model import checkpoint
    from model.tokenizer import ChatTokenizer
    from sharding import processes

    _check(args)
    reference = args.reference or args.checkpoint
    try:
        processes.start(args)
        config = checkpoint.load_config(args.checkpoint)
        tokenizer = ChatTokenizer.from_folder(args.checkpoint, config.eos_token_ids)
        identities = {
            "model": checkpoint.identity(args.checkpoint),
            "reference": checkpoint.identity(reference),
            "tokenizer": tokenizer.identity,
            "chat_template": tokenizer.template_identity,
        }
        if checkpoint.load_config(reference) != config:
            raise UserError(f"--reference {reference} is of another architecture than --checkpoint")
    except (ValueError, UserError) as error:
        raise UserError(str(error)) from error
    print(f"reference: {reference} ({identities['reference'][:12]})")

    files = [args.pairs] + ([args.test_pairs] if args.test_pairs else [])
    sampled_by_reference = [_check_lineage(file, identities, args) for file in files]
    manifest = Manifest(
        stage="dpo",
        arguments={
            field.name: getattr(args, field.name)
            for field in dataclasses.fields(args)
            if field.name not in NOT_CONTENT
        },
        inputs={file: file_sha256(file) for file in files},
        identities=identities,
    )
    if not processes.agree(json.dumps(manifest.key())):
        raise UserError("the processes were given different pairs or checkpoints")
    work = Work(args.out, manifest, args.keep_states)
    if work.finished:
        print(f"{args.out} is finished already")
        return
    aside: list[dict] = []
    read = partial(
        read_pairs,
        tokenizer=tokenizer,
        vocabulary=config.vocab_size,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        aside=aside,
    )
    train, counts = read(args.pairs)
    test, test_counts = [], Counter()
    if args.test_pairs:
        test, test_counts = read(args.test_pairs)
    if not train:
        raise UserError(f"{args.pairs}: no pair can be trained on ({_counts(counts)})")
    unknown = sum(e.win_probability is None for e in train + test)
    if args.loss == "sppo" and unknown:
        raise UserError(
            f"--loss sppo: {unknown} pairs have no win_probability, and no all_rm_scores to take "
            "it from: add the field, or take another loss"
        )
    manifest.counts = {**counts, **{f"test {name}": n for name, n in test_counts.items()}}
    print(f"{args.pairs}: {_counts(counts)}" + (f"; test: {_counts(test_counts)}" if test else ""))
    work.begin(manifest, aside)
    Run(args, config, train, test, manifest, work, all(sampled_by_reference)).run()


# Arguments that change where, how fast or whether, but not what comes out.
NOT_CONTENT = {
    "checkpoint",
    "reference",
    "pairs",
    "test_pairs",
    "out",
    "mesh",
    "shardings",
    "save_every",
    "keep_states",
    "eval_every",
    "coordinator",
    "processes",
    "process_id",
    "allow_other_model",
}


def _check(args: Args) -> None:
    for name, ok, rule in (
        ("learning_rate", args.learning_rate > 0, "above 0"),
        ("warmup_ratio", 0 <= args.warmup_ratio <= 1, "between 0 and 1"),
        ("max_grad_norm", args.max_grad_norm > 0, "above 0"),
        ("epochs", args.epochs >= 1, "at least 1"),
        ("batch_size", args.batch_size >= 1, "at least 1"),
        ("micro_batch_size", args.micro_batch_size >= 1, "at least 1"),
        ("max_prompt_length", 1 <= args.max_prompt_length < args.max_length, "below --max-length"),
        ("save_every", args.save_every >= 0, "at least 0"),
        ("keep_states", args.keep_states >= 1, "at least 1"),
        ("eval_every", args.eval_every >= 0, "at least 0"),
    ):
        if not ok:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {getattr(args, name)}: it must be {rule}")
    try:
        _loss(args)
    except ValueError as error:
        raise UserError(str(error)) from None


def _loss(args: Args):
    from model.losses import Loss

    return Loss(args.loss, args.beta, args.label_smoothing, args.gamma, args.nll_weight)


def _counts(counts: Counter) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())


def _check_lineage(path: str, identities: dict, args: Args) -> bool:
    """Refuse pairs whose lineage contradicts the arguments; True if the reference sampled them."""
    lineage = read_lineage(path) if epath.Path(path).exists() else None
    theirs = lineage.identities if lineage else {}
    for name in ("tokenizer", "chat_template"):
        if theirs.get(name, identities[name]) != identities[name]:
            raise UserError(
                f"{path}: its token ids were made with another {name.replace('_', ' ')} than "
                f"{args.checkpoint}'s: sample with that checkpoint, or remove the *token_ids "
                "fields and the manifest to have the texts tokenised again"
            )
    model = theirs.get("model")
    if model is not None and model != identities["reference"] and not args.allow_other_model:
        raise UserError(
            f"{path}: sampled from another model ({model[:12]}) than the reference "
            f"({identities['reference'][:12]}): give the checkpoint that sampled them, or pass "
            "--allow-other-model to train off-policy"
        )
    return model == identities["reference"]


# --------------------------------------------------------------------------------- training


def epoch_order(seed: int, epoch: int, pairs: int) -> np.ndarray:
    """The order of the pairs in an epoch (0, 1, …): a function of these three alone."""
    digest = hashlib.sha256(f"{seed}\n{epoch}".encode()).digest()
    return np.random.Generator(np.random.PCG64(list(digest))).permutation(pairs)


@dataclasses.dataclass
class MicroBatch:
    indices: np.ndarray  # of its pairs
    packed: dict[str, np.ndarray]  # their tokens: model/packing.py
    sides: dict[str, np.ndarray]  # fp32 [micro_batch_size] each, what `losses.Pairs` needs beside


class Run:
    def __init__(
        self,
        args: Args,
        config,
        train: list[Example],
        test: list[Example],
        manifest: Manifest,
        work: Work,
        sampled_by_reference: bool,
    ):
        import jax
        import jax.numpy as jnp

        from model import checkpoint, decoder
        from model import train as training
        from sharding.mesh import (
            batch_shards,
            make_mesh,
            replicated,
            training_sizes,
            tree_shardings,
        )

        self.args, self.config, self.manifest, self.work = args, config, manifest, work
        self.train, self.test = train, test
        self.sampled_by_reference = sampled_by_reference
        # For cards; now, since these files may be gone at the end.
        self.known = {
            "parent": checkpoint.read_manifest(args.checkpoint),
            "data": provenance(args.pairs),
        }
        self.metrics = self.board = None
        self.begun = time.monotonic()
        try:
            self.mesh = make_mesh(*args.mesh or training_sizes(jax.device_count(), config))
        except ValueError as error:
            raise UserError(str(error)) from error
        self.shards = batch_shards(self.mesh)
        self.shardings = tree_shardings(
            self.mesh, decoder.logical_axes(config), decoder.abstract(config)
        )
        self.layer_weights = sum(
            math.prod(x.shape) for x in jax.tree.leaves(decoder.abstract(config)["layers"])
        )
        self.steps_per_epoch = math.ceil(len(train) / args.batch_size)
        self.total_steps = self.steps_per_epoch * args.epochs
        self.loss = _loss(args)
        recipe = training.Recipe(
            self.loss,
            **{
                field.name: getattr(args, field.name)
                for field in dataclasses.fields(training.Recipe)[1:]
            },
        )
        with jax.set_mesh(self.mesh):
            self.trainer = training.Trainer(
                config,
                recipe,
                self.total_steps,
                self.shardings,
                replicated(self.mesh),
                jnp.dtype(args.dtype),
                args.remat,
            )
        self._tell_shardings(recipe)

    def _tell_shardings(self, recipe) -> None:
        from model import placement
        from sharding import table

        longest = self._pack(self.train, self._micro_batches(self.train, range(len(self.train)))[0])
        sections = placement.training(self.config, self.mesh, recipe, longest)
        tell = table.table if self.args.shardings else table.summary
        print(tell(self.mesh, sections))

    def run(self) -> None:
        import jax

        from sharding import processes

        work = self.work

        def check_together():  # so that all stop after the same step
            processes.all_check(check_stop, STOPPED_TOGETHER)

        with jax.set_mesh(self.mesh), stop_signal() as check_stop:
            params, references = self._references()
            check_together()
            step, params, optimizer_state = self._start(params)
            if processes.is_first():
                work.log_from(step, evaluated=0 < step < self.total_steps)
                self._open_log(step)
            if step == 0 and self.test:
                self._log(0, self._evaluate(params, references["test"]))
            start = time.monotonic()
            with tqdm(
                total=self.total_steps,
                initial=step,
                unit=" steps",
                desc="dpo",
                disable=not processes.is_first(),
            ) as progress:
                make = partial(self._step_batches, references["train"])
                for batches, waited in ahead(make, range(step, self.total_steps)):
                    try:
                        gradients, norm, values = self._gradients(step, params, batches, waited)
                    except UserError:  # nothing was updated with it: keep what there is
                        self._save(step, params, optimizer_state)
                        work.finish_saving()
                        raise
                    params, optimizer_state, changed = self.trainer.apply(
                        params, optimizer_state, gradients, norm
                    )
                    del gradients
                    values["bf16_weights_changed"] = float(changed)
                    step += 1
                    self._log(step, values)
                    every = self.args.eval_every
                    if self.test and every and step % every == 0 and step < self.total_steps:
                        self._log(step, self._evaluate(params, references["test"]))
                    accuracy = values["rewards/accuracies"]
                    progress.set_postfix_str(
                        f"loss {values['loss']:.4f}, accuracy {accuracy:.2f}", refresh=False
                    )
                    progress.update()
                    try:
                        check_together()
                    except Stopped:
                        self._save(step, params, optimizer_state)
                        work.finish_saving()
                        raise
                    save = self.args.save_every and step % self.args.save_every == 0
                    if save and step < self.total_steps:
                        self._save(step, params, optimizer_state)
            seconds = time.monotonic() - start
            work.finish_saving()
            del optimizer_state
            results = {"steps": self.total_steps, "train_seconds": round(seconds, 1)}
            if self.test:
                after = self._evaluate(params, references["test"])
                self._log(self.total_steps, after)
                results |= after
            self._finish(params, results)

    def _references(self):
        """(the reference's parameters if they are the policy's start, its log-probs of both files,
        fp32 [pairs, 2]); zeros where the loss knows no reference."""
        from model import checkpoint
        from sharding import processes

        args, params, references = self.args, None, {}
        folder = args.reference or args.checkpoint
        for name, path, examples in (
            ("train", args.pairs, self.train),
            ("test", args.test_pairs, self.test),
        ):
            references[name] = np.zeros((len(examples), 2), np.float32)
            if not examples or not self.loss.needs_reference:
                continue
            cache = self._reference_cache(path)
            if processes.from_first(np.array(cache.exists())):
                references[name] = np.load(io.BytesIO(cache.read_bytes()))
                print(f"the reference's log-probs are there already: {cache}")
            else:
                params = self._load(folder) if params is None else params
                references[name] = self._logprobs(params, examples, f"reference, {name}")
                if processes.is_first():
                    save_array(cache, references[name])
        if self.loss.needs_reference:
            self._check_against_sampler(references["train"])
        # Freed here unless the policy starts from the very same parameters.
        same = checkpoint.identity(folder) == checkpoint.identity(args.checkpoint)
        return (params if same else None), references

    def _reference_cache(self, pairs: str) -> epath.Path:
        """Where the reference's log-probs of a file of pairs lie: a name made of all they hang on.
        Beside the pairs, or, where nothing can be written there, in the work folder."""
        args, identities = self.args, self.manifest.identities
        content = [
            self.manifest.inputs[pairs],
            args.max_length,
            args.max_prompt_length,
            args.dtype,
            *(identities[name] for name in ("reference", "tokenizer", "chat_template")),
        ]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        beside = epath.Path(f"{pairs}.reference")
        writable = is_remote(pairs) or os.access(Path(pairs).parent, os.W_OK)
        return (beside if writable else self.work.folder / "reference") / f"{key}.npy"

    def _load(self, folder: str):
        from model import checkpoint

        try:
            return checkpoint.load(folder, self.shardings)[1]
        except checkpoint.UserError as error:
            raise UserError(str(error)) from error

    def _start(self, params):
        """(steps done, parameters, optimizer state): from the saved state, else the start."""
        import jax

        from model import checkpoint, decoder

        states = self.work.states()
        if not states:
            params = self._load(self.args.checkpoint) if params is None else params
            return 0, params, self.trainer.init_optimizer(params)
        del params
        abstract = {
            "params": decoder.abstract(self.config),
            "optimizer": self.trainer.optimizer_shapes,
        }
        shardings = {"params": self.shardings, "optimizer": self.trainer.optimizer_shardings}
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        state = checkpoint.load_state(str(self.work.folder / f"state-{states[-1]}"), abstract)
        print(f"{self.work.folder}: going on after step {states[-1]} of {self.total_steps}")
        return states[-1], state["params"], state["optimizer"]

    def _save(self, step: int, params, optimizer_state) -> None:
        self.work.save_state(step, {"params": params, "optimizer": optimizer_state})

    def _finish(self, params, results: dict) -> None:
        from model import checkpoint
        from sharding import processes

        self.manifest.results |= results
        self.manifest.seconds = round(time.monotonic() - self.begun, 1)
        identity = checkpoint.save(
            self.args.out,
            self.config,
            params,
            self.args.checkpoint,
            dataclasses.asdict(self.manifest),
            **self.known,
        )
        if processes.is_first():
            self.metrics.close()
            self.board.close()
            self.work.done()
        print(f"{self.args.out}: trained {self.total_steps} steps, identity {identity[:12]}")

    # -------------------------------------------------------------------------- one step

    def _step_batches(self, references: np.ndarray, step: int) -> list[MicroBatch]:
        """A step's micro-batches: of seed and step alone, whatever was trained before."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.args.seed, epoch, len(self.train))
        batch = order[number * self.args.batch_size : (number + 1) * self.args.batch_size]
        batches = []
        for indices in self._micro_batches(self.train, batch):
            sides = {
                name: self._pad(x)
                for name, x in self._sides(self.train, indices, references[indices]).items()
            }
            sides["weights"] = self._pad(np.ones(len(indices)), 0.0)
            batches.append(MicroBatch(indices, self._pack(self.train, indices), sides))
        return batches

    def _gradients(self, step: int, params, batches: list[MicroBatch], waited: float):
        """What the optimizer needs for a step: (gradients, their norm, the step's metrics). waited:
        the seconds that its batches were waited for. Raises UserError where a number is not
        finite."""
        import jax

        from sharding.mesh import put_batch

        gradients = None
        values: dict[str, list] = {}  # metric → one value a pair, in the order of `done`
        done: list[str] = []  # prompt_ids
        start, work = time.monotonic() - waited, np.zeros(3)
        pairs = sum(len(batch.indices) for batch in batches)
        for batch in batches:
            indices, packed, sides = batch.indices, batch.packed, batch.sides
            gradients, micro = self.trainer.accumulate(
                params, gradients, put_batch(self.mesh, packed), sides, float(pairs)
            )
            work += self._work(packed)
            micro = dict(jax.device_get(micro))
            for side in ("chosen", "rejected"):
                log_ratio_p = micro[f"logps/{side}"] - sides[f"ref_{side}"]
                micro[f"log_ratios/{side}"] = log_ratio_p / sides[f"{side}_tokens"]
            for name, value in micro.items():
                values.setdefault(name, []).extend(value[: len(indices)])
            done += [self.train[i].prompt_id for i in indices]
        _check_finite(step, values, done)
        norm = self.trainer.norm(gradients)
        metrics = self._means({name: np.array(value) for name, value in values.items()})
        metrics["grad_norm"] = float(norm)
        metrics["learning_rate"] = float(self.trainer.schedule(step))
        metrics["epoch"] = (step + 1) / self.steps_per_epoch
        seconds = time.monotonic() - start
        metrics |= self._speed(work, seconds)
        metrics["host_wait"] = waited / seconds
        self._check_first_loss(step, metrics["loss"])
        if not math.isfinite(metrics["grad_norm"]):
            raise UserError(
                f"step {step + 1}: the gradient's norm is {norm}: lower --learning-rate; "
                f"{self.work.folder} keeps the state before it"
            )
        return gradients, norm, metrics

    def _micro_batches(self, examples: list[Example], indices) -> list[np.ndarray]:
        """The indices in micro-batches of about as many tokens each, so of few compiled shapes."""
        by_length = sorted(indices, key=lambda i: (-len(examples[i].sequence), i))
        count = math.ceil(len(by_length) / self.args.micro_batch_size)
        return [np.array(by_length[m::count]) for m in range(count)]

    def _pack(self, examples: list[Example], indices) -> dict[str, np.ndarray]:
        sequences = [examples[i].sequence for i in indices]
        if self.args.rows == "responses":
            sequences = [Sequence(s.prompt, [r]) for s in sequences for r in s.responses]
        return pack(sequences, self.shards, alone=self.args.rows != "packed")

    def _sides(self, examples: list[Example], indices, references) -> dict[str, np.ndarray]:
        """What `losses.Pairs` needs of these pairs beside the policy's log-probs."""
        some = [examples[i] for i in indices]
        return {
            "ref_chosen": references[:, 0],
            "ref_rejected": references[:, 1],
            "chosen_tokens": np.array([len(e.chosen) for e in some], np.float32),
            "rejected_tokens": np.array([len(e.rejected) for e in some], np.float32),
            "win_probability": np.array(
                [1.0 if e.win_probability is None else e.win_probability for e in some], np.float32
            ),
        }

    def _pad(self, x_p: np.ndarray, filler: float = 1.0) -> np.ndarray:
        """As long as a micro-batch; the filler is what a division stands."""
        size = self.args.micro_batch_size
        return np.pad(x_p.astype(np.float32), (0, size - len(x_p)), constant_values=filler)

    def _means(self, values: dict[str, np.ndarray]) -> dict[str, float]:
        margins = values["rewards/chosen"] - values["rewards/rejected"]
        values |= {"rewards/margins": margins, "rewards/accuracies": margins > 0}
        if "log_ratios/chosen" in values:
            # The responses were drawn from the reference: −log π/π_ref is an unbiased estimate.
            values["kl"] = -(values["log_ratios/chosen"] + values["log_ratios/rejected"]) / 2
        return {name: float(np.mean(value)) for name, value in values.items()}

    def _work(self, packed: dict[str, np.ndarray]) -> np.ndarray:
        """(tokens, tokens and padding, operations) of a micro-batch: products with weights alone,
        forward and backward, nothing of what is computed twice."""
        tokens, responses = np.sum(packed["copies"][..., 0] >= 0), np.sum(packed["owners"] >= 0)
        vocabulary = self.config.vocab_size * self.config.hidden_size
        flops = 6.0 * (tokens * self.layer_weights + responses * vocabulary)
        return np.array([tokens, packed["tokens"].size, flops])

    def _speed(self, work: np.ndarray, seconds: float) -> dict[str, float]:
        from sharding.mesh import peak_flops, peak_memory

        tokens, slots, flops = work
        found = {
            "padding": 1 - tokens / slots,
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": flops / seconds,
            "peak_memory_gb": peak_memory(self.mesh) / 1e9,
        }
        if peak := peak_flops(self.mesh):
            found["mfu"] = flops / seconds / peak
        return {name: float(value) for name, value in found.items()}

    def _open_log(self, step: int) -> None:
        from tensorboardX import SummaryWriter

        self.metrics = open(self.work.log / "metrics.jsonl", "a")
        self.board = SummaryWriter(str(self.work.log / "tensorboard"), purge_step=step)

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self.metrics is None:  # another process keeps the log
            return
        self.metrics.write(json.dumps({"step": step, **values}) + "\n")
        self.metrics.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    # ---------------------------------------------------------------- without gradients

    def _logprobs(self, params, examples: list[Example], name: str) -> np.ndarray:
        """Summed log-probs of every pair's chosen and rejected response, fp32 [pairs, 2]."""
        import jax

        from sharding.mesh import put_batch

        found = np.zeros((len(examples), 2), np.float32)
        batches = self._micro_batches(examples, range(len(examples)))
        silent = not examples or jax.process_index() > 0
        made = ahead(lambda indices: (indices, self._pack(examples, indices)), batches)
        for (indices, batch), _ in tqdm(
            made, desc=name, unit=" batches", total=len(batches), disable=silent
        ):
            sides = jax.device_get(
                self.trainer.logprobs(
                    params, batch=put_batch(self.mesh, batch), pairs=self.args.micro_batch_size
                )
            )
            for column, side in enumerate(sides):
                found[indices, column] = side[: len(indices)]
        return found

    def _evaluate(self, params, references: np.ndarray) -> dict[str, float]:
        from model.losses import Pairs

        policy = self._logprobs(params, self.test, "eval")
        sides = self._sides(self.test, range(len(self.test)), references)
        loss = self.loss(Pairs(*policy.T, **sides))
        rewards = self.loss.beta * (policy - references)
        values = {
            "loss": np.asarray(loss),
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "logps/chosen": policy[:, 0],
            "logps/rejected": policy[:, 1],
        }
        return {f"eval_{name}": value for name, value in self._means(values).items()}

    # ------------------------------------------------------------------------- the gates

    def _check_first_loss(self, step: int, loss: float) -> None:
        """ln 2 at step 0 where the policy is the reference (with or without label smoothing)."""
        same = self.manifest.identities["model"] == self.manifest.identities["reference"]
        same &= self.args.loss == "sigmoid" and not self.args.nll_weight
        tolerance = 1e-4 if self.args.dtype == "float32" else 2e-2
        if step == 0 and same and abs(loss - math.log(2)) > tolerance:
            raise RuntimeError(
                f"the loss at step 0 is {loss:.6f}, not ln 2 = {math.log(2):.6f}, although the "
                "policy is the reference: their log-probs are computed differently"
            )

    def _check_against_sampler(self, references: np.ndarray) -> None:
        """The sampler's log-probs must be the trainer's, where the reference sampled the pairs."""
        known = [i for i, e in enumerate(self.train) if e.sampled is not None]
        if not known or not self.sampled_by_reference:
            return
        tokens = np.array([[len(self.train[i].chosen), len(self.train[i].rejected)] for i in known])
        sampled = np.array([self.train[i].sampled for i in known])
        a_token = np.abs(references[known] - sampled) / np.maximum(tokens, 1)
        print(
            f"sampler and trainer agree within {a_token.max():.1e} of log-prob a token "
            f"(mean {a_token.mean():.1e})"
        )
        self.manifest.results["sampler_disagreement"] = float(a_token.max())
        message = (
            f"the sampler's log-probs differ from the trainer's by {a_token.mean():.2g} a token"
        )
        if a_token.mean() > STOP_DISAGREEMENT:
            raise UserError(
                f"{self.args.pairs}: {message}: the *_logprob or *_token_ids fields are not what "
                "this model sampled; sample again, or remove them"
            )
        if a_token.mean() > WARN_DISAGREEMENT:
            print(f"warning: {message} (was one of them computed in bfloat16?)")


def _check_finite(step: int, values: dict[str, list], prompt_ids: list[str]) -> None:
    """UserError that names the pairs with a value that is not finite."""
    finite = np.isfinite(list(values.values())).all(axis=0)
    bad = [prompt_id for prompt_id, ok in zip(prompt_ids, finite) if not ok]
    if bad:
        raise UserError(
            f"step {step + 1}: loss or log-probs are not finite for prompt_id "
            f"{', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}: lower --learning-rate"
        )


if __name__ == "__main__":
    sys.exit(run_main(main, Args))
