"""Prompts with their responses, packed into rows: the arrays that log-probs are computed from.

A sequence is a prompt and the responses to it. A response attends to its prompt and itself only, so
the prompt of a pair is computed once for both sides. Sequences lie one behind the other in a row,
so that there is little padding:

    row         prompt  chosen    rejected  | prompt  chosen    rejected  | padding
    positions   0 1 2   3 4 5 6   3 4 5     | 0 1     2 3 4     2 3       | 0 0

For attention only, the row is unfolded: each response with a copy of its prompt before it, a plain
causal text, in rows about as long as the longest text. So no response computes scores with another
response, and any causal attention kernel can be used:

    unfolded    prompt  chosen               segments   1 1 1 1 1 1 1
                prompt  rejected  padding               1 1 1 1 1 1 0
                prompt  chosen  | prompt  rejected      1 1 1 1 1 2 2 2 2

Axis letters: b row, t index in a row, u unfolded row, s index in an unfolded row, c copy of a
token. Runs without JAX.
"""

import dataclasses

import numpy as np

from model.buckets import bucket, coarse_bucket


@dataclasses.dataclass
class Sequence:
    prompt: list[int] | np.ndarray  # at least one token
    responses: list

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


def pack(sequences: list[Sequence], shards: int = 1, alone: bool = False) -> dict[str, np.ndarray]:
    """The int32 arrays of a batch. There is one row per shard of the mesh, or, if `alone`, one row
    per sequence, filled up to a multiple of `shards`.

    tokens, positions [b, t]: as above;
    unfold [b, u, s]: the index in its row of each token of the unfolded rows, 0 at padding;
    segments [b, u, s]: 1, 2, … for the texts of an unfolded row, 0 at padding;
    copies [b, t, c]: the places of a token, counted through its row's unfolded rows; -1: no more;
    predictors, targets [b, t]: for each response token, the index in its row of the token that
    predicts it, and its id; the response tokens of a row stand first;
    owners [b, t]: the number of the response, counted through all sequences; -1 behind the last.
    """
    count = -(-len(sequences) // shards) if alone else 1
    rows = _fill(list(map(len, sequences)), shards * count)
    b, t = len(rows), bucket(max(sum(len(sequences[i]) for i in row) for row in rows))
    arrays = {
        name: np.zeros((b, t), np.int32)
        for name in ("tokens", "positions", "predictors", "targets")
    }
    arrays["owners"] = np.full((b, t), -1, np.int32)
    first_response = np.cumsum([0] + [len(s.responses) for s in sequences])
    texts = []  # per row: the indices of each response with its prompt
    for row, members in enumerate(rows):
        at = counted = 0
        texts.append([])
        for i in members:
            prompt, responses = sequences[i].prompt, sequences[i].responses
            asked = np.arange(at, at + len(prompt))
            arrays["tokens"][row, asked] = prompt
            arrays["positions"][row, asked] = np.arange(len(prompt))
            at += len(prompt)
            for number, ids in enumerate(responses, first_response[i]):
                said = np.arange(at, at + len(ids))
                arrays["tokens"][row, said] = ids
                arrays["positions"][row, said] = len(prompt) + np.arange(len(ids))
                text = np.concatenate([asked, said])
                texts[-1].append(text)
                # A response's first token follows the prompt's last one.
                here = slice(counted, counted + len(ids))
                arrays["predictors"][row, here] = text[len(prompt) - 1 : -1]
                arrays["targets"][row, here] = ids
                arrays["owners"][row, here] = number
                at, counted = at + len(ids), counted + len(ids)
    return arrays | _unfold(texts, t)


def _fill(lengths: list[int], rows: int) -> list[list[int]]:
    """Item numbers per row. The items are dealt out longest first, each to the emptiest row."""
    dealt, filled = [[] for _ in range(rows)], [0] * rows
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = filled.index(min(filled))
        dealt[row].append(i)
        filled[row] += lengths[i]
    return dealt


def _unfold(texts: list[list[np.ndarray]], t: int) -> dict[str, np.ndarray]:
    """`unfold`, `segments` and `copies`. texts: per row, the indices of each text's tokens in it;
    t: the length of a row."""
    s = coarse_bucket(max((len(text) for row in texts for text in row), default=1))
    placed = []  # per row: (unfolded row, start in it, segment) of each text
    for row in texts:
        filled, held, places = [], [], [None] * len(row)
        for i in sorted(range(len(row)), key=lambda i: (-len(row[i]), i)):
            fits = (u for u, length in enumerate(filled) if length + len(row[i]) <= s)
            u = next(fits, len(filled))
            if u == len(filled):
                filled.append(0)
                held.append(0)
            held[u] += 1
            places[i] = u, filled[u], held[u]
            filled[u] += len(row[i])
        placed.append(places)
    u = max([1, *(place[0] + 1 for places in placed for place in places)])
    c = max([1, *(int(np.bincount(np.concatenate(row)).max()) for row in texts if row)])
    unfold, segments = np.zeros((2, len(texts), u, s), np.int32)
    copies = np.full((len(texts), t, c), -1, np.int32)
    for row, places in enumerate(placed):
        seen = np.zeros(t, np.int32)
        for text, (to, start, segment) in zip(texts[row], places):
            unfold[row, to, start : start + len(text)] = text
            segments[row, to, start : start + len(text)] = segment
            copies[row, text, seen[text]] = to * s + start + np.arange(len(text))
            seen[text] += 1
    return {"unfold": unfold, "segments": segments, "copies": copies}
