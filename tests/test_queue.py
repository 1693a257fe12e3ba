"""The bounded queue between two threads."""

import threading

import pytest

from streamflow._queue import BoundedQueue


def test_a_queue_that_drops_keeps_the_newest_and_counts_the_others():
    box = BoundedQueue(1, block=False)
    for k in range(4):
        box.put(k)
    assert (box.take(), box.take(), box.dropped) == (3, None, 3) and not box


def test_a_queue_that_blocks_keeps_order_and_makes_who_puts_wait():
    box, put = BoundedQueue(2, block=True), []

    def fill():
        for k in range(5):
            put.append(box.put(k))

    thread = threading.Thread(target=fill)
    thread.start()
    taken = []
    while len(taken) < 3:
        taken += [one for one in [box.take()] if one is not None]
    assert taken == [0, 1, 2]
    box.close()
    thread.join(5)
    assert not thread.is_alive() and put[:3] == [True] * 3 and len(put) == 5 and box.dropped == 0


def test_room_is_waited_for():
    box = BoundedQueue(1, block=True)
    assert box.wait_for_room(0) and box.put(1) and not box.wait_for_room(0)
    threading.Timer(0.05, box.take).start()
    assert box.wait_for_room(5)
    box.close()
    assert not box.wait_for_room(5)


def test_get_waits_until_something_is_queued_or_the_queue_is_closed():
    box = BoundedQueue(1, block=False)
    with pytest.raises(TimeoutError, match="within 0 s"):
        box.get(0)
    threading.Timer(0.05, box.put, (7,)).start()
    assert box.get() == 7
    box.put(8)
    box.close()
    assert not box.put(9) and (box.get(), box.get()) == (8, None)


@pytest.mark.parametrize("depth", [0, -1, 1.5, None])
def test_a_queue_holds_at_least_one(depth):
    with pytest.raises(ValueError, match="at least 1"):
        BoundedQueue(depth, block=True)
