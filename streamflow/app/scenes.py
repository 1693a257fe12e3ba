"""Scenes of a live performance, each a file of settings: the next one is loaded and warmed while one plays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Self

import torch

from streamflow._threads import aside
from streamflow.app.config import Settings
from streamflow.live.draw import Scene
from streamflow.live.show import Live
from streamflow.models.loading import default_device
from streamflow.parallel.replicas import free_bytes
from streamflow.wrapper import StreamFlowWrapper


def open_scene(settings: Settings) -> StreamFlowWrapper:
    """A scene's model, loaded and prepared beside the models that are loaded.

    Raises:
        MemoryError: it does not fit beside them, with the numbers. Otherwise as `StreamFlowWrapper.from_settings`.
    """
    device = torch.device(settings.device or default_device())
    free = free_bytes(device)
    if (needed := weights_on_disk(settings.model)) > free:
        raise MemoryError(_no_room(settings, device, free, f"its files alone have {needed:,}"))
    try:
        rate = {"target_rate": settings.live.target_fps} if settings.split == "auto" else {}
        return aside(partial(StreamFlowWrapper.from_settings, settings, **rate))
    except torch.OutOfMemoryError as error:
        raise MemoryError(_no_room(settings, device, free, "it took them all")) from error


def weights_on_disk(model: str) -> int:
    """Bytes of a folder's or a file's safetensors; 0 for a model of another kind, whose size is not known before."""
    path = Path(model)
    files = [path] if path.is_file() else path.rglob("*.safetensors") if path.is_dir() else ()
    return sum(file.stat().st_size for file in files)


def _no_room(settings: Settings, device: torch.device, free: int, needed: str) -> str:
    return (
        f"{settings.model} does not fit on {device} beside the scene that plays: {free:,} bytes are free, {needed}; "
        f"choose a smaller model or dtype, or another device for this scene"
    )


class Scenes:
    """Scenes in turn, of which the first is `playing`. Called from one thread, which is not the clock's: `prepare` loads and
    warms the next one, `next` shows it."""

    def __init__(self, live: Live, playing: StreamFlowWrapper, scenes: Sequence[Settings]) -> None:
        self._live, self._playing, self._all = live, playing, tuple(scenes)
        self._at = 0
        self._ready: tuple[StreamFlowWrapper, Scene] | None = None

    def prepare(self) -> None:
        """Load and warm the next scene, if there is another and it is not warm yet. MemoryError: it does not fit."""
        if len(self._all) == 1 or self._ready is not None:
            return
        wrapper = open_scene(self._all[(self._at + 1) % len(self._all)])
        try:
            self._ready = wrapper, aside(self._live.warm, wrapper.stream)
        except BaseException:
            wrapper.close()
            raise

    def next(self, crossfade: float = 0.0) -> bool:
        """Show the next scene and close the one before; False where there is no other."""
        self.prepare()
        if self._ready is None:
            return False
        wrapper, scene = self._ready
        aside(self._live.switch, scene, crossfade)
        self._ready = None
        self._playing, before = wrapper, self._playing
        self._at = (self._at + 1) % len(self._all)
        before.close()
        return True

    def close(self) -> None:
        """Close the scene that plays and the one that is warm, once the show has ended."""
        self._playing.close()
        if self._ready is not None:
            self._ready[0].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
