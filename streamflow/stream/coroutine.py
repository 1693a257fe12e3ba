"""A coroutine for functions that are not written as one: the function runs in its own thread and can stop in the middle to
wait for an answer from its owner. It runs only while the owner waits for it. So the two never run at once, shared state
needs no locks, and the order of draws, reads and writes is always the same."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

from streamflow._threads import Thread, acting_thread

STOP_SECONDS = 60.0  # how long a stopped coroutine may take to end

Request = TypeVar("Request")
Result = TypeVar("Result")
Ask = Callable[[Request], Any]


class Stopped(BaseException):
    """Raised inside a stopped coroutine where it waits; no `except Exception` catches it."""


class Coroutine(Generic[Request, Result]):
    """Runs `function(ask)`. `ask(request)` stops the function until `resume(answer)`, and returns the answer. The first
    `resume`, without an answer, starts the function.

    request: the request that the function waits with. done: the function has returned `result` or raised `error`.
    The function runs on its owner's CUDA stream and in its owner's inference mode. Its thread ends with it. The owner of a
    coroutine that is not done must call `stop` before dropping it.
    """

    def __init__(self, function: Callable[[Ask[Request]], Result], device: torch.device):
        self.request: Request | None = None
        self.done = False
        self.result: Result  # set once the function has returned
        self.error: BaseException | None = None
        self._device = device
        self._stopped = False
        self._requests: SimpleQueue[tuple[bool, Request | None]] = SimpleQueue()
        self._answers: SimpleQueue[tuple[Any, torch.cuda.Stream | None]] = SimpleQueue()
        self._thread = Thread(self._run, "streamflow frame", (function, torch.is_inference_mode_enabled()))
        self._thread.start()

    def resume(self, answer: object = None) -> None:
        """Answer its request, and wait for its next request or its end."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self.request = None
        self._thread.acts_for = acting_thread()
        self._answers.put((answer, stream))
        self.done, self.request = self._requests.get()
        if self.done:
            self._thread.join()

    def stop(self) -> None:
        """End the function where it waits, and its thread. RuntimeError if that takes more than `STOP_SECONDS`."""
        self._stopped = True
        self._answers.put((None, None))
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            raise RuntimeError(f"a frame's pipeline still runs {STOP_SECONDS:.0f} s after it was stopped")
        self.done, self.request = True, None

    def _run(self, function: Callable[[Ask[Request]], Result], inference_mode: bool) -> None:
        try:
            self._wait()
            with torch.inference_mode(inference_mode):
                self.result = function(self._ask)
        except BaseException as error:  # passed on to the owner, whatever it is
            self.error = error
        finally:
            self._requests.put((True, None))

    def _ask(self, request: Request) -> Any:
        if self._stopped:
            raise Stopped
        self._requests.put((False, request))
        return self._wait()

    def _wait(self) -> Any:
        answer, stream = self._answers.get()
        if self._stopped:
            raise Stopped
        if stream is not None:
            torch.cuda.set_stream(stream)
        return answer
