"""Updates from many threads: only the last of those that wait is encoded, none is lost, and ticks go on meanwhile."""

from __future__ import annotations

import threading
import time

import pytest
from conftest import PROMPT

from streamflow.stream.update_queue import SHARE, UpdateQueue

WAIT = 20  # seconds after which a thread that should have gone on has not


class Held:
    """Holds a module's calls, once asked to, until they are let go, and counts them."""

    def __init__(self, module):
        self.calls, self.inside, self.release = 0, threading.Event(), threading.Event()
        self.holding = False
        module.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.calls += 1
        if self.holding:
            self.inside.set()
            assert self.release.wait(WAIT)


def until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def in_thread(function, into):
    def run():
        try:
            into.append(function())
        except Exception as error:
            into.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.fixture
def stream(stream_of):
    return stream_of("sd3", [1, 2, 3], cfg_type="none")


@pytest.fixture
def held(stream):
    """The encoder, held by an update to "first" that runs in a thread of its own."""
    held = Held(stream.pipe.text_encoder)
    held.holding = True
    thread = in_thread(lambda: stream.update(prompt="first"), [])
    assert held.inside.wait(WAIT)
    yield held
    held.release.set()
    thread.join()


def waiting(stream):
    return len(stream._denoiser.queue._waiting)


def test_of_the_updates_that_wait_only_the_last_is_encoded(stream, held):
    numbers, threads = [], []
    for k in range(8):
        threads.append(in_thread(lambda k=k: stream.update(prompt=f"number {k}"), numbers))
        until(lambda k=k: waiting(stream) == k + 1)
    held.release.set()
    for thread in threads:
        thread.join()
    stream.txt2img()
    assert held.calls == 2 and numbers == [2] * 8
    assert stream._denoiser.state.request.prompt == "number 7"


def test_fields_that_no_later_update_sets_are_kept(stream, held):
    asked = [{"prompt": "second", "seed": 5}, {"prompt": "third"}, {"delta": 0.5}]
    threads = []
    for k, fields in enumerate(asked):
        threads.append(in_thread(lambda fields=fields: stream.update(**fields), []))
        until(lambda k=k: waiting(stream) == k + 1)
    held.release.set()
    for thread in threads:
        thread.join()
    stream.txt2img()
    assert (stream.seed, stream._denoiser.state.request.prompt, stream.delta) == (5, "third", 0.5)


def test_an_update_is_made_after_all_where_the_one_that_took_its_place_fails(stream, held):
    good, bad = [], []
    one = in_thread(lambda: stream.update(prompt="good"), good)
    until(lambda: waiting(stream) == 1)
    two = in_thread(lambda: stream.update(prompt="bad", num_inference_steps=-1), bad)
    until(lambda: waiting(stream) == 2)
    held.release.set()
    one.join()
    two.join()
    stream.txt2img()
    assert isinstance(bad[0], ValueError) and good == [2] and stream._denoiser.state.request.prompt == "good"


def test_ticks_go_on_while_a_prompt_is_encoded(stream, held):
    for _ in range(5):
        stream.txt2img()
    assert stream._denoiser.state.request.prompt == PROMPT
    held.release.set()
    until(lambda: stream._updates.pending is not None)
    stream.txt2img()
    assert stream._denoiser.state.request.prompt == "first"


def drawn(updates, now=None):
    """This thread has drawn."""
    updates.drawn_by, updates.drawn_at = threading.get_ident(), time.monotonic() if now is None else now


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_pause_follows_an_update_while_another_thread_draws_and_only_then():
    clock = Clock()
    updates = UpdateQueue(clock)

    def takes(seconds):
        clock.now += seconds
        return 1

    def left():
        from streamflow.stream.update_queue import _Ticket

        ticket = _Ticket(frozenset(), frozenset(), None)
        updates._waiting.append(ticket)
        try:
            return updates._left(ticket)
        finally:
            updates._waiting.remove(ticket)

    updates.apply({"prompt"}, None, lambda: takes(0.03))
    assert left() == 0, "nobody draws"
    drawn(updates, clock())
    assert left() == 0, "this thread draws, and would wait for itself"
    threading.Thread(target=drawn, args=(updates, clock())).start()
    until(lambda: updates.drawn_by != threading.get_ident())
    pause = 0.03 * (1 / SHARE - 1)
    assert left() == pytest.approx(pause)
    clock.now += pause
    updates.apply({"prompt"}, None, lambda: takes(60.0))
    threading.Thread(target=drawn, args=(updates, clock())).start()
    until(lambda: updates.drawn_at == clock.now)
    assert left() == 1.0, "a second at most"
    clock.now += 5
    assert left() == 0, "nobody draws any more"


def test_who_waits_for_an_update_under_way_goes_on_with_it_however_many_come():
    """A stream of updates would otherwise hold the first callers for as long as it lasts."""
    updates, release, ended = UpdateQueue(), threading.Event(), []
    held = in_thread(lambda: updates.apply({"a"}, None, lambda: release.wait(WAIT) and 1), ended)
    until(lambda: updates._busy)
    again = threading.Event()
    one = in_thread(lambda: ended.append("one") or updates.apply({"a"}, None, lambda: 2), [])
    until(lambda: len(updates._waiting) == 1)
    two = in_thread(lambda: updates.apply({"a"}, None, lambda: again.wait(WAIT) and 3), ended)
    until(lambda: len(updates._waiting) == 2)
    release.set()
    until(lambda: updates._busy and len(updates._waiting) == 1)  # the second is made, and the first waits for it
    three = in_thread(lambda: updates.apply({"a"}, None, lambda: 4), ended)
    until(lambda: len(updates._waiting) == 2)
    assert [ticket.replaced_by is not None for ticket in updates._waiting] == [True, False]
    assert updates._waiting[0].replaced_by not in updates._waiting
    again.set()
    for thread in (held, one, two, three):
        thread.join()


def test_the_thread_that_draws_is_never_left_out_for_a_later_update():
    updates, release, ended = UpdateQueue(), threading.Event(), []
    drawn(updates)
    drawer = threading.get_ident()
    held = in_thread(lambda: updates.apply({"a"}, None, lambda: release.wait(WAIT) and 1), ended)
    until(lambda: updates._busy)
    later = threading.Timer(0.1, lambda: updates.apply({"a"}, None, lambda: 9))
    later.start()
    threading.Timer(0.3, release.set).start()
    assert updates.drawn_by == drawer and updates.apply({"a"}, None, lambda: 2) == 2
    updates.drawn_at = float("-inf")
    held.join()
    later.join()


@pytest.mark.parametrize(
    "asked",
    [
        [
            {"prompt": [("a cat", 0.5), ("a dog", 0.5)]},
            {"prompt_weights": [0.9, 0.1]},
            {"prompt": [("a fox", 0.5), ("a cow", 0.5)]},
        ],
        [{"t_index_list": [0, 1]}, {"num_inference_steps": 2}, {"t_index_list": [0, 1]}],
    ],
    ids=["texts and weights", "levels"],
)
def test_updates_that_build_on_each_other_are_made_in_their_order(asked, stream, held):
    numbers, threads = [], []
    for k, fields in enumerate(asked):
        threads.append(in_thread(lambda fields=fields: stream.update(**fields), numbers))
        until(lambda k=k: waiting(stream) == k + 1)
    held.release.set()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [2, 3, 4]


def test_the_thread_that_draws_waits_for_the_update_under_way_and_for_no_pause():
    """Its update goes before those that wait for a pause, which is far longer than this test."""
    updates, release, order = UpdateQueue(), threading.Event(), []
    drawn(updates)
    one = in_thread(lambda: updates.apply({"a"}, None, lambda: release.wait(WAIT) and 1), order)
    until(lambda: updates._busy)
    two = in_thread(lambda: updates.apply({"b"}, None, lambda: 2), order)
    until(lambda: len(updates._waiting) == 1)
    drawn(updates)
    time.sleep(0.2)
    threading.Timer(0.05, release.set).start()
    order.append(updates.apply({"c"}, None, lambda: 3))
    assert order == [1, 3] or order == [3, 1]
    updates.drawn_at = float("-inf")
    one.join()
    two.join()
    assert order[2:] == [2]


def test_an_update_that_replaces_the_first_one_lets_the_second_one_go():
    updates, order = UpdateQueue(), []
    drawn(updates)
    in_thread(lambda: updates.apply({"x"}, None, lambda: time.sleep(0.02) or 0), order).join()  # a pause of 0.38 s follows
    threads = []
    for number, name in enumerate("aba", start=1):
        threads.append(in_thread(lambda name=name, number=number: updates.apply({name}, None, lambda: number), order))
        until(lambda number=number: len(updates._waiting) == number)
    for thread in threads:
        thread.join(WAIT)
    assert sorted(order) == [0, 2, 3, 3]


def test_many_threads_lose_no_field_and_end(stream):
    names, ended = ("seed", "delta", "guidance_scale"), []

    def many(k):
        for n in range(20):
            stream.update(**{names[k % 3]: n + k})

    threads = [in_thread(lambda k=k: many(k), ended) for k in range(6)]
    while any(thread.is_alive() for thread in threads):
        stream.txt2img()
    stream.txt2img()
    assert ended == [None] * 6 and stream.seed in (19, 22) and stream.delta in (20, 23)


def test_an_assignment_keeps_what_another_thread_has_kept_meanwhile(stream, held):
    one = in_thread(lambda: setattr(stream, "do_add_noise", True), [])
    until(lambda: waiting(stream) == 1)
    stream._updates.defaults["cfg_type"] = "self"  # what another thread's assignment would keep
    held.release.set()
    one.join()
    assert stream._updates.defaults["cfg_type"] == "self" and stream._updates.defaults["do_add_noise"] is True


def test_reading_what_is_requested_does_not_wait_for_an_engine_that_is_made(stream, monkeypatch):
    stream.txt2img()
    inside, release, read = threading.Event(), threading.Event(), []
    begin = stream._denoiser.begin

    def slow(state):
        inside.set()
        assert release.wait(WAIT)
        begin(state)

    monkeypatch.setattr(stream._denoiser, "begin", slow)
    stream.update(num_inference_steps=5, t_index_list=[0, 1])
    drawing = in_thread(stream.txt2img, [])
    assert inside.wait(WAIT)
    reading = in_thread(lambda: stream.request, read)
    reading.join(WAIT / 2)
    stuck = reading.is_alive()
    release.set()
    drawing.join()
    assert not stuck and read
