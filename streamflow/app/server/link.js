// The connection: a ticket, a socket, and all over again when it is lost. Knows messages; nothing of the page.

const SLOWEST = 8000; // milliseconds between two tries

export class Link {
  // settings(): what is sent to the server after every connect. on: {welcome, settings, error, image, gif, state, token}.
  constructor(settings, on) {
    this.settings = settings;
    this.on = on;
    this.pause = 500;
    this.connect();
  }

  async connect() {
    const token = sessionStorage.getItem("token");
    let response;
    try {
      response = await fetch("session", { method: "POST", headers: token ? { Authorization: `Bearer ${token}` } : {} });
    } catch {
      return this.later("the server is not there; trying again", "lost");
    }
    if (response.status === 401) return this.on.token(() => this.connect());
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) {
      const wait = Number(response.headers.get("Retry-After")) || 2;
      return this.later(answer.message || answer.detail || `refused (${response.status})`, "waiting", 1000 * wait);
    }
    this.open(answer.ticket);
  }

  open(ticket) {
    const url = new URL("stream", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url, ["streamflow", ticket]);
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.text(JSON.parse(data)) : this.binary(data));
    socket.onclose = ({ reason }) => this.later(reason || "connection lost; trying again", "lost");
    this.socket = socket;
  }

  later(message, state, wait = (this.pause = Math.min(SLOWEST, 1.6 * this.pause))) {
    this.on.state(message, state);
    setTimeout(() => this.connect(), wait * (0.8 + 0.4 * Math.random()));
  }

  text(message) {
    if (message.type === "welcome") {
      this.pause = 500;
      this.on.welcome(message);
      this.set(this.settings());
      this.on.state("live", "live");
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
    if (this.live) this.socket.send(JSON.stringify(message));
  }

  set(settings) {
    this.send({ type: "set", settings });
  }

  // Send an image, unless the last one is still on its way: the newest wins.
  async sendImage(blob, stamp) {
    const data = new Uint8Array(8 + blob.size);
    new DataView(data.buffer).setFloat64(0, stamp);
    data.set(new Uint8Array(await blob.arrayBuffer()), 8);
    if (this.live && this.socket.bufferedAmount === 0) this.socket.send(data);
  }
}
