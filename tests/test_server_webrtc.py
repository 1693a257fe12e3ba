"""WebRTC in the page's server: real connections of aiortc and of Chromium, by WHIP, WHEP and the WebSocket."""

import asyncio
import contextlib
import json
import queue
import random
import re
import socket
import struct
import sys
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

for needed in ("fastapi", "uvicorn", "aiortc"):
    pytest.importorskip(needed, reason="needs the extras web and webrtc")
httpx = pytest.importorskip("httpx", reason="needs httpx")

import av  # noqa: E402
from aiortc.mediastreams import MediaStreamError  # noqa: E402
from aiortc.rtcsctptransport import SCTP_DATA_FIRST_FRAG, DataChunk, crc32c  # noqa: E402
from aiortc.rtp import RTCP_PSFB_APP, RtcpPsfbPacket, pack_remb_fci  # noqa: E402
from PIL import Image  # noqa: E402
from test_browser import CHROMIUM, live  # noqa: E402
from test_server import OTHER, SECRET, Running, encoded, gone, parsed  # noqa: E402
from webrtc_client import Camera, Client  # noqa: E402
from websockets.asyncio.client import connect  # noqa: E402

from streamflow.app.config import Settings  # noqa: E402
from streamflow.app.server import images, tokens, webrtc  # noqa: E402
from streamflow.app.server.app import Service, create_app  # noqa: E402
from streamflow.app.server.messages import BadMessage, DrawRequest, changed  # noqa: E402
from streamflow.app.server.settings import IceServer, Server  # noqa: E402
from streamflow.app.server.webrtc import BadOffer, check_offer  # noqa: E402
from streamflow.app.server.webrtc_media import BACKLOG, Decoder, Output, OutputTrack, fitted, is_key  # noqa: E402
from streamflow.app.server.whip import fields_of, has_webrtc  # noqa: E402

pytestmark = pytest.mark.extras
CLOSE_TO_INPUT = "steps=8&strength=0.05"  # settings under which an even image keeps its brightness
SDP = {"content-type": "application/sdp"}


def code(name, size, count=1, grey=90):
    """So many frames of one colour, encoded. The first is a key frame."""
    encoder = av.CodecContext.create({"VP8": "libvpx", "H264": "libx264"}[name], "w")
    encoder.width, encoder.height = size
    encoder.pix_fmt, encoder.framerate, encoder.time_base = "yuv420p", 30, Fraction(1, 30)
    encoder.options = {"deadline": "realtime", "lag-in-frames": "0"} if name == "VP8" else {"tune": "zerolatency"}
    pixels = np.full((size[1], size[0], 3), grey, np.uint8)
    frames = []
    for number in range(count):
        frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
        frame.pts = number
        frames.append(b"".join(map(bytes, encoder.encode(frame))))
    return frames


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["VP8", "H264"])
def test_a_frame_that_is_too_large_is_not_decoded_and_later_ones_are(name, monkeypatch):
    monkeypatch.setattr("streamflow.app.server.webrtc_media.FAILING_SECONDS", 0.0)
    small, large = code(name, (64, 48), 3), code(name, (320, 240))
    assert is_key(name, small[0]) and not is_key(name, small[1]) and not is_key(name, b"")

    async def decode():
        got, said, asked = [], [], []
        decoder = Decoder(64 * 48, got.append, said.append)
        receiver = SimpleNamespace(_RTCRtpReceiver__decoder_queue=queue.Queue(), getSynchronizationSources=lambda: [])
        decoder.attach(receiver)
        assert receiver._RTCRtpReceiver__decoder_queue is decoder
        decoder._ask_for_a_key_frame = lambda: asked.append(1)
        thread = threading.Thread(target=decoder.get)
        thread.start()
        for number, data in enumerate([large[0], b"nonsense", large[0], *small]):
            await asyncio.sleep(0.02)
            decoder.put((SimpleNamespace(name=name), SimpleNamespace(data=data, timestamp=number)))
        await asyncio.sleep(0.1)
        decoder.put(None)
        await asyncio.to_thread(thread.join, 5)
        assert not thread.is_alive()
        return got, said, asked

    got, said, asked = asyncio.run(decode())
    assert [(one.width, one.height, one.pts) for one in got] == [(64, 48, 3), (64, 48, 4), (64, 48, 5)]
    assert len(said) == 1 and "at most 3072 pixels" in said[0] and asked


def test_no_more_than_so_many_frames_wait_for_the_decoder_and_it_goes_on_at_a_key_frame():
    async def flood():
        decoder = Decoder(10_000, lambda frame: None, lambda message: None)
        asked = []
        decoder._ask_for_a_key_frame = lambda: asked.append(1)
        key, *others = code("VP8", (32, 32), 3)
        codec = SimpleNamespace(name="VP8")
        for data in (key, *[others[0]] * 100):  # nothing takes them
            decoder.put((codec, SimpleNamespace(data=data)))
        assert decoder.qsize() == BACKLOG and len(asked) == 101 - BACKLOG
        decoder.queue.clear()
        decoder.put((codec, SimpleNamespace(data=others[1])))  # refers to a frame that was dropped
        assert decoder.qsize() == 0
        for data in (key, others[0]):
            decoder.put((codec, SimpleNamespace(data=data)))
        assert decoder.qsize() == 2
        decoder.put(None)
        assert decoder.qsize() == 1  # the end does not wait for what is left

    asyncio.run(flood())


def test_a_frame_is_cut_and_scaled_as_an_uploaded_image():
    pixels = np.random.default_rng(1).integers(0, 255, (48, 80, 3), np.uint8)
    frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
    assert fitted(frame, 16, 16).tobytes() == images.fit(Image.fromarray(pixels), 16, 16).tobytes()
    assert fitted(frame, 16, 24).size == (16, 24)


def test_an_output_gives_the_newest_image_again_while_there_is_no_newer_one(monkeypatch):
    monkeypatch.setattr("streamflow.app.server.webrtc_media.REPEAT_SECONDS", 0.05)

    async def run():
        taken = []
        output = Output(lambda: taken.append(1))
        first, second = OutputTrack(output), OutputTrack(output)
        waiting = asyncio.ensure_future(first.recv())
        await asyncio.sleep(0.12)
        assert not waiting.done()  # nothing has been drawn yet
        for grey in (10, 20, 30):
            output.show(np.full((16, 16, 3), grey, np.uint8))
        frames = [await waiting, await second.recv(), await first.recv()]
        assert [int(one.to_ndarray(format="rgb24").mean()) for one in frames] == [30, 30, 30] and len(taken) == 3
        output.show(np.full((16, 16, 3), 40, np.uint8))
        frames.append(await first.recv())
        assert int(frames[-1].to_ndarray(format="rgb24").mean()) == 40 and len(taken) == 4
        assert frames[0].pts < frames[2].pts < frames[3].pts
        output.show(np.zeros((16, 16, 3), np.uint8))
        output.close()
        assert len(taken) == 5  # what nobody took does not count as on its way
        with pytest.raises(MediaStreamError):
            await first.recv()

    asyncio.run(run())


def test_offers_are_checked_before_they_are_parsed():
    head = "v=0\r\na=group:BUNDLE 0\r\na=fingerprint:sha-256 AB\r\nm=video 9 UDP/TLS/RTP/SAVPF 96\r\na=mid:0\r\n"
    names = "a=candidate:1 1 udp 1 0b3c.local 9 typ host\r\na=end-of-candidates\r\n"
    address = "a=candidate:1 1 udp 1 192.0.2.1 9 typ host\r\n"
    assert check_offer(head + names + address, True) == head + address  # no name is looked up
    assert check_offer(head + names + address, False) == head  # nothing is sent to an address that only the offer names
    alone = head.replace("a=group:BUNDLE 0\r\n", "")
    assert check_offer(alone, False) == alone
    for bad, why in (
        ("", "no SDP"),
        ("\0" * 99, "no SDP"),
        (head + 33 * address, "33 candidates, and at most 32"),
        (head + 5 * "m=audio 9 X 0\r\n", "6 media, and at most 4"),
        (3 * head, "3 videos, and at most 2"),
        (2 * head, "one a=group:BUNDLE"),
        (head.replace("BUNDLE 0", "BUNDLE 1"), "one a=group:BUNDLE"),
        (head.replace("a=mid:0", ""), "an a=mid each"),
        (head.replace("BUNDLE 0", f"BUNDLE {65 * 'x'}").replace("mid:0", f"mid:{65 * 'x'}"), "1 to 64"),
        (head.replace("a=fingerprint", "a=print"), "no a=fingerprint"),
        (head + "a=extmap:256/sendrecv urn:x\r\n", "a=extmap of the offer is above 255"),
        (head + f"a=sctp-port:{5000 * '9'}\r\n", "a=sctp-port of the offer is above 65535"),
    ):
        with pytest.raises(BadOffer, match=why):
            check_offer(bad, True)


def test_settings_of_an_address_are_checked_as_those_of_a_message():
    def with_fields(query, control=False):
        return changed(DrawRequest(model="m"), fields_of(query), ("m",), 8, control)

    request = with_fields({"prompt": "3", "steps": "2", "strength": "0.5"})
    assert (request.mode, request.prompt, request.steps, request.strength) == ("image", "3", 2, 0.5)
    for wrong in ({"steps": "9"}, {"steps": "x"}, {"steps": "1e9"}, {"model": "n"}, {"colour": "red"}, {"running": "true"}):
        with pytest.raises(BadMessage):
            with_fields(wrong)
    with pytest.raises(BadMessage, match="choose image"):
        with_fields({"mode": "text"}, control=True)


def test_ice_servers_are_checked():
    assert "secret" not in repr(IceServer(url="turn:turn.example:3478?transport=tcp", username="ann", credential="secret"))
    IceServer(url="stun:stun.example")
    for wrong in (
        {"url": "turn:turn.example"},
        {"url": "http://x"},
        {"url": "stun:"},
        {"url": "stun:a b"},
        {"url": "stun:a:65536"},
    ):
        with pytest.raises(ValueError):
            IceServer(**wrong)


@pytest.mark.parametrize("setting, installed", [(False, True), (True, False)])
def test_without_webrtc_the_endpoints_say_what_to_do(setting, installed, monkeypatch):
    monkeypatch.setattr("streamflow.app.server.whip.has_webrtc", lambda: installed)
    service = Service(Settings(server=Server(webrtc=setting)), tokens.Tokens())

    async def answers():
        transport = httpx.ASGITransport(create_app(service))  # the model's thread is not started
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return [await client.post(path, content="v=0", headers=SDP) for path in ("/whip", "/whep")]

    for one in asyncio.run(answers()):
        assert one.status_code == 501 and "pip install 'streamflow-rf[web,webrtc]'" in one.json()["detail"]
    assert service.make_peer is None
    service.pools.shutdown()


def test_a_broken_aiortc_switches_webrtc_off_and_is_logged(monkeypatch, caplog):
    assert has_webrtc() and caplog.text == ""
    monkeypatch.setitem(sys.modules, "streamflow.app.server.webrtc", None)  # importing it raises ImportError
    assert not has_webrtc() and "aiortc cannot be imported" in caplog.text


def test_offers_before_the_model_is_there_and_too_many_of_one_address_are_refused():
    service = Service(Settings(), tokens.Tokens())

    async def answers():
        transport = httpx.ASGITransport(create_app(service))  # the model's thread is not started
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return [await client.post("/whip", content="v=0", headers=SDP) for _ in range(14)]

    found = asyncio.run(answers())
    assert [one.status_code for one in found] == [503] * 10 + [429] * 4
    assert all(int(one.headers["retry-after"]) > 0 for one in found)
    service.pools.shutdown()


# -- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    running = Running(max_viewers=2, max_image_pixels=100_000, max_message_bytes=100_000, max_readers=1)
    yield running
    running.close()


def talk(running, scenario, *given):
    """Run a client's coroutine `scenario(http, *given)`, then wait until the server has no viewer."""

    async def run():
        Client.made.clear()
        async with httpx.AsyncClient(base_url=f"http://{running.host}", timeout=30) as http:
            try:
                await scenario(http, *given)
            except BaseException:  # the next test needs the room of these clients
                for client in Client.made:
                    await client.close()
                raise

    try:
        asyncio.run(run())
    finally:
        gone(running.service)


def numbers(client):
    """The numbers of the frames that the server told of."""
    return [one["frame"] for one in client.messages if one["type"] == "image"]


async def ends(http, client, response):
    assert (await http.delete(response.headers["location"])).status_code == 200
    await client.close()


def test_a_video_is_published_restyled_and_ended(server):
    async def scenario(http):
        client = Client(Camera())
        response = await client.publish(http, "/whip?prompt=a+red+apple&stream=desk")
        assert response.status_code == 201 and response.headers["content-type"] == "application/sdp"
        assert "a=candidate" in response.text and "VP8" in response.text and "H264" in response.text
        assert "goog-remb" in response.text and "abs-send-time" in response.text  # by which the bitrate follows the network
        welcome = await client.heard("welcome")
        assert (welcome["settings"]["prompt"], welcome["settings"]["mode"]) == ("a red apple", "image")
        assert welcome["limits"]["webrtc"] == {"ice_servers": []}
        await client.until(lambda: len(client.frames) > 2 and len(numbers(client)) > 2)
        client.send(type="set", settings={"steps": 99})
        assert "steps: 99 is above 8" in (await client.heard("error"))["message"]
        client.send(type="set", settings={"prompt": "a fox"}, number=7)
        answer = await client.heard("settings")
        assert (answer["settings"]["prompt"], answer["number"]) == ("a fox", 7)
        times = [pts for _, pts, _ in client.frames]
        assert times == sorted(set(times)) and numbers(client) == sorted(set(numbers(client)))
        assert client.frames[-1][2].shape == (128, 128, 3)
        await ends(http, client, response)
        assert (await http.delete(response.headers["location"])).status_code == 404

    talk(server, scenario)


def test_requests_that_are_no_offers_are_refused(server):
    async def scenario(http):
        for path in ("/whip", "/whep"):
            for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS"):
                refused = await http.request(method, path)
                assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
            assert (await http.patch(f"{path}/x", content="a=ice", headers=SDP)).headers["allow"] == "DELETE"
            assert (await http.delete(f"{path}/x")).status_code == 404
            assert (await http.post(path, content="v=0")).status_code == 415
            assert (await http.post(f"{path}?stream=../x", content="v=0", headers=SDP)).status_code == 400
        assert (await http.post("/whep?stream=none", content="v=0", headers=SDP)).status_code == 404
        for bad in (b"", b"v=0", b"\xff\xfe", b"m=video\r\n", b"m=video 9 UDP/TLS/RTP/SAVPF 96\r\na=ice-ufrag:x\r\n"):
            refused = await http.post("/whip", content=bad, headers=SDP)
            assert refused.status_code == 400, (bad, refused.text)
        assert server.service.admission.inside == 0
        receiver = Client(camera=None, channel=False)
        assert "no video that is sent" in (await receiver.publish(http)).json()["detail"]
        await receiver.close()

    talk(server, scenario)


@pytest.mark.slow
def test_images_leave_in_the_order_of_the_frames(server):
    """The video grows brighter, and so does its answer."""

    async def scenario(http):
        camera = Camera(rate=10, paint=lambda number: min(250, 20 + 5 * number))
        client = Client(camera, codec="H264")
        response = await client.publish(http, f"/whip?{CLOSE_TO_INPUT}")
        assert "H264" in response.text and "VP8" not in response.text
        await client.until(lambda: client.frames and client.frames[-1][2].mean() > 180, 40)
        means = [image.mean() for _, _, image in client.frames]
        assert len(means) > 4 and np.diff(means).min() > -6 and means[0] < 120
        assert numbers(client) == sorted(set(numbers(client)))
        await ends(http, client, response)

    talk(server, scenario)


@pytest.mark.slow
def test_images_come_in_order_where_a_fifth_of_the_packets_are_lost(server):
    async def scenario(http):
        client = Client(Camera(rate=10, paint=lambda number: min(250, 20 + 4 * number)), loss=0.2)
        response = await client.publish(http, f"/whip?{CLOSE_TO_INPUT}")
        await client.until(lambda: client.frames and client.frames[-1][2].mean() > 150, 60)
        means = [image.mean() for _, _, image in client.frames]
        assert len(means) > 3 and np.diff(means).min() > -6
        times = [pts for _, pts, _ in client.frames]
        assert times == sorted(set(times))
        assert client.lost > 10
        await ends(http, client, response)

    talk(server, scenario)


@pytest.mark.slow
def test_a_video_is_added_and_replaced_by_later_offers(server):
    """First only an answer is asked for, then a camera is added, then another one takes its place."""

    async def scenario(http):
        client = Client(Camera(paint=lambda number: 60))
        response = await client.publish(http, f"/whip?{CLOSE_TO_INPUT}")
        await client.until(lambda: client.frames and abs(client.frames[-1][2].mean() - 60) < 15)

        async def renegotiate():
            client.messages.clear()
            client.send(type="offer", sdp=await client.offer())
            await client.accept((await client.heard("answer"))["sdp"])

        client.video.sender.replaceTrack(Camera(paint=lambda number: 200))  # the same medium
        await renegotiate()
        await client.until(lambda: abs(client.frames[-1][2].mean() - 200) < 15)
        client.pc.addTransceiver(Camera(paint=lambda number: 120), "sendonly")  # one more, which is taken from now on
        await renegotiate()
        await client.until(lambda: abs(client.frames[-1][2].mean() - 120) < 15)
        for _ in range(3):
            client.send(type="offer", sdp="v=0")
        assert "no SDP" in (await client.heard("error"))["message"]
        said = await client.until(lambda: [one for one in client.messages if "every 2 seconds" in one.get("message", "")])
        assert len(said) > 0
        before = len(client.frames)
        await client.until(lambda: len(client.frames) > before + 2)  # a refused offer changes nothing
        await ends(http, client, response)

    talk(server, scenario)


@pytest.mark.slow
def test_a_video_that_is_too_large_is_refused_with_one_message_and_a_smaller_one_is_drawn(server):
    async def scenario(http):
        client = Client(Camera(size=(640, 480), rate=10))
        response = await client.publish(http)
        assert "at most 100000 pixels" in (await client.heard("error"))["message"]
        await asyncio.sleep(1)
        assert not numbers(client) and not [one for one in client.messages if one["type"] == "error"]
        client.video.sender.replaceTrack(Camera(size=(160, 120)))
        await client.until(lambda: len(numbers(client)) > 2)
        await ends(http, client, response)

    talk(server, scenario)


@pytest.mark.slow
def test_a_client_that_vanishes_leaves_its_slot(server, monkeypatch):
    monkeypatch.setattr(webrtc, "SILENT_SECONDS", 2.0)

    async def scenario(http):
        client = Client(Camera())
        assert (await client.publish(http)).status_code == 201
        await client.until(lambda: client.frames)
        assert server.service.admission.inside == 1
        client.vanish()
        await client.until(lambda: server.service.admission.inside == 0)
        await client.close()

    talk(server, scenario)


@pytest.mark.slow
def test_a_client_that_never_connects_leaves_its_slot(server, monkeypatch):
    monkeypatch.setattr(webrtc, "CONNECT_SECONDS", 1.0)

    async def scenario(http):
        client = Client(Camera())
        response = await http.post("/whip", content=await client.offer(), headers=SDP)
        assert response.status_code == 201 and server.service.admission.inside == 1
        await client.until(lambda: server.service.admission.inside == 0)
        await client.close()

    talk(server, scenario)


@pytest.mark.slow
def test_the_bitrate_follows_what_the_receiver_estimates(server):
    async def scenario(http):
        client = Client(Camera())
        response = await client.publish(http)
        await client.until(lambda: len(client.frames) > 2)
        (stream,) = server.service.streams._streams.values()
        (sender,) = stream.peer._connection.getSenders()
        encoder = sender._RTCRtpSender__encoder
        receiver = client.video.receiver
        for bitrate in (300_000, 700_000):
            estimate = pack_remb_fci(bitrate, [sender._ssrc])
            packet = RtcpPsfbPacket(fmt=RTCP_PSFB_APP, ssrc=receiver._RTCRtpReceiver__rtcp_ssrc, media_ssrc=0, fci=estimate)
            await receiver._send_rtcp(packet)
            await client.until(lambda bitrate=bitrate: abs(encoder.target_bitrate - bitrate) < 5000)
            await client.until(lambda bitrate=bitrate: abs(encoder.codec.bit_rate - bitrate) < 5000)
        await ends(http, client, response)

    talk(server, scenario)


@pytest.mark.slow
def test_floods_and_invalid_messages_end_only_their_sender(server):
    async def scenario(http):
        good = Client(Camera())
        kept = await good.publish(http, "/whip?stream=good")
        await good.until(lambda: good.frames)
        attacks = (
            (4429, lambda client: [client.send(type="ack") for _ in range(2000)]),
            (4400, lambda client: [client.send(type="exec") for _ in range(60)]),
            (1009, lambda client: client.send(type="set", settings={"prompt": "x" * 20_000})),
            (1009, lambda client: client.channel.send(bytes(100_001))),
        )
        for closed, attack in attacks:
            client = Client(Camera())
            assert (await client.publish(http, "/whip?stream=bad")).status_code == 201
            await client.heard("welcome")
            for _ in range(20):  # of more channels than one, the others are closed
                client.pc.createDataChannel("more")
            attack(client)
            assert (await client.heard("close"))["code"] == closed
            await client.until(lambda: server.service.admission.inside == 1)
            await client.close()
        client = Client(Camera(), receive=False)
        assert (await client.publish(http, "/whip?stream=bad")).status_code == 201
        await client.heard("welcome")
        client.channel.send(b"")
        client.channel.send(b"\0" * 60_000)  # a clock, and no image
        assert len([await client.heard("error") for _ in range(2)]) == 2
        client.send(type="style", image=True)
        client.channel.send(encoded())
        assert "takes no style image" in (await client.heard("error"))["message"]
        await client.close()
        before = len(good.frames)
        await good.until(lambda: len(good.frames) > before + 2)
        await ends(http, good, kept)

    talk(server, scenario)


@pytest.mark.slow
def test_tokens_quotas_and_players(caplog):
    held = tokens.parse(f"ann {SECRET}\nbob {OTHER} streams=3", "here")
    running = Running(held, max_viewers=4, max_readers=2, streams_per_user=2)
    ann, bob = ({"authorization": f"Bearer {one}"} for one in (SECRET, OTHER))

    async def scenario(http):
        async def refused(client, path="/whip", **headers):
            answer = await client.publish(http, path, **headers)
            await client.close()
            return answer

        assert (await refused(Client(Camera()))).status_code == 401
        wrong = await refused(Client(Camera()), authorization="Bearer wrong-wrong-wrong")
        assert wrong.status_code == 401 and wrong.headers["www-authenticate"] == "Bearer"
        camera = Client(Camera(paint=lambda number: 200), receive=False, channel=False)  # as OBS publishes
        published = await camera.publish(http, f"/whip?{CLOSE_TO_INPUT}", **ann)
        assert published.status_code == 201
        assert (await refused(Client(Camera()), **ann)).status_code == 409  # two of one name
        assert (await refused(Client(None), "/whep", **bob)).status_code == 404  # another's stream
        assert (await http.delete(published.headers["location"], headers=bob)).status_code == 404
        assert (await http.delete(published.headers["location"])).status_code == 401
        players = [Client(None, channel=False, codec=codec) for codec in ("VP8", "H264")]
        answers = [await one.publish(http, "/whep?stream=live", **ann) for one in players]
        assert [one.status_code for one in answers] == [201, 201]
        for one in players:
            await one.until(lambda one=one: one.frames and abs(one.frames[-1][2].mean() - 200) < 15)
        full = await refused(Client(None), "/whep", **ann)
        assert full.status_code == 429 and "quota" in full.json()["detail"] and int(full.headers["retry-after"]) > 0
        await ends_as(http, players[0], answers[0], ann)
        more = [Client(Camera()) for _ in range(4)]
        codes = [(await one.publish(http, f"/whip?stream=n{k}", **(ann if k == 0 else bob))) for k, one in enumerate(more)]
        assert [one.status_code for one in codes] == [201, 201, 201, 503]  # ann has two streams, and bob two of three
        assert "session slots" in codes[3].json()["detail"] and int(codes[3].headers["retry-after"]) > 0
        assert (await refused(Client(Camera()), "/whip?stream=n9", **ann)).status_code == 429
        await ends_as(http, camera, published, ann)
        await players[1].until(lambda: players[1].pc.connectionState == "closed")  # its stream has ended
        for one in (*more, players[1]):
            await one.close()

    try:
        talk(running, scenario)
        said = parsed(running.service.metrics.text())
        assert said['streamflow_refused_total{kind="token"}'] == 3
        assert SECRET not in caplog.text and OTHER not in caplog.text
    finally:
        running.close()


async def ends_as(http, client, response, headers):
    assert (await http.delete(response.headers["location"], headers=headers)).status_code == 200
    await client.close()


@pytest.mark.slow
def test_a_websockets_session_gains_and_loses_webrtc(server):
    """Images go by JPEG, then by the video, then by JPEG again; messages by the data channel while there is one."""

    async def scenario(http):
        ticket = (await http.post("/session")).json()["ticket"]
        seen = []

        async with connect(f"ws://{server.host}/stream", subprotocols=["streamflow", ticket]) as socket:

            async def read():
                with contextlib.suppress(Exception):
                    async for message in socket:
                        text = message if isinstance(message, str) else message[4 : 4 + int.from_bytes(message[:4])]
                        seen.append((type(message), json.loads(text)))
                        if isinstance(message, bytes):
                            await socket.send('{"type": "ack"}')

            reading = asyncio.ensure_future(read())
            client = Client(Camera())
            await socket.send(json.dumps({"type": "set", "settings": {"mode": "image"}}))
            await socket.send(json.dumps({"type": "offer", "sdp": await client.offer()}))
            found = await client.until(lambda: next((said for _, said in seen if said["type"] == "answer"), None))
            await client.accept(found["sdp"])
            await client.until(lambda: len(client.frames) > 2 and len(numbers(client)) > 2)
            client.send(type="set", settings={"prompt": "a fox"}, number=3)
            assert (await client.heard("settings"))["settings"]["prompt"] == "a fox"
            await socket.send(json.dumps({"type": "set", "settings": {"seed": 5}}))  # the socket is still read
            assert (await client.heard("settings"))["settings"]["seed"] == 5
            before = len(seen)
            await asyncio.sleep(1)
            assert not [kind for kind, _ in seen[before:] if kind is bytes]
            await client.close()
            await client.until(lambda: any(said["type"] == "webrtc" for _, said in seen))
            await socket.send(json.dumps({"type": "set", "settings": {"mode": "text"}}))
            before = len(seen)
            await client.until(lambda: [said for kind, said in seen[before:] if kind is bytes][2:])
            reading.cancel()

    talk(server, scenario)


@pytest.mark.slow
def test_a_new_connection_of_a_websockets_session_takes_the_place_of_the_old_one(server):
    """As where a page goes from its webcam to a screen: the old connection may end before or after the new one's offer."""

    async def scenario(http):
        ticket = (await http.post("/session")).json()["ticket"]
        seen, clients = [], []

        async with connect(f"ws://{server.host}/stream", subprotocols=["streamflow", ticket]) as socket:

            async def read():
                with contextlib.suppress(Exception):
                    async for message in socket:
                        if isinstance(message, str):
                            seen.append(json.loads(message))

            reading = asyncio.ensure_future(read())
            await socket.send(json.dumps({"type": "set", "settings": {"mode": "image"}}))
            for closed_first in (False, False, True):
                if clients and closed_first:
                    await clients[-1].close()
                seen.clear()
                clients.append(Client(Camera()))
                offer = {"type": "offer", "sdp": await clients[-1].offer(), "number": len(clients)}
                await socket.send(json.dumps(offer))
                await clients[-1].until(lambda: "answer" in [one["type"] for one in seen])
                found = [one["type"] for one in seen].index("answer")
                assert seen[found]["number"] == len(clients)
                await clients[-1].accept(seen[found]["sdp"])
                await clients[-1].until(lambda: len(clients[-1].frames) > 2)
                assert not [one for one in seen[found:] if one["type"] == "webrtc"]  # what ends an old one comes before
            await clients[0].until(lambda: clients[0].pc.connectionState == "closed")
            for one in clients:
                await one.close()
            reading.cancel()

    talk(server, scenario)


@pytest.mark.slow
def test_a_player_waits_for_the_first_image_of_a_paused_stream(server, monkeypatch):
    monkeypatch.setattr(webrtc, "SILENT_SECONDS", 1.0)

    async def scenario(http):
        publisher, player = Client(Camera(), receive=False), Client(None, channel=False)
        await publisher.publish(http)
        await publisher.heard("welcome")
        (stream,) = server.service.streams._streams.values()
        stream.peer.output._image = None  # as where nothing has been drawn yet
        publisher.send(type="set", settings={"running": False})
        await publisher.heard("settings")
        for _ in range(2):  # a frame that is being drawn still comes
            stream.peer.output._image = None
            await asyncio.sleep(1)
        assert stream.peer.output._image is None
        await player.publish(http, "/whep")
        await asyncio.sleep(3)
        assert player.pc.connectionState == "connected" and not player.frames
        publisher.send(type="set", settings={"running": True})
        await player.until(lambda: len(player.frames) > 2)
        await player.close()
        await publisher.close()

    talk(server, scenario)


async def ask_again(client, server):
    """One datagram asks for the newest packets 5600 times."""
    (stream,) = server.service.streams._streams.values()
    (sender,) = stream.peer._connection.getSenders()
    newest = max(one.sequence_number for one in sender._RTCRtpSender__rtp_history.values())
    before = stream.peer._connection.getSenders()[0].transport._RTCDtlsTransport__tx_packets
    lost = struct.pack("!HH", (newest - 16) & 0xFFFF, 0xFFFF) * 330
    await client.video.receiver.transport._send_rtp(struct.pack("!BBHII", 0x81, 205, 332, 1, sender._ssrc) + lost)
    await asyncio.sleep(0.5)
    assert sender.transport._RTCDtlsTransport__tx_packets - before < 150


async def send_many_sources(client, server):
    for number in range(20):
        head = struct.pack("!BBHII", 0x80, client.payload_type, number, 0, 5000 + number)
        with contextlib.suppress(ConnectionError):  # once the server has ended the connection
            await client.video.receiver.transport._send_rtp(head + b"\x10abc")


async def send_parts(client, server):
    """Parts of one message that never ends, of a byte each."""
    sctp = client.pc.sctp
    for number in range(20):
        chunks = []
        for part in range(40):
            chunk = DataChunk(flags=SCTP_DATA_FIRST_FRAG if number == part == 0 else 0)
            chunk.tsn, chunk.stream_id, chunk.stream_seq, chunk.protocol = sctp._local_tsn + 40 * number + part, 9, 0, 51
            chunk.user_data = b"a"
            chunks.append(bytes(chunk))
        head = struct.pack("!HHL", sctp._local_port, sctp._remote_port, sctp._remote_verification_tag)
        checksum = struct.pack("<L", crc32c(head + bytes(4) + b"".join(chunks)))
        with contextlib.suppress(ConnectionError):
            await sctp.transport._send_data(head + checksum + b"".join(chunks))


@pytest.mark.slow
@pytest.mark.parametrize("attack, ends_it", [(ask_again, False), (send_many_sources, True), (send_parts, True)])
def test_packets_that_make_aiortc_work_without_bound_are_limited(server, attack, ends_it, caplog):
    async def scenario(http):
        client = Client(Camera())
        response = await client.publish(http)
        client.payload_type = int(re.search(r"a=rtpmap:([0-9]+) VP8", response.text)[1])
        await client.until(lambda: len(client.frames) > 2)
        await attack(client, server)
        if ends_it:
            await client.until(lambda: server.service.admission.inside == 0)
        else:
            assert (await http.delete(response.headers["location"])).status_code == 200
        await client.close()

    talk(server, scenario)
    assert "not closed as it should be" not in caplog.text


@pytest.mark.slow
def test_a_connection_whose_reports_have_failed_is_closed(server, caplog):
    """aiortc's task fails where a clock jumps by days, for one, and its `stop` would wait for it without end."""

    async def scenario(http):
        client = Client(Camera())
        response = await client.publish(http)
        await client.until(lambda: client.frames)
        (stream,) = server.service.streams._streams.values()
        (receiver,) = stream.peer._connection.getReceivers()
        for one in receiver._RTCRtpReceiver__remote_streams.values():
            one._jitter_q4 = 2**50
        await client.until(lambda: receiver._RTCRtpReceiver__rtcp_task.done())
        assert (await http.delete(response.headers["location"])).status_code == 200
        assert stream.peer._connection.getReceivers()[0].transport.state == "closed"
        await client.close()

    talk(server, scenario)
    assert "not closed as it should be" not in caplog.text


@pytest.mark.slow
def test_the_server_ends_with_its_connections():
    running = Running(max_viewers=1)

    async def scenario():
        async with httpx.AsyncClient(base_url=f"http://{running.host}", timeout=30) as http:
            client = Client(Camera())
            await client.publish(http)
            await client.until(lambda: client.frames)
            began = time.monotonic()
            await asyncio.to_thread(running.close)
            assert time.monotonic() - began < 5
            await client.until(lambda: client.pc.connectionState == "closed")

    asyncio.run(scenario())
    assert not [one for one in threading.enumerate() if "decoder" in one.name]


@pytest.mark.attack
def test_broken_offers_and_foreign_datagrams_end_nothing(monkeypatch, caplog):
    """Offers with lines lost, repeated, cut and filled with other numbers; datagrams of others to a connection's port."""
    monkeypatch.setattr("streamflow.app.server.whip.BURST", 10_000)
    running, dice = Running(max_viewers=2), random.Random(3)

    def broken(lines):
        for _ in range(dice.randrange(1, 4)):
            k = dice.randrange(len(lines))
            changes = (
                lambda line: [],
                lambda line: [line, lines[dice.randrange(len(lines))]],
                lambda line: [line[: dice.randrange(len(line) + 1)]],
                lambda line: [re.sub(r"[0-9]+", lambda _: str(dice.choice([-1, 0, 65536, 2**64])), line)],
                lambda line: ["".join(chr(dice.randrange(32, 999)) if dice.random() < 0.3 else one for one in line)],
            )
            lines[k : k + 1] = dice.choice(changes)(lines[k])
        return "\r\n".join(lines)

    async def scenario(http):
        client = Client(Camera())
        offer = await client.offer()
        found = set()
        for _ in range(200):
            response = await http.post("/whip", content=broken(offer.split("\r\n")), headers=SDP)
            found.add(response.status_code)
            if response.status_code == 201:
                await http.delete(response.headers["location"])
        assert found == {400, 201} and running.service.admission.inside == 0
        response = await client.publish(http)
        await client.until(lambda: client.frames)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as foreign:
            for host, port in re.findall(r"candidate:\S+ 1 udp \d+ ([0-9.]+) (\d+)", response.text):
                for size in range(100):
                    foreign.sendto(bytes(size % 2 * dice.randrange(1200)), (host, int(port)))
        before = len(client.frames)
        await client.until(lambda: len(client.frames) > before + 2)
        for _ in range(20_000):  # more packets than any video has
            await client.video.receiver.transport.transport._send(b"\x80\x60" + bytes(500))
            await asyncio.sleep(0)
            if not running.service.admission.inside:
                break
        await client.until(lambda: running.service.admission.inside == 0)
        await client.close()

    try:
        talk(running, scenario)
        assert "Traceback" not in caplog.text and "never retrieved" not in caplog.text
    finally:
        running.close()


# -- Chromium -----------------------------------------------------------------------------------------------------------

FLAGS = ("--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


@contextlib.contextmanager
def camera_page(server, script=""):
    """The page with the fake camera as its source. script: run in it first."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page, errors = chromium.new_page(), []
        page.set_default_timeout(60_000)
        page.add_init_script(script)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(f"http://{server.host}/")
        live(page)
        page.click("#tab-image")
        page.click("button[data-source=camera]")
        yield page
        chromium.close()
        assert errors == []


NO_WAY = """window.RTCPeerConnection = class extends RTCPeerConnection {
    constructor(given) { super({ ...given, iceTransportPolicy: "relay" }); }  // there is no relay
}"""
NEXT = """before => {
    const video = document.getElementById("output-video"), canvas = document.getElementById("output");
    return !video.hidden && video.videoWidth === 128 && canvas.toDataURL() !== before;
}"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_sends_its_camera_by_webrtc(server):
    pytest.importorskip("playwright", reason="needs playwright")
    with camera_page(server) as page:
        page.wait_for_function("() => document.getElementById('transport').textContent === 'WebRTC'")
        for prompt in ("a fox, 3d render", "a hamburger, 3d render"):
            before = page.evaluate("document.getElementById('output').toDataURL()")
            page.fill("#prompt", prompt)
            page.wait_for_function(NEXT, arg=before)
        first = int(page.text_content("#frame"))
        page.wait_for_function("first => Number(document.getElementById('frame').textContent) > first + 2", arg=first)
        assert page.text_content("#median").endswith(" ms")
        page.fill("#seed", "-1")
        page.wait_for_function("() => document.getElementById('message').textContent.startsWith('Seed')")
        page.fill("#seed", "4")
        page.click("button[data-source=drawing]")  # the WebSocket again
        page.wait_for_selector("#transport", state="hidden")
        assert page.is_hidden("#output-video")
        before = page.evaluate("document.getElementById('output').toDataURL()")
        page.wait_for_function("before => document.getElementById('output').toDataURL() !== before", arg=before)
        page.click("#pause")  # no image comes, and the connection stays
        page.click("button[data-source=camera]")
        page.wait_for_function("() => document.getElementById('transport').textContent === 'WebRTC'")
        for pause in (300, 100):  # again, as where another source is chosen while the old one's connection ends
            page.wait_for_timeout(pause)
            page.click("button[data-source=camera]")
        page.wait_for_timeout(7000)  # more than the page's patience
        assert page.text_content("#transport") == "WebRTC"
        first = int(page.text_content("#frame"))
        page.click("#pause")
        page.wait_for_function("first => Number(document.getElementById('frame').textContent) > first + 2", arg=first)
        page.click("#tab-text")
        page.wait_for_selector("#transport", state="hidden")
        page.goto(f"http://{server.host}/?transport=websocket")
        live(page)
        page.click("#tab-image")
        page.click("button[data-source=camera]")
        says_and_draws(page, "WebSocket (chosen in the address)")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_falls_back_to_the_websocket_and_says_so(server):
    pytest.importorskip("playwright", reason="needs playwright")
    with camera_page(server, NO_WAY) as page:
        says_and_draws(page, "WebSocket (WebRTC: no connection within 5 seconds)")


def says_and_draws(page, words):
    page.wait_for_function("words => document.getElementById('transport').textContent === words", arg=words)
    first = int(page.text_content("#frame"))
    page.wait_for_function("first => Number(document.getElementById('frame').textContent) > first + 2", arg=first)
    assert page.is_hidden("#output-video") and page.is_visible("#transport")
