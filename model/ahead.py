"""The host prepares the next batches in a thread while the device computes."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
Made = TypeVar("Made")


def ahead(
    make: Callable[[T], Made], of: Iterable[T], depth: int = 2
) -> Iterator[tuple[Made, float]]:
    """Yields (make(x), seconds waited for it) for each x of `of`, in order. Up to `depth` results
    are made ahead. An exception of `make` is raised when its result is asked for."""
    of = iter(of)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        making = deque(pool.submit(make, x) for x in islice(of, depth))
        while making:
            start = time.monotonic()
            made = making.popleft().result()
            waited = time.monotonic() - start
            making.extend(pool.submit(make, x) for x in islice(of, 1))
            yield made, waited
