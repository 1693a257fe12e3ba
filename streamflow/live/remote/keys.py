"""The state that keys change in a show. The drawing and the output read it."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from streamflow.live.remote.settings import KEYS, Action

FLAGS: dict[Action, str] = {"pause": "paused", "freeze": "frozen", "blackout": "black", "panic": "panic"}


class Keys:
    """Each `press` of a key, from any thread, turns its flag on or off. Presses of the key for the next scene are counted.

    paused: nothing enters and nothing is drawn. frozen: the stream draws on, and the image of that moment is shown. black: a
    black image is shown. panic: the last good image is shown.
    """

    def __init__(self, actions: Mapping[str, Action] = KEYS) -> None:
        self.paused = self.frozen = self.black = self.panic = False
        self._actions, self._next, self._lock = dict(actions), 0, threading.Lock()

    def press(self, key: str) -> None:
        """A key by its name ("p", "space", "f1"); one without an action does nothing."""
        action = self._actions.get(key)
        with self._lock:
            if action == "next":
                self._next += 1
            elif action is not None:
                setattr(self, FLAGS[action], not getattr(self, FLAGS[action]))

    def next(self) -> int:
        """How often the key for the next scene was pressed since the last call."""
        with self._lock:
            count, self._next = self._next, 0
            return count
