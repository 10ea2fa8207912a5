"""The host's half of a training step: which examples it takes, in which micro-batches. Without JAX.

An example is anything with a `sequence` (model/packing.py) and a `prompt_id`, such as those of
stages/files/examples.py.
"""

import dataclasses
import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal, TypeVar

import numpy as np

from model.packing import Sequence, pack

T = TypeVar("T")
Made = TypeVar("Made")


@dataclasses.dataclass
class MicroBatch:
    prompt_ids: list[str]  # of its examples
    packed: dict[str, np.ndarray]  # the tokens: model/packing.py
    sides: dict[str, np.ndarray]  # one fp32 value per example: `weights` and what the loss needs


def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of the examples in epoch 0, 1, …: a function of these three numbers alone."""
    digest = hashlib.sha256(f"{seed}\n{epoch}".encode()).digest()
    return np.random.Generator(np.random.PCG64(list(digest))).permutation(examples)


@dataclasses.dataclass(frozen=True)
class Batcher:
    """How examples become the micro-batches of a step."""

    seed: int  # of the order of the examples
    batch_size: int  # examples per step
    size: int  # examples per micro-batch
    # What a row holds: all examples that one device gets, one example, or one response behind its
    # own copy of the prompt.
    rows: Literal["packed", "pairs", "responses"]
    shards: int  # into how many parts the mesh cuts a batch

    def cut(self, examples: list, indices) -> list[np.ndarray]:
        """The indices in micro-batches of about as many tokens each, so that few shapes are
        compiled."""
        by_length = sorted(indices, key=lambda i: (-len(examples[i].sequence), i))
        count = math.ceil(len(by_length) / self.size)
        return [np.array(by_length[m::count]) for m in range(count)]

    def pack(self, examples: list, indices) -> dict[str, np.ndarray]:
        """The arrays of model/packing.py for these examples."""
        sequences = [examples[i].sequence for i in indices]
        if self.rows == "responses":
            sequences = [Sequence(s.prompt, [r]) for s in sequences for r in s.responses]
        return pack(sequences, self.shards, alone=self.rows != "packed")

    def steps_per_epoch(self, examples: list) -> int:
        return math.ceil(len(examples) / self.batch_size)

    def of_step(
        self, examples: list, sides: Callable[[np.ndarray], dict], step: int
    ) -> list[MicroBatch]:
        """The micro-batches of step 0, 1, …, counted through the epochs: a function of the seed and
        the step alone. The last step of an epoch takes what is left.

        sides(indices): what the loss needs beside the tokens, one fp32 value per index.
        """
        epoch, number = divmod(step, self.steps_per_epoch(examples))
        order = epoch_order(self.seed, epoch, len(examples))
        indices = order[number * self.batch_size : (number + 1) * self.batch_size]
        made = []
        for part in self.cut(examples, indices):
            padding = 0, self.size - len(part)
            values = {n: np.pad(x, padding, constant_values=1) for n, x in sides(part).items()}
            values["weights"] = np.pad(np.ones(len(part), np.float32), padding)
            ids = [examples[i].prompt_id for i in part]
            made.append(MicroBatch(ids, self.pack(examples, part), values))
        return made


def ahead(
    make: Callable[[T], Made], of: Iterable[T], depth: int = 2
) -> Iterator[tuple[Made, float]]:
    """Yields (make(x), seconds waited for it) for each x of `of`, in order. Up to `depth` results
    are made ahead, in a thread, while the device computes. An exception of `make` is raised when
    its result is asked for."""
    of = iter(of)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        making = deque(pool.submit(make, x) for x in islice(of, depth))
        while making:
            start = time.monotonic()
            made = making.popleft().result()
            waited = time.monotonic() - start
            making.extend(pool.submit(make, x) for x in islice(of, 1))
            yield made, waited
