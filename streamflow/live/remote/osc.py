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
        logging.getLogger().addFilter(self._keeps)
        self.bound: tuple[str, int] = self._server.socket.getsockname()[:2]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="streamflow control osc", daemon=True
        )
        self._thread.start()

    def _log_malformed(self, request: object, client_address: object) -> None:
        """Called where a datagram could not be read, while that error is handled."""
        self._log_once(f"a datagram from {client_address} is not OSC and is dropped: {sys.exc_info()[1]!r}")

    def _keeps(self, record: logging.LogRecord) -> bool:
        """A filter of the root logger, where python-osc writes a line for every part of a datagram that it cannot read."""
        own = record.module in ("osc_bundle", "osc_message")
        if own:
            self._log_once(f"a part of a datagram is not OSC and is dropped: {record.getMessage()}")
        return not own

    def _log_once(self, message: str) -> None:
        if not self._logged:
            self._logged = True
            logger.warning("%.300s", message)

    def close(self) -> None:
        """Stop listening; the thread has ended when this returns."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        logging.getLogger().removeFilter(self._keeps)
