"""Knobs over the network: Open Sound Control by UDP. Knows python-osc; no knob, no field."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable

from streamflow.io.protocols import need

logger = logging.getLogger(__name__)


class OscInput:
    """Listens in a thread of its own, and calls `receive("osc:/address", *values)` there. Time tags are not waited for, and
    nothing is ever sent back.

    host: 127.0.0.1 is this machine alone. port: 0 is any that is free. `bound` holds both.

    Raises:
        ImportError: without python-osc. OSError: the address is not available.
    """

    def __init__(self, host: str, port: int, receive: Callable[..., None]) -> None:
        need("pythonosc", '"streamflow-rf[control]"')
        from pythonosc.dispatcher import Dispatcher
        from pythonosc.osc_server import BlockingOSCUDPServer

        def handle(address: str, *values: object) -> None:
            receive(f"osc:{address}", *values)

        dispatcher = Dispatcher(strict_timing=False)  # strict: one message for next year would hold up all others
        dispatcher.set_default_handler(handle)
        try:
            self._server = BlockingOSCUDPServer((host, port), dispatcher)
        except OSError as error:
            raise OSError(f"OSC cannot listen at {host}:{port}: {error}") from error
        self._server.handle_error = self._log_malformed
        self._logged = False
        self.bound: tuple[str, int] = self._server.socket.getsockname()[:2]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="streamflow control osc", daemon=True
        )
        self._thread.start()

    def _log_malformed(self, request: object, client_address: object) -> None:
        """Called where a datagram could not be read, while that error is handled."""
        if not self._logged:
            self._logged = True
            logger.warning("a datagram from %s is not OSC and is dropped: %r", client_address, sys.exc_info()[1])

    def close(self) -> None:
        """Stop listening; the thread has ended when this returns."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
