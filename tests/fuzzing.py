"""What the fuzz tests share: how many inputs a reader gets, and how a valid input is damaged.

FUZZ_CASES=2000 bash scripts/test.sh -k fuzz     tries so many on each reader, the same each time
"""

import copy
import os
import struct

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st

from sharding.errors import UserError

COUNT = int(os.environ.get("FUZZ_CASES", 0))


def cases(quick: int = 30) -> settings:
    """Settings of one fuzz test; quick: its number of inputs in the suite. An input that takes 20
    seconds counts as one that hangs."""
    return settings(
        max_examples=COUNT or quick,
        derandomize=True,
        database=None,
        deadline=20_000,
        suppress_health_check=list(HealthCheck),
    )


def refusal(read, *args) -> tuple:
    """(what `read` gives, None), or (None, its UserError), which must be one line."""
    try:
        result = read(*args)
        event(f"{read.__name__}: read")
        return result, None
    except UserError as error:
        event(f"{read.__name__}: refused")
        line = str(error)
        assert line.isprintable() and 10 < len(line) < 2500, line
        return None, error


# Whole numbers at the borders of what files, arrays and floats hold.
BORDERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    31,
    32,
    33,
    255,
    256,
    2**31 - 1,
    2**31,
    2**32,
    2**60,
    2**63,
    10**400,
]
TEXTS = ["", "0", "1", "true", "null", "\0", "\n", "../x", "/etc/passwd", "é", "\ud800", "x" * 3000]


def odd_values() -> st.SearchStrategy:
    """JSON values of every kind, at the borders more often than not."""
    leaf = st.one_of(
        st.sampled_from([None, True, False, *BORDERS]),
        st.sampled_from([float("nan"), float("inf"), -0.0, 1e-320, 1e308, 0.5, 1e-6, 1.0]),
        st.sampled_from(TEXTS),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
    )
    return st.recursive(
        leaf,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=4,
    )


@st.composite
def changed(draw, content, keys: tuple[str, ...] = ()):
    """A JSON value with up to three things replaced, removed, repeated or added somewhere in it.
    keys: names to add to an object."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        node = content
        while True:
            if not isinstance(node, dict | list) or not node:
                break
            places = list(node) if isinstance(node, dict) else range(len(node))
            place = draw(st.sampled_from(places))
            child = node[place]
            if isinstance(child, dict | list) and child and draw(st.booleans()):
                node = child
                continue
            what = draw(st.sampled_from(["replace", "replace", "remove", "add", "repeat"]))
            if what == "remove":
                del node[place]
            elif what == "replace":
                node[place] = draw(odd_values())
            elif isinstance(node, list):
                node.insert(place, child if what == "repeat" else draw(odd_values()))
            else:
                name = draw(st.sampled_from(keys) if keys else st.text(max_size=5))
                node[name] = child if what == "repeat" else draw(odd_values())
            break
    return content


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes with up to three places overwritten, cut out, repeated, or cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kinds = ["byte"] * 4 + ["number", "long"] * 2 + ["cut", "repeat", "end"]
        what = draw(st.sampled_from(kinds))
        size = draw(st.integers(1, 64))
        if what == "byte":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif what in ("number", "long"):
            kind, limit = ("<I", 2**32) if what == "number" else ("<Q", 2**64)
            number = draw(st.sampled_from(BORDERS)) % limit
            data[at : at + struct.calcsize(kind)] = struct.pack(kind, number)
        elif what == "cut":
            del data[at : at + size]
        elif what == "repeat":
            data[at:at] = data[at : at + size]
        else:
            del data[at:]
    return bytes(data)
