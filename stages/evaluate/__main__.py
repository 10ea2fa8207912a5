"""Did the model get better? Each command writes one file, with a manifest beside it.

    python -m stages.evaluate outputs   answers to a benchmark's instructions, or best-of-16 of them
    python -m stages.evaluate compare   two files of answers, judged by a ranker: the win rate
    python -m stages.evaluate judge     the same by an OpenAI-compatible endpoint, as AlpacaEval 2.0
    python -m stages.evaluate score     AlpacaEval's annotations: its win rates
    python -m stages.evaluate overlap   n-grams that training prompts and benchmarks share
    python -m stages.evaluate kl        how far a model is from the one that sampled

Each explains itself: python -m stages.evaluate compare --help
"""

import sys

from sharding import processes
from stages.evaluate import compare, judge, kl, outputs, overlap, score
from stages.files.run import run_main

COMMANDS = {
    outputs.Outputs: outputs.main,
    compare.Compare: compare.main,
    judge.Judge: judge.main,
    score.Score: score.main,
    overlap.Overlap: overlap.main,
    kl.Kl: kl.main,
}

Command = outputs.Outputs | compare.Compare | judge.Judge | score.Score | overlap.Overlap | kl.Kl


def main(args: Command) -> None:
    COMMANDS[type(args)](args)


if __name__ == "__main__":
    sys.exit(run_main(main, Command, several=processes))
