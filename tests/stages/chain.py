"""The stages as their command lines run them, for the tests of several stages."""

from stages import dpo, rank, sample
from stages.files.run import run_main
from tests import tiny


def run_sample(folder, *more, out="samples.jsonl", prompts="prompts.jsonl", model="model"):
    argv = [
        "--checkpoint",
        str(folder / model),
        "--prompts",
        str(folder / prompts),
        "--out",
        str(folder / out),
        "--n",
        "3",
        "--max-new-tokens",
        "12",
        "--temperature",
        "1",
        "--slots",
        "4",
        *more,
    ]
    return run_main(sample.main, sample.Args, argv)


def run_rank(folder, *more, ranker=None, out="ranked.jsonl", samples="samples.jsonl"):
    argv = [
        "--ranker",
        ranker or f"{folder / 'reward.py'}:reward",
        "--samples",
        str(folder / samples),
        "--out",
        str(folder / out),
        *more,
    ]
    return run_main(rank.main, rank.Args, argv)


def dpo_argv(folder, out, *more, pairs="pairs.jsonl", model="model"):
    return [
        "--checkpoint",
        str(folder / model),
        "--pairs",
        str(folder / pairs),
        "--out",
        str(out),
        "--learning-rate",
        "1e-3",
        "--batch-size",
        "2",
        "--micro-batch-size",
        "1",
        "--epochs",
        "2",
        "--warmup-ratio",
        "0",
        "--max-length",
        "128",
        "--max-prompt-length",
        "96",
        "--mesh",
        "1",
        "1",
        "-1",
        *more,
    ]


def run_dpo(folder, out, *more, **paths):
    return run_main(dpo.main, dpo.Args, dpo_argv(folder, out, *more, **paths))


def metrics(out):
    """A training's metrics, but for those of time and memory."""
    measured = {"host_wait", "tokens_per_second", "model_flops_per_second", "peak_memory_gb"}
    rows = tiny.read_jsonl(f"{out}.log/metrics.jsonl")
    assert all(row.keys() >= measured for row in rows if "loss" in row)
    return [{name: x for name, x in row.items() if name not in measured} for row in rows]


def refused(capsys, code, *words):
    """The command ended with 2 and one line on stderr that holds the words."""
    assert code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]
