"""PairRM: ours against llm-blender, all comparisons of real answers."""

import contextlib
import dataclasses
import io
import tempfile
from itertools import permutations
from pathlib import Path

import numpy as np
from etils import epy

from model.rankers.comparisons import aggregate
from scripts.bench import machine
from sharding.errors import UserError
from stages.files.rows import Sample, read

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    from model.rankers import blender, pairrm
    from scripts import random_pairrm
    from scripts.bench import shapes

Prompt = tuple[str, list[str]]  # a prompt and its answers


@dataclasses.dataclass
class Rank(machine.BenchFlags):
    """PairRM: ours against llm-blender with the same weights, all comparisons of real answers, each
    in float32, as llm-blender runs on a CPU, and bfloat16, which is autocast with llm-blender.
    """

    ranker: str | None = None
    """PairRM's folder or hub id; default: one of its size with random weights, made for the run."""
    samples: str | None = None
    """A samples.jsonl; default: three models' answers to AlpacaEval, where the tests' data lies."""
    prompts: int = 3
    """So many prompts, spread over the file."""
    group: int = 1
    """Prompts given to each side in a turn: llm-blender's batch size. More than one pads more."""


def bench(args: Rank) -> None:
    rows = _rows(args)
    prompts = machine.spread(rows, args.prompts)
    groups = [prompts[i : i + args.group] for i in range(0, len(prompts), args.group)]
    # To warm up: two answers to the shortest prompt.
    source, answers = min(rows, key=lambda row: sum(map(len, (row[0], *row[1][:2]))))
    groups.insert(0, [(source, answers[:2])])
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.ranker or _write_random(Path(temporary) / "pairrm", rows)
        sides = [
            machine.Side(name, dtype, kind, folder, groups)
            for dtype in args.precisions
            for name, kind in (("ours", Ours), ("llm-blender", Theirs))
        ]
        sizes = [side.ask("warm") for side in sides if side.name == "ours"]
        machine.warm_up(sides)
        machine.in_turns("group", range(1, len(groups)), sides)
        scores = [np.concatenate([result[3] for _, result in side.turns]) for side in sides]
        made, tokens, padded = sizes[0]
        print(
            f"{made} comparisons of {tokens / made:.0f} tokens, padded to {padded / made:.0f}; the "
            f"scores spread over {np.ptp(scores[1]):.1f}"
        )
        for side, mine in zip(sides, scores):
            said = f"scores within {np.abs(mine - scores[1]).max():.1e} of {sides[1].title}"
            machine.report(side, "comparisons/s", said)
        machine.compare(sides)
        for side in sides:
            side.close()


def _rows(args: Rank) -> list[Prompt]:
    """Prompts with the same number of answers each."""
    if args.samples is not None:
        rows = [(row.prompt, row.texts) for row in read(args.samples, Sample)]
    else:
        models = ("Mistral-7B-Instruct-v0.2", "Snorkel-Mistral-PairRM-DPO", "gpt4_1106_preview")
        rows = machine.alpaca_eval(*models, instead="give --samples, or ")
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


# ------------------------------------------------------------------------------ the sides


class Ours(machine.Worker):
    def __init__(self, dtype: machine.Dtype, folder: str, groups: list[list[Prompt]]):
        super().__init__(dtype)
        self.model, self.groups = pairrm.PairRM(folder, dtype), groups

    def comparisons(self, group: list[Prompt]) -> list[tuple]:
        return [
            (encoded, i, j)
            for source, answers in group
            for encoded in [self.model.encode(source, answers)]
            for i, j in permutations(range(len(answers)), 2)
        ]

    def warm(self) -> tuple[int, int, int]:
        """Compile each shape: everything is computed once, through two layers instead of all.
        (comparisons, tokens, tokens with padding) of all turns."""
        encoder = self.model.params["encoder"]
        layers = encoder["layers"]
        encoder["layers"] = [layers[0], layers[-1]]
        padded, lengths = 0, []
        for turn, group in enumerate(self.groups):
            comparisons = self.comparisons(group)
            self.model.logits(comparisons)
            if turn:
                lengths += [encoded.length(i, j) for encoded, i, j in comparisons]
                batches = self.model.batches(comparisons)
                padded += sum(arrays["tokens_bt"].size for _, arrays in batches)
        encoder["layers"] = layers
        return len(lengths), sum(lengths), padded

    def work(self, turn: int) -> tuple[float, int, float, np.ndarray]:
        """(seconds, comparisons, useful operations, scores [prompts, n]). The last layer is needed
        at three tokens alone."""
        group, c = self.groups[turn], self.model.config.encoder
        comparisons = self.comparisons(group)
        seconds, logits = machine.timed(lambda: self.model.logits(self.comparisons(group)))
        lengths = [encoded.length(i, j) for encoded, i, j in comparisons]
        useful = sum(
            (c.num_hidden_layers - 1) * shapes.layer_operations(c, length, length)
            + shapes.layer_operations(c, length, 3)
            for length in lengths
        )
        matrices = np.zeros((len(group), len(group[0][1]), len(group[0][1])))
        off_diagonal = ~np.eye(matrices.shape[1], dtype=bool)
        matrices[:, off_diagonal] = np.reshape(logits, (len(group), -1))
        scores = np.array([aggregate(matrix, "max_logits") for matrix in matrices])
        return seconds, len(logits), useful, scores


class Theirs(machine.Worker):
    library = "PyTorch"

    def __init__(self, dtype: machine.Dtype, folder: str, groups: list[list[Prompt]]):
        super().__init__(dtype)
        self.blender, self.groups = blender.BlenderRanker(folder).blender, groups

    def work(self, turn: int) -> tuple[float, int, None, np.ndarray]:
        """(seconds, comparisons, None, scores [prompts, n])."""
        seconds, scores = machine.timed(self._rank, *map(list, zip(*self.groups[turn])))
        return seconds, scores.size * (scores.shape[1] - 1), None, scores

    def _rank(self, sources: list[str], answers: list[list[str]]) -> np.ndarray:
        import torch  # here: heavy, and for this side alone

        how = {"return_scores": True, "batch_size": len(sources), "disable_tqdm": True}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
            return self.blender.rank(sources, answers, **how)
