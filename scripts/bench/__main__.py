"""What this machine does: speed and memory, measured side by side with what users had before.

    python -m scripts.bench rank      PairRM: ours and llm-blender
    python -m scripts.bench sample    the sampling engine: ours and transformers' generate
    python -m scripts.bench dpo       training: ours and TRL's DPOTrainer (pip install trl)
    python -m scripts.bench bf16      what bfloat16 changes: answers, log-probs and DPO steps
    python -m scripts.bench gemm      the rates of matrix products

The first three time each side at each precision that it has, in turns within one run, since
machines are noisy: trust the ratios. They compare both at their best, and at the same precision.
What a GPU or TPU reaches, measured where only jax is installed: python -m scripts.bench accelerator
(--help lists its pieces).
"""

import sys


def main(words: list[str]) -> int:
    if words[:1] == ["accelerator"]:
        # Here: it runs where packages that the other commands need are not installed.
        from scripts.bench import accelerator

        return accelerator.main(words[1:])
    from scripts.bench import bf16, dpo, machine, rank, sample  # here: they need those packages
    from stages.files.run import run_main

    benches = {rank.Rank: rank.bench, sample.Sample: sample.bench, dpo.Dpo: dpo.bench}
    benches |= {bf16.Bf16: bf16.bench, machine.Gemm: machine.bench}
    command = rank.Rank | sample.Sample | dpo.Dpo | bf16.Bf16 | machine.Gemm
    return run_main(lambda args: benches[type(args)](args), command, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
