"""A video model on the page: one video, which all viewers see, and whose prompt each of them may change. Knows viewers as
the worker does; no socket."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from streamflow._files import Json
from streamflow.app.config import Settings
from streamflow.app.server.messages import DrawRequest
from streamflow.app.server.metrics import Metrics
from streamflow.app.server.session import Viewer
from streamflow.app.server.slot import LOADING, WARMING_UP, Drawn, Slot, first_request, open_slots
from streamflow.app.server.worker import NAP, Worker, log_failure
from streamflow.app.video_model import check_video, open_video
from streamflow.io import Sink, TimedImage
from streamflow.live.video import VideoLive
from streamflow.models.loading import is_video
from streamflow.video import VideoStream

UNUSED = ("server.models", "server.loras")  # the video is the only model of its server
NAMES = {"prompt": "prompt", "negative": "negative_prompt", "guidance": "guidance_scale", "seed": "seed"}  # of an update
GUIDED = ("negative", "guidance")  # used with guidance only
FAILED = "a chunk cannot be drawn, and is tried again: change the prompt, the guidance or the seed"


class Channel:
    """A video in the place of a slot. size: width and height in pixels. It takes no style image.

    The first chunk is drawn here, and drawn again for the viewers.
    """

    check_style = None

    def __init__(self, stream: VideoStream) -> None:
        self.stream = stream
        height, width = stream().images[0].shape[:2]
        stream.reset()
        self.size = width, height


def open_model(settings: Settings, progress: Callable[[str, int, int], None]) -> Mapping[str, list[Slot] | list[Channel]]:
    """The warm slots of all models, or the channel of a video. progress: as `open_slots`."""
    if not is_video(settings.model):
        return open_slots(settings, progress)
    progress(LOADING, 0, 1)
    guidance = first_video_request(settings).guidance
    stream = open_video(settings.model_copy(update={"guidance_scale": guidance}), use_safetensors=True)
    progress(WARMING_UP, 0, 1)
    return {"model": [Channel(stream)]}


def check_settings(settings: Settings) -> None:
    """Raise ValueError for settings that the page of a video model does not use."""
    check_video(settings, UNUSED)


def first_video_request(settings: Settings) -> DrawRequest:
    """What is drawn at first: without guidance, unless the settings have some."""
    return first_request(settings).model_copy(update={"mode": "text", "guidance": settings.guidance_scale or 1.0})


class Broadcast(Sink):
    """Passes every new image on."""

    def __init__(self, deliver: Callable[[TimedImage], object]) -> None:
        self._deliver = deliver
        self._last: np.ndarray | None = None

    def open(self) -> None:
        """Nothing is to be opened."""

    def write(self, image: TimedImage) -> None:
        """Pass it on, unless it is the last one again."""
        if image.pixels is not self._last:
            self._last = image.pixels
            self._deliver(image)

    def close(self) -> None:
        """Nothing is to be closed."""


class VideoWorker(Worker):
    """The model's thread of a video. `request` is what is drawn for all. A viewer's change acts at the next chunk, and the
    other viewers get the new settings. The video pauses while no viewer watches."""

    def __init__(self, opened: Callable[[], Mapping[str, list[Channel]]], metrics: Metrics, settings: Settings):
        super().__init__(opened, metrics)
        self.request = self._first = first_video_request(settings)
        guided = settings.cfg_type != "none"
        self._names = {name: own for name, own in NAMES.items() if guided or name not in GUIDED}
        self._given: dict[Viewer, DrawRequest] = {}  # the settings that each viewer was given last
        self._frame = 0

    def add(self, client: Viewer) -> None:
        """Add a viewer, which has been given `request`."""
        with self.changing():
            self._given[client] = client.request
            super().add(client)

    def _work(self) -> None:
        super()._work()
        self._given.clear()

    def _work_on(self) -> None:
        stream: VideoStream = self.slots["model"][0].stream
        try:
            if changes := changed_fields(self._first, self.request):  # the model was opened again after an error
                self._update(stream, changes)
            while not self._stopping:
                with VideoLive(stream, Broadcast(self._deliver)) as show:
                    self._apply_changes(stream, show)
                stream.reset()  # a video that has an end begins again
        finally:
            stream.close()

    def _apply_changes(self, stream: VideoStream, show: VideoLive) -> None:
        """Apply what viewers change, until `stop` or the end of the show."""
        errors = 0
        while show.running:
            with self._changed:
                self._drop_gone()
                if self._stopping:
                    return
                self._given = {one: self._given[one] for one in self._clients}
                show.pause(not any(one.request.running for one in self._clients))
                wanted = [(one, one.request) for one in self._clients if changed_fields(self._given[one], one.request)]
                if not wanted:
                    self._changed.wait(NAP)
            for client, request in wanted:
                self._apply(stream, client, request)
            if show.statistics.errors > errors:
                errors = show.statistics.errors
                self._metrics.count("errors")
                self._tell_all(FAILED)

    def _apply(self, stream: VideoStream, client: Viewer, request: DrawRequest) -> None:
        """Draw what a viewer has changed, and give it to the others; report what cannot be."""
        changes = changed_fields(self._given[client], request)
        try:
            self._update(stream, changes)
        except (TypeError, ValueError) as error:
            self._call(client, client.report, str(error))
            changes = {}
        except Exception as error:  # such as too little memory for a prompt; what is drawn stays
            log_failure("a change failed", error)
            self._call(client, client.report, f"the change failed ({type(error).__name__})")
            changes = {}
        with self._changed:
            self.request = self.request.model_copy(update=changes)
            for one in self._clients:
                if one is client and changes:
                    self._given[one] = request
                else:
                    self._give(one, refused=request)

    def _give(self, client: Viewer, refused: DrawRequest) -> None:
        """Give a viewer what is drawn. What it has changed itself meanwhile stays, and is applied next."""
        own = {} if client.request is refused else changed_fields(self._given[client], client.request)
        self._given[client] = self.request
        self._call(client, client.follow, self.request.model_copy(update=own))

    def _update(self, stream: VideoStream, changes: Json) -> None:
        if unknown := sorted(changes.keys() - self._names.keys()):
            raise ValueError(f"{', '.join(unknown)}: a video that all viewers share takes {', '.join(self._names)} only")
        stream.update(**{self._names[name]: value for name, value in changes.items()})

    def _deliver(self, image: TimedImage) -> None:
        """Give a frame to every viewer that can take it now."""
        with self._changed:
            drawn = Drawn(image.pixels, self._frame, image.time, None, ())
            self._frame += 1
            for one in self._clients:
                if self._call(one, one.ready):
                    self._call(one, one.show, drawn)
                elif one.request.running:
                    self._metrics.count("drops", "out")

    def _tell_all(self, message: str) -> None:
        with self._changed:
            for one in self._clients:
                self._call(one, one.report, message)


def changed_fields(before: DrawRequest, after: DrawRequest) -> Json:
    """The settings that differ, but for whether images are wanted."""
    old = before.model_dump(exclude={"running"})
    return {name: value for name, value in after.model_dump(exclude={"running"}).items() if value != old[name]}
