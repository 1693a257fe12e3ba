"""Threads that are waited for, whatever interrupts the wait."""

import os
import signal
import threading

import pytest

from streamflow._threads import Thread


def test_a_join_that_is_interrupted_leaves_the_thread_alive_and_the_next_one_waits():
    release, done = threading.Event(), []
    thread = Thread(lambda: (release.wait(20), done.append(1)), "one")
    thread.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            thread.join(20)
    finally:
        signal.signal(signal.SIGINT, before)
    assert thread.is_alive() and not done
    thread.join(0.05)
    assert thread.is_alive()
    release.set()
    thread.join()
    assert done == [1] and not thread.is_alive()


def test_what_is_raised_ends_it_too(monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)

    def fail():
        raise ValueError("no")

    thread = Thread(fail, "one")
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="before it is started"):
        thread.join()
    thread.start()
    thread.join()
    assert not thread.is_alive() and raised[0].exc_type is ValueError
