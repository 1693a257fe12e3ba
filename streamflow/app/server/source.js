// Where images come from: webcam, screen, a drawing, a file. Each is drawn, cut to the middle, on the input canvas.

export class Source {
  constructor(canvas, brush) {
    this.canvas = canvas;
    this.brush = brush; // () => {colour, width}
    this.video = Object.assign(document.createElement("video"), { muted: true, playsInline: true });
    this.kind = null;
    this.listen();
  }

  async start(kind, file) {
    this.stop();
    if (kind === "camera" || kind === "screen") await this.play(kind);
    if (kind === "file") this.cover(await createImageBitmap(file));
    if (kind === "drawing") this.clear();
    this.canvas.classList.toggle("drawing", kind === "drawing");
    this.kind = kind;
  }

  stop() {
    for (const track of this.video.srcObject?.getTracks() ?? []) track.stop();
    this.video.srcObject = null;
    this.kind = null;
  }

  async play(kind) {
    const devices = navigator.mediaDevices;
    if (!devices) throw new Error("the browser gives cameras and screens to https pages and to 127.0.0.1 only");
    const ask = { camera: () => devices.getUserMedia({ video: { width: 640, height: 480 } }), screen: () => devices.getDisplayMedia() };
    this.video.srcObject = await ask[kind]();
    await this.video.play();
  }

  // The newest image as a JPEG; null where there is none.
  async grab() {
    if (!this.kind) return null;
    if (this.video.srcObject) {
      if (!this.video.videoWidth) return null;
      this.cover(this.video, this.video.videoWidth, this.video.videoHeight);
    }
    return new Promise((done) => this.canvas.toBlob(done, "image/jpeg", 0.9));
  }

  cover(image, width = image.width, height = image.height) {
    const { canvas } = this, scale = Math.max(canvas.width / width, canvas.height / height);
    const [w, h] = [width * scale, height * scale];
    canvas.getContext("2d").drawImage(image, (canvas.width - w) / 2, (canvas.height - h) / 2, w, h);
  }

  clear() {
    const context = this.canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  listen() {
    let last = null;
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect(), scale = this.canvas.width / box.width;
      return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale, scale];
    };
    const line = (event) => {
      const [x, y, scale] = at(event), { colour, width } = this.brush(), context = this.canvas.getContext("2d");
      Object.assign(context, { strokeStyle: colour, lineWidth: width * scale, lineCap: "round" });
      context.beginPath();
      context.moveTo(...(last ?? [x, y]));
      context.lineTo(x, y);
      context.stroke();
      last = [x, y];
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      if (this.kind !== "drawing") return;
      this.canvas.setPointerCapture(event.pointerId);
      last = null;
      line(event);
    });
    this.canvas.addEventListener("pointermove", (event) => last && this.kind === "drawing" && line(event));
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => (last = null));
  }
}
