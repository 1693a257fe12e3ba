"""Level, bands, onsets, tempo and beat of sound, found as it arrives. Knows samples; no device, no file, no knob.

The sound is cut into windows of about 40 ms, one every 5 ms (a hop). The rise of their spectra from hop to hop is the
spectral flux, whose peaks are onsets. Every 0.25 s a comb over the flux's autocorrelation gives the tempo, and a comb over
the flux itself the time of the last beat, to which a phase-locked loop turns.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence

import numpy as np

logger = logging.getLogger(__name__)
HOPS_PER_SECOND = 200
WINDOW = 8  # hops
BANDS = {"low": (20.0, 250.0), "mid": (250.0, 4000.0), "high": (4000.0, 16000.0)}  # Hz
FLOOR = -60.0  # dB of a full-scale sine: a level of 0
FLUX_BANDS, FLUX_FLOOR, LAG = 24, -80.0, 2  # of the spectral flux; LAG: hops between the spectra that are compared
ONSET_DELAY = 1.0  # hops from an onset to the end of the hop that shows it
RISE = 2.0  # dB above its usual value by which the flux of an onset rises, at least
REFRACTORY = 0.08  # seconds between onsets, at least
MEMORY = 8.0  # seconds of flux in which tempo and beat are found
EVERY = 0.25  # seconds between two estimates of the tempo
TEMPI, USUAL = np.arange(600, 2001) / 10, 120.0  # BPM; of two that fit equally, the nearer to the usual one
BELL = np.exp(-0.5 * (np.arange(-6, 7) / 2) ** 2)  # that makes the flux smooth, over 10 ms
REGULAR = 0.3  # correlation of the flux from beat to beat, above which there is a tempo
FLUX_DELAY = 2.5  # hops from an onset to the maximum of its flux
TURN = 0.25  # of the difference to the beat that was found, at each estimate


class SoundAnalysis:
    """Analyses samples as they are fed. Times are seconds from the first sample.

    level, low, mid, high: power of the last window and of its bands, in [0, 1] on a scale of decibels: 1 is a full-scale
        sine, and 0 is 60 dB less, or silence. The bands reach from 20 to 250, to 4000 and to 16,000 Hz.
    onsets: times of the last onsets. tempo: BPM, 60 to 200; None before one was found.

    Raises:
        ValueError: a rate below 8000 samples a second.
    """

    def __init__(self, rate: float) -> None:
        if not rate >= 8000:
            raise ValueError(f"sound of {rate:g} samples a second: give 8000 or more")
        self.hop = round(rate / HOPS_PER_SECOND)
        self.level = self.low = self.mid = self.high = 0.0
        self.onsets: deque[float] = deque(maxlen=1000)
        self.tempo: float | None = None
        self._hop_rate, self._size = rate / self.hop, WINDOW * self.hop
        self._window = np.hanning(self._size + 1)[:-1].astype(np.float32)
        self._scale = 4 / (self._size * (self._window**2).sum())  # a full-scale sine has a power of 1
        frequencies = np.fft.rfftfreq(self._size, 1 / rate)
        edges = np.geomspace(40, min(16000, rate / 2), FLUX_BANDS + 1)
        edges[0] = 0
        self._flux_bands = _matrix(frequencies, list(zip(edges[:-1], edges[1:], strict=True)))
        self._bands = _matrix(frequencies, [(0.0, math.inf), *BANDS.values()])
        self._tail = np.zeros(self._size, np.float32)  # what the next window begins with
        self._hops = 0  # windows so far
        self._spectra: deque[np.ndarray] = deque([np.full(FLUX_BANDS, FLUX_FLOOR)] * LAG, maxlen=LAG)
        self._flux = np.zeros(round(MEMORY * HOPS_PER_SECOND))  # newest last
        self._tempi: deque[float] = deque(maxlen=5)
        self._beat_at = 0.0  # time of a beat
        self._warned = False

    @property
    def seconds(self) -> float:
        """Of sound that was analysed."""
        return self._hops / self._hop_rate

    def feed(self, samples: np.ndarray) -> None:
        """Analyse more samples, float `[n]` or `[n, channels]` within [-1, 1], of which the channels' mean counts. Samples
        out of range are clipped, and those that are not finite are 0, which is logged once."""
        if not np.isfinite(samples).all() and not self._warned:
            self._warned = True
            logger.warning("the sound has samples that are not finite, which are taken as 0")
        finite = np.nan_to_num(samples, nan=0, posinf=0, neginf=0).clip(-1, 1)
        self._tail = np.concatenate([self._tail, finite.mean(1) if finite.ndim == 2 else finite])
        while len(self._tail) >= self._size + self.hop:
            self._tail = self._tail[self.hop :]
            self._analyse(self._tail[: self._size])

    def _analyse(self, window: np.ndarray) -> None:
        power = np.abs(np.fft.rfft((window - window.mean()) * self._window)) ** 2 * self._scale
        levels = 1 - _decibels(self._bands @ power, FLOOR) / FLOOR
        self.level, self.low, self.mid, self.high = levels.clip(0, 1).tolist()
        spectrum = _decibels(self._flux_bands @ power, FLUX_FLOOR)
        flux = float((spectrum - self._spectra[0]).clip(0).mean())
        self._spectra.append(spectrum)
        self._hops += 1
        self._find_onset(flux)
        self._flux = np.append(self._flux[1:], flux)
        if self._hops % round(EVERY * HOPS_PER_SECOND) == 0:
            self._find_beat()

    def _find_onset(self, flux: float) -> None:
        """A flux far above that of the last second is an onset, at the middle of the newest hop."""
        usual = np.median(self._flux[-min(self._hops, HOPS_PER_SECOND) :])
        now = (self._hops - ONSET_DELAY) / self._hop_rate
        if flux > 1.5 * usual + RISE and (not self.onsets or now - self.onsets[-1] >= REFRACTORY):
            self.onsets.append(now)

    def _find_beat(self) -> None:
        """The tempo whose beat the flux repeats best, and the loop turned to the beats that are found with it."""
        usual = np.median(self._flux[-min(self._hops, len(self._flux)) :])
        rises = np.convolve(np.sqrt((self._flux - usual - RISE).clip(0)), BELL, "same")
        tempo = _tempo(rises - rises.mean(), self._hop_rate)
        if tempo is None:
            return
        self._tempi.append(tempo)
        first, self.tempo = self.tempo is None, float(np.median(self._tempi))
        period = 60 / self.tempo
        found = self.seconds - (_hops_since_beat(rises, period * self._hop_rate) + FLUX_DELAY) / self._hop_rate
        if first:
            self._beat_at = found
        beats = (found - self._beat_at) / period
        self._beat_at += (round(beats) + TURN * (beats - round(beats))) * period

    def beat(self, time: float) -> float:
        """Phase within the beat at a time, in [0, 1): 0 on the beat. Times to come are extrapolated."""
        if self.tempo is None:
            raise ValueError("no tempo was found yet")
        return (time - self._beat_at) * self.tempo / 60 % 1.0 % 1.0  # the second one: -1e-18 % 1.0 is 1.0


def _matrix(frequencies: np.ndarray, bands: Sequence[tuple[float, float]]) -> np.ndarray:
    """`[bands, bins]`, 1 where a bin is within a band; its sum over bins is the band's power."""
    return np.array([(low <= frequencies) & (frequencies < high) for low, high in bands], np.float32)


def _decibels(power: np.ndarray, floor: float) -> np.ndarray:
    return 10 * np.log10(power.clip(10 ** (floor / 10)))


def _tempo(rises: np.ndarray, rate: float) -> float | None:
    """BPM of a flux of mean 0; None where nothing in it is regular."""
    size = len(rises)
    repeats = np.fft.irfft(np.abs(np.fft.rfft(rises, 2 * size)) ** 2)[:size]
    if repeats[0] <= 0:
        return None
    teeth = rate * 60 / TEMPI * np.arange(1, 5)[:, None]
    regular = np.interp(teeth, np.arange(size), repeats / repeats[0]).mean(0)
    best = np.argmax(regular * np.exp(-0.5 * np.log2(TEMPI / USUAL) ** 2))
    return float(TEMPI[best]) if regular[best] > REGULAR else None


def _hops_since_beat(rises: np.ndarray, period: float) -> float:
    """How many hops before the last one the newest beat of this period, in hops, was."""
    phases, beats = np.arange(0, period), np.arange(int(len(rises) / period) - 1)
    at = len(rises) - 1 - phases[:, None] - beats * period
    return float(phases[np.argmax(np.interp(at, np.arange(len(rises)), rises) @ 0.9**beats)])
