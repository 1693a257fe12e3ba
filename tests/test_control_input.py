"""Knobs and keys: what comes by OSC and MIDI reaches `update`, in range and smoothed; mistakes are told and stop nothing."""

import importlib.util
import logging
import math
import socket
import threading
import time
from contextlib import ExitStack

import pytest
import torch
import yaml
from pydantic import ValidationError

from streamflow.app import config
from streamflow.app.config import ConfigError
from streamflow.live.remote import Control, Keys, Mapping, open_control
from streamflow.live.remote.knobs import Knobs
from streamflow.live.remote.learn import Learner
from streamflow.live.remote.midi import find_port, parse_message
from streamflow.live.remote.settings import socket_of

LACKING = [name for name in ("pythonosc", "mido", "rtmidi") if importlib.util.find_spec(name) is None]


def extras(test):
    """A test that needs the packages of the extra `control`."""
    return pytest.mark.extras(pytest.mark.skipif(bool(LACKING), reason=f"pip install {', '.join(LACKING)}")(test))


def knobs_of(*mappings, **options):
    return Knobs([Mapping(**one) for one in mappings], **options)


# -- settings -------------------------------------------------------------------------------------------------------------

CONTROL = Control(
    osc="127.0.0.1:9000",
    midi="nanoKONTROL2",
    mappings=(
        Mapping(address="osc:/guidance", field="guidance_scale", range=(1, 8), smoothing=0.25),
        Mapping(address="midi:cc:16:127", field="prompt_weights.1", source=(127, 0)),
        Mapping(address="osc:/text", field="prompt"),
    ),
    keys={"space": "panic", "n": "next"},
)


def test_a_section_is_read_as_it_was_written():
    assert config.parse(yaml.safe_load(yaml.safe_dump(CONTROL.model_dump(mode="json"))), Control) == CONTROL
    plain = CONTROL.model_copy(update={"mappings": ()})
    assert config.parse(yaml.safe_load(config.commented(plain)), Control) == plain
    assert config.parse({}, Control) == Control() and Control().keys["space"] == "pause"


def test_all_mistakes_are_told_with_their_paths():
    one = {"field": "delta"}
    wrong = {
        "osc": "127.0.0.1:99999",
        "keys": {"x": "explode"},
        "mappings": [
            {"address": "cc:74", **one},
            {"address": "midi:cc:17:74", **one},
            {"address": "osc:/all/*", **one},
            {"address": "osc:/a", "field": "sead"},
            {"address": "osc:/a", "smoothing": -1, **one},
            {"address": "osc:/a", "range": [0], **one},
            {"address": "osc:/a", "source": [1, 1], **one},
            {"address": "osc:/a", "field": "feedback", "range": [0, 1]},
            {"address": "midi:note:1:60", "field": "prompt"},
            {"address": "osc:/a", "field": "prompt", "smoothing": 1},
        ],
    }
    with pytest.raises(ConfigError) as caught:
        config.parse(wrong, Control)
    said = str(caught.value)
    for part in (
        "osc: osc is an address such as 127.0.0.1:9000, its port up to 65535, not '127.0.0.1:99999'",
        "keys.x: Input should be 'pause'",
        "mappings.0.address: 'cc:74' is no address",
        "mappings.1.address: 'midi:cc:17:74'",
        "mappings.2.address: 'osc:/all/*'",
        "mappings.3.field: a knob cannot change 'sead': choose one of prompt, ",
        "mappings.4.smoothing: Input should be greater",
        "mappings.5.range.1: Field required",
        "mappings.6: source holds the knob's two ends",
        "mappings.7: feedback is from 0 to 0.999, and range is [0.0, 1.0]",
        "mappings.8: prompt is a text, which MIDI does not send",
        "mappings.9: prompt is a text: leave range",
    ):
        assert part in said


def test_mappings_fit_together():
    one = {"address": "osc:/a", "field": "delta"}
    for wrong, says in (
        ({"osc": ":9000", "mappings": [one, {**one, "field": "seed"}]}, "more than one mapping of osc:/a"),
        ({"midi": "nano", "mappings": [one]}, "osc is empty, and mappings need it: osc:/a"),
    ):
        with pytest.raises(ConfigError, match=says):
            config.parse(wrong, Control)


def test_osc_is_bound_to_this_machine_unless_told_otherwise():
    assert [socket_of(one) for one in ("9000", ":9000", "0.0.0.0:1", "[::1]:9000")] == [
        ("127.0.0.1", 9000),
        ("127.0.0.1", 9000),
        ("0.0.0.0", 1),
        ("::1", 9000),
    ]


# -- knobs ----------------------------------------------------------------------------------------------------------------


def test_values_are_scaled_held_within_the_range_and_sent_once():
    knobs = knobs_of(
        {"address": "osc:/g", "field": "guidance_scale", "range": (1, 8)},
        {"address": "midi:cc:1:74", "field": "delta", "range": (1, -1)},
        {"address": "osc:/seed", "field": "seed", "range": (0, 10)},
        {"address": "osc:/text", "field": "prompt"},
    )
    assert knobs.due(0) == {}
    for address, value in (("osc:/g", 0.5), ("midi:cc:1:74", 127), ("osc:/seed", 0.26), ("osc:/text", "a fox")):
        knobs.put(address, value)
    first = knobs.due(0)
    assert first == {"guidance_scale": 4.5, "delta": -1.0, "seed": 3, "prompt": "a fox"}
    assert isinstance(first["seed"], int)
    knobs.put("osc:/g", 10**400)
    knobs.put("osc:/seed", 0.34)  # rounds to what was sent
    knobs.put("osc:/of/nobody", 1)
    assert knobs.due(1) == {"guidance_scale": 8.0}
    assert knobs.due(2) == {}


def test_smoothing_is_exponential_whatever_the_frame_rate_and_ends_at_the_target():
    mapping = {"address": "osc:/g", "field": "guidance_scale", "range": (0, 10), "smoothing": 0.5}
    ends = []
    for frames in (2, 50):  # a second each
        knobs = knobs_of(mapping)
        knobs.put("osc:/g", 0)
        assert knobs.due(0) == {"guidance_scale": 0}
        knobs.put("osc:/g", 1)
        values = [knobs.due((k + 1) / frames)["guidance_scale"] for k in range(frames)]
        assert values == sorted(values) and len(set(values)) == frames
        ends.append(values[-1])
    assert ends == pytest.approx([10 * (1 - math.exp(-2))] * 2)
    assert knobs.due(5) == {"guidance_scale": 10.0}  # within a thousandth of the range: there
    assert knobs.due(9) == {}


def test_of_two_knobs_of_one_field_the_last_moved_counts():
    knobs = knobs_of({"address": "osc:/a", "field": "delta"}, {"address": "osc:/b", "field": "delta"})
    for address, value in (("osc:/a", 0.2), ("osc:/b", 0.9), ("osc:/a", 0.2)):
        knobs.put(address, value)
        assert knobs.due(0) == {"delta": value}


def test_weights_go_out_together():
    both = [{"address": f"osc:/{i}", "field": f"prompt_weights.{i}"} for i in (0, 2)]
    knobs = knobs_of(*both, weights=(0.6, 0.3, 0.1, 0.5))
    knobs.put("osc:/2", 1)
    assert knobs.due(0) == {"prompt_weights": [0.6, 0.3, 1.0, 0.5]}
    knobs.put("osc:/0", 0)
    assert knobs.due(1) == {"prompt_weights": [0.0, 0.3, 1.0, 0.5]}
    knobs = knobs_of(*both)
    knobs.put("osc:/0", 0.25)
    assert knobs.due(0) == {"prompt_weights": [0.25, 1.0, 1.0]}


def test_what_cannot_be_is_dropped_and_told_once_an_address(caplog):
    knobs = knobs_of({"address": "osc:/g", "field": "delta"}, {"address": "osc:/text", "field": "prompt"})
    for values in ((math.nan,), (math.inf,), ("loud",), (True,), (None,), (0.1, 0.2), ()):
        knobs.put("osc:/g", *values)
    knobs.put("osc:/text", 3)
    assert knobs.due(0) == {}
    assert [record.getMessage().split(" sent")[0] for record in caplog.records] == ["osc:/g", "osc:/text"]


# -- learn mode -----------------------------------------------------------------------------------------------------------


def test_the_next_address_that_moves_is_learned():
    learner = Learner("guidance_scale", (1, 8), 0.1)
    for address, value in (("osc:/still", 0.5), ("osc:/moved", 0), ("osc:/still", 0.5), ("osc:/text", "a"), ("osc:/a b", 1)):
        assert learner.receive(address, value) is None
    made = learner.receive("osc:/moved", 0.1)
    assert made == Mapping(address="osc:/moved", field="guidance_scale", range=(1, 8), smoothing=0.1)
    assert learner.wait(0) is made
    assert learner.receive("osc:/still", 0.7) is None
    assert Learner("prompt").receive("osc:/said", "a fox") == Mapping(address="osc:/said", field="prompt")


def test_a_range_is_by_default_0_to_1_within_what_the_field_takes():
    assert Mapping(address="osc:/a", field="strength").range == (0.01, 1.0)
    assert Mapping(address="osc:/a", field="feedback").range == (0.0, 0.999)
    assert (
        Mapping(address="osc:/a", field="prompt_weights.3").range == Mapping(address="osc:/a", field="seed").range == (0, 1)
    )
    with pytest.raises(ValueError, match="strength is from 0.01 to 1"):
        Mapping(address="osc:/a", field="strength", range=(0.0, 1.0))


def test_learning_keeps_a_thousand_addresses_and_hears_what_comes_after_them():
    learner = Learner("delta")
    for k in range(5000):
        assert learner.receive(f"osc:/{k}", 0) is None
    assert len(learner._first_values) == 1000
    assert learner.receive("osc:/" + "a" * 300, 0) is learner.receive("osc:/" + "a" * 300, 1) is None
    assert learner.receive("osc:/0", 1) is None  # forgotten
    assert learner.receive("osc:/4999", 1).address == "osc:/4999"


def test_learning_ends_where_nothing_moves():
    learner = Learner("delta")
    with pytest.raises(TimeoutError, match="delta within 0.01 s"):
        learner.wait(0.01)
    assert [learner.receive("osc:/a", value) for value in (0, 1)] == [None, None]
    with pytest.raises(ValidationError, match="sead"):
        Learner("sead")


# -- keys -----------------------------------------------------------------------------------------------------------------


def test_keys_turn_flags_on_and_off_and_count_scenes():
    keys = Keys()
    flags = {"space": "paused", "f": "frozen", "b": "black", "p": "panic"}
    for key, flag in flags.items():
        keys.press(key)
        assert [name for name in flags.values() if getattr(keys, name)] == [flag]
        keys.press(key)
        assert not getattr(keys, flag)
    for key in ("n", "n", "q"):
        keys.press(key)
    assert (keys.next(), keys.next()) == (2, 0)
    other = Keys({"q": "panic"})
    other.press("p")
    assert not other.panic
    other.press("q")
    assert other.panic


# -- all together ---------------------------------------------------------------------------------------------------------


def test_a_refused_update_is_told_once_and_does_not_hold_up_the_others(caplog):
    taken, refusing = [], True

    def update(**fields):
        if refusing and "guidance_scale" in fields:
            raise ValueError("there is no guidance")
        taken.append(fields)

    with open_control(Control(), update) as controls:
        for field in ("guidance_scale", "delta"):
            controls.learn(field)
            for value in (0, 1):
                controls.receive(f"osc:/{field}", value)
        assert [one.field for one in controls.settings.mappings] == ["guidance_scale", "delta"]
        caplog.clear()
        for now, value in enumerate((0.1, 0.2, 0.3)):
            refusing = now < 2
            controls.receive("osc:/guidance_scale", value)
            controls.receive("osc:/delta", value)
            controls.tick(now)
            controls.tick(now)
    assert taken == [{"delta": 0.1}, {"delta": 0.2}, {"guidance_scale": 0.3, "delta": 0.3}]
    assert [record.getMessage() for record in caplog.records] == [
        "guidance_scale = 0.1 is refused and dropped: there is no guidance"
    ]


def until(tell, seconds=10):
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not tell():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.002)


@pytest.fixture
def send():
    """`send(controls, address, *values)`: by UDP, as any OSC program does."""
    from pythonosc.udp_client import SimpleUDPClient

    with ExitStack() as clients:

        def sent(controls, address, *values):
            client = clients.enter_context(SimpleUDPClient(*controls.osc_bound))
            client.send_message(address, list(values))

        yield sent


@extras
def test_osc_changes_a_real_stream(stream_of, send):
    mappings = (
        Mapping(address="osc:/seed", field="seed", range=(0, 10), source=(0, 10)),
        Mapping(address="osc:/mix", field="prompt_weights.1"),
        Mapping(address="osc:/delta", field="delta"),
    )
    prompt = [("a red apple", 0.5), ("a fox", 0.5)]
    turned, expected = (stream_of("sd3", (0, 1), prepare={"num_inference_steps": 2}) for _ in range(2))
    for stream in (turned, expected):
        stream.update(prompt=prompt)
    before = turned.txt2img()
    turned.reset()
    arrived = {}

    def update(**fields):
        turned.update(**fields)
        arrived.update(fields)

    with open_control(Control(osc="127.0.0.1:0", mappings=mappings), update, weights=(0.5, 0.5)) as controls:
        send(controls, "/nobody", 1)
        send(controls, "/delta", "loud")
        send(controls, "/seed", 7)
        send(controls, "/mix", 0.25)
        until(lambda: controls.tick(time.monotonic()) or len(arrived) == 2)
        threads = [one for one in threading.enumerate() if one.name == "streamflow control osc"]
    assert arrived == {"seed": 7, "prompt_weights": [0.5, 0.25]}
    assert threads and not any(one.is_alive() for one in threads)
    expected.update(seed=7, prompt_weights=[0.5, 0.25])
    after = turned.txt2img()
    assert torch.equal(after, expected.txt2img()) and not torch.equal(after, before)


@extras
def test_neither_what_is_no_osc_nor_what_is_for_later_holds_up_the_next_message(send, caplog):
    from pythonosc.osc_bundle_builder import OscBundleBuilder
    from pythonosc.osc_message_builder import OscMessageBuilder

    taken = []
    mapping = Mapping(address="osc:/text", field="prompt")
    with open_control(Control(osc=":0", mappings=(mapping,)), lambda **fields: taken.append(fields)) as controls:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
            for data in (b"", b"noise", b"/\xff\xfe\0\0", b"#bundle\0\0", b"#bundle\0" + b"\xff" * 99, b"/a\0\0,f\0\0"):
                for _ in range(2):
                    raw.sendto(data, controls.osc_bound)
            later = OscBundleBuilder(time.time() + 1e6)
            later.add_content(OscMessageBuilder("/later").build())
            raw.sendto(later.build().dgram, controls.osc_bound)
        send(controls, "/text", "été")
        until(lambda: controls.tick(0) or taken)
        with pytest.raises(OSError, match=f"OSC cannot listen at 127.0.0.1:{controls.osc_bound[1]}"):
            open_control(Control(osc=f":{controls.osc_bound[1]}"), print)
    controls.close()
    assert taken == [{"prompt": "été"}]
    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("streamflow.live.remote")]
    assert "is not OSC" in told and not [one for one in caplog.records if one.module.startswith("osc_")]
    assert not [one for one in logging.getLogger().filters if "OscInput" in repr(one)]
    open_control(Control(osc=f":{controls.osc_bound[1]}"), print).close()  # the port is free again


@extras
def test_midi_messages_become_addresses_and_values():
    from mido import Message

    knobs = knobs_of(
        {"address": "midi:cc:1:74", "field": "delta"}, {"address": "midi:note:16:60", "field": "feedback", "range": (0, 0.5)}
    )
    for message, due in (
        (Message("control_change", channel=0, control=74, value=127), {"delta": 1.0}),
        (Message("control_change", channel=1, control=74, value=0), {}),
        (Message("note_on", channel=15, note=60, velocity=127), {"feedback": 0.5}),
        (Message("note_off", channel=15, note=60, velocity=64), {"feedback": 0.0}),
    ):
        knobs.put(*parse_message(message))
        assert knobs.due(0) == due
    assert parse_message(Message("pitchwheel", pitch=5)) is None and parse_message(Message("clock")) is None


def test_a_midi_port_is_chosen_by_its_name_or_a_part():
    ports = ["Through 14:0", "nanoKONTROL2 20:0", "Pad 24:0", "Pad 24:0 B"]
    assert find_port("nanokontrol", ports) == ports[1]
    assert find_port("Pad 24:0", ports) == ports[2]
    for name, says in (("piano", "no MIDI port 'piano'; ports: 'Through 14:0', 'nano"), ("pad", "2 MIDI ports have 'pad'")):
        with pytest.raises(OSError, match=says):
            find_port(name, ports)
    with pytest.raises(OSError, match="ports: none"):
        find_port("piano", [])


@extras
def test_a_midi_port_that_is_not_there_is_told_and_nothing_stays_open():
    with pytest.raises(OSError, match="this machine has no MIDI|no MIDI port 'of nobody'; ports: "):
        open_control(Control(osc=":0", midi="of nobody"), print)
    assert not [one for one in threading.enumerate() if one.name == "streamflow control osc"]


@extras
def test_midi_arrives_from_a_port():
    import mido

    try:
        out = mido.open_output("streamflow test", virtual=True)
    except (OSError, NotImplementedError) as error:
        pytest.skip(f"no virtual MIDI port: {error}")
    taken, mapping = [], Mapping(address="midi:cc:1:7", field="delta")
    with out, open_control(Control(midi="streamflow test", mappings=(mapping,)), lambda **f: taken.append(f)) as controls:
        out.send(mido.Message("control_change", control=7, value=127))
        until(lambda: controls.tick(0) or taken)
    assert taken == [{"delta": 1.0}]
