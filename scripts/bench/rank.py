"""PairRM: ours against llm-blender, all comparisons of real answers."""

import contextlib
import dataclasses
import io
import tempfile
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
from etils import epy

from model.rankers.comparisons import aggregate, strategy
from scripts.bench.machine import Side, Worker, alpaca_eval, in_turns, report, spread, timed
from sharding.errors import UserError
from stages.files.rows import Sample, read

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    from model.rankers import blender, pairrm
    from scripts import random_pairrm
    from scripts.bench import shapes

Prompt = tuple[str, list[str]]  # a prompt and its answers


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
    prompts = spread(rows, args.prompts)
    groups = [prompts[i : i + args.group] for i in range(0, len(prompts), args.group)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.ranker or _write_random(Path(temporary) / "pairrm", rows)
        sides = {"llm-blender": Side(Theirs, folder), "ours": Side(Ours, folder)}
        sides["ours"].ask("warm", groups)
        work = {name: partial(side.ask, "rank") for name, side in sides.items()}
        results, rates = in_turns("group", groups, work, gemm=partial(sides["ours"].ask, "gemm"))
        seconds = {name: sum(result[0] for result in done) for name, done in results.items()}
        rate, made = float(np.mean(rates)), sum(len(a) * (len(a) - 1) for _, a in prompts)
        tokens, padded, flops = sides["ours"].ask("work", groups)
        print(
            f"fp32 GEMM {rate / 1e9:.0f} GFLOP/s, measured in turns; {made} comparisons of "
            f"{tokens / made:.0f} tokens, padded to {padded / made:.0f}; "
            f"{flops / made / 1e9:.0f} useful GFLOP each"
        )
        for name, side in sides.items():
            report(
                name,
                side,
                f"{made / seconds[name]:.3f} comparisons/s",
                f"{flops / seconds[name] / 1e9:.0f} useful GFLOP/s",
                f"{flops / seconds[name] / rate:.0%} of GEMM",
                *([f"batch size {side.ask('batch')}"] if name == "llm-blender" else []),
            )
            side.close()
    matrices = [matrix for _, group in results["ours"] for matrix in group]
    theirs = np.concatenate([scores for _, scores in results["llm-blender"]])
    ours = np.array([aggregate(matrix, "max_logits") for matrix in matrices])
    print(
        f"ratio {seconds['llm-blender'] / seconds['ours']:.2f}\n"
        f"largest difference of a score {np.abs(ours - theirs).max():.1e} "
        f"of a spread of {np.ptp(ours):.1f}"
    )
    _report_bubble(prompts, matrices, ours)


def _rows(args: Rank) -> list[Prompt]:
    """Prompts with the same number of answers each."""
    if args.samples is not None:
        rows = [(row.prompt, row.texts) for row in read(args.samples, Sample)]
    else:
        models = ("Mistral-7B-Instruct-v0.2", "Snorkel-Mistral-PairRM-DPO", "gpt4_1106_preview")
        rows = alpaca_eval(*models, instead="give --samples, or ")
        rows = [(row[0]["instruction"], [x["output"] for x in row]) for row in rows]
    rows = [row for row in rows if len(row[1]) == len(rows[0][1]) > 1]
    if len(rows) < args.prompts:
        raise UserError(f"{len(rows)} prompts with as many answers as the first: fewer --prompts")
    return rows


def _write_random(folder: Path, rows: list[Prompt]) -> str:
    print("no --ranker: writing a PairRM of random weights (1.7 GB, twice)", flush=True)
    # A tokenizer of these very texts, so that they are about as long as with PairRM's own.
    texts = [text for source, answers in rows for text in (source, *answers)]
    lines = tuple(line for text in texts for line in text.splitlines() if line.strip())
    with contextlib.redirect_stdout(io.StringIO()):
        random_pairrm.write_pairrm(
            folder,
            random_pairrm.LARGE,
            random_pairrm.sentencepiece_model(16000, lines, random_pairrm.LARGE_VOCABULARY),
        )
    return str(folder)


def _report_bubble(prompts: list[Prompt], matrices: list[np.ndarray], full: np.ndarray) -> None:
    """What bubble would have asked for, and chosen, of the logits that were computed."""
    asked = best = worst = 0
    for (source, answers), matrix, scores in zip(prompts, matrices, full):
        plan, logits = strategy("bubble", answers, "max_logits", source), None
        try:
            while True:
                wanted = plan.send(logits)
                asked += len(wanted)
                logits = {pair: matrix[pair] for pair in wanted}
        except StopIteration as end:
            bubble = end.value.scores
        best += int(np.argmax(bubble)) == int(np.argmax(scores))
        worst += int(np.argmin(bubble)) == int(np.argmin(scores))
    every = sum(matrix.size - len(matrix) for matrix in matrices)
    print(
        f"bubble would make {asked} of {every} comparisons; its best answer is full's for "
        f"{best} of {len(prompts)} prompts, its worst for {worst}"
    )


# ------------------------------------------------------------------------------ the sides


class Ours(Worker):
    def __init__(self, folder: str):
        self.model = pairrm.PairRM(folder)

    def comparisons(self, group: list[Prompt]) -> list[tuple]:
        return [
            (encoded, i, j)
            for source, answers in group
            for encoded in [self.model.encode(source, answers)]
            for i, j in permutations(range(len(answers)), 2)
        ]

    def warm(self, groups: list[list[Prompt]]) -> None:
        """Compile each shape: everything is computed once, through two layers instead of all."""
        encoder = self.model.params["encoder"]
        layers = encoder["layers"]
        encoder["layers"] = [layers[0], layers[-1]]
        for group in groups:
            self.rank(group)
        encoder["layers"] = layers

    def rank(self, group: list[Prompt]) -> tuple[float, list[np.ndarray]]:
        """(seconds, each prompt's logits [n, n])."""
        seconds, logits = timed(lambda: self.model.logits(self.comparisons(group)))
        matrices, logits = [], iter(logits)
        for _, answers in group:
            matrices.append(np.zeros((len(answers), len(answers))))
            for pair in permutations(range(len(answers)), 2):
                matrices[-1][pair] = next(logits)
        return seconds, matrices

    def work(self, groups: list[list[Prompt]]) -> tuple[int, int, float]:
        """(tokens, tokens with padding, useful operations) of all comparisons: the last layer is
        needed at three tokens alone."""
        lengths = [e.length(i, j) for group in groups for e, i, j in self.comparisons(group)]
        c = self.model.config.encoder
        flops = sum(
            (c.num_hidden_layers - 1) * shapes.layer_operations(c, length, length)
            + shapes.layer_operations(c, length, 3)
            for length in lengths
        )
        batches = [self.model.batches(self.comparisons(group)) for group in groups]
        padded = sum(arrays["tokens_bt"].size for group in batches for _, arrays in group)
        return sum(lengths), padded, flops


class Theirs(Worker):
    def __init__(self, folder: str):
        self.blender = blender.BlenderRanker(folder).blender
        self._rank([("warm", ["up", "now"])], 1)

    def rank(self, group: list[Prompt]) -> tuple[float, np.ndarray]:
        """(seconds, scores [prompts, n])."""
        self.sizes = self.sizes or tuple(i for i in range(1, len(group) + 1) if len(group) % i == 0)
        return self.quickest(lambda size: self._rank(group, size))

    def _rank(self, group: list[Prompt], size: int) -> np.ndarray:
        sources, answers = map(list, zip(*group))
        return self.blender.rank(
            sources, answers, return_scores=True, batch_size=size, disable_tqdm=True
        )
