"""A page of this machine with every knob: where it is, what it changes, its range and the present value. Knobs of OSC can be
moved there, under the same checks. Knows HTTP and knobs; no stream.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from streamflow._files import Json
from streamflow.io.local_server import LocalHandler, LocalServer, allows_host
from streamflow.live.remote.knobs import Knobs, unscaled
from streamflow.live.remote.settings import Control, weight_number

HOST, SLOTS = "127.0.0.1", 8
MOST_BYTES = 2**15  # of a request's body
FILES = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript")}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
JSON = "application/json"


class ControlPage:
    """Serves at http://127.0.0.1:PORT/ from here on: `GET /`, `GET /osc.json`, and `POST /osc` of
    `{"address": "/guidance", "value": 0.5}`.

    osc_bound: host and port where OSC arrives. present: the values of the stream's fields by name. refused: why the stream
    has refused the last value of a field, by its name.

    Raises:
        OSError: the port is not available.
    """

    def __init__(
        self,
        settings: Control,
        osc_bound: tuple[str, int] | None,
        knobs: Knobs,
        present: Callable[[], Json],
        refused: Mapping[str, str],
    ) -> None:
        assert settings.page is not None, "the settings have a page"
        self._settings, self._osc_bound = settings, osc_bound
        self._knobs, self._present, self._refused = knobs, present, refused
        self._closing = ExitStack()
        try:
            server = _Server((HOST, settings.page), self)
        except OSError as error:
            raise OSError(f"the page of controls cannot listen at {HOST}:{settings.page}: {error}") from error
        self.port: int = server.server_address[1]
        server.start(self._closing, "streamflow control page")

    def describe(self) -> Json:
        """What `/osc.json` holds. RuntimeError: the stream has just been closed."""
        present = self._present()
        knobs = {kind: list(self._of(kind, present)) for kind in ("osc", "midi", "audio", "link")}
        bound = self._osc_bound
        return {
            "osc": {
                "host": None if bound is None else bound[0],
                "port": None if bound is None else bound[1],
                "addresses": knobs["osc"],
            },
            "midi": {"port": self._settings.midi, "addresses": knobs["midi"]},
            "sound": {"inputs": self._settings.sound, "addresses": knobs["audio"] + knobs["link"]},
        }

    def _of(self, kind: str, present: Json) -> Iterator[Json]:
        """The knobs of a kind. `at` is what the knob sends where the field has its present value."""
        for one in self._knobs.mappings:
            if not one.address.startswith(f"{kind}:"):
                continue
            value, numbers = present.get(one.field), one.kind != "text"
            yield {
                "address": one.address.removeprefix("osc:"),
                "field": one.field,
                "type": one.kind,
                "source": one.ends if numbers else None,
                "range": one.range if numbers else None,
                "smoothing": one.smoothing if numbers else None,
                "value": value,
                "at": unscaled(one, value),
                "refused": self._refused.get("prompt_weights" if weight_number(one.field) is not None else one.field),
            }

    def send(self, data: object) -> None:
        """Move a knob of OSC. LookupError: there is no such address. ValueError: the value does not fit, or data are no
        address and value."""
        if not isinstance(data, dict) or data.keys() != {"address", "value"} or not isinstance(data["address"], str):
            raise ValueError('send an address and a value: {"address": "/guidance", "value": 0.5}')
        if not self._knobs.take(f"osc:{data['address']}", data["value"]):
            raise LookupError(f"no knob has the OSC address {data['address']}")

    def close(self) -> None:
        """Stop serving. May be called twice."""
        self._closing.close()


class _Server(LocalServer):
    def __init__(self, address: tuple[str, int], page: ControlPage) -> None:
        self.page = page
        super().__init__(address, _Handler, SLOTS, lambda host: allows_host(host, ("localhost",)))


class _Handler(LocalHandler):
    server: _Server

    def do_GET(self) -> None:
        self.answer(self._get)

    def do_POST(self) -> None:
        self.answer(self._post)

    def _get(self) -> None:
        if self.path == "/osc.json":
            try:
                self._send_json(200, self.server.page.describe())
            except RuntimeError as error:
                self._send_json(503, {"error": str(error)})
        elif self.path in FILES:
            name, kind = FILES[self.path]
            self._send(200, f"{kind}; charset=utf-8", (Path(__file__).parent / name).read_bytes())
        else:
            self._send_json(404, {"error": f"there is nothing here: see {', '.join(FILES)} and /osc.json"})

    def _post(self) -> None:
        if self.path != "/osc":
            self._send_json(404, {"error": "a value is posted to /osc"})
            return
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != JSON:
            self._send_json(415, {"error": f"the Content-Type must be {JSON}"})
        elif "Transfer-Encoding" in self.headers or not re.fullmatch(r"[0-9]{1,20}", length):
            self._send_json(411, {"error": "the Content-Length is missing or no number"})
        elif int(length) > MOST_BYTES:
            self._send_json(413, {"error": f"the body may have {MOST_BYTES:,} bytes, and has {length}"})
        else:
            body = self.rfile.read(int(length))
            self.connection.settimeout(self.timeout)
            self._move(body)

    def _move(self, body: bytes) -> None:
        try:
            self.server.page.send(json.loads(body))
        except LookupError as error:
            self._send_json(404, {"error": error.args[0]})
        except (ValueError, RecursionError) as error:  # of json too
            self._send_json(400, {"error": str(error)})
        else:
            self._send(204, JSON, b"")

    def _send_json(self, status: int, data: Json) -> None:
        self._send(status, JSON, json.dumps(data).encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(data))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", POLICY),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
