"""`streamflow serve`: the page, on this machine by default."""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from streamflow._command_line import say_download
from streamflow._threads import freeze_loaded
from streamflow.app.commands import options
from streamflow.app.server.settings import UNUSED
from streamflow.app.signals import Stop, stop_signals

if TYPE_CHECKING:
    from streamflow.app.config import Settings

EXAMPLE = "streamflow serve --port 7860 --server.max-viewers 2"
END_WITHIN = 0.5  # seconds for threads that still compute after the server has waited for them


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 after SIGTERM or SIGINT; 1 where it cannot bind; 2 for invalid settings."""
    p = options.parser(
        "serve",
        "Serves the page: text and images restyled live, for several viewers. With a video model (--model), all "
        "viewers see one video, and change its prompt. With the extra webrtc, cameras travel by WebRTC, and programs "
        "publish and read streams at /whip and /whep.",
        EXAMPLE,
        "video",
        "server",
        unused=("mode", *UNUSED),
        defaults={"cfg_type": "full"},
    )
    p.add_argument("--host", dest="server.host", metavar="HOST", help="short for --server.host")
    p.add_argument("--port", dest="server.port", metavar="PORT", help="short for --server.port")
    proxy = "a proxy in front ends TLS"
    p.add_argument("--behind-proxy", dest="server.behind_proxy", action="store_const", const="true", help=proxy)
    with stop_signals() as stop:
        a = p.parse_args(argv)
        settings = options.settings(p, a, cfg_type="full", warmup=0)
        try:
            return serve(settings, stop, a.json)
        except (ValueError, OSError) as error:
            return options.failed(p, error)


def serve(settings: Settings, stop: Stop, as_json: bool = False) -> int:
    """Until SIGTERM or SIGINT. ValueError: it would not be safe. OSError: the port is taken, a file is not there.

    Where the model's thread still loads or draws after the server has waited for it, the process ends here with `os._exit`:
    a thread that computes in torch while the interpreter finalizes would abort it.
    """
    try:
        import uvicorn

        from streamflow.app.server.app import Service, create_app
        from streamflow.app.server.connections import Connections, Listener, uvicorn_config
        from streamflow.app.server.video import open_model
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'streamflow-rf[web]'") from error
    from streamflow.app.server import tokens

    def opened(settings: Settings, progress: Callable[[str, int, int], None]) -> Mapping[str, list[Any]]:
        gc.unfreeze()  # after an error in the model's thread: what was loaded before is collected first
        gc.collect()
        slots = open_model(settings, progress)
        freeze_loaded()
        return slots

    server = settings.server
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of visitors' images, such as corrupt EXIF
    app = create_app(service := Service(settings, tokens.load(server.token_file), opened))
    connections = Connections(server, service.refusals)
    with Listener(server.host, server.port, connections) as listener:
        running = uvicorn.Server(uvicorn_config(app, server, connections))
        running.handle_exit = stop  # uvicorn's own leaves out the application's shutdown after a second SIGINT
        stop.remember(partial(setattr, running, "should_exit", True))
        host = f"[{server.host}]" if ":" in server.host else server.host
        url = f"http{'s' if server.tls_certificate else ''}://{host}:{listener.getsockname()[1]}"
        print(json.dumps({"url": url}) if as_json else f"StreamFlow is on {url} (Ctrl+C ends it)", flush=True)
        for model in dict.fromkeys((settings.model, *server.models)):
            say_download(model)
        running.run(sockets=[listener])
    gc.unfreeze()
    code = int(service.worker.failed is not None)
    if not service.ended(END_WITHIN):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
