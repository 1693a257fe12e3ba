"""`streamflow serve`: the page, on this machine unless told otherwise."""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from streamflow.commands import options

EXAMPLE = "streamflow serve --port 7860 --server.max-viewers 2"
DRAIN = 5  # seconds for open requests when it is asked to end; the model's thread has four more


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when it was asked to end (SIGTERM, SIGINT); 1 where it cannot bind; 2 for settings that cannot be."""
    p = options.parser("serve", "Serves the page: text and pictures restyled live, for several viewers.", EXAMPLE, "server")
    p.add_argument("--host", help="short for --server.host")
    p.add_argument("--port", help="short for --server.port")
    p.add_argument("--behind-proxy", action="store_true", help="a proxy in front ends TLS")
    a = p.parse_args(argv)
    given = {"server.host": a.host, "server.port": a.port, "server.behind_proxy": "true" if a.behind_proxy else None}
    for path, value in given.items():
        if value is not None:
            setattr(a, path, value)
    settings = options.settings(p, a, cfg_type="full", warmup=0)
    try:
        return serve(settings, a.json)
    except ValueError as error:
        print(f"{p.prog}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{p.prog}: {settings.server.host}:{settings.server.port}: {error}", file=sys.stderr)
        return 1


def serve(settings: Any, as_json: bool = False) -> int:
    """Until SIGTERM or SIGINT. ValueError: it would not be safe. OSError: the port is taken, a file is not there."""
    try:
        import uvicorn

        from streamflow.server.app import Service, create_app
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'streamflow-rf[web]'") from error
    from streamflow.server import tokens

    server = settings.server
    app = create_app(service := Service(settings, tokens.load(server.token_file)))
    bound = _bind(server.host, server.port)
    config = uvicorn.Config(
        app,
        ws="websockets-sansio",
        ws_max_size=server.max_message_bytes,
        ws_per_message_deflate=False,  # pictures are compressed, and a small message could grow
        ssl_certfile=server.tls_certificate,
        ssl_keyfile=server.tls_key,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_level="warning",
        limit_concurrency=64 + 4 * server.max_viewers,
        timeout_graceful_shutdown=DRAIN,
    )
    url = f"http{'s' if server.tls_certificate else ''}://{server.host}:{bound.getsockname()[1]}"
    print(json.dumps({"url": url}) if as_json else f"StreamFlow is on {url} (Ctrl+C ends it)", flush=True)
    handlers = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config).run(sockets=[bound])  # raises the signal again when it has ended
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
    return int(service.worker.failed is not None)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()  # whoever reads the address may come at once, and waits
    except OSError:
        bound.close()
        raise
    return bound
