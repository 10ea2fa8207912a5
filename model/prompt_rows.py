"""Rows of prompts, each of which the sampling engine prefills at once. Runs without JAX."""

from collections.abc import Iterable, Iterator

import numpy as np

from model.buckets import coarse_bucket

PREFILL_TOKENS = 512  # the most tokens in a row of several prompts; off CPU four times as many
PREFILL_PROMPTS = 8  # the most prompts in a row; a power of two: few numbers to compile


class PromptRow:
    """Prompts that are prefilled together, and what came of it: keys and values, and the logits of
    the first tokens."""

    def __init__(self, prompts: list[tuple[str, list[int]]]):
        self.prompts, self.kv, self.logits_pv = prompts, None, None
        self.starts = np.zeros(PREFILL_PROMPTS, np.int32)
        self.lengths = np.ones(PREFILL_PROMPTS, np.int32)  # 1: no prompt
        t = coarse_bucket(sum(len(token_ids) for _, token_ids in prompts))
        self.arrays = {x: np.zeros((1, t), np.int32) for x in ("tokens", "positions", "prompts")}
        start = 0
        for number, (_, token_ids) in enumerate(prompts):
            length = len(token_ids)
            here = slice(start, start + length)
            self.arrays["tokens"][0, here] = token_ids
            self.arrays["positions"][0, here] = np.arange(length)
            self.arrays["prompts"][0, here] = number + 1
            self.starts[number], self.lengths[number], start = start, length, start + length


def rows_of(
    prompts: Iterable[tuple[str, list[int]]], most: int = PREFILL_TOKENS
) -> Iterator[PromptRow]:
    """The prompts in rows, as many in each as `most` tokens and PREFILL_PROMPTS allow."""
    row: list[tuple[str, list[int]]] = []
    for prompt_id, token_ids in prompts:
        tokens = sum(len(ids) for _, ids in row) + len(token_ids)
        if row and (tokens > most or len(row) == PREFILL_PROMPTS):
            yield PromptRow(row)
            row = []
        row.append((prompt_id, token_ids))
    if row:
        yield PromptRow(row)
