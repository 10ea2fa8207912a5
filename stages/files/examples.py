"""Pairs as token ids: from the rows of pairs.jsonl to what training packs into batches.

Tokens that were sampled are taken as they are; a row without token ids has its texts tokenised,
prompt and responses apart. Runs without JAX.
"""

import dataclasses
import math
from collections import Counter

import numpy as np

from model.packing import Sequence
from model.tokenizer import ChatTokenizer
from sharding.errors import UserError
from stages.files.rows import Row, field, messages_of, read_rows


@dataclasses.dataclass(slots=True)
class Example:
    """One pair as token ids, each response with the EOS that it ended with. int32 arrays: all pairs
    are held in memory, and lists of ints would take nine times as much."""

    prompt_id: str
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    sampled: tuple[float, float] | None  # the sampler's log-probs, where nothing was cut
    win_probability: float | None = None  # that the chosen response beats the rejected one

    @property
    def sequence(self) -> Sequence:
        return Sequence(self.prompt, [self.chosen, self.rejected])


def read_pairs(
    path: str,
    tokenizer: ChatTokenizer,
    vocabulary: int,
    max_length: int,
    max_prompt_length: int,
    aside: list[dict],
) -> tuple[list[Example], Counter]:
    """(the pairs as token ids, the counts of what was read, cut and set aside).

    A prompt beyond max_prompt_length is cut behind its template's head, a response beyond
    max_length (of both together) at its end. What cannot be trained on goes to `aside` with its
    reason. Raises UserError for a malformed row.
    """
    head = template_head(tokenizer)
    if head >= max_prompt_length:
        raise UserError(
            f"--max-prompt-length {max_prompt_length} is no longer than the chat "
            f"template's opening ({head} tokens): raise it"
        )
    lengths = max_length, max_prompt_length
    counts, examples, seen = Counter({"in": 0}), [], set()
    for where, row in read_rows(path):
        prompt_id = field(row, "prompt_id", str, where)
        if prompt_id in seen:
            raise UserError(f"{where}: prompt_id {prompt_id!r} stood above: remove one of them")
        seen.add(prompt_id)
        counts["in"] += 1
        example = _example(row, where, tokenizer, vocabulary, head, lengths, counts)
        if isinstance(example, str):
            counts[f"set aside: {example}"] += 1
            aside.append({"file": path, "prompt_id": prompt_id, "reason": example})
            continue
        examples.append(example)
    return examples, counts


def _example(row: Row, where: str, tokenizer, vocabulary: int, head: int, lengths, counts: Counter):
    """One pair as an Example, or the reason (str) why it cannot be used."""
    max_length, max_prompt_length = lengths
    try:
        prompt = _ids(row, "prompt_token_ids", where)
        if prompt is None:
            prompt = tokenizer.prompt_ids(messages_of(row, where))
        sides = [_response(row, side, tokenizer, where) for side in ("chosen", "rejected")]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not prompt or not all(sides):
        return "empty prompt or response"
    if sides[0] == sides[1]:
        return "chosen equals rejected"
    cut = len(prompt) > max_prompt_length
    if cut:
        prompt = prompt[:head] + prompt[len(prompt) - max_prompt_length + head :]
        counts["prompts cut"] += 1
    room = max_length - len(prompt)
    for i, ids in enumerate(sides):
        if len(ids) > room:
            sides[i], cut = ids[:room], True
            counts["responses cut"] += 1
    if sides[0] == sides[1]:
        return "chosen equals rejected after the cut"
    if max(map(max, (prompt, *sides))) >= vocabulary:
        raise UserError(f"{where}: a token id beyond the vocabulary: other tokenizer, or edited?")
    recorded = [row.get(f"{side}_logprob") for side in ("chosen", "rejected")]
    known = not cut and all(isinstance(x, (int, float)) for x in recorded)
    return Example(
        prompt_id=row["prompt_id"],
        prompt=np.array(prompt, np.int32),
        chosen=np.array(sides[0], np.int32),
        rejected=np.array(sides[1], np.int32),
        sampled=tuple(recorded) if known else None,
        win_probability=_win_probability(row, where),
    )


def _win_probability(row: Row, where: str) -> float | None:
    """The row's own `win_probability`, or what its ranking says; None where there is none.

    The logistic function of by how much the chosen response is ahead: of both orders' mean logit in
    PairRM's matrix, or else of the scores' difference (Wu et al. 2024, SPPO, section 5).
    """
    if row.get("win_probability") is not None:
        probability = field(row, "win_probability", (int, float), where)
        if not 0 <= probability <= 1:
            raise UserError(f"{where}: win_probability is {probability}, not between 0 and 1")
        return float(probability)
    best, worst, scores = (row.get(k) for k in ("chosen_index", "rejected_index", "all_rm_scores"))
    if not isinstance(best, int) or not isinstance(worst, int) or not isinstance(scores, list):
        return None
    try:
        matrix = row.get("comparisons")
        ahead = None
        if matrix is not None and None not in (matrix[best][worst], matrix[worst][best]):
            ahead = (matrix[best][worst] - matrix[worst][best]) / 2
        ahead = scores[best] - scores[worst] if ahead is None else ahead
        return 1 / (1 + math.exp(-min(max(ahead, -700), 700)))
    except (TypeError, IndexError):
        raise UserError(
            f"{where}: chosen_index, rejected_index, all_rm_scores and comparisons do not fit "
            "together: correct the line"
        ) from None


def _ids(row: Row, name: str, where: str) -> list[int] | None:
    if row.get(name) is None:
        return None
    ids = field(row, name, list, where)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(f"{where}: field {name!r} must hold token ids only")
    return ids


def _response(row: Row, side: str, tokenizer, where: str) -> list[int]:
    """The tokens that were sampled, or else the text's; EOS only where the answer ended by itself
    (a text without token ids counts as ended: published pairs hold whole answers)."""
    messages = field(row, side, list, where)
    ids = _ids(row, f"{side}_token_ids", where)
    reason = row.get(f"{side}_finish_reason") or "stop"
    if ids is None:
        if not messages or not isinstance(messages[-1], dict):
            raise UserError(f"{where}: {side!r} must be a list of {{role, content}}")
        ids = tokenizer.response_ids(field(messages[-1], "content", str, f"{where}, {side}"))
        if not ids:
            return []
    return ids + [tokenizer.eos_ids[0]] if reason == "stop" and tokenizer.eos_ids else ids


def template_head(tokenizer) -> int:
    """How many tokens the chat template puts before a user's text."""
    one, other = ([{"role": "user", "content": text}] for text in ("a", "7"))
    one, other = tokenizer.prompt_ids(one), tokenizer.prompt_ids(other)
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), 0)
