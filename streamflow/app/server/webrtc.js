// The camera and its answer as video tracks of a WebRTC connection, which is offered over the link. Knows no page.

const PATIENCE = 5000; // milliseconds from the offer until the connection must be there
const GATHERING = 1500; // milliseconds for candidates; the offer has those that there are then

const soon = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

export class Media {
  // on: {changed, closed(reason), frame}: the connection is there, or is in doubt; it has ended, with the reason unless `stop`
  // ended it; each image of the answer. live: whether the answer has had an image.
  constructor(link, video, on) {
    Object.assign(this, { link, video, on, connection: null, live: false, delay: 0, number: 0 });
  }

  // Send this track, scaled down until it only just covers a size, and show the answer.
  async start(track, { width, height }, servers) {
    const iceServers = servers.map(({ url, username, credential }) => (username ? { urls: url, username, credential } : { urls: url }));
    const connection = (this.connection = new RTCPeerConnection({ iceServers }));
    const current = () => connection === this.connection, number = (this.number += 1);
    const lost = (reason) => current() && this.end(reason);
    connection.onconnectionstatechange = () => {
      if (connection.connectionState === "failed") lost("the connection is lost");
      else if (current()) this.on.changed();
    };
    connection.ontrack = ({ track: answer, receiver }) => {
      if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0;
      this.video.srcObject = new MediaStream([answer]);
      this.video.play().catch(() => {}); // a later start or stop interrupts it
      this.watch(current);
    };
    const channel = connection.createDataChannel("messages");
    channel.onmessage = ({ data }) => current() && this.link.text(JSON.parse(data));
    channel.onopen = () => current() && (this.link.channel = channel);
    setTimeout(() => this.connected || lost(`no connection within ${PATIENCE / 1000} seconds`), PATIENCE + GATHERING);
    try {
      const { sender } = connection.addTransceiver(track, { direction: "sendrecv" });
      await connection.setLocalDescription();
      const { width: w, height: h } = track.getSettings(), parameters = sender.getParameters();
      for (const one of parameters.encodings) one.scaleResolutionDownBy = Math.max(1, Math.min(w / width, h / height)) || 1;
      await sender.setParameters(parameters);
      const gathered = new Promise((done) => connection.addEventListener("icegatheringstatechange", () => connection.iceGatheringState === "complete" && done()));
      if (connection.iceGatheringState !== "complete") await Promise.race([gathered, soon(GATHERING)]);
      if (current()) this.link.send({ type: "offer", sdp: connection.localDescription.sdp, number });
    } catch (error) {
      lost(error.message);
    }
  }

  get connected() {
    return this.connection?.connectionState === "connected";
  }

  // The server has ended a connection. Before an answer it is an earlier one.
  ended(reason) {
    if (this.connection?.remoteDescription) this.end(reason);
  }

  // Take the answer to the newest offer.
  async answer({ sdp, number }) {
    const connection = this.connection;
    if (number !== this.number) return;
    try {
      await connection?.setRemoteDescription({ type: "answer", sdp });
    } catch (error) {
      if (connection === this.connection) this.end(error.message);
    }
  }

  // Call on.frame for each image of the answer.
  watch(current) {
    const next = () => {
      if (!current()) return;
      this.live = true;
      this.on.frame(this.video);
      this.video.requestVideoFrameCallback(next);
    };
    this.video.requestVideoFrameCallback(next);
  }

  // Note what the network and this browser add to the server's latency: the round trip, and encoding, decoding and waiting.
  async measure() {
    const connection = this.connection;
    if (!this.live) return;
    const each = (sum, count) => (count ? (1000 * sum) / count : 0);
    let delay = 0;
    for (const one of (await connection.getStats()).values()) {
      if (one.type === "candidate-pair" && one.nominated) delay += 1000 * (one.currentRoundTripTime ?? 0);
      if (one.type === "outbound-rtp") delay += each(one.totalEncodeTime, one.framesEncoded);
      if (one.type === "inbound-rtp") delay += each(one.jitterBufferDelay, one.jitterBufferEmittedCount) + each(one.totalDecodeTime, one.framesDecoded);
    }
    this.delay = delay;
  }

  stop() {
    if (this.connection) this.end("");
  }

  end(reason) {
    this.connection.close();
    this.video.srcObject = null;
    Object.assign(this, { connection: null, live: false });
    this.link.channel = null;
    this.on.closed(reason);
  }
}
