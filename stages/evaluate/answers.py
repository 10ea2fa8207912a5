"""Two files of answers side by side: which instructions both answer, and whose answers they are."""

from collections import Counter

from etils import epath

from sharding.errors import UserError
from stages.files.benchmarks import ModelOutput, read_outputs


def read_both(
    files: tuple[str, str], response: int, common: bool
) -> tuple[list[tuple[ModelOutput, ModelOutput]], list[str], Counter]:
    """(pairs of answers to the same instruction in the first file's order, the model of each file,
    counts).

    response: the index of the response that is taken from each row of a samples.jsonl. common:
    leave out instructions that only one file answers; otherwise UserError is raised for them.
    """
    ours, baseline = (read_outputs(path, response) for path in files)
    shared = [key for key in ours if key in baseline]
    ours_alone = [output for key, output in ours.items() if key not in baseline]
    baseline_alone = [output for key, output in baseline.items() if key not in ours]
    alone = [*ours_alone, *baseline_alone]
    if not shared:
        raise UserError(f"{files[0]} and {files[1]} have no instruction in common")
    if alone and not common:
        raise UserError(
            f"{len(ours_alone)} instructions are answered in {files[0]} alone and "
            f"{len(baseline_alone)} in {files[1]} alone, the first at {alone[0].where}: answer all "
            f"of them, or pass --common-only to compare the {len(shared)} that both answer"
        )
    counts = Counter({"in": len(shared) + len(alone), "out": len(shared)})
    for name, lone in (("outputs", ours_alone), ("baseline", baseline_alone)):
        if lone:
            counts[f"set aside: answered in --{name} alone"] = len(lone)
    models = [_model_of(outputs, path) for outputs, path in zip((ours, baseline), files)]
    return [(ours[key], baseline[key]) for key in shared], models, counts


def _model_of(outputs: dict[str, ModelOutput], path: str) -> str:
    """The model that all answers of a file name as their generator, or else the file's name."""
    names = {output.generator for output in outputs.values() if output.generator}
    return str(names.pop()) if len(names) == 1 else epath.Path(path).stem
