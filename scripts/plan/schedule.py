"""What a recipe runs on a slice, how often, and how long it takes."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

from scripts.plan.arithmetic import (
    DecoderCost,
    Lengths,
    Piece,
    RankingCost,
    SamplingCost,
    TrainingCost,
    mesh_of,
    seconds,
)
from scripts.plan.recipe import LoopRecipe
from scripts.plan.slices import Slice
from sharding.errors import UserError
from sharding.mesh import decoding_sizes, training_sizes

# The share of the roofline that a stage reaches. On accelerators assumed, nothing was measured
# there: what good programs reach in training, less where many small operations follow each other.
# On CPU as `scripts.bench shares` found them on one (rank: bench rank): measure yours with it.
ASSUMED = {"sample": 0.5, "rank": 0.3, "dpo": 0.4, "kl": 0.4}
MEASURED_ON_CPU = {"sample": 0.75, "rank": 0.8, "dpo": 0.6, "kl": 0.7}

# Seconds beside a stage's work: compiling what the loop's cache of compiled programs does not have,
# opening and closing files. Python's start and imports come before them.
START = {"sample": 60.0, "rank": 120.0, "pairs": 1.0, "dpo": 90.0, "kl": 60.0, "report": 5.0}
START_ON_CPU = {
    "sample": 8.0,
    "rank": 0.1,
    "pairs": 0.1,
    "dpo": 12.0,
    "compare": 1.2,
    "kl": 0.5,
    "report": 5.0,
}
DISK = 1e9  # bytes a second of a checkpoint, one host


@dataclasses.dataclass(frozen=True)
class LoopStage:
    """One of the loop's steps."""

    name: str
    kind: str  # sample, rank, dpo or kl: the efficiency that goes with it
    times: int  # in a whole run
    dtype: str
    pieces: list[Piece]
    start: float  # seconds beside the work and imports
    chips: int  # that work at it

    @property
    def imports(self) -> float:
        return 5.0 if self.pieces else 1.0  # with jax and without


@dataclasses.dataclass(frozen=True)
class Plan:
    recipe: LoopRecipe
    decoder: DecoderCost
    on: Slice
    lengths: Lengths
    prompts: int  # an iteration
    heldout: int
    efficiency: dict[str, float]

    @property
    def pairrm(self) -> bool:
        return not self.recipe.ranker.rpartition(":")[0].endswith(".py")

    def sampling(self, heldout: bool = False) -> SamplingCost:
        args = self.recipe.heldout_sample if heldout else self.recipe.sample
        prompts = self.heldout if heldout else self.prompts
        mesh = self._mesh("sample", args.mesh)
        return SamplingCost(self.decoder, args, self.lengths, prompts, mesh)

    def ranking(self, heldout: bool = False) -> RankingCost:
        """Of the samples; of held-out answers, a model's against another's, always in fp32."""
        args, prompts, n = self.recipe.rank, self.prompts, self.recipe.sample.n
        if heldout:
            args, prompts, n = dataclasses.replace(args, dtype="float32"), self.heldout, 2
        return RankingCost(args, self.lengths, prompts, n, self.on)

    def training(self) -> TrainingCost:
        args, test = self.recipe.dpo, self.recipe.pairs
        aside = test.test_count or round(test.test_fraction * self.prompts)
        mesh = self._mesh("dpo", args.mesh)
        return TrainingCost(self.decoder, args, self.lengths, self.prompts - aside, aside, mesh)

    def _mesh(self, stage: str, sizes: tuple[int, int, int] | None):
        """What the stage makes of its --mesh."""
        chosen = {"sample": decoding_sizes, "dpo": training_sizes}[stage]
        try:
            return mesh_of(sizes or chosen(self.on.size, self.decoder.config), self.on.size)
        except ValueError as error:
            raise UserError(f"{stage}: {error}: change it in the recipe, or the topology") from None

    def stages(self) -> list[LoopStage]:
        rounds, on = self.recipe.iterations, self.on
        start = START_ON_CPU if on.is_cpu else START
        weights = 4 * self.decoder.parameters / DISK / on.hosts
        saves = 1 if not self.recipe.dpo.save_every else 2  # the last state's is not hidden

        def sample(name, times, heldout):
            work = self.sampling(heldout)
            return LoopStage(
                name,
                "sample",
                times,
                work.args.dtype,
                work.pieces(),
                start["sample"] + weights,
                on.size,
            )

        def rank(name, times, heldout):
            if not self.pairrm:
                return LoopStage(name, "rank", times, "float32", [], START_ON_CPU[name], on.hosts)
            work = self.ranking(heldout)
            return LoopStage(name, "rank", times, work.dtype, work.pieces(), start["rank"], on.size)

        training = self.training()
        return [
            sample("held-out answers", rounds + 1, True),
            sample("sample", rounds, False),
            rank("rank", rounds, False),
            LoopStage("pairs", "pairs", rounds, "float32", [], start["pairs"], 1),
            LoopStage(
                "dpo",
                "dpo",
                rounds,
                training.args.dtype,
                training.pieces(),
                start["dpo"] + (1 + saves) * weights,
                on.size,
            ),
            # Each model against the start, and from the second on against the one before.
            rank("compare", 2 * rounds - 1, True),
            LoopStage(
                "kl",
                "kl",
                2 * rounds - 1,
                self.recipe.kl.dtype,
                self.divergence(),
                start["kl"] + weights,
                on.size,
            ),
            LoopStage("report", "report", rounds, "float32", [], start["report"], 1),
        ]

    def divergence(self) -> list[Piece]:
        """Log-probs of held-out answers, in the rows of a training without the second response."""
        answers = min(self.recipe.kl.prompts or self.heldout, self.heldout)
        answers *= self.recipe.heldout_sample.n
        return self.training().reference(math.ceil(answers / 2))

    def seconds(self, stage: LoopStage) -> float:
        """Of one time."""
        ideal = seconds(stage.pieces, self.on, stage.dtype).total
        return stage.imports + stage.start + ideal / self.efficiency.get(stage.kind, 1.0)

    def changed(self, stage: str, **flags) -> "Plan":
        """The plan with other flags of a stage."""
        args = dataclasses.replace(getattr(self.recipe, stage), **flags)
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, **{stage: args}))

    def others(self) -> Iterator[tuple[str, "Plan"]]:
        """Flags that may be quicker, and the plan with them."""
        changed = self.changed("sample", mesh=None).changed("heldout_sample", mesh=None)
        yield "no --mesh in sampling", changed
        if self.pairrm and self.ranking().dtype == "float32":
            yield "--dtype bfloat16 for PairRM", self.changed("rank", dtype="bfloat16")

    def hours(self) -> float:
        """Of the whole run."""
        return sum(stage.times * self.seconds(stage) for stage in self.stages()) / 3600


def efficiencies(given: tuple[str, ...], on: Slice) -> dict[str, float]:
    """From --efficiency: sample=0.5, or FILE.json of such names, over what is assumed."""
    found = dict(MEASURED_ON_CPU if on.is_cpu else ASSUMED)
    for word in given:
        name, _, value = word.partition("=")
        try:
            new = {name: value} if value else json.loads(Path(word).read_text())
            new = {name: float(value) for name, value in new.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            raise UserError(
                f"--efficiency {word}: write sample=0.5, or a JSON file of {', '.join(found)}"
            ) from None
        if unknown := [n for n, v in new.items() if n not in found or not 0 < v <= 1]:
            raise UserError(
                f"--efficiency {word}: {unknown[0]} must be one of {', '.join(found)}, "
                "above 0 and at most 1"
            )
        found |= new
    return found
