"""streamflow.io with real files, servers, threads and processes: every kind that runs here keeps to its protocol."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from itertools import chain

import numpy as np
import PIL.Image
import pytest

from streamflow.io import (
    SINKS,
    SOURCES,
    Reading,
    Sink,
    SinkLost,
    Source,
    SourceLost,
    TimedImage,
    Writing,
    open_sink,
    open_source,
    register_sink,
    register_source,
)

pytestmark = pytest.mark.extras
HEIGHT, WIDTH = 48, 64


def lacks(module):
    return importlib.util.find_spec(module) is None


def picture(k=0, height=HEIGHT, width=WIDTH, seconds=None):
    """Flat grey of a level that tells k, a red corner at the top left."""
    pixels = np.full((height, width, 3), 20 * (k % 10), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    return TimedImage(pixels, k / 10 if seconds is None else seconds)


def all_of(source):
    source.open()
    try:
        return list(iter(source.read, None))
    finally:
        source.close()


def record(path, count=10, height=HEIGHT, width=WIDTH, **options):
    sink = open_sink(f"file:{path}", rate=10, **options)
    sink.open()
    for k in range(count):
        sink.write(picture(k, height, width))
    sink.close()
    return path


def with_sound(path, seconds=1.0):
    """A video of a second with a tone."""
    av = pytest.importorskip("av", reason="pip install av")
    with av.open(str(path), "w") as output:
        video = output.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = output.add_stream("aac", rate=16000, layout="mono")
        for k in range(round(10 * seconds)):
            output.mux(video.encode(av.VideoFrame.from_ndarray(picture(k).pixels, format="rgb24")))
        tone = (8000 * np.sin(np.arange(16000 * seconds) * 0.1)).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        frame.sample_rate = 16000
        output.mux(sound.encode(frame))
        output.mux(video.encode(None))
        output.mux(sound.encode(None))
    return path


def packets(path):
    av = pytest.importorskip("av", reason="pip install av")
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(audio=0) if packet.size]


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63)])
def test_a_video_keeps_its_images_and_times(tmp_path, suffix, height, width):
    pytest.importorskip("av", reason="pip install av")
    source = open_source(str(record(tmp_path / f"a.{suffix}", height=height, width=width)))
    found = all_of(source)
    assert source.rate == 10 and source.audio is None
    assert [round(one.pts, 2) for one in found] == [k / 10 for k in range(10)]
    for k, one in enumerate(found):
        assert one.pixels.shape == (48, 64, 3)
        assert np.abs(one.pixels[:height, :width].astype(int) - picture(k, height, width).pixels).mean() < 8


def test_a_clip_loops_with_its_times_going_on(tmp_path):
    pytest.importorskip("av", reason="pip install av")
    source = open_source(str(record(tmp_path / "a.mp4", 3)), loop=True)
    source.open()
    assert [round(source.read().pts, 2) for _ in range(7)] == [k / 10 for k in range(7)]
    source.close()


def test_a_turned_video_comes_out_upright(tmp_path):
    """The display matrix of a telephone held upright, written into the track's header."""
    pytest.importorskip("av", reason="pip install av")
    data = bytearray(record(tmp_path / "a.mp4").read_bytes())
    one = (1 << 16).to_bytes(4, "big")
    identity = one + bytes(12) + one + bytes(12) + (1 << 30).to_bytes(4, "big")
    clockwise = bytes(4) + one + bytes(4) + (-(1 << 16)).to_bytes(4, "big", signed=True) + bytes(16) + identity[-4:]
    at = data.index(identity, data.index(b"tkhd"))
    data[at : at + 36] = clockwise
    (tmp_path / "turned.mp4").write_bytes(data)
    turned = all_of(open_source(f"file:{tmp_path / 'turned.mp4'}"))[0].pixels
    assert turned.shape == (WIDTH, HEIGHT, 3)
    red = (turned[..., 0] > 128) & (turned[..., 1] < 100)
    assert red[: WIDTH // 2 - 4, HEIGHT // 2 + 4 :].all() and not red[WIDTH // 2 + 4 :].any()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_sound_is_copied_bit_by_bit_as_far_as_the_images_go(tmp_path, suffix):
    source = open_source(str(with_sound(tmp_path / "in.mp4")))
    source.open()
    assert source.audio == source.path
    source.close()
    whole, half = tmp_path / f"whole.{suffix}", tmp_path / f"half.{suffix}"
    record(whole, 11, audio=source.audio)
    record(half, 5, audio=source.audio)
    sound = packets(source.path)
    assert packets(whole) == sound
    assert packets(half) == sound[: len(packets(half))] and 0.3 < len(packets(half)) / len(sound) < 0.7


def test_a_recording_by_the_clock_holds_each_image_as_long_as_it_was_shown(tmp_path):
    pytest.importorskip("av", reason="pip install av")
    with Writing(open_sink(f"record:{tmp_path / 'a.mp4'}", rate=30), depth=8) as writing:
        for seconds in (7.0, 7.1, 7.5, 8.2):
            writing.write(picture(seconds=seconds))
    pts = [one.pts for one in all_of(open_source(str(tmp_path / "a.mp4")))]
    assert pts == pytest.approx([0, 0.1, 0.5, 1.2], abs=1e-3)


def test_bad_files_are_refused(tmp_path):
    pytest.importorskip("av", reason="pip install av")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="cannot be read"):
        open_source(str(tmp_path / "text.mp4")).open()
    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        open_source(str(tmp_path / "gone.mp4")).open()
    with pytest.raises(ValueError, match="ends in one of .mp4, .mkv"):
        open_sink("record:a.avi")
    sink = open_sink(f"record:{tmp_path / 'a.mp4'}")
    sink.open()
    sink.write(picture())
    with pytest.raises(ValueError, match="32x32 in a recording of 64x48"):
        sink.write(picture(1, 32, 32))
    sink.close()


KILLED = """
import sys, time, types
package = types.ModuleType("streamflow")  # without its __init__, which loads torch
package.__path__ = [{root!r}]
sys.modules["streamflow"] = package
import numpy as np
from streamflow.io.protocols import TimedImage
from streamflow.io.recorder import Recorder
sink = Recorder({path!r}, rate=10, clock=False)
sink.open()
for k in range(40):
    sink.write(TimedImage(np.random.default_rng(k).integers(0, 255, (48, 64, 3), dtype=np.uint8), k / 10))
print("written", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is of POSIX")
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.slow
def test_a_recording_killed_under_way_plays(tmp_path, suffix):
    pytest.importorskip("av", reason="pip install av")
    import streamflow

    path = str(tmp_path / f"a.{suffix}")
    root = os.path.dirname(streamflow.__file__)
    with subprocess.Popen([sys.executable, "-c", KILLED.format(path=path, root=root)], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"written\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert 30 <= len(all_of(open_source(path))) <= 40


def cut(path, share):
    """The file's first part."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def ordinary(path, count=30):
    """A video whose index stands at its beginning, as on the web."""
    av = pytest.importorskip("av", reason="pip install av")
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as output:
        video = output.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for k in range(count):
            noise = np.random.default_rng(k).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            output.mux(video.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        output.mux(video.encode(None))
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("share", [0.3, 0.62, 0.9])
def test_a_cut_video_ends_where_it_is_cut(tmp_path, suffix, share, caplog):
    path = cut(ordinary(tmp_path / f"a.{suffix}"), share)
    assert 30 * share - 4 <= len(all_of(open_source(str(path)))) < 30
    assert sum("damaged or cut" in one.getMessage() for one in caplog.records) <= 1
    looped = open_source(str(path), loop=True)
    looped.open()
    times = [looped.read().pts for _ in range(40)]
    assert times == sorted(times)
    looped.close()


@pytest.mark.slow
def test_a_recording_cut_anywhere_plays_up_to_there(tmp_path):
    """Also within the head of a fragment, where FFmpeg refuses to read the index."""
    pytest.importorskip("av", reason="pip install av")
    data = record(tmp_path / "a.mp4", 40).read_bytes()
    heads = [found.start() for found in re.finditer(b"moof", data)]
    assert len(heads) > 3
    found = []
    for at in (place + offset for place in heads[1:] for offset in (8, 30, 38, 60, 94)):
        (tmp_path / "left.mp4").write_bytes(data[:at])
        found.append(len(all_of(open_source(f"file:{tmp_path / 'left.mp4'}"))))
    assert found == sorted(found) and found[0] > 0 and found[-1] >= 30


def test_a_video_with_damage_goes_on_after_it(tmp_path, caplog):
    path = ordinary(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(i * 7 % 256 for i in range(3000))
    path.write_bytes(data)
    assert 20 < len(all_of(open_source(str(path)))) < 30
    assert sum("damaged or cut" in one.getMessage() for one in caplog.records) == 1


@pytest.mark.parametrize(("suffix", "lacking"), [("mp4", 6), ("mkv", 1)])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_a_recording_lacks_only_its_last_images_while_it_is_written(tmp_path, suffix, lacking, count):
    """What is on the disk then is what a killed process leaves: of an .mkv all but one image, of an .mp4 half a second."""
    pytest.importorskip("av", reason="pip install av")
    sink = open_sink(f"file:{tmp_path / f'a.{suffix}'}", rate=10)
    sink.open()
    for k in range(count):
        sink.write(picture(k))
    left = tmp_path / f"left.{suffix}"
    left.write_bytes((tmp_path / f"a.{suffix}").read_bytes())
    sink.close()
    assert count - lacking <= len(all_of(open_source(str(left)))) < count


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is of POSIX")
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_recorder_on_a_full_disk_raises_and_goes_on_in_a_new_file(tmp_path, suffix):
    pytest.importorskip("av", reason="pip install av")
    import resource

    rng, files = np.random.default_rng(0), []
    pictures = [TimedImage(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8), k / 10) for k in range(30)]
    sink = open_sink(f"file:{tmp_path / f'a.{suffix}'}", rate=10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (20_000, 10_000, None):
        try:
            if most is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
            sink.open()
            with nullcontext() if most is None else pytest.raises(OSError, match="too large"):
                for one in pictures:
                    sink.write(one)
            with suppress(OSError):
                sink.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        files.append(sink.path)
    assert [path.name for path in files] == [f"a.{suffix}", f"a.2.{suffix}", f"a.3.{suffix}"]
    counts = [len(all_of(open_source(str(path)))) for path in files]
    assert counts[0] > counts[1] > 0 and counts[2] == 30


# -- folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_comes_back_in_order_and_is_continued(tmp_path):
    for count in (2, 9):
        with Writing(open_sink(f"folder:{tmp_path}"), block=True) as writing:
            for k in range(count):
                writing.write(picture(k))
    found = all_of(open_source(str(tmp_path), rate=5))
    assert [one.pts for one in found] == [k / 5 for k in range(11)]
    assert all(np.array_equal(one.pixels, picture(k).pixels) for one, k in zip(found, (0, 1, *range(9)), strict=True))


def test_images_are_sorted_by_number_and_turned_by_exif(tmp_path):
    for k in (10, 2):
        PIL.Image.fromarray(picture(k // 2).pixels).save(tmp_path / f"p{k}.png")
    assert [one.pixels[-1, -1, 0] for one in all_of(open_source(f"folder:{tmp_path}"))] == [20, 100]
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(picture().pixels).save(tmp_path / "t.png", exif=exif)
    still = open_source(str(tmp_path / "t.png"))
    still.open()
    assert [still.read().pixels.shape for _ in range(3)] == [(WIDTH, HEIGHT, 3)] * 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image"):
        open_source(f"folder:{tmp_path / 'empty'}").open()


@pytest.mark.parametrize("broken", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40), "cut", "folder", "gone"], ids=str)
@pytest.mark.parametrize("loop", [False, True])
def test_a_file_that_cannot_be_read_is_left_out_and_named_once(tmp_path, broken, loop, caplog):
    for k in range(3):
        PIL.Image.fromarray(picture(k).pixels).save(tmp_path / f"{k}.png")
    bad = tmp_path / "1.png"
    source = open_source(f"folder:{tmp_path}", rate=10, loop=loop)
    if broken == "cut":
        cut(bad, 0.5)
    elif broken == "folder":
        bad.unlink()
        bad.mkdir()
    elif isinstance(broken, bytes):
        bad.write_bytes(broken)
    source.open()
    if broken == "gone":
        bad.unlink()
    found = [source.read() for _ in range(5 if loop else 2)]
    assert [one.pixels[-1, -1, 0] for one in found] == [0, 40, 0, 40, 0][: len(found)]
    assert [one.pts for one in found] == [k / 10 for k in range(len(found))]
    assert loop or source.read() is None
    assert [str(bad) in one.getMessage() for one in caplog.records] == [True]


@pytest.mark.parametrize("address", ["folder:{}", "image:{}/0.png", "{}/0.png"])
def test_a_folder_without_an_image_that_can_be_read_is_lost(tmp_path, address):
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(b"no image")
    source = open_source(address.format(tmp_path), loop=True)
    source.open()
    with pytest.raises(SourceLost, match="none of the"):
        source.read()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_an_image_has_its_name_only_once_it_is_complete(tmp_path, suffix, monkeypatch):
    sink = open_sink(f"folder:{tmp_path}", suffix=suffix)
    sink.open()
    seen, save = [], PIL.Image.Image.save

    def saving(self, *arguments, **options):
        save(self, *arguments, **options)
        seen.append([one.name for one in tmp_path.iterdir() if one.suffix == suffix])

    monkeypatch.setattr(PIL.Image.Image, "save", saving)
    sink.write(picture(1))
    sink.write(picture(2))
    assert seen == [[], [f"frame_000000{suffix}"]]
    assert sorted(one.name for one in tmp_path.iterdir()) == [f"frame_000000{suffix}", f"frame_000001{suffix}"]
    if os.name == "posix":
        assert (tmp_path / f"frame_000000{suffix}").stat().st_mode & 0o777 == tmp_path.stat().st_mode & 0o666

    def fails(self, *arguments, **options):
        raise OSError("the disk is full")

    monkeypatch.setattr(PIL.Image.Image, "save", fails)
    with pytest.raises(OSError, match="full"):
        sink.write(picture(3))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_vanishes_raises_and_is_made_again(tmp_path):
    sink = open_sink(f"folder:{tmp_path / 'a'}")
    sink.open()
    sink.write(picture())
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        sink.write(picture())
    sink.close()
    sink.open()
    sink.write(picture())
    assert (tmp_path / "a/frame_000000.png").is_file()


# -- MJPEG ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def served():
    """A server on a free port that shows images until the test ends."""
    sink, over = open_sink("mjpeg:0", viewers=2), threading.Event()
    sink.open()

    def show():
        k = 0
        while not over.wait(0.01):
            sink.write(picture(k := k + 1))

    thread = threading.Thread(target=show)
    thread.start()

    def stop():
        over.set()
        thread.join()
        sink.close()

    sink.stop = stop
    yield sink
    stop()


def test_mjpeg_goes_over_http_to_as_many_as_there_are_places(served):
    url = f"http://127.0.0.1:{served.port}/"
    viewers = [open_source(url) for _ in range(2)]
    for viewer in viewers:
        viewer.open()
        assert np.abs(viewer.read().pixels[-8:, -8:].astype(int) % 20 - 10).min() >= 5  # levels are multiples of 20
        assert viewer.read().pixels.shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(SourceLost, match="503"):
        open_source(url).open()
    viewers[0].close()
    again, end = open_source(url), time.monotonic() + 5
    while time.monotonic() < end:
        try:
            again.open()
            break
        except SourceLost:
            time.sleep(0.02)
    assert again.read().pixels.shape == (HEIGHT, WIDTH, 3)
    served.stop()
    with pytest.raises(SourceLost):
        while True:
            viewers[1].read()
    with pytest.raises(SourceLost, match="does not answer"):
        again.open()
    viewers[1].close()


def test_mjpeg_stays_on_this_machine():
    with pytest.raises(ValueError, match="allow_remote"):
        open_sink("mjpeg:0.0.0.0:8080")
    assert open_sink("mjpeg:0.0.0.0:8080", allow_remote=True).host == "0.0.0.0"
    with pytest.raises(ValueError, match="http://"):
        open_source("mjpeg:file:///etc/passwd")


def jpeg():
    data = io.BytesIO()
    PIL.Image.fromarray(picture(1).pixels).save(data, "JPEG")
    return data.getvalue()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=f\r\n\r\n"
CHUNKED = HEAD.replace(b"Content-Type", b"Transfer-Encoding: chunked\r\nContent-Type")


def part(length, data=b""):
    return b"--f\r\nContent-Type: image/jpeg\r\nContent-Length: " + str(length).encode() + b"\r\n\r\n" + data


def dripping(data):
    return ((one, 0.05) for one in (bytes([byte]) for byte in data * 1000))


def again(data):
    return ((data * 1000, 0) for _ in range(10**6))


def bomb():
    data = io.BytesIO()
    PIL.Image.new("L", (9000, 9000)).save(data, "JPEG")
    return data.getvalue()


BAD_SERVERS = {
    "no HTTP": [b"HELLO\r\n\r\n"],
    "status without end": again(b"x"),
    "101 headers": [b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 101 + b"\r\n"],
    "headers without end": chain([(b"HTTP/1.1 200 OK\r\n", 0)], again(b"a: b\r\n")),
    "continue without end": again(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a redirect without end": chain([(b"HTTP/1.1 302 F\r\nLocation: /x\r\n\r\n", 0)], again(b"x")),
    "a redirect to a file": [b"HTTP/1.1 302 F\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"],
    "a head byte by byte": dripping(HEAD),
    "gzip": [HEAD.replace(b"Content-Type", b"Content-Encoding: gzip\r\nContent-Type") + part(len(jpeg()), jpeg())],
    "no Content-Length": [HEAD + b"--f\r\nContent-Type: image/jpeg\r\n\r\n" + jpeg()],
    "a negative length": [HEAD + part(-5, jpeg())],
    "a length of 0": [HEAD + part(0, jpeg())],
    "a huge length": [HEAD + part(10**900, jpeg())],
    "a length that is none": [HEAD + part("many", jpeg())],
    "a boundary that never comes": chain([(HEAD, 0)], again(b"x")),
    "blank lines": chain([(HEAD, 0)], again(b"\r\n")),
    "heads of parts without end": chain([(HEAD + b"Content-Length: 50\r\n", 0)], again(b"a: b\r\n")),
    "a part byte by byte": chain([(HEAD + part(len(jpeg())), 0)], dripping(jpeg())),
    "a bomb": [HEAD + part(len(bomb()), bomb())],
    "no JPEG": [HEAD + part(1000, b"x" * 1000)],
    "a part that is cut": [HEAD + part(len(jpeg()), jpeg()[:50])],
    "a chunk's size byte by byte": chain([(CHUNKED, 0)], dripping(b"0")),
    "no chunk": [CHUNKED + b"zz\r\n"],
    "trailers without end": chain([(CHUNKED + b"0\r\n", 0)], again(b"a: b\r\n")),
    "nothing": [(b"", 30)],
}


@pytest.fixture
def answering():
    """`answering(what)`: the address of a server that answers one request with these bytes, each a pair with a pause."""
    over, threads, servers = threading.Event(), [], []

    def start(what):
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def answer():
            try:
                connection = server.accept()[0]
                with connection:
                    connection.recv(4096)
                    for one in what:
                        data, pause = one if isinstance(one, tuple) else (one, 0)
                        connection.sendall(data)
                        if over.wait(pause):
                            return
            except OSError:
                pass

        threads.append(threading.Thread(target=answer))
        threads[-1].start()
        return f"http://127.0.0.1:{server.getsockname()[1]}/"

    yield start
    over.set()
    for one in servers:
        one.close()
    for one in threads:
        one.join()


@pytest.mark.parametrize("name", BAD_SERVERS)
@pytest.mark.slow
def test_whatever_a_server_sends_the_source_is_lost_within_its_deadline(name, answering):
    source, began = open_source(answering(BAD_SERVERS[name]), timeout=0.5), time.monotonic()
    with pytest.raises(SourceLost):
        source.open()
        for _ in range(2):
            source.read()
    assert time.monotonic() - began < 20
    source.close()


@pytest.mark.parametrize("head", [HEAD, CHUNKED], ids=["plain", "chunked"])
@pytest.mark.slow
def test_the_deadline_is_of_each_part_and_not_of_the_stream(head, answering):
    data = part(len(jpeg()), jpeg()) + b"\r\n"
    data = data if head is HEAD else f"{len(data):x}\r\n".encode() + data + b"\r\n"
    source = open_source(answering(chain([(head, 0)], ((data, 0.2) for _ in range(8)))), timeout=1)
    source.open()
    assert all(source.read().pixels.shape == (HEIGHT, WIDTH, 3) for _ in range(8))
    source.close()


@pytest.mark.parametrize("url", ["http://", "http://:80/", "http://host:0/", "http://host:99999/", "ftp://host/", "host"])
def test_an_address_that_is_none_is_refused(url):
    from streamflow.io.mjpeg import MjpegSource

    with pytest.raises(ValueError, match=r"begins with|[Pp]ort"):
        MjpegSource(url)


def asked(port, *lines):
    """The status and the head of what the server answers."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall("\r\n".join(("GET / HTTP/1.1", *lines, "", "")).encode())
        with connection.makefile("rb") as answer:
            status = int(answer.readline().split()[1])
            return status, b"".join(iter(answer.readline, b"\r\n")).decode().lower()


OTHERS = (
    ("Host: evil.example",),
    ("Host: localhost.evil.example:{port}",),
    ("Host: 127.0.0.1.evil.example",),
    ("Host: evil.example@127.0.0.1",),
    ("Host: 127.0.0.1#evil.example",),
    ("Host: 192.168.1.5:{port}",),
    ("Host: [::1",),
    ("Host:",),
    (),
    ("Host: localhost", "Host: evil.example"),
    ("Host: localhost:{port}", "Origin: https://evil.example"),
    ("Host: localhost:{port}", "Origin: null"),
    ("Host: localhost:{port}", "Origin: http://localhost:1"),
    ("Host: localhost:{port}", "Sec-Fetch-Site: cross-site"),
    ("Host: localhost:{port}", "Sec-Fetch-Site: same-site"),
)
OWN = (
    ("Host: 127.0.0.1:{port}",),
    ("Host: LOCALHOST",),
    ("Host: [::1]:{port}",),
    ("Host: 127.0.0.1:{port}", "User-Agent: VLC/3.0.20 LibVLC/3.0.20", "Range: bytes=0-"),
    ("Host: localhost:{port}", "Origin: http://localhost:{port}", "Sec-Fetch-Site: same-origin"),
    ("Host: localhost:{port}", "Sec-Fetch-Site: none", "Sec-Fetch-Mode: navigate"),
)


@pytest.mark.parametrize("headers", OTHERS + OWN, ids=" ".join)
def test_the_page_is_for_this_machine_and_its_own_pages(headers, served):
    status, head = asked(served.port, *(one.format(port=served.port) for one in headers))
    assert status == (200 if headers in OWN else 403)
    assert "cross-origin-resource-policy: same-origin" in head
    assert ("multipart" in head) == (headers in OWN)


def test_a_sink_for_other_machines_allows_addresses_and_the_names_it_is_given():
    sink = open_sink("mjpeg:0.0.0.0:0", allow_remote=True, names=("Studio.local",))
    hosts = ("10.0.0.7:8080", "[fe80::1]", "localhost", "studio.local:80", "0.0.0.0", "evil.example", "studio.local.evil")
    assert [sink.allows(host) for host in hosts] == [True, True, True, True, True, False, False]


def test_requests_that_are_not_complete_are_limited_in_number(served):
    """Many of them hold up neither a viewer nor the end, and the oldest of them are given up."""
    before = threading.active_count()
    waiting = [socket.create_connection(("127.0.0.1", served.port), timeout=20) for _ in range(100)]
    for one in waiting:
        one.sendall(b"GET / HTTP/1.1\r\nHost: lo")
    assert asked(served.port, "Host: localhost")[0] == 200
    assert waiting[0].recv(1) == b"" and waiting[60].recv(1) == b""
    end = time.monotonic() + 10
    while threading.active_count() > before + 33 and time.monotonic() < end:
        time.sleep(0.02)
    assert threading.active_count() <= before + 33
    served.stop()
    assert waiting[-1].recv(1) == b""
    for one in waiting:
        one.close()


def test_a_request_that_drips_in_has_a_deadline(served, monkeypatch):
    from streamflow.io import local_server

    monkeypatch.setattr(local_server, "HEAD_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        began = time.monotonic()
        with suppress(OSError):  # it was closed
            while time.monotonic() < began + 8:
                connection.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() < began + 6


@pytest.fixture
def sent(tmp_path, monkeypatch):
    """An NDI sender, found by its address since a test machine may have no mDNS; NDI reads this when it is loaded."""
    (tmp_path / "ndi-config.v1.json").write_text('{"ndi": {"networks": {"ips": "127.0.0.1,"}}}')
    monkeypatch.setenv("NDI_CONFIG_DIR", str(tmp_path))
    name, over = f"Test {os.getpid()}", threading.Event()

    def send():
        while not over.wait(0.03):
            writing.write(picture())

    with Writing(open_sink(f"ndi:{name}")) as writing:
        thread = threading.Thread(target=send)
        thread.start()
        end = time.monotonic() + 20
        while not writing.count and writing.error is None and time.monotonic() < end:
            time.sleep(0.01)
        yield name  # once it can be found: a finder that comes too early looks again after 0.5, 1, 2 and 7 s
        over.set()
        thread.join()


@pytest.mark.skipif(lacks("cyndilib"), reason="pip install cyndilib")
def test_ndi_gives_every_image_that_is_sent(sent):
    """And lets the threads of the process run, of which one sends here."""
    with Reading(open_source(f"ndi:{sent}"), "every") as reading:
        times = [reading.read().time for _ in range(30)]
    assert np.all(np.diff(times) > 0) and times[-1] - times[0] < 5  # 29 * 0.03 s and the delays of a loaded machine


# -- threads --------------------------------------------------------------------------------------------------------------


class Counting:
    """A source of numbered images, as fast as it is read, which may fail at one."""

    def __init__(self, count=10**9, fails=None):
        self.count, self.fails, self.k, self.opened, self.threads = count, fails, 0, 0, set()

    def open(self):
        self.opened += 1
        self.threads.add(threading.get_ident())

    def read(self):
        self.k += 1
        self.threads.add(threading.get_ident())
        if self.k == self.fails:
            raise SourceLost("unplugged")
        return None if self.k > self.count else picture(seconds=float(self.k))

    def close(self):
        self.opened -= 1
        self.threads.add(threading.get_ident())


def test_every_gives_each_image_and_makes_the_source_wait():
    source = Counting(50)
    with Reading(source, "every", depth=3) as reading:
        time.sleep(0.05)
        assert reading.queued == 3 and source.k <= 4
        assert [int(one.time) for one in iter(reading.read, None)] == list(range(1, 51))
        assert reading.read() is None and reading.dropped == 0 and reading.count == 50
    assert source.opened == 0 and len(source.threads) == 1 and threading.get_ident() not in source.threads


def test_newest_drops_the_older_and_counts_them():
    with Reading(Counting(1000), "newest", depth=2) as reading:
        while not reading.done:
            time.sleep(0.01)
        assert [int(one.time) for one in iter(reading.read, None)] == [999, 1000]
        assert reading.dropped == 998


def test_newest_gives_a_clip_at_its_own_pace(tmp_path):
    for k in range(4):
        PIL.Image.fromarray(picture(k).pixels).save(tmp_path / f"{k}.png")
    with Reading(open_source(str(tmp_path), rate=20), "newest") as reading:
        found = [time.monotonic() for _ in iter(reading.read, None)]
    assert found[-1] - found[0] > 0.1 and reading.dropped == 0


def test_a_pause_that_begins_while_an_image_is_awaited_discards_nothing(tmp_path):
    for k in range(3):
        PIL.Image.fromarray(picture(k).pixels).save(tmp_path / f"{k}.png")
    with Reading(open_source(str(tmp_path), rate=10), "newest") as reading:
        while not reading.queued:
            time.sleep(0.001)
        time.sleep(0.03)
        reading.pause(True)  # the second image is read, and its time has not come
        time.sleep(0.3)
        assert reading.queued == 1 and reading.dropped == 0
        reading.read()
        reading.pause(False)
        assert len(list(iter(reading.read, None))) == 2 and reading.dropped == 0


def test_what_a_source_raises_reaches_the_reader_after_what_it_gave():
    source = Counting(fails=3)
    with Reading(source, "every") as reading:
        assert [int(reading.read().time) for _ in range(2)] == [1, 2]
        with pytest.raises(SourceLost, match="unplugged"):
            reading.read()
    with Reading(source, "every") as reading:  # plugged in again
        assert reading.read().time == 4
    assert source.opened == 0


class Slow:
    """A sink that takes an image only when it is let, and may fail."""

    def __init__(self, fails=False):
        self.gate, self.entered, self.found, self.fails = threading.Semaphore(0), threading.Semaphore(0), [], fails

    def open(self):
        self.found.clear()

    def write(self, one):
        self.entered.release()
        self.gate.acquire()
        if self.fails:
            raise SinkLost("closed")
        self.found.append(int(one.time))

    def close(self):
        self.found.append("closed")


def test_writing_drops_the_oldest_and_finishes_the_rest():
    sink = Slow()
    writing = Writing(sink, depth=2)
    writing.write(picture(seconds=0))
    sink.entered.acquire()
    for k in range(1, 9):
        writing.write(picture(seconds=k))
        assert writing.queued <= 2
    assert writing.dropped == 6
    sink.gate.release(9)
    writing.close()
    assert sink.found == [0, 7, 8, "closed"] and writing.count == 3
    with pytest.raises(RuntimeError, match="has ended"):
        writing.write(picture())


def test_what_a_sink_raises_reaches_the_writer():
    sink = Slow(fails=True)
    writing = Writing(sink, block=True)
    writing.write(picture())
    sink.gate.release()
    while not writing.done:
        time.sleep(0.005)
    with pytest.raises(SinkLost, match="closed"):
        writing.write(picture())
    writing.close()
    assert sink.found == ["closed"]


def test_threads_end_with_their_owner():
    before = threading.active_count()
    for _ in range(20):
        Reading(Counting(), "newest").close()
        Writing(open_sink("null")).close()
    assert threading.active_count() == before


@pytest.mark.parametrize("wrong", [lambda: Reading(Counting(), "latest"), lambda: Reading(Counting(), depth=0)])
def test_wrong_settings_of_threads_are_refused(wrong):
    with pytest.raises(ValueError, match="newest, every|at least 1"):
        wrong()


# -- every kind -----------------------------------------------------------------------------------------------------------

NOT_HERE = {
    "spout": (sys.platform != "win32" or lacks("SpoutGL"), "Spout needs Windows and SpoutGL"),
    "syphon": (sys.platform != "darwin" or lacks("syphon"), "Syphon needs macOS and syphon-python"),
    "ndi": (lacks("cyndilib"), "pip install cyndilib"),
    "screen": (lacks("mss") or (sys.platform == "linux" and not os.environ.get("DISPLAY")), "needs mss and a display"),
    "virtualcam": (lacks("pyvirtualcam") or not os.path.exists("/dev/video0"), "needs pyvirtualcam and its device"),
    "window": (lacks("pygame"), "pip install pygame-ce"),
    "https": (True, "needs a server with a certificate: the class is that of http"),
    "camera": (lacks("cv2"), "pip install opencv-python-headless"),
    "file": (lacks("av"), "pip install av"),
    "record": (lacks("av"), "pip install av"),
}


def kinds(table):
    return [
        pytest.param(kind, marks=pytest.mark.skipif(NOT_HERE[kind][0], reason=NOT_HERE[kind][1]))
        if kind in NOT_HERE
        else kind
        for kind in table
    ]


@pytest.mark.parametrize("kind", kinds(SOURCES))
def test_every_source_keeps_to_the_protocol(kind, tmp_path, request):
    PIL.Image.fromarray(picture().pixels).save(tmp_path / "a.png")
    rest = {"folder": tmp_path, "image": tmp_path / "a.png", "spout": "", "syphon": "", "screen": 1}
    if kind in ("file", "camera"):  # OpenCV reads a file as it reads a camera
        rest[kind] = record(tmp_path / "a.mp4")
    if kind in ("mjpeg", "http"):
        rest[kind] = f"//127.0.0.1:{request.getfixturevalue('served').port}"
        rest["mjpeg"] = f"http:{rest[kind]}"
    if kind == "ndi":
        rest[kind] = request.getfixturevalue("sent")
    source = open_source(f"{kind}:{rest[kind]}")
    assert isinstance(source, Source)
    source.close()
    with pytest.raises(RuntimeError, match="open"):
        source.read()
    for _ in range(2):
        before = time.monotonic()
        source.open()
        found = source.read()
        source.close()
        assert found.pixels.dtype == np.uint8 and found.pixels.flags.c_contiguous and found.pixels.flags.writeable
        assert before <= found.time <= time.monotonic()
    source.close()


@pytest.mark.parametrize("kind", kinds(SINKS))
def test_every_sink_keeps_to_the_protocol(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    rest = {"record": tmp_path / "a.mp4", "file": tmp_path / "b.mkv", "folder": tmp_path / "c", "mjpeg": 0}
    sink = open_sink(f"{kind}:{rest.get(kind, '')}")
    assert isinstance(sink, Sink)
    sink.close()
    for _ in range(2):
        sink.open()
        for k in range(3):
            one = picture(k)
            kept = one.pixels.copy()
            sink.write(one)
            assert np.array_equal(one.pixels, kept)
        sink.close()
    sink.close()


@pytest.mark.skipif(lacks("cv2"), reason="pip install opencv-python-headless")
def test_a_camera_that_is_gone_says_so_and_comes_back(tmp_path):
    with pytest.raises(SourceLost, match="plugged in"):
        open_source("camera:77").open()
    pytest.importorskip("av", reason="pip install av")
    camera = open_source(f"camera:{record(tmp_path / 'a.mp4', 3)}")
    camera.open()
    first = camera.read().pixels
    assert first[5, 5, 0] > 200 and first[5, 5, 2] < 60  # red, not blue
    with pytest.raises(SourceLost, match="unplugged"):
        for _ in range(4):
            camera.read()
    camera.open()
    assert np.array_equal(camera.read().pixels, first)
    camera.close()


@pytest.mark.skipif(lacks("pygame"), reason="pip install pygame-ce")
def test_a_window_passes_its_keys_on_and_says_when_it_is_closed(monkeypatch):
    import pygame

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    keys = []
    window = open_sink("window:Here", size=(128, 128), on_key=keys.append)
    window.open()
    window.write(picture())
    assert pygame.display.get_caption()[0] == "Here"
    shown = pygame.surfarray.array3d(pygame.display.get_surface())  # [x, y, 3]
    assert tuple(shown[10, 30]) == (255, 0, 0) and not shown[:, :16].any() and not shown[:, 112:].any()
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_p))
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_SPACE))
    window.write(picture())
    assert keys == ["p", "space"]
    pygame.event.post(pygame.event.Event(pygame.QUIT))
    with pytest.raises(SinkLost, match="closed"):
        window.write(picture())
    window.close()


SHOWN_AND_READ = """
import time
from streamflow.io import TimedImage, open_sink, open_source
import numpy as np
pixels = np.zeros((96, 128, 3), np.uint8)
pixels[:48, :64] = 255, 0, 0
window, screen = open_sink("window", size=(400, 300)), open_source("screen:1")
window.open()
screen.open()
for _ in range(5):
    window.write(TimedImage(pixels, 0.0))
    time.sleep(0.1)
seen = screen.read().pixels
print(((seen[..., 0] > 250) & (seen[..., 1:].max(2) < 5)).sum())
"""


@pytest.mark.skipif(NOT_HERE["screen"][0] or NOT_HERE["window"][0], reason="needs mss, pygame-ce and a display")
def test_the_screen_reads_what_a_window_shows():
    environment = {**os.environ, "SDL_VIDEODRIVER": "x11"} if sys.platform == "linux" else None
    run = subprocess.run([sys.executable, "-c", SHOWN_AND_READ], capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode == 0 and 29_000 < int(run.stdout.splitlines()[-1]) <= 30_000, run.stderr  # of 200 x 150 red ones


def test_unknown_addresses_list_the_known():
    with pytest.raises(ValueError, match="camera, file, folder, image, screen, mjpeg, http, https, ndi, spout, syphon"):
        open_source("webcam:0")
    with pytest.raises(ValueError, match="record, file, folder, window, virtualcam"):
        open_sink("projector")
    with pytest.raises(ValueError, match="give file:in.mp4"):
        open_source("file:")
    with pytest.raises(ValueError, match="HOST:PORT"):
        open_sink("mjpeg:here")
    assert open_source("camera:2").device == 2 and open_source("camera:/dev/video2").device == "/dev/video2"


@pytest.mark.skipif(not lacks("syphon") or not lacks("SpoutGL"), reason="both are installed")
def test_what_is_of_another_system_or_not_installed_says_what_to_do():
    for kind, system in {"spout": "win32", "syphon": "darwin"}.items():
        with pytest.raises(ImportError, match="pip install" if sys.platform == system else "only"):
            open_source(kind).open()


@pytest.mark.parametrize(
    ("pixels", "error"),
    [
        (np.zeros((4, 4, 3)), TypeError),
        (np.zeros((4, 4), np.uint8), ValueError),
        (np.zeros((0, 4, 3), np.uint8), ValueError),
    ],
)
def test_an_image_is_checked(pixels, error):
    with pytest.raises(error, match="pixels are"):
        TimedImage(pixels, 0.0)


class Theirs:
    """A sink of someone else's."""

    def __init__(self, name=""):
        self.name, self.count = name, 0

    def open(self):
        self.count = 0

    def write(self, image):
        self.count += 1

    def close(self):
        pass


@pytest.fixture
def tables(monkeypatch):
    for name, table in (("SINKS", SINKS), ("SOURCES", SOURCES)):
        monkeypatch.setattr(f"streamflow.io.addresses.{name}", dict(table))


@pytest.mark.parametrize(("register", "make"), [(register_sink, open_sink), (register_source, open_source)])
def test_kinds_of_others_are_registered(tables, register, make):
    register("counting", Theirs)
    assert make("counting:mine").name == "mine" and make("counting:").name == "" and make("counting").name == ""
    assert make("counting:a:b").name == "a:b"
    with pytest.raises(ValueError, match="'counting' is there already"):
        register("counting", Theirs)
    table = SOURCES if register is register_source else SINKS
    for taken in table:
        with pytest.raises(ValueError, match=f"'{taken}' is there already, one of {', '.join(table)}"):
            register(taken, Theirs)
    for wrong in ("c", "a b", "a/b", "", 3):
        with pytest.raises(ValueError, match="a kind is a name of two or more"):
            register(wrong, Theirs)
    with pytest.raises(TypeError, match="needs a class or a function"):
        register("other", "Theirs")


def test_every_kind_that_can_be_registered_is_reached(tables):
    """Also by an address that looks like a URL, and where a folder of the name is there."""
    for register, make in ((register_sink, open_sink), (register_source, open_source)):
        register("rtsp", Theirs)
        assert make("rtsp://host/1").name == "//host/1"
        register("tests", Theirs)
        assert make("tests").name == ""
    register_sink("http", Theirs)
    assert open_sink("http://host/").name == "//host/"


def test_addresses_of_http_are_mjpeg():
    for address in ("http://host:80/a:b", "https://host/"):
        assert open_source(address).url == open_source(f"mjpeg:{address}").url == address
    with pytest.raises(ValueError, match="begins with http:// or https://"):
        open_source("http:")
