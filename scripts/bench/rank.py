"""PairRM: ours against llm-blender, all comparisons of real answers."""

import contextlib
import dataclasses
import io
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from etils import epy

from model.rankers.comparisons import strategy
from scripts.bench.machine import Side, peak_memory, timed
from scripts.plan.slices import gemm_rate
from sharding.errors import UserError
from sharding.mesh import put_batch
from stages.files.rows import Sample, read

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    from model.rankers import deberta, pairrm, pairwise, ranking
    from scripts import random_pairrm


@dataclasses.dataclass
class Rank:
    """PairRM: ours against llm-blender with the same weights, all comparisons of real answers."""

    ranker: str | None = None
    """PairRM's folder or hub id; default: one of its size with random weights, made for the run."""
    samples: str | None = None
    """A samples.jsonl; default: three models' answers to AlpacaEval, where the tests' data lies."""
    prompts: int = 8
    """So many prompts, spread over the file."""
    group: int = 2
    """Prompts given to each side in a turn. llm-blender's batch sizes divide it; it does the first
    turn with each, and goes on with the best."""


def bench(args: Rank) -> None:
    rows = _rows(args)
    prompts = rows[:: len(rows) // args.prompts][: args.prompts]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.ranker
        if folder is None:
            folder = _write_random(Path(temporary) / "pairrm", rows)
        sides = {"llm-blender": Side(_blender_worker, folder), "ours": Side(our_worker, folder)}
        groups = [prompts[i : i + args.group] for i in range(0, len(prompts), args.group)]
        sides["ours"].ask("warm", groups)
        tallies, rates = {name: Tally() for name in sides}, []
        for number, group in enumerate(groups, 1):
            took = []
            rates.append(sides["ours"].ask("gemm"))
            for name, side in sides.items():
                done = side.ask("rank", group)
                tallies[name].add(*done)
                took.append(f"{name} {done[0]:.1f} s")
            print(f"group {number} of {len(groups)}: {', '.join(took)}", flush=True)
        rate = float(np.mean(rates))
        ours, theirs = tallies["ours"], tallies["llm-blender"]
        facts = {name: side.ask("facts") for name, side in sides.items()}
        for side in sides.values():
            side.close()
        flops, padded, tokens = (facts["ours"][name] for name in ("flops", "padded", "tokens"))
        print(
            f"fp32 GEMM {rate / 1e9:.0f} GFLOP/s, measured in turns; {ours.made} comparisons of "
            f"{tokens / ours.made:.0f} tokens, padded to {padded / ours.made:.0f}; "
            f"{flops / ours.made / 1e9:.0f} useful GFLOP each"
        )
        for name, side in tallies.items():
            batch = facts[name].get("batch")
            print(
                f"{name:12s} {side.made / side.seconds:.3f} comparisons/s, "
                f"{flops / side.seconds / 1e9:.0f} useful GFLOP/s, "
                f"{flops / side.seconds / rate:.0%} of GEMM, "
                f"peak {facts[name]['memory'] / 2**30:.2f} GiB"
                + (f" (batch size {batch})" if batch else "")
            )
        print(f"ratio {theirs.seconds / ours.seconds:.2f}")
        differences = [np.abs(np.array(a) - b).max() for a, b in zip(ours.scores, theirs.scores)]
        print(
            f"largest difference of a score {max(differences):.1e} "
            f"of a spread of {np.ptp(np.concatenate(ours.scores)):.1f}"
        )
        _report_bubble(prompts, ours.matrices)


def _write_random(folder: Path, rows) -> str:
    print("no --ranker: writing a PairRM of random weights (1.7 GB, twice)", flush=True)
    # A tokenizer of these very texts, so that they are about as long as with PairRM's own.
    texts = tuple(text for source, answers in rows for text in (source, *answers))
    lines = tuple(line for text in texts for line in text.splitlines() if line.strip())
    with contextlib.redirect_stdout(io.StringIO()):
        random_pairrm.write_pairrm(
            folder,
            random_pairrm.LARGE,
            random_pairrm.sentencepiece_model(16000, lines, random_pairrm.LARGE_VOCABULARY),
        )
    return str(folder)


def _rows(args: Rank) -> list[tuple[str, list[str]]]:
    """(prompt, answers), the same number of answers each."""
    if args.samples is not None:
        rows = [(row.prompt, row.texts) for row in read(args.samples, Sample)]
    else:
        data = Path(os.environ.get("ALIGN_TEST_DATA", "../shared/data")) / "alpaca_eval"
        names = ("Mistral-7B-Instruct-v0.2", "Snorkel-Mistral-PairRM-DPO", "gpt4_1106_preview")
        if not data.is_dir():
            raise UserError(f"{data} does not exist: give --samples, or set ALIGN_TEST_DATA")
        models = [json.loads((data / f"{name}.json").read_text()) for name in names]
        rows = [(r[0]["instruction"], [x["output"] for x in r]) for r in zip(*models)]
    rows = [row for row in rows if len(row[1]) == len(rows[0][1]) > 1]
    if len(rows) < args.prompts:
        raise UserError(f"{len(rows)} prompts with as many answers as the first: fewer --prompts")
    return rows


def _report_bubble(prompts, matrices) -> None:
    """What bubble would have asked for, and found, of the logits that were computed."""
    asked = best = worst = every = 0
    for (source, answers), matrix in zip(prompts, matrices):
        plan, n = strategy("bubble", answers, "max_logits", source), len(answers)
        full = np.mean(np.array(matrix) - np.array(matrix).T, axis=1)
        try:
            wanted = plan.send(None)
            while True:
                asked += len(wanted)
                wanted = plan.send({(i, j): matrix[i][j] for i, j in wanted})
        except StopIteration as end:
            scores = end.value.scores
        every += n * (n - 1)
        best += int(np.argmax(scores)) == int(np.argmax(full))
        worst += int(np.argmin(scores)) == int(np.argmin(full))
    print(
        f"bubble would make {asked} of {every} comparisons; its best answer is full's for "
        f"{best} of {len(prompts)} prompts, its worst for {worst}"
    )


@dataclasses.dataclass
class Tally:
    """What one side did so far."""

    seconds: float = 0.0
    made: int = 0
    scores: list[list[float]] = dataclasses.field(default_factory=list)
    matrices: list[list[list[float]]] = dataclasses.field(default_factory=list)

    def add(self, seconds, made, scores, matrices):
        self.seconds += seconds
        self.made += made
        self.scores += scores
        self.matrices += matrices


def our_worker(pipe, folder: str):
    model = pairrm.PairRM(folder)
    config, params = model.config.encoder, model.params["encoder"]
    ranker = pairwise.PairwiseRanker(model, "full", "max_logits")
    facts = {"flops": 0.0, "padded": 0, "tokens": 0}

    def rank(group) -> list:
        requests = [
            ranking.Request(
                "", str(number), source, [{"role": "user", "content": source}], answers, []
            )
            for number, (source, answers) in enumerate(group)
        ]
        found = {
            request.prompt_id: ranked
            for request, ranked in ranker.rank_all(requests, lambda n: None)
        }
        return [found[request.prompt_id] for request in requests]

    shapes = []  # of each batch that is computed
    batches = model.batches

    def seen(comparisons):
        for batch, arrays in batches(comparisons):
            shapes.append(arrays["tokens_bt"].shape)
            yield batch, arrays

    def compile_only(comparisons):
        """Each shape once, through two layers instead of all."""
        short = {**params, "layers": [params["layers"][0], params["layers"][-1]]}
        for _, arrays in batches(comparisons):
            if (shape := arrays["tokens_bt"].shape) not in shapes:
                shapes.append(shape)
                deberta.encode(short, config, *put_batch(model.mesh, arrays).values())
        return iter(())

    while True:
        what, given = pipe.recv()
        if what == "warm":
            model.batches = compile_only
            for group in given:
                rank(group)
            model.batches = seen
            shapes.clear()
            pipe.send(None)
        elif what == "gemm":
            pipe.send(gemm_rate())
        elif what == "facts":
            pipe.send(facts | {"padded": sum(b * t for b, t in shapes), "memory": peak_memory()})
        else:
            seconds, found = timed(partial(rank, given))
            made = 0
            for source, answers in given:
                encoded, n = model.encode(source, answers), len(answers)
                lengths = [encoded.length(i, j) for i in range(n) for j in range(n) if i != j]
                facts["flops"] += sum(useful_flops(config, length) for length in lengths)
                facts["tokens"] += sum(lengths)
                made += len(lengths)
            pipe.send((seconds, made, [r.scores for r in found], [r.comparisons for r in found]))


def _blender_worker(pipe, folder: str):
    from model.rankers.blender import BlenderRanker  # here: needs torch and llm-blender

    with contextlib.redirect_stdout(sys.stderr):
        blender = BlenderRanker(folder).blender
    sizes: list[int] = []  # batch sizes worth using

    def rank(group, size):
        sources, answers = [source for source, _ in group], [a for _, a in group]
        return blender.rank(
            sources, answers, return_scores=True, batch_size=size, disable_tqdm=True
        )

    rank([("warm", ["up", "now"])], 1)
    while True:
        what, given = pipe.recv()
        if what == "facts":
            pipe.send({"batch": sizes[0], "memory": peak_memory()})
        else:
            sizes = sizes or [size for size in range(1, len(given) + 1) if len(given) % size == 0]
            found = {size: timed(partial(rank, given, size)) for size in sizes}
            sizes = [min(found, key=lambda size: found[size][0])]
            seconds, scores = found[sizes[0]]
            n = len(given[0][1])
            pipe.send((seconds, len(given) * n * (n - 1), scores.tolist(), []))


def useful_flops(config, length: int) -> float:
    """Operations that one comparison of so many tokens needs: products alone, no padding, the last
    layer computed where it is read (three tokens)."""
    d, f = config.hidden_size, config.intermediate_size
    rows = min(2 * config.position_buckets, 2 * length - 1)

    def layer(queries):
        linear = queries * (2 * d * d + 2 * d * f) + length * 2 * d * d
        attention = 2 * queries * length * d + (queries + length) * rows * d
        return 2.0 * (linear + attention)

    return (config.num_hidden_layers - 1) * layer(length) + layer(3)
