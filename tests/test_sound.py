"""Sound and beat as knobs: levels, onsets, tempo and beat of synthesized audio, MIDI clocks and Link, and what fails."""

import importlib.util
import itertools
import math
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import slow

from streamflow.app import config
from streamflow.app.config import ConfigError, Settings
from streamflow.live.remote import Control, Mapping, audio, open_control
from streamflow.live.remote.knobs import Knobs
from streamflow.live.remote.midi import MidiClock
from streamflow.live.remote.sound import SoundAnalysis

RATE = 44100
LEVELS = ("level", "low", "mid", "high")


def needs(*modules):
    """A test that needs packages of the extras `audio` and `control`, or aalink."""
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    skip = pytest.mark.skipif(bool(lacking), reason=f"pip install {', '.join(lacking)}")
    return lambda test: pytest.mark.extras(skip(test))


def clicks(bpm, seconds, noise=0.0, rate=RATE):
    """Clicks of 1.5 kHz on every beat from 0.25 s on, in white noise, and their times."""
    times = np.arange(0.25, seconds - 0.1, 60 / bpm)
    t = np.arange(round(0.03 * rate)) / rate
    click = 0.8 * np.sin(2 * np.pi * 1500 * t) * np.exp(-t / 0.006)
    samples = noise * np.random.default_rng(0).standard_normal(round(seconds * rate))
    for at in times:
        samples[round(at * rate) :][: len(click)] += click
    return samples.astype(np.float32), times


def sine(frequency, amplitude=1.0, seconds=0.2, rate=RATE):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def analysed(samples, rate=RATE, block=882):
    analysis = SoundAnalysis(rate)
    for at in range(0, len(samples), block):
        analysis.feed(samples[at : at + block])
    return analysis


def levels(analysis):
    return {name: getattr(analysis, name) for name in LEVELS}


def distance(phase):
    """Of a phase from the beat, in beats."""
    return abs((phase + 0.5) % 1 - 0.5)


# -- analysis -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bpm", "noise", "rate"),
    [
        (120, 0, 44100),
        slow(120, 0.02, 48000),
        (90, 0.02, 16000),
        (140, 0.02, 44100),
        slow(67.3, 0, 44100),
        slow(180, 0, 48000),
    ],
)
def test_tempo_onsets_and_beat_of_clicks_are_found(bpm, noise, rate):
    samples, times = clicks(bpm, 9, noise, rate)
    found = analysed(samples, rate)
    assert found.tempo == pytest.approx(bpm, abs=0.3)
    onsets = np.array([one for one in found.onsets if one > 0.1])  # the noise begins at 0
    assert len(onsets) == len(times) and np.abs(onsets - times).max() < 0.015
    assert max(distance(found.beat(at)) for at in times[-6:]) * 60 / bpm < 0.015
    middle = times[-3:] + 30 / bpm
    assert min(distance(found.beat(at)) for at in middle) > 0.45


@pytest.mark.slow
def test_a_new_tempo_is_followed():
    samples = np.concatenate([clicks(100, 10)[0], clicks(130, 12)[0]])
    found = analysed(samples)
    assert found.tempo == pytest.approx(130, abs=0.5)
    assert distance(found.beat(10 + 0.25 + 20 * 60 / 130)) * 60 / 130 < 0.02


def test_the_beat_goes_on_in_silence():
    samples, times = clicks(120, 5)
    found = analysed(np.concatenate([samples, np.zeros(3 * RATE, np.float32)]))
    assert found.tempo == pytest.approx(120, abs=0.3) and len(found.onsets) == len(times)
    assert distance(found.beat(times[0] + 20 * 0.5)) < 0.05


@pytest.mark.parametrize("kind", ["noise", slow("sine"), slow("irregular")])
def test_what_has_no_beat_has_no_tempo(kind):
    rng = np.random.default_rng(1)
    samples = {"noise": 0.1 * rng.standard_normal(8 * RATE), "sine": sine(440, 0.5, 10)}.get(kind)
    if samples is None:
        samples, click = np.zeros(8 * RATE), sine(1500, 0.8, 0.02)
        for at in np.cumsum(rng.uniform(0.15, 0.9, 14)):
            samples[int(at * RATE) :][: len(click)] += click[: len(samples) - int(at * RATE)]
    found = analysed(samples.astype(np.float32))
    assert found.tempo is None and (len(found.onsets) == 1) == (kind != "irregular")
    with pytest.raises(ValueError, match="no tempo was found yet"):
        found.beat(0)


@pytest.mark.parametrize(("frequency", "band"), [(60, "low"), (150, "low"), (440, "mid"), (2500, "mid"), (8000, "high")])
def test_a_sine_is_in_its_band_at_its_level(frequency, band):
    for amplitude in (1.0, 0.1, 0.01):
        found = levels(analysed(sine(frequency, amplitude)))
        expected = 1 + 20 * math.log10(amplitude) / 60
        assert found["level"] == pytest.approx(expected, abs=0.01) and found[band] == pytest.approx(expected, abs=0.01)
        assert all(value < expected - 0.3 or value == 0 for name, value in found.items() if name not in ("level", band))
    assert all(0 <= value <= 1 for value in found.values())


def test_silence_and_a_constant_have_level_0_and_no_onset():
    for samples in (np.zeros(RATE, np.float32), np.full((RATE, 2), 0.5, np.float32)):
        found = SoundAnalysis(RATE)
        found.feed(samples[: RATE // 2])
        found.onsets.clear()  # of a constant that begins
        found.feed(samples[RATE // 2 :])
        assert set(levels(found).values()) == {0.0} and not found.onsets and found.tempo is None


def test_samples_that_are_not_finite_or_clipped_stop_nothing(caplog):
    samples, times = clicks(120, 5)
    loud = 50 * samples
    loud[5000], loud[50000], loud[90000:90050] = math.inf, -math.inf, math.nan
    found = analysed(loud)
    assert found.tempo == pytest.approx(120, abs=0.5)
    assert all(min(abs(one - at) for one in found.onsets) < 0.02 for at in times)
    assert all(0 <= value <= 1 for value in levels(found).values())
    assert [record.getMessage() for record in caplog.records] == [
        "the sound has samples that are not finite, which are taken as 0"
    ]
    with pytest.raises(ValueError, match="sound of 4000 samples a second: give 8000 or more"):
        SoundAnalysis(4000)


def test_neither_blocks_nor_channels_change_what_is_found():
    samples, _ = clicks(120, 3, 0.01)
    one = analysed(samples)
    for other in (analysed(samples, block=97), analysed(np.stack([samples, samples], 1), block=30011)):
        assert list(other.onsets) == list(one.onsets) and other.tempo == one.tempo and levels(other) == levels(one)


@pytest.mark.slow
def test_phases_are_in_range_and_rise_while_the_loop_turns():
    samples, _ = clicks(140, 10, 0.01)
    found, before = SoundAnalysis(RATE), None
    for at in range(0, len(samples), 882):
        found.feed(samples[at : at + 882])
        if found.tempo is not None:
            phase = found.beat(found.seconds)
            assert 0 <= phase < 1
            assert before is None or (phase - before) % 1 < 0.25
            before = phase
    assert 0 <= found.beat(found._beat_at - 1e-18) < 1


# -- settings -------------------------------------------------------------------------------------------------------------


def test_ends_are_those_of_the_value():
    ends = {
        "audio:level": (0, 1),
        "audio:beat": (0, 1),
        "link:tempo": (60, 180),
        "midi:beat": (0, 1),
        "midi:cc:1:7": (0, 127),
    }
    assert {one: Mapping(address=one, field="delta").ends for one in ends} == ends
    assert Mapping(address="audio:tempo", field="delta", source=(100, 130)).ends == (100, 130)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sound": ["audio"]}, "sound: 'audio' is no sound: write audio:default, audio:NAME, audio:FILE.wav or link:"),
        ({"sound": ["link:", "link:"]}, "at most one audio: and one link:, not link:, link:"),
        (
            {"mappings": [{"address": "audio:beat", "field": "delta"}]},
            "sound has no audio:, and mappings need it: audio:beat",
        ),
        ({"sound": ["audio:a"], "mappings": [{"address": "link:beat", "field": "delta"}]}, "sound has no link:"),
        ({"mappings": [{"address": "midi:tempo", "field": "delta"}]}, "midi is empty, and mappings need it: midi:tempo"),
        ({"mappings": [{"address": "link:level", "field": "delta"}]}, "'link:level' is no address"),
        ({"sound": ["audio:a"], "mappings": [{"address": "audio:beat", "field": "prompt"}]}, "which sound does not send"),
    ],
)
def test_mistakes_are_named(wrong, says):
    with pytest.raises(ConfigError) as caught:
        config.parse(wrong, Control)
    assert says in str(caught.value)


def test_the_example_of_the_guide_moves_prompt_weights_with_the_beat():
    guide = (Path(__file__).parents[1] / "docs/guides/live.md").read_text(encoding="utf-8").split("## Sound and beat")[1]
    settings = config.parse(yaml.safe_load(re.search(r"```yaml\n(.*?)```", guide, re.DOTALL)[1]), Settings)
    weights, values = [weight for _, weight in settings.prompt], {"audio:beat": 0.0, "audio:high": 0.6}
    knobs = Knobs(settings.control.mappings, weights)
    for address, value in values.items():
        knobs.put(address, value)
    assert knobs.due(0.0)["prompt_weights"][:2] == [1.0, 2.0]
    knobs.put("audio:beat", 0.75)
    assert knobs.due(60.0)["prompt_weights"] == pytest.approx([1.0, 0.5, 0.5])


# -- MIDI clock -----------------------------------------------------------------------------------------------------------


@needs("mido")
@pytest.mark.parametrize("bpm", [90, 120, 174])
def test_a_jittered_midi_clock_has_its_tempo_and_beat(bpm):
    from mido import Message

    rng, clock, pulse = np.random.default_rng(0), MidiClock(), 60 / bpm / 24
    clock.take(Message("start"), 100.0)
    found = []
    for k in range(24 * 16):
        at = 100 + k * pulse
        clock.take(Message("clock"), at + abs(rng.normal(0, 0.003)))
        clock.take(Message("note_on", note=60), at)
        if k % 7 == 0:
            found.append((clock.values(at + pulse / 2), (k + 0.5) / 24))
    assert [values for values, _ in found[:4]] == [{}] * 4
    for values, beat in found[8:]:
        assert values["midi:tempo"] == pytest.approx(bpm, abs=1)
        assert distance(values["midi:beat"] - beat) * 60 / bpm < 0.006 and 0 <= values["midi:beat"] < 1


@needs("mido")
def test_a_midi_clock_follows_start_and_song_position_and_stops():
    from mido import Message

    clock = MidiClock()

    def play(pulses, since):
        for k in range(pulses):
            clock.take(Message("clock"), since + k / 48)
        return clock.values(since + (pulses - 1) / 48)

    assert play(37, 0)["midi:beat"] == pytest.approx(0.5)
    assert clock.values(36 / 48 + 0.3) == {}
    clock.take(Message("start"), 5)
    assert play(23, 5) == {}
    clock.take(Message("songpos", pos=6), 5.4)  # sixteenths
    assert play(31, 10) == pytest.approx({"midi:beat": 0.75, "midi:tempo": 120})
    clock.take(Message("stop"), 10.7)
    assert play(5, 10 + 31 / 48) == {}, "a stopped song has no beat, though the clock goes on"
    clock.take(Message("continue"), 10.75)
    assert play(1, 10 + 36 / 48) == pytest.approx({"midi:beat": 0.75 + 1 / 24, "midi:tempo": 120})
    clock.take(Message("stop"), 10.77)
    clock.take(Message("songpos", pos=5), 10.78)
    play(11, 10 + 37 / 48)
    clock.take(Message("continue"), 11)
    assert play(1, 11) == pytest.approx({"midi:beat": 0.25, "midi:tempo": 120})
    clock = MidiClock()
    for _ in range(30):  # all at once
        clock.take(Message("clock"), 1.0)
    assert clock.values(1.0) == {}


# -- inputs ---------------------------------------------------------------------------------------------------------------


def until(tell, seconds=10):
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not tell():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.005)


def wav(path, samples):
    import soundfile

    soundfile.write(path, samples, RATE)
    return path


@needs("soundfile")
def test_a_file_moves_fields_again_and_again_and_is_not_learned(tmp_path):
    path, seen = wav(tmp_path / "tone.wav", np.concatenate([sine(1000, 1.0, 0.1), np.zeros(8820, np.float32)])), []
    mapping = Mapping(address="audio:mid", field="guidance_scale", range=(1, 8))
    with open_control(
        Control(sound=(f"audio:{path}",), mappings=(mapping,)), lambda **fields: seen.append(fields)
    ) as controls:
        learner = controls.learn("seed")
        began = time.monotonic()
        for loud in (True, False, True, False):  # the tone and what follows it, twice
            until(lambda loud=loud: controls.tick(time.monotonic()) or (seen and (seen[-1]["guidance_scale"] > 4) == loud))
        assert 0.3 < time.monotonic() - began < 5
        with pytest.raises(TimeoutError):
            learner.wait(0)
    assert max(one["guidance_scale"] for one in seen) == pytest.approx(8, abs=0.2)
    assert not [one for one in threading.enumerate() if one.name == "streamflow control audio"]


@needs("soundfile")
def test_a_file_that_is_lost_is_told_once_and_the_beat_stays(tmp_path, caplog):
    path = wav(tmp_path / "short.wav", sine(1000, 1.0, 0.2))
    with open_control(Control(sound=(f"audio:{path}",)), print) as controls:
        (values,) = controls._senses
        until(lambda: values(time.monotonic())["audio:level"] > 0.9)
        os.truncate(path, 44)
        until(lambda: values(time.monotonic())["audio:level"] == 0)
        controls.tick(time.monotonic())
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"audio:{path} is lost, and its level stays 0: EOFError")


class Unplugged:
    """A device that plays clicks faster than real time, stops, plays on, and fails."""

    rate, latency = RATE, 0.0

    def __init__(self):
        samples = itertools.cycle(clicks(120, 8)[0].reshape(-1, 882))
        self.samples, self.left, self.more = samples, 500, threading.Event()
        self.fails = self.closed = False

    def read(self):
        if not self.left:
            self.more.wait()
        if self.fails:
            raise OSError("Device unavailable [PaErrorCode -9985]")
        self.left -= 1
        return next(self.samples)[:, None]

    def close(self):
        self.closed = True


def test_a_device_that_stops_or_fails_is_told_once_and_the_beat_goes_on(monkeypatch, caplog):
    device = Unplugged()
    monkeypatch.setattr(audio, "open_reader", lambda name: device)
    heard = audio.AudioInput("default")
    until(lambda: device.left == 0 and heard.values(time.monotonic()).get("audio:tempo"))
    now = time.monotonic()
    for ahead in (2.5, 3.0):
        values = heard.values(now + ahead)
        assert values["audio:level"] == values["audio:onset"] == 0 and 119 < values["audio:tempo"] < 121
    assert heard.values(now + 3.25)["audio:beat"] == pytest.approx((values["audio:beat"] + 0.5) % 1, abs=0.01)
    device.left, device.fails = 50, False
    device.more.set()
    until(lambda: heard.values(time.monotonic())["audio:level"] or device.left < 5)
    device.fails = True
    until(lambda: device.closed)
    assert heard.values(time.monotonic())["audio:level"] == 0
    heard.close()
    assert [record.getMessage() for record in caplog.records] == [
        "audio:default has sent no sound for 2 s, and its level is 0 until it does",
        "audio:default is lost, and its level stays 0: OSError: Device unavailable [PaErrorCode -9985]",
    ]


@needs("soundfile")
def test_what_cannot_be_opened_is_told_and_nothing_stays_open(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    wav(tmp_path / "empty.wav", np.zeros(0, np.float32))
    wav(tmp_path / "short.wav", np.zeros(9, np.float32))  # it would be read thousands of times a second
    for name, error, says in (
        (tmp_path / "none.wav", FileNotFoundError, "there is no sound file .*none.wav"),
        (tmp_path / "text.wav", ValueError, "text.wav cannot be read as sound: "),
        (tmp_path / "empty.wav", ValueError, "empty.wav has 0 samples"),
        (tmp_path / "short.wav", ValueError, r"short.wav has 9 samples, and \d+ are read at once"),
    ):
        with pytest.raises(error, match=says):
            open_control(Control(sound=(f"audio:{name}",)), print)
    assert not [one for one in threading.enumerate() if one.name.startswith("streamflow control")]


@needs("sounddevice")
def test_a_device_that_is_not_there_is_told():
    with pytest.raises(
        OSError, match="sound devices need PortAudio .*: .* install |'of nobody' cannot be opened: .*inputs: "
    ):
        open_control(Control(sound=("audio:of nobody",)), print)


@pytest.mark.slow
@needs("aalink")
def test_two_peers_of_link_have_one_beat():
    """Another program sets the tempo, and both have the same phase; the tempo stays when that program leaves."""
    mapping = Mapping(address="link:beat", field="delta")
    with open_control(Control(sound=("link:",), mappings=(mapping,)), lambda **fields: None) as controls:
        from streamflow.live.remote.link import LinkInput

        (values,), other = controls._senses, LinkInput()
        assert values(0)["link:tempo"] == 120
        until(lambda: other._link.num_peers == 1)
        other._link.tempo = 97.0
        until(lambda: abs(values(0)["link:tempo"] - 97) < 0.01)
        time.sleep(1)
        for _ in range(50):
            time.sleep(0.01)
            assert distance(values(0)["link:beat"] - other.values(0)["link:beat"]) < 0.02
        other.close()
        before = values(0)["link:beat"]
        time.sleep(60 / 97 / 2)
        assert values(0)["link:tempo"] == pytest.approx(97, abs=0.01)
        assert 0.45 < (values(0)["link:beat"] - before) % 1 < 0.8
