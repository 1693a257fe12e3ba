"""The model's thread: opens the models, then gives turns to viewers, one after another. The viewer that has used the least
time is next, so viewers share the model equally whatever they draw. Knows slots and viewers; no socket. Of a viewer's
methods, all but `report` are called with the worker's lock held."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from streamflow._threads import Thread
from streamflow.app.server.images import CheckSize, Style
from streamflow.app.server.messages import DrawRequest
from streamflow.app.server.metrics import Metrics

if TYPE_CHECKING:
    from streamflow.app.server.session import Viewer
    from streamflow.app.server.slot import Slot
    from streamflow.image_utils import Images

T = TypeVar("T")

logger = logging.getLogger(__name__)
NAP = 0.05  # seconds until due viewers are looked for again; whatever becomes ready earlier wakes the thread
MAX_ERRORS = 5  # in a row, after which a viewer is dropped
MAX_RESTARTS = 1


@dataclass(frozen=True)
class Turn:
    """What a viewer requested when it was chosen. Later changes apply to its next turn."""

    client: Viewer
    request: DrawRequest
    style: Style | None
    image: Images | None
    entered: float | None
    stamp: float | None


class Worker(Thread):
    """`open_slots` is called first, in the thread; `ready` is set when it is done, `failed` holds why it could not.

    If the thread's work ends with an error, the models are opened again and the viewers stay, once (`restarts`). The
    second time the thread ends, and its viewers get an error message.
    """

    def __init__(self, open_slots: Callable[[], Mapping[str, list[Any]]], metrics: Metrics):
        super().__init__(self._work, "model")
        self._open, self._metrics = open_slots, metrics
        self._changed = threading.Condition()
        self._clients: list[Viewer] = []
        self._errors: dict[int, int] = {}
        self._stopping = False
        self.ready = threading.Event()
        self.failed: BaseException | None = None
        self.restarts = 0
        self.slots: dict[str, list[Any]] = {}  # by model: each a `Slot`, or of a video the `Channel`
        self.models: tuple[str, ...] = ()
        self.size = (0, 0)
        self.style_checks: dict[str, CheckSize | None] = {}  # by model, `Slot.check_style`

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock while a viewer's state changes; due viewers are looked for after."""
        with self._changed:
            yield
            self._changed.notify_all()

    def add(self, client: Viewer) -> None:
        """Add a viewer. It starts with the used time of the viewer that has used the least."""
        with self.changing():
            client.used = min((one.used for one in self._clients), default=0.0)
            self._clients.append(client)

    def remove(self, client: Viewer) -> None:
        """Remove a viewer. Its slot is free once its current turn has ended."""
        with self.changing():
            client.gone = True

    def stop(self) -> None:
        """End after the current turn."""
        with self.changing():
            self._stopping = True

    def _work(self) -> None:
        while self._open_all() and not self._give_turns() and self.restarts < MAX_RESTARTS:
            self.restarts += 1
        with self._changed:
            for client in () if self._stopping else self._clients:
                self._call(client, client.report, "the model's thread has ended", True)
            self._clients.clear()
            self.style_checks.clear()
            self.slots.clear()  # FastAPI's caches keep a server's functions, and this thread's object with them

    def _open_all(self) -> bool:
        try:
            self.slots = dict(self._open())
        except Exception as error:  # the server goes on, and its health says so
            logger.exception("the model cannot be opened")
            self.failed = error
            return False
        self.models = tuple(self.slots)
        self.size = self.slots[self.models[0]][0].size
        self.style_checks = {name: own[0].check_style for name, own in self.slots.items()}
        self.ready.set()
        return True

    def _give_turns(self) -> bool:
        """Give turns until `stop` (True), or until an error (False), after which no viewer has a slot."""
        try:
            self._work_on()
            return True
        except BaseException as error:  # SystemExit of a library too: the other viewers need this thread
            log_failure("the model's thread has ended", error)
        with self._changed:
            self.ready.clear()
            self.slots = {}
            for client in self._clients:
                client.slot = None
        return False

    def _work_on(self) -> None:
        """Give turns until `stop`."""
        while (turn := self._next()) is not None:
            self._turn(turn)

    def _next(self) -> Turn | None:
        """The turn of the due viewer with the least used time; None when it is over."""
        with self._changed:
            while not self._stopping:
                self._drop_gone()
                if (turn := self._choose(time.monotonic())) is not None:
                    return turn
                self._changed.wait(NAP)
        return None

    def _choose(self, now: float) -> Turn | None:
        """Choose a viewer, take what it wants and give it a slot: one step under the lock, so nothing changes between."""
        due = [one for one in self._clients if self._call(one, one.due, now)]
        if not due:
            return None
        chosen = min(due, key=lambda one: one.used)
        for other in self._clients:  # a viewer that had nothing to draw does not catch up later
            if other not in due:
                other.used = max(other.used, chosen.used)
        return self._call(chosen, self._take, chosen)

    def _take(self, client: Viewer) -> Turn:
        turn = Turn(client, *client.take())
        if client.slot is None or client.model != turn.request.model:
            self._free(client)
            client.slot = self.slots[turn.request.model].pop()
            client.model = turn.request.model
        return turn

    def _call(self, client: Viewer, method: Callable[..., T], *arguments: object) -> T | None:
        """Call a viewer's method. Where it fails, drop the viewer and return None: its state must not end the thread."""
        try:
            return method(*arguments)
        except Exception as error:
            log_failure("a viewer is dropped", error)
            client.gone = True
            return None

    def _drop_gone(self) -> None:
        for client in [one for one in self._clients if one.gone]:
            self._clients.remove(client)
            self._errors.pop(id(client), None)
            self._free(client)

    def _free(self, client: Viewer) -> None:
        slot, client.slot = client.slot, None
        if slot is not None:
            slot.reset()
            self.slots[client.model].append(slot)

    def _turn(self, turn: Turn) -> None:
        client, slot, began = turn.client, turn.client.slot, time.monotonic()
        assert slot is not None, "a viewer has a slot in its turn"
        drawn = None
        try:
            try:
                slot.apply(turn.request, turn.style)
            except (ValueError, TypeError) as error:
                self._call(client, client.report, str(error))
            if slot.prepared:
                drawn = slot.draw(turn.image, turn.entered, turn.stamp)
            self._errors.pop(id(client), None)
        except Exception as error:  # of one viewer's draw; the other viewers go on
            self._failed(client, slot, error)
        seconds = time.monotonic() - began
        self._metrics.observe("tick_seconds", seconds)
        with self._changed:
            client.used += seconds
            if drawn is not None:
                self._call(client, client.put, drawn)

    def _failed(self, client: Viewer, slot: Slot, error: Exception) -> None:
        log_failure("a draw failed", error)
        self._metrics.count("errors")
        errors = self._errors[id(client)] = self._errors.get(id(client), 0) + 1
        slot.reset()
        message = f"drawing failed ({type(error).__name__}); trying again"
        self._call(client, client.report, message, errors >= MAX_ERRORS)


def log_failure(what: str, error: BaseException) -> None:
    """Log an error's type and traceback. Its message is left out, since it may quote a viewer's prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s: %s, its message is not logged since it may quote a viewer\n%s", what, type(error).__name__, frames)
