// The connection: a ticket, a socket, and all over again when it is lost. Knows messages; nothing of the page.

const SLOWEST = 8000; // milliseconds between two tries

export class Link {
  // settings(): what is sent to the server after every connect. on: {welcome, settings, error, image, control, style, gif, answer,
  // webrtc, status, token}. channel: while there is one, a data channel that text messages are sent by.
  // on.status({state, message, done, of, seconds}): where the connection stands; all but the state may be absent.
  constructor(settings, on) {
    this.settings = settings;
    this.on = on;
    this.pause = 500;
    this.channel = null;
    this.connect();
  }

  // With ?page=true the server answers with status 200 while a page must wait: browsers log other ones as errors.
  async connect() {
    const token = sessionStorage.getItem("token");
    let response;
    try {
      const headers = token ? { Authorization: `Bearer ${token}` } : {};
      response = await fetch("session?page=true", { method: "POST", headers });
    } catch {
      return this.later({ state: "no connection", message: "The server does not answer. Trying again." });
    }
    const answer = await response.json().catch(() => ({}));
    if (response.status === 401 || answer.state === "token required") {
      this.on.status({ state: "token required" });
      return this.on.token(() => this.connect(), Boolean(token));
    }
    if (answer.ticket) return this.open(answer.ticket);
    const wait = 1000 * (Number(response.headers.get("Retry-After")) || 2);
    const message = answer.message ?? answer.detail ?? `The server refused the connection (status ${response.status}).`;
    this.later({ state: "refused", ...answer, message }, wait);
  }

  open(ticket) {
    const url = new URL("stream", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    url.hash = "";
    const socket = new WebSocket(url, ["streamflow", ticket]);
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.text(JSON.parse(data)) : this.binary(data));
    socket.onclose = ({ reason }) => this.later({ state: "no connection", message: reason || "The connection is lost. Trying again." });
    this.socket = socket;
  }

  later(status, wait = (this.pause = Math.min(SLOWEST, 1.6 * this.pause))) {
    this.on.status(status);
    setTimeout(() => this.connect(), wait * (0.8 + 0.4 * Math.random()));
  }

  text(message) {
    if (message.type === "welcome") {
      this.pause = 500;
      this.on.welcome(message);
      this.set(this.settings());
      this.on.status({ state: "drawing" });
    } else this.on[message.type]?.(message);
  }

  binary(data) {
    const length = new DataView(data).getUint32(0);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    this.on[header.type]?.(header, new Blob([new Uint8Array(data, 4 + length)]));
  }

  get live() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  send(message) {
    const path = this.channel?.readyState === "open" ? this.channel : this.socket;
    if (this.live) path.send(JSON.stringify(message));
  }

  set(settings) {
    this.send({ type: "set", settings });
  }

  // Send a style image, or take it away with null. The server answers with a message of the same type.
  async sendStyle(blob) {
    const data = blob && (await blob.arrayBuffer());
    if (!this.live) return;
    this.socket.send(JSON.stringify({ type: "style", image: Boolean(data) })); // by the socket, so that the image follows
    if (data) this.socket.send(data);
  }

  // Send an image, unless the last one is still on its way: the newest wins.
  async sendImage(blob, stamp) {
    const data = new Uint8Array(8 + blob.size);
    new DataView(data.buffer).setFloat64(0, stamp);
    data.set(new Uint8Array(await blob.arrayBuffer()), 8);
    if (this.live && this.socket.bufferedAmount === 0) this.socket.send(data);
  }
}
