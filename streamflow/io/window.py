"""A window on the desktop, with its keys. Knows pygame (pygame-ce), whose wheels bring SDL."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from streamflow.io.device import Device
from streamflow.io.protocols import Sink, SinkLost, TimedImage, need


class WindowSink(Device, Sink):
    """Shows images, fitted into the window, black around them. on_key is called with the name of each key pressed
    ("p", "space", "f1"), in the thread that writes. On macOS that must be the main thread.

    Raises, from open: OSError where there is no display; from write: SinkLost when the window was closed.
    """

    def __init__(
        self,
        title: str = "StreamFlow",
        size: tuple[int, int] | None = None,
        fullscreen: bool = False,
        on_key: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__("the window")
        self.title, self.size, self.fullscreen, self.on_key = title or "StreamFlow", size, fullscreen, on_key

    def _open(self, closing: ExitStack) -> object:
        pygame = need("pygame", "pygame-ce")
        try:
            pygame.display.init()
        except pygame.error as error:
            raise OSError(f"no window can be opened: {error}") from error
        closing.callback(pygame.display.quit)
        self._screen = None
        return pygame

    def write(self, image: TimedImage) -> None:
        pygame = self.handle
        height, width = image.pixels.shape[:2]
        if self._screen is None:
            flags = pygame.RESIZABLE | (pygame.FULLSCREEN if self.fullscreen else 0)
            self._screen = pygame.display.set_mode(self.size or (width, height), flags)
            pygame.display.set_caption(self.title)
        shown = pygame.image.frombuffer(image.pixels.tobytes(), (width, height), "RGB")
        across, down = self._screen.get_size()
        scale = min(across / width, down / height)
        if scale != 1:
            shown = pygame.transform.smoothscale(shown, (max(1, int(width * scale)), max(1, int(height * scale))))
        self._screen.fill((0, 0, 0))
        self._screen.blit(shown, ((across - shown.get_width()) // 2, (down - shown.get_height()) // 2))
        pygame.display.flip()
        for event in pygame.event.get():
            if event.type == pygame.QUIT:
                raise SinkLost("the window was closed")
            if event.type == pygame.KEYDOWN and self.on_key is not None:
                self.on_key(pygame.key.name(event.key))
