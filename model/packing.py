"""Prompts with their responses, packed into rows: the arrays that log-probs are computed from.

A sequence is a prompt and the responses to it. A response sees its prompt and itself and nothing
else, so a pair's prompt is computed once for both sides; several sequences lie one behind the other
in a row, so that hardly anything is padding:

    row         prompt  chosen    rejected  | prompt  chosen    rejected  | padding
    sequences   1 1 1   1 1 1 1   1 1 1     | 2 2     2 2 2     2 2       | 0 0
    branches    0 0 0   1 1 1 1   2 2 2     | 0 0     1 1 1     2 2       | 0 0
    positions   0 1 2   3 4 5 6   3 4 5     | 0 1     2 3 4     2 3       | 0 0

Axis letters: b row, t index in a row, r response token of a row. Runs without JAX.
"""

import dataclasses

import numpy as np

# Tokens a row should hold, if its longest sequence allows: rows can be filled evenly from about two
# sequences on, and attention's work grows with the row's length.
ROW_TOKENS = 384


@dataclasses.dataclass
class Sequence:
    prompt: list[int]  # at least one token
    responses: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


def bucket(length: int, step: int = 32) -> int:
    """The padded length that is compiled: multiples of `step`, from sixteen of them on of about a
    sixteenth to an eighth of the length."""
    while length > 16 * step:
        step *= 2
    return -(-length // step) * step


def coarse_bucket(length: int) -> int:
    """64, 96, 128, 192, 256, …: for what costs more to compile than a third of padding costs."""
    power = 64
    while power < length:
        power *= 2
    return power * 3 // 4 if 64 < length <= power * 3 // 4 else power


def pack(sequences: list[Sequence], shards: int = 1, alone: bool = False) -> dict[str, np.ndarray]:
    """Arrays, all int32, in a multiple of `shards` rows (over which a mesh cuts the batch), several
    sequences in a row unless each is to be `alone` in its own:

    tokens, positions, sequences, branches [b, t]: as above;
    predictors [b, r]: the index in its row of the token that predicts a response token;
    targets [b, r]: the response token;
    owners [b, r]: its response's number, counted through all sequences, and -1 at padding.
    """
    a_row = max([ROW_TOKENS, *map(len, sequences)])
    total = sum(map(len, sequences))
    count = -(-len(sequences) // shards) if alone else max(1, round(total / (shards * a_row)))
    rows = [[] for _ in range(shards * count)]
    filled = [0] * len(rows)
    # Longest first, each to the emptiest row.
    for i in sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i)):
        row = filled.index(min(filled))
        rows[row].append(i)
        filled[row] += len(sequences[i])
    responses = [sum(len(sequences[i]) - len(sequences[i].prompt) for i in row) for row in rows]
    # A response token more costs little: fewer lengths, so that fewer programs are compiled.
    b, t, r = len(rows), bucket(max(filled)), bucket(max(responses), 128)
    arrays = {name: np.zeros((b, t), np.int32)
              for name in ("tokens", "positions", "sequences", "branches")}  # fmt: skip
    arrays |= {name: np.zeros((b, r), np.int32) for name in ("predictors", "targets")}
    arrays["owners"] = np.full((b, r), -1, np.int32)

    first_response = np.cumsum([0] + [len(s.responses) for s in sequences])
    for row, members in enumerate(rows):
        at = counted = 0
        for number, i in enumerate(members, 1):
            sequence, start = sequences[i], at
            parts = [(0, 0, sequence.prompt)]
            end = len(sequence.prompt)
            parts += [(k, end, ids) for k, ids in enumerate(sequence.responses, 1)]
            for branch, position, ids in parts:
                here = slice(at, at + len(ids))
                arrays["tokens"][row, here] = ids
                arrays["positions"][row, here] = np.arange(position, position + len(ids))
                arrays["sequences"][row, here] = number
                arrays["branches"][row, here] = branch
                if branch and ids:
                    there = slice(counted, counted + len(ids))
                    # A response's first token follows the prompt's last one.
                    before = np.arange(at - 1, at + len(ids) - 1)
                    before[0] = start + end - 1
                    arrays["predictors"][row, there] = before
                    arrays["targets"][row, there] = ids
                    arrays["owners"][row, there] = first_response[i] + branch - 1
                    counted += len(ids)
                at += len(ids)
    return arrays
