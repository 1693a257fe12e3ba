"""`streamflow live`: a source restyled live, a prompt drawn without end, or a video model shown as it draws."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from streamflow._command_line import Parser, above, say_download
from streamflow._files import Json
from streamflow._threads import aside, freeze_loaded
from streamflow.app import config
from streamflow.app.commands import options
from streamflow.app.config import Settings
from streamflow.app.signals import Stop, stop_signals

if TYPE_CHECKING:
    from streamflow.app.scenes import Scenes
    from streamflow.app.video_model import VideoScenes
    from streamflow.live.remote.keys import Keys
    from streamflow.live.show import Live, Show, Statistics
    from streamflow.live.video import VideoLive
    from streamflow.pipeline import StreamFlow
    from streamflow.video import VideoStream

logger = logging.getLogger("streamflow.live")
EXAMPLE = 'streamflow live --in camera:0 --out window --record out.mp4 --prompt "a fox, 3d render" --strength 0.6'
PERIOD = 0.2  # seconds between two looks at keys and figures


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the source ended, the window was closed, or by SIGINT or SIGTERM; 1 for what failed; 2 for
    arguments."""
    description = (
        "Restyles a camera, a screen or a file live; without --in, draws from the prompt. A video model (--model) draws a "
        "video without end, at its own rate unless --live.target-fps is given."
    )
    p = options.parser("live", description, EXAMPLE, "video", "live", "control", unused=())
    p.add_argument("--in", dest="live.source", metavar="SOURCE", help="short for --live.source")
    p.add_argument("--out", action="append", metavar="SINK", help="where to, may be given several times (default: window)")
    p.add_argument("--record", metavar="FILE", help="and into this .mp4 or .mkv")
    p.add_argument("--seconds", type=above(0), help="end so long after the first image (default: at the source's end)")
    p.add_argument("--learn", metavar="FIELD", help="the next knob that is moved turns this field; its mapping is printed")
    with stop_signals() as stop:
        return _run(p, p.parse_args(argv), stop)


def _run(p: Parser, a: argparse.Namespace, stop: Stop) -> int:
    if outs := [*(a.out or []), *([f"record:{a.record}"] if a.record else [])]:
        setattr(a, "live.sinks", json.dumps(outs))
        p.typed["live.sinks"] = "--out" if a.out else "--record"
    settings = options.settings(p, a)
    logging.getLogger("streamflow").setLevel(logging.WARNING if a.json else logging.INFO)
    try:
        with logging_redirect_tqdm():
            result = play(settings, stop, a.seconds, a.learn, quiet=a.json)
    except options.ERRORS as error:
        return options.failed(p, error)
    lines = (f"{name}: {', '.join(value) if name == 'wrote' else value}" for name, value in result.items())
    print(json.dumps(result) if a.json else "\n".join(lines))
    return 0


def play(
    settings: Settings, stop: Stop, seconds: float | None = None, learn: str | None = None, quiet: bool = False
) -> Json:
    """Play until the source or the video ends, the last sink is gone, a signal arrives, or `seconds` have passed. Return the
    statistics, what was learned, and the files and folders that were written."""
    from streamflow.app.scenes import Scenes, open_scene
    from streamflow.app.video_model import VideoScenes, check_images, check_live, open_video
    from streamflow.io import open_sink, open_source
    from streamflow.live.remote import open_control
    from streamflow.models.loading import is_video
    from streamflow.wrapper import StreamFlowWrapper

    s = settings.live
    shows: list[Live | VideoLive] = []
    if (settings.mode == "img2img") != bool(s.source):
        raise ValueError(f"mode is {settings.mode}, and there is {'a' if s.source else 'no'} source: leave one out")
    others = [one.model_copy(update={"mode": settings.mode}) for one in map(config.load, s.scenes)]
    source, sinks = open_source(s.source) if s.source else None, [open_sink(one) for one in s.sinks]

    def update(**changes: Any) -> None:
        (shows[-1].stream if shows else stream).update(**changes)

    def present() -> Json:
        return _values(shows[-1].stream) if shows else {}

    weights = [] if isinstance(settings.prompt, str) else [weight for _, weight in settings.prompt]
    with ExitStack() as opened:
        controls = opened.enter_context(open_control(settings.control, update, weights, present))
        if learn:
            controls.learn(learn)
        for sink in sinks:
            if hasattr(sink, "on_key"):
                setattr(sink, "on_key", controls.keys.press)  # noqa: B010 - of windows only, no part of the protocol
        for one in dict.fromkeys(one.model for one in (settings, *others)):
            say_download(one)
        if is_video(settings.model):
            check_live(settings, others, learn)
            playing = stream = aside(open_video, settings)
        else:
            check_images(settings, *others)
            playing = open_scene(settings)
            stream = playing.stream
        with opened.pop_all() as closing:
            closing.callback(playing.close)
            freeze_loaded()
            closing.callback(gc.unfreeze)
            stop.remember()  # files are open from here on
            if isinstance(playing, StreamFlowWrapper):
                passed = s.model_dump(include={"target_fps", "policy", "mode", "on_error"})
                show = playing.stream.live(source, sinks, **passed, controls=controls)
                scenes = Scenes(show, playing, (settings, *others))
            else:
                rate = s.target_fps if "target_fps" in s.model_fields_set else None
                show = playing.live(sinks, target_fps=rate, on_error=s.on_error, controls=controls)
                scenes = VideoScenes(playing, (settings, *others))
            shows.append(show)
            closing.enter_context(scenes)
            closing.enter_context(show)  # ends before its scenes are closed
            closing.callback(controls.close)  # its page reads the stream
            _watch(show, scenes, controls.keys, s.crossfade, seconds, quiet, stop)
            show.stop()
        figures = asdict(show.statistics).items()
        result = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures}
        if learn:
            new = [one for one in controls.settings.mappings if one not in settings.control.mappings]
            result["learned"] = [one.model_dump(mode="json", exclude_unset=True) for one in new]
        if written := [str(path) for sink in sinks if (path := getattr(sink, "path", None)) and Path(path).exists()]:
            result["wrote"] = written
        return result


def _values(stream: StreamFlow | VideoStream) -> Json:
    """What the stream draws with after the last update, by the names of `update`; and each of `prompt_weights`."""
    from streamflow.conditioning.blending import parts
    from streamflow.pipeline import StreamFlow

    if not isinstance(stream, StreamFlow):
        return {**stream.arguments, "seed": stream.seed}
    now = stream.requested()
    names = ("prompt", "negative_prompt", "num_inference_steps", "delta", "strength", "feedback", "noise_period")
    weights = [] if now.request.prompt is None else [weight for _, weight in parts(now.request.prompt)]
    return {
        **{name: getattr(now.request, name) for name in names},
        **{f"prompt_weights.{i}": weight for i, weight in enumerate(weights)},
        "guidance_scale": now.guidance_scale,
        "seed": now.noise.seed,
    }


def _watch(
    show: Show,
    scenes: Scenes | VideoScenes,
    keys: Keys,
    crossfade: float,
    seconds: float | None,
    quiet: bool,
    stop: Stop,
) -> None:
    """Report, prepare scenes and change them, until it ends."""
    end = float("inf")
    with tqdm(unit="image", disable=quiet) as bar:
        _scene(scenes.prepare)
        while show.running and not stop.received and (left := end - time.monotonic()) > 0:
            show.wait(min(PERIOD, left))
            if seconds and end == float("inf") and show.statistics.shown:
                end = time.monotonic() + seconds
            for _ in range(keys.next()):
                _scene(scenes.next, crossfade)
                _scene(scenes.prepare)
            now = show.statistics
            bar.update(now.shown - bar.n)
            bar.set_postfix_str(_in_short(now))
    if stop.received:
        logger.info("ending")


def _scene(change: Callable[..., object], *arguments: object) -> None:
    """A change of scene; what cannot be done is logged, and what plays goes on."""
    try:
        change(*arguments)
    except (*options.WRONG, OSError, MemoryError) as error:
        logger.error("the next scene cannot be shown: %s", error)


def _in_short(now: Statistics) -> str:
    latency = "" if now.latency_p50 is None else f", latency {1e3 * now.latency_p50:.0f} ms"
    return f"{now.mode} {now.drawn_per_second:.1f} drawn/s{latency}, repeated {now.repeated}, dropped {now.dropped_in}"
