"""Two files of answers side by side: which instructions both answer, and whose answers they are."""

from collections import Counter

from etils import epath

from sharding.errors import UserError
from stages.files.benchmarks import ModelOutput


def align(
    ours: dict[str, ModelOutput],
    baseline: dict[str, ModelOutput],
    names: tuple[str, str],
    common: bool,
    counts: Counter,
) -> list[tuple[ModelOutput, ModelOutput]]:
    """Pairs of answers to the same instruction, in our order. Adds to `counts`.

    Raises UserError where only one of the files `names` answers an instruction, unless the
    `common` ones are enough.
    """
    shared = [key for key in ours if key in baseline]
    ours_alone = [output for key, output in ours.items() if key not in baseline]
    baseline_alone = [output for key, output in baseline.items() if key not in ours]
    alone = [*ours_alone, *baseline_alone]
    if not shared:
        raise UserError(f"{names[0]} and {names[1]} have no instruction in common")
    if alone and not common:
        raise UserError(
            f"{len(ours_alone)} instructions are answered in {names[0]} alone and "
            f"{len(baseline_alone)} in {names[1]} alone, the first at {alone[0].where}: answer all "
            f"of them, or pass --common-only to compare the {len(shared)} that both answer"
        )
    counts["in"] = len(shared) + len(alone)
    counts["out"] = len(shared)
    for name, lone in (("outputs", ours_alone), ("baseline", baseline_alone)):
        if lone:
            counts[f"set aside: answered in --{name} alone"] = len(lone)
    return [(ours[key], baseline[key]) for key in shared]


def generator_of(outputs: dict[str, ModelOutput], path: str) -> str:
    """The model that all answers of a file name as their generator, or else the file's name."""
    names = {output.generator for output in outputs.values() if output.generator}
    return str(names.pop()) if len(names) == 1 else epath.Path(path).stem
