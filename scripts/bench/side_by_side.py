"""What this machine does: speed and memory, measured side by side with what users had before.

    python -m scripts.bench rank      PairRM: ours and llm-blender
    python -m scripts.bench sample    the sampling engine: ours and transformers' generate
    python -m scripts.bench dpo       training: ours and TRL's DPOTrainer (pip install trl)
    python -m scripts.bench gemm      the rate of fp32 matrix products

Everything is timed in one run, side by side in turns, since machines are noisy: trust the ratios.
What a GPU or TPU reaches, measured where only jax is installed: python -m scripts.bench accelerator
(--help lists its pieces).
"""

import dataclasses

from scripts.bench import dpo, machine, rank, sample
from stages.files.run import run_main


@dataclasses.dataclass
class Gemm:
    """The rate of fp32 matrix products: what the other figures are shares of."""


def gemm(_: Gemm) -> None:
    print(f"fp32 GEMM: {machine.gemm_rate() / 1e9:.0f} GFLOP/s")


Command = rank.Rank | sample.Sample | dpo.Dpo | Gemm
BENCHES = {rank.Rank: rank.bench, sample.Sample: sample.bench, dpo.Dpo: dpo.bench, Gemm: gemm}


def main(args: Command) -> None:
    BENCHES[type(args)](args)


def command(words: list[str]) -> int:
    return run_main(main, Command, words)
