"""The model's thread: opens the models, then gives turns to viewers, one after another. Whoever has had the least of the
model's time is next, so viewers share it equally whatever they draw. Knows places and viewers; no socket."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from streamflow.server.metrics import Metrics
from streamflow.server.place import Place

logger = logging.getLogger(__name__)
NAP = 0.05  # seconds until due viewers are looked for again; whatever becomes ready earlier wakes the thread
MAX_ERRORS = 5  # in a row, until a viewer is let go


class Client(Protocol):
    """What the worker needs of a viewer. All but `tell` and `gone` are called with the worker's lock held."""

    used: float
    place: Place | None
    gone: bool
    model: str

    def due(self, now: float) -> bool:
        """Whether it has something to draw and somewhere to put it."""

    def take(self) -> tuple[Any, ...]:
        """(wish, picture or None, when it came, its stamp): what is to be drawn next."""

    def put(self, drawn: Any) -> None:
        """A finished picture."""

    def tell(self, message: str, fatal: bool = False) -> None:
        """What went wrong; fatal ends its connection."""


class Worker(threading.Thread):
    """`open_places` is called first, in the thread; `ready` is set when it is done, `failed` holds why it could not."""

    def __init__(self, open_places: Callable[[], dict[str, list[Place]]], metrics: Metrics):
        super().__init__(name="model", daemon=True)
        self._open, self._metrics = open_places, metrics
        self._wake = threading.Condition()
        self._clients: list[Client] = []
        self._errors: dict[int, int] = {}
        self._stopping = False
        self.ready = threading.Event()
        self.failed: BaseException | None = None
        self.places: dict[str, list[Place]] = {}
        self.models: tuple[str, ...] = ()
        self.size = (0, 0)

    @property
    def lock(self) -> threading.Condition:
        """Held to change what a viewer wants; `wake` after."""
        return self._wake

    def wake(self) -> None:
        """Look for due viewers at once."""
        with self._wake:
            self._wake.notify_all()

    def add(self, client: Client) -> None:
        """A new viewer starts level with the one who has had the least."""
        with self._wake:
            client.used = min((one.used for one in self._clients), default=0.0)
            self._clients.append(client)
            self._wake.notify_all()

    def remove(self, client: Client) -> None:
        """Its place is free for the next, once a turn under way has ended."""
        with self._wake:
            client.gone = True
            self._wake.notify_all()

    def stop(self) -> None:
        """End after the turn under way."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()

    def run(self) -> None:
        try:
            self.places = self._open()
        except Exception as error:  # whatever it is, the server goes on to say so
            logger.exception("the model cannot be opened")
            self.failed = error
            return
        self.models = tuple(self.places)
        self.size = self.places[self.models[0]][0].size
        self.ready.set()
        while (client := self._next()) is not None:
            self._turn(client)
        self.places.clear()  # FastAPI's caches keep a server's functions, and this thread's object with them
        self._clients.clear()

    def _next(self) -> Client | None:
        """The due viewer with the least used time; None when it is over."""
        with self._wake:
            while not self._stopping:
                self._let_go()
                now = time.monotonic()
                due = [one for one in self._clients if one.due(now)]
                if due:
                    chosen = min(due, key=lambda one: one.used)
                    for other in self._clients:  # who waited for itself has no claim to that time later
                        if other not in due:
                            other.used = max(other.used, chosen.used)
                    return chosen
                self._wake.wait(NAP)
        return None

    def _let_go(self) -> None:
        for client in [one for one in self._clients if one.gone]:
            self._clients.remove(client)
            self._errors.pop(id(client), None)
            self._free(client)

    def _free(self, client: Client) -> None:
        if client.place is not None:
            client.place.reset()
            self.places[client.model].append(client.place)
            client.place = None

    def _turn(self, client: Client) -> None:
        began = time.monotonic()
        with self._wake:
            wish, image, entered, stamp = client.take()
            if client.place is None or client.model != wish.model:
                self._free(client)
                client.model, client.place = wish.model, self.places[wish.model].pop()
        drawn = None
        try:
            try:
                client.place.follow(wish)
            except (ValueError, TypeError) as error:
                client.tell(str(error))
            if client.place.prepared:
                drawn = client.place.draw(image, entered, stamp)
            self._errors.pop(id(client), None)
        except Exception as error:  # of one viewer's draw; the others go on
            self._failed(client, error)
        seconds = time.monotonic() - began
        self._metrics.observe("tick_seconds", seconds)
        with self._wake:
            client.used += seconds
            if drawn is not None:
                client.put(drawn)

    def _failed(self, client: Client, error: Exception) -> None:
        logger.exception("a draw failed")
        self._metrics.count("errors")
        errors = self._errors[id(client)] = self._errors.get(id(client), 0) + 1
        client.place.reset()
        client.tell(f"drawing failed ({type(error).__name__}); trying again", fatal=errors >= MAX_ERRORS)
