"""Pairs as token ids: from the rows of pairs.jsonl to what training packs into batches.

Tokens that were sampled are taken as they are. A row without token ids has its texts tokenised,
prompt and responses apart. Runs without JAX.
"""

import dataclasses
import math
from collections import Counter

import numpy as np

from model.packing import Sequence
from model.tokenizer import ChatTokenizer
from sharding.errors import UserError, at
from stages.files import rows
from stages.files.output import read_manifest
from stages.files.paths import file_sha256
from stages.files.rows import Pair, Response, RowFile, field


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


def sides(examples: list[Example], reference_p2: np.ndarray) -> dict[str, np.ndarray]:
    """What model/losses.py needs of pairs beside the policy's log-probs, fp32 [pairs] each.
    reference_p2: the reference's log-probs, chosen and rejected."""
    wins = [1.0 if e.win_probability is None else e.win_probability for e in examples]
    return {
        "ref_chosen": reference_p2[:, 0],
        "ref_rejected": reference_p2[:, 1],
        "chosen_tokens": np.array([len(e.chosen) for e in examples], np.float32),
        "rejected_tokens": np.array([len(e.rejected) for e in examples], np.float32),
        "win_probability": np.array(wins, np.float32),
    }


def read_pairs(
    path: str,
    tokenizer: ChatTokenizer,
    vocabulary: int,
    max_length: int,
    max_prompt_length: int,
    aside: list[dict],
) -> tuple[list[Example], RowFile[Pair]]:
    """(the pairs as token ids, the file with its sha256 and the counts of what was read, cut and
    set aside). The file is read once.

    A prompt beyond max_prompt_length loses tokens behind its template's head, and a response that
    ends beyond max_length, counted from the prompt's start, loses its end. A pair that cannot be
    trained on goes to `aside` with its reason. Raises UserError for a malformed row, and in a file
    that was edited for a text that is not that of its token ids.
    """
    head = template_head(tokenizer)
    if head >= max_prompt_length:
        raise UserError(
            f"--max-prompt-length {max_prompt_length} is no longer than the chat "
            f"template's opening ({head} tokens): raise it"
        )
    examples, counts = [], Counter()
    manifest = read_manifest(path)
    written = manifest and manifest.results.get("sha256")
    is_edited = written is not None and written != file_sha256(path)

    def example_of(pair: Pair) -> Example | str:
        """The pair as an Example, or the reason why it cannot be trained on."""
        if pair.unusable is not None:
            return pair.unusable
        prompt = _prompt_ids(pair, tokenizer, vocabulary)
        for side, response in (("chosen_", pair.chosen), ("rejected_", pair.rejected)):
            response.check_ids(pair.where, side, vocabulary)
        if is_edited:
            _check_texts(pair, prompt, tokenizer)
        responses = [_response_ids(r, tokenizer) for r in (pair.chosen, pair.rejected)]
        if not prompt or not all(responses):
            return "empty prompt or response"
        if responses[0] == responses[1]:
            return "chosen equals rejected"
        full = prompt, *responses
        if len(prompt) > max_prompt_length:
            prompt = prompt[:head] + prompt[len(prompt) - max_prompt_length + head :]
            counts["prompts cut"] += 1
        room = max_length - len(prompt)
        if too_long := sum(len(ids) > room for ids in responses):
            counts["responses cut"] += too_long
        chosen, rejected = (ids[:room] for ids in responses)
        if chosen == rejected:
            return "chosen equals rejected after the cut"
        logprobs = pair.chosen.logprob, pair.rejected.logprob
        is_cut = (prompt, chosen, rejected) != full
        return Example(
            pair.prompt_id,
            *(np.array(ids, np.int32) for ids in (prompt, chosen, rejected)),
            sampled=None if is_cut or None in logprobs else logprobs,
            win_probability=_win_probability(pair.fields, pair.where),
        )

    def each(pair: Pair) -> None:
        example = example_of(pair)
        if isinstance(example, str):
            counts[f"set aside: {example}"] += 1
            aside.append({"file": path, "prompt_id": pair.prompt_id, "reason": example})
        else:
            examples.append(example)

    file = rows.read(path, Pair, each)
    file.counts.update(counts)
    return examples, file


def _prompt_ids(pair: Pair, tokenizer: ChatTokenizer, vocabulary: int) -> list[int]:
    if pair.fields.get("prompt_token_ids") is not None:
        ids = field(pair.fields, "prompt_token_ids", list, pair.where)
        rows.check_token_ids(ids, "prompt_token_ids", pair.where, vocabulary)
        return ids
    with at(pair.where):
        return tokenizer.prompt_ids(pair.messages)


def _check_texts(pair: Pair, prompt: list[int], tokenizer: ChatTokenizer) -> None:
    """Raise UserError where a text is not that of its token ids, which would be trained on."""
    with at(pair.where):
        same = {"prompt": prompt == tokenizer.prompt_ids(pair.messages)}
    for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if response.token_ids is not None:
            text = tokenizer.decode(response.token_ids)
            # A stop string may begin within a token, which then has no id here.
            is_cut = response.finish_reason == "stop_string" and response.text.startswith(text)
            same[side] = is_cut or response.text == text
    for name, is_same in same.items():
        if not is_same:
            made = {f"{name}_{field.name}" for field in dataclasses.fields(Response)}
            raise UserError(
                f"{pair.where}: the text of {name!r} is not that of its token ids, which would be "
                f"trained on: if you edited it, remove {', '.join(sorted(made & set(pair.fields)))}"
            )


def _response_ids(response: Response, tokenizer: ChatTokenizer) -> list[int]:
    """The tokens that were sampled, else those of the text. A text without token ids counts as
    ended: published pairs hold whole answers."""
    ids = response.token_ids
    if ids is None:
        ids = tokenizer.response_ids(response.text)
        if not ids:
            return []
    elif response.end_token_id is None and ids and ids[-1] in tokenizer.eos_ids:
        return ids  # of a tool that counts the EOS to the answer
    return response.with_end(ids, tokenizer.end_id)


def _win_probability(fields: dict, where: str) -> float | None:
    """The row's own `win_probability`, else what PairRM says, else None.

    PairRM says σ(lead of the chosen response over the rejected one), the mean logit of both orders
    in its matrix (Wu et al. 2024, SPPO, section 5). Scores say no probability: those of a reward
    function have a scale of their own, wins are counts, and `--comparisons bubble` leaves 1 and −1
    to answers that never met.
    """
    if fields.get("win_probability") is not None:
        probability = field(fields, "win_probability", (int, float), where)
        if not 0 <= probability <= 1:
            raise UserError(f"{where}: win_probability is {probability}, not between 0 and 1")
        return float(probability)
    best, worst, matrix = map(fields.get, ("chosen_index", "rejected_index", "comparisons"))
    if matrix is None or best is None or worst is None:
        return None
    try:
        if best < 0 or worst < 0:
            raise IndexError
        logits = matrix[best][worst], matrix[worst][best]
        if None in logits:
            return None
        lead = (logits[0] - logits[1]) / 2
        if not math.isfinite(lead):
            raise ValueError
        return 1 / (1 + math.exp(-min(max(lead, -700), 700)))
    except (TypeError, ValueError, IndexError, KeyError, OverflowError):
        raise UserError(
            f"{where}: chosen_index, rejected_index and comparisons do not fit together: correct "
            "the line"
        ) from None


def template_head(tokenizer: ChatTokenizer) -> int:
    """How many tokens the chat template puts before a user's text."""
    one, other = (tokenizer.prompt_ids([{"role": "user", "content": text}]) for text in ("a", "7"))
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), 0)
