"""What is made ahead in a thread."""

import threading
import time

import pytest

from model.batches import ahead


def test_all_come_in_order_and_no_more_are_made_ahead_than_asked():
    made = []

    def make(x):
        assert threading.current_thread() is not threading.main_thread()
        made.append(x)
        return x * x

    found = []
    for value, _ in ahead(make, iter(range(10)), depth=3):
        found.append(value)
        time.sleep(0.01)
        assert len(made) <= len(found) + 3
    assert found == [x * x for x in range(10)]
    assert list(ahead(make, [])) == []


def test_what_making_takes_is_waited_for_only_where_it_takes_longer_than_using():
    def slow(x):
        time.sleep(0.05)
        return x

    assert min(waited for _, waited in ahead(slow, range(4))) > 0.03
    waits = []
    for _, waited in ahead(slow, range(5)):
        waits.append(waited)
        time.sleep(0.2)
    assert waits[0] > 0.03 and max(waits[1:]) < 0.1


def test_an_error_comes_in_its_turn():
    def make(x):
        return 1 // x

    items = ahead(make, [1, 1, 0, 1])
    assert [next(items)[0], next(items)[0]] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(items)
