"""Which programs a recipe's stages run on a slice, how often, and how long that takes."""

import dataclasses
import math
import re
from collections import namedtuple

import jax

from model import decoder
from model.config import DecoderConfig
from model.generate import cache_unit, round_up, side_buffer
from model.packing import bucket, coarse_bucket
from model.prompt_rows import PREFILL_TOKENS
from scripts.bench.shapes import PAIRRM
from scripts.plan.slices import Slice
from scripts.recipe import Recipe, with_flags
from sharding.errors import UserError
from sharding.mesh import decoding_sizes, training_sizes
from stages import dpo, pairs, sample
from stages.evaluate.kl import Kl

# The share of the roofline that a stage reaches: assumed on accelerators, where nothing was
# measured; measured with the demo on a CPU. START: the seconds that a stage takes beside its
# programs, for imports, files, and compiling what the loop's cache of programs does not have.
ASSUMED = {"sample": 0.5, "rank": 0.3, "dpo": 0.4, "kl": 0.4}
MEASURED_ON_CPU = {"sample": 0.75, "rank": 0.8, "dpo": 0.6, "kl": 0.7}
START = {"sample": 65.0, "rank": 125.0, "dpo": 95.0, "kl": 65.0}
START_ON_CPU = {"sample": 13.0, "rank": 2.0, "dpo": 17.0, "kl": 5.0}
DISK = 1e9  # bytes per second and host of reading or writing a checkpoint
PAIRRM_LONGEST = 2048  # tokens of a comparison, PairRM's own limit on three texts

# times: how often a run does the stage. programs: name → how often per time. start: seconds beside
# the programs.
Stage = namedtuple("Stage", "name kind times programs start")


@dataclasses.dataclass
class Plan:
    recipe: Recipe
    config: DecoderConfig
    on: Slice
    prompts: int  # per iteration
    heldout: int
    lengths: tuple[float, float, float]  # tokens: mean prompt, mean answer, longest prompt
    efficiency: dict[str, float]

    def __post_init__(self):
        recipe = self.recipe
        self.sampling = self._args(sample.Args("C", "P", "S"), recipe.sample)
        self.heldout_sampling = self._args(sample.Args("C", "P", "S"), recipe.evaluate["sample"])
        self.training = self._args(dpo.Args("C", "D", "C2"), recipe.dpo)
        self.kl = self._args(Kl("C", "S", "O"), recipe.evaluate["kl"])
        test = with_flags(pairs.Args("K", "D"), recipe.pairs)
        self.test_pairs = test.test_count or round(test.test_fraction * self.prompts)
        self.micro_batches = math.ceil(self.training.batch_size / self.training.micro_batch_size)
        self.dtypes = {"sample": self.sampling.dtype, "dpo": self.training.dtype}
        self.dtypes |= {"rank": recipe.rank.get("dtype") or "float32", "kl": self.kl.dtype}
        self.pairrm = ".py:" not in recipe.ranker
        drawn = self.sampling.mesh or decoding_sizes(self.on.size, self.config)
        trained = self.training.mesh or training_sizes(self.on.size, self.config)
        self.meshes = {"sample": self._filled("sample", drawn), "rank": (1, 1, 1)}
        self.meshes["dpo"] = self._filled("dpo", trained)
        cut = math.prod(self.meshes["sample"][:2])
        slots = min(self.sampling.slots or 256, self.prompts * self.sampling.n)
        self.slots = -(-slots // cut) * cut
        self.parameters = sum(x.size for x in jax.tree.leaves(decoder.abstract(self.config)))

    def _args(self, args, table: dict):
        """A stage's Args with the flags of a recipe's table. "auto" becomes the machine's dtype: on
        a CPU float32, in which the efficiencies were measured."""
        args = with_flags(args, table)
        auto = "float32" if self.on.chip.name == "cpu" else "bfloat16"
        return dataclasses.replace(args, dtype=auto if args.dtype == "auto" else args.dtype)

    def _filled(self, stage: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
        rest = self.on.size // math.prod(side for side in sizes if side != -1)
        filled = tuple(rest if side == -1 else side for side in sizes)
        if math.prod(filled) != self.on.size:
            told = f"{stage}: mesh {' '.join(map(str, sizes))} does not cover {self.on.size} chips"
            raise UserError(f"{told}: change it in the recipe, or choose another machine")
        return filled

    def changed(self, stage: str, **flags) -> "Plan":
        """The plan with other flags of a stage."""
        table = getattr(self.recipe, stage) | flags
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, **{stage: table}))

    def on_more(self, factor: int) -> "Plan":
        """The plan on `factor` times as many chips, with the meshes that the stages choose."""
        if factor == 1:
            return self
        plan = self.changed("sample", mesh=None).changed("dpo", mesh=None)
        return dataclasses.replace(plan, on=self.on.times(factor))

    # ---------------------------------------------------------------- the programs

    def programs(self) -> list[dict]:
        """What scripts/plan/compile.py is asked for. A program is compiled with the longest texts
        that are allowed, which decide its memory, and traced with the `usual` ones, which decide
        its time. A step of sampling is bound by memory, so it is compiled with both."""
        kind, chip = self.on.compiler, {"chip": self.on.chip.name}
        drawn = dataclasses.asdict(self.sampling) | chip
        trained = dataclasses.asdict(self.training) | chip
        (tokens, answer, most), limit = self.lengths, self.sampling.max_new_tokens
        # The longest of n lengths that fall off exponentially is the mean times ln n.
        times = max(1.0, math.log(self.slots))
        usual = coarse_bucket(round(min(most, tokens * times) + min(limit, answer * times)))
        longest, usual = (round_up(x, cache_unit(kind)) for x in (round(most) + limit, usual))
        drawn |= {"slots": self.slots, "length": longest, "side_buffer": side_buffer(kind)}
        prompts = drawn | {"tokens": coarse_bucket(round(most))}
        # The mean of such answers, once those that make a pair too long are cut.
        prompt = min(trained["max_prompt_length"], tokens)
        said = answer * -math.expm1((prompt - trained["max_length"]) / answer)
        mean = {"max_prompt_length": round(prompt), "max_length": round(prompt) + round(said)}
        ranked = {"dtype": self.dtypes["rank"]} | chip | self._comparisons(PAIRRM_LONGEST)
        # A TPU's compiler chooses the cache's layout; with another one the cache would lie twice.
        needed = {"start": kind == "tpu", "layer": self.pairrm}
        asked = [
            ("sample: a step", "decode", drawn, {}),
            ("sample: a usual step", "decode", drawn | {"length": min(usual, longest)}, {}),
            ("sample: prompts", "prefill", prompts, {"tokens": coarse_bucket(round(tokens))}),
            ("sample: starts", "start", drawn | {"tokens": 4 * PREFILL_TOKENS}, {}),
            ("rank: a layer", "layer", ranked, self._comparisons()),
            ("dpo: gradients", "gradients", trained, mean),
        ]
        keys, config = ("name", "build", "given", "usual"), dataclasses.asdict(self.config)
        programs = [dict(zip(keys, each)) for each in asked if needed.get(each[1], True)]
        where = [self.meshes[each["name"].partition(":")[0]] for each in programs]
        return [each | {"config": config, "mesh": mesh} for each, mesh in zip(programs, where)]

    def _comparisons(self, length: int | None = None) -> dict[str, int]:
        """The size of a device's call, as in model/rankers/pairrm.py. length: default the usual."""
        usual = round(min(self.lengths[0], 1224) + 2 * self.lengths[1] + 9)
        length = length or min(PAIRRM_LONGEST, bucket(usual, 128))
        tokens = 1024 if self.on.chip.name == "cpu" else 16384
        return {"length": length, "rows": 1 << (max(1, tokens // length).bit_length() - 1)}

    # ---------------------------------------------------------------- the stages

    def stages(self) -> list[Stage]:
        rounds, training = self.recipe.iterations, self.training
        micro, disk = training.micro_batch_size, 4 * self.parameters / DISK / self.on.hosts
        start = START_ON_CPU if self.on.chip.name == "cpu" else START
        count = self.prompts - self.test_pairs
        steps = training.epochs * math.ceil(count / training.batch_size)
        passes = 4 if training.remat == "full" else 3  # forward passes that take a gradient's time
        references = (count + 3 * self.test_pairs) / micro / passes
        trained = {"dpo: gradients": steps * self.micro_batches + references}
        answers = min(self.kl.prompts or self.heldout, self.heldout) * self.heldout_sampling.n
        distance = {"dpo: gradients": answers / 2 / micro / passes}  # a pair holds two answers
        # Each model is compared with the start, and from the second on with the one before.
        table = (
            ("held-out answers", "sample", rounds + 1, self._drawn(True), disk),
            ("sample", "sample", rounds, self._drawn(False), disk),
            ("rank", "rank", rounds, self._ranked(self.prompts, self.sampling.n), 0),
            ("dpo", "dpo", rounds, trained, (3 if training.save_every else 2) * disk),
            ("compare", "rank", 2 * rounds - 1, self._ranked(self.heldout, 2), 0),
            ("kl", "kl", 2 * rounds - 1, distance, disk),
        )
        return [Stage(*each[:4], each[4] + start[each[1]]) for each in table]

    def _drawn(self, heldout: bool) -> dict[str, float]:
        """The steps of all slots, and the prompts. Slots are filled and refilled; when no prompt
        waits, they are halved as their answers end, twice at most."""
        args = self.heldout_sampling if heldout else self.sampling
        prompts = self.heldout if heldout else self.prompts
        answers, limit = prompts * args.n, args.max_new_tokens
        mean, slots = min(limit, self.lengths[1]), min(args.slots or 256, answers)
        half = min(limit, mean * math.log(2))  # until half of them have ended
        end = half + min(half, limit - half) / 2 + max(0.0, limit - 2 * half) / 4
        steps = (answers - slots) * mean / slots + end
        return {"sample: a usual step": steps * slots / self.slots, "sample: prompts": prompts}

    def _ranked(self, prompts: int, n: int) -> dict[str, float]:
        """How many layers of PairRM, on each chip."""
        # bubble finds the best in n − 1 duels, the worst among about half; both orders each.
        bubble = self.recipe.rank.get("comparisons") == "bubble"
        comparisons = prompts * (2 * (n - 1) + n - 2 if bubble else n * (n - 1))
        calls = comparisons / self._comparisons()["rows"] / self.on.size
        return {"rank: a layer": PAIRRM.num_hidden_layers * calls} if self.pairrm else {}

    def seconds(self, stage: Stage, work: dict[str, dict]) -> dict[str, float]:
        """The seconds that a stage takes each time. work: name → the program's figures from
        scripts/plan/compile.py. "work" of the result: a program takes the time that bounds it, over
        the stage's efficiency, or, if that is longer, the TPU compiler's estimate of cycles."""
        sums = dict.fromkeys(("products", "memory", "exchange", "cycles", "work"), 0.0)
        for name, times in stage.programs.items():
            each = self.on.seconds(work[name]["usual"], self.dtypes[stage.kind])
            bound = max(each["products"], each["memory"], each["exchange"])
            each["work"] = max(bound / self.efficiency[stage.kind], each["cycles"])
            sums = {part: total + times * each[part] for part, total in sums.items()}
        return sums | {"start": stage.start}

    def hours(self, work: dict[str, dict]) -> float:
        took = ((stage.times, self.seconds(stage, work)) for stage in self.stages())
        return sum(times * (each["start"] + each["work"]) for times, each in took) / 3600


def efficiencies(words: tuple[str, ...], on: Slice) -> dict[str, float]:
    """The shares of the roofline, with those of --efficiency (sample=0.5) in place of defaults."""
    known = dict(MEASURED_ON_CPU if on.chip.name == "cpu" else ASSUMED)
    for word in words:
        name, _, share = word.partition("=")
        if name not in known or not re.fullmatch(r"0?\.\d*[1-9]\d*|1(\.0*)?", share):
            rule = f"{', '.join(known)}, above 0 and at most 1"
            raise UserError(f"--efficiency {word}: write NAME=SHARE, of {rule}")
        known[name] = float(share)
    return known
