"""A function that runs in a thread of its own and can stop in the middle to ask its owner something, as a coroutine does.
It runs only while the owner waits for it: never two strands at once, so what they share needs no locks, and the order in
which they draw, read and write is always the same. Nothing here knows what is asked."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch

from streamflow._threads import Thread, acting_thread

STOP_SECONDS = 60.0  # how long a strand may take to end once it is stopped


class Stopped(BaseException):
    """Raised inside a strand where it asks, once its owner has stopped it; no `except Exception` catches it."""


class Strand:
    """`function(ask)`, which the first `answer`, an empty one, begins: `ask(question)` returns the owner's next.

    question: what it waits to have answered. over: it has ended, with a `result` or with an `error`.
    Its CUDA stream and its inference mode are its owner's. Its thread ends with it; whoever drops a strand that is not over
    calls `stop`.
    """

    def __init__(self, function: Callable[[Callable[[Any], Any]], Any], device: torch.device):
        self.question: Any = None
        self.over = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._device = device
        self._stopped = False
        self._said: SimpleQueue = SimpleQueue()
        self._heard: SimpleQueue = SimpleQueue()
        arguments = (function, torch.is_inference_mode_enabled())
        self._thread = Thread(self._run, "streamflow frame", arguments)
        self._thread.start()

    def answer(self, answer: Any = None) -> None:
        """Answer its question, and wait until it asks the next one or is over."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self.question = None
        self._thread.acts_for = acting_thread()
        self._heard.put((answer, stream))
        self.over, self.question = self._said.get()
        if self.over:
            self._thread.join()

    def stop(self) -> None:
        """End it where it waits, and its thread with it. RuntimeError if it goes on for `STOP_SECONDS`."""
        self._stopped = True
        self._heard.put((None, None))
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            raise RuntimeError(f"a frame's pipeline still runs {STOP_SECONDS:.0f} s after it was stopped")
        self.over, self.question = True, None

    def _run(self, function: Callable[[Callable[[Any], Any]], Any], inference_mode: bool) -> None:
        try:
            self._hear()
            with torch.inference_mode(inference_mode):
                self.result = function(self._ask)
        except BaseException as error:  # whatever it is, the owner gets it
            self.error = error
        finally:
            self._said.put((True, None))

    def _ask(self, question: Any) -> Any:
        if self._stopped:
            raise Stopped
        self._said.put((False, question))
        return self._hear()

    def _hear(self) -> Any:
        answer, stream = self._heard.get()
        if self._stopped:
            raise Stopped
        if stream is not None:
            torch.cuda.set_stream(stream)
        return answer
