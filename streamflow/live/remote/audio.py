"""Sound of a device or a file as values of knobs. Knows sounddevice (PortAudio) and soundfile; no knob, no field."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

import numpy as np

from streamflow.io.protocols import need
from streamflow.live.feed import describe
from streamflow.live.remote.sound import SoundAnalysis

logger = logging.getLogger(__name__)
PACKAGE = '"streamflow-rf[audio]"'
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff")  # of files; every other name is a device
BLOCK = 0.02  # seconds that are read at once
FADE = 0.15  # seconds in which the value of an onset falls from 1 to 0.37
SILENCE = 2.0  # seconds without samples, after which a device is logged
ENDING = 2.0  # seconds for the thread to end


class Reader(Protocol):
    """Samples as they are played. rate: samples a second. latency: seconds from a sound to the return of the `read` that
    has it."""

    rate: float
    latency: float

    def read(self) -> np.ndarray:
        """The next `BLOCK` seconds, float32 `[n, channels]`, once they have been played."""
        ...

    def close(self) -> None:
        """Close the device or file."""
        ...


class FileReader:
    """A sound file at the speed of its sound, again and again. It is not heard.

    Raises:
        ImportError: without soundfile. FileNotFoundError. ValueError: it is no sound file, or shorter than what is read at
            once.
    """

    latency = 0.0

    def __init__(self, path: Path) -> None:
        soundfile = need("soundfile", PACKAGE)
        if not path.exists():
            raise FileNotFoundError(f"there is no sound file {path}")
        try:
            self._file = soundfile.SoundFile(path)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{path} cannot be read as sound: {error}") from error
        least = round(BLOCK * self._file.samplerate)
        if self._file.frames < least:
            self.close()
            raise ValueError(f"{path} has {self._file.frames} samples, and {least} are read at once")
        self.rate: float = self._file.samplerate
        self._due = time.monotonic()

    def read(self) -> np.ndarray:
        """The next samples. At the end of the file, it starts again."""
        samples = self._file.read(round(BLOCK * self.rate), dtype="float32", always_2d=True)
        if not len(samples):
            self._file.seek(0)
            samples = self._file.read(round(BLOCK * self.rate), dtype="float32", always_2d=True)
            if not len(samples):
                raise EOFError("the file has lost its samples")
        self._due += len(samples) / self.rate
        time.sleep(max(0.0, self._due - time.monotonic()))
        return samples

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class DeviceReader:
    """A microphone, a line input or what a loopback device hears, by its name or a part that only it has, or "default".

    Raises:
        ImportError: without sounddevice. OSError: without PortAudio; no such device, or it cannot be opened.
    """

    def __init__(self, name: str) -> None:
        try:
            sounddevice = need("sounddevice", PACKAGE)
        except OSError as error:  # it looks for PortAudio where it is imported
            remedy = "sudo apt install libportaudio2" if sys.platform == "linux" else f"pip install {PACKAGE}"
            raise OSError(f"sound devices need PortAudio ({error}): {remedy}") from error
        try:
            device = sounddevice.query_devices(None if name == "default" else name, "input")
            self._stream = sounddevice.InputStream(
                device=device["index"],
                samplerate=device["default_samplerate"],
                channels=min(2, device["max_input_channels"]),
                dtype="float32",
            )
            self._stream.start()
        except (ValueError, sounddevice.PortAudioError) as error:
            inputs = [repr(one["name"]) for one in sounddevice.query_devices() if one["max_input_channels"]]
            there = ", ".join(inputs) or "none"
            raise OSError(f"the sound device {name!r} cannot be opened: {error}; inputs: {there}") from error
        self.rate, self.latency = self._stream.samplerate, self._stream.latency

    def read(self) -> np.ndarray:
        """The next samples. PortAudioError: the device has failed."""
        return self._stream.read(round(BLOCK * self.rate))[0]

    def close(self) -> None:
        """Close the device."""
        self._stream.close()


def open_reader(name: str) -> Reader:
    """The file or device of `audio:NAME`. Errors as those of `FileReader` and `DeviceReader`."""
    return FileReader(Path(name)) if Path(name).suffix.lower() in SUFFIXES else DeviceReader(name)


class AudioInput:
    """Analyses sound in a thread of its own. Where reading it fails, that is logged once: the level, the bands and the onset
    are 0 from then on, and the beat goes on at the last tempo.

    Raises:
        ImportError, OSError, ValueError: as `open_reader`; ValueError for fewer than 8000 samples a second.
    """

    def __init__(self, name: str) -> None:
        self._name, self._reader = f"audio:{name}", open_reader(name)
        try:
            self._analysis = SoundAnalysis(self._reader.rate)
        except ValueError:
            self._reader.close()
            raise
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._arrived, self._began = time.monotonic(), None
        self._failed = self._silent = False
        self._thread = threading.Thread(target=self._run, name="streamflow control audio", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                self._feed(self._reader.read(), time.monotonic())
        except Exception as error:  # of a driver, whatever it is
            self._failed = True
            logger.warning("%s is lost, and its level stays 0: %s", self._name, describe(error))
        finally:
            self._reader.close()

    def _feed(self, samples: np.ndarray, now: float) -> None:
        with self._lock:
            self._analysis.feed(samples)
            began = now - self._reader.latency - self._analysis.seconds  # of the sound, in time.monotonic()
            self._began = began if self._began is None else self._began + 0.05 * (began - self._began)
            self._arrived = now

    def values(self, now: float) -> dict[str, float]:
        """By address, at a time of `time.monotonic()`. Without `audio:beat` and `audio:tempo` before a tempo was found."""
        with self._lock:
            found, began = self._analysis, self._began
            values = {f"audio:{name}": 0.0 for name in ("level", "low", "mid", "high", "onset")}
            if began is not None and not self._is_silent(now):
                values |= {f"audio:{name}": getattr(found, name) for name in ("level", "low", "mid", "high")}
                ago = now - began - found.onsets[-1] if found.onsets else math.inf
                values["audio:onset"] = math.exp(-max(0.0, ago) / FADE)
            if began is not None and found.tempo is not None:
                values |= {"audio:beat": found.beat(now - began), "audio:tempo": found.tempo}
            return values

    def _is_silent(self, now: float) -> bool:
        """Whether no samples come; logged once, until they come again."""
        silent = self._failed or now - self._arrived > SILENCE
        if silent and not self._silent and not self._failed:
            logger.warning("%s has sent no sound for %g s, and its level is 0 until it does", self._name, SILENCE)
        self._silent = silent
        return silent

    def close(self) -> None:
        """Stop reading; the thread has ended when this returns, unless the driver does not return, which is logged."""
        self._ended.set()
        self._thread.join(ENDING)
        if self._thread.is_alive():
            logger.warning("%s does not answer and is left open", self._name)
