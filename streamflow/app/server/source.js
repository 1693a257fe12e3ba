// Where images come from: webcam, screen, a drawing, an image or a video file. Each is drawn, cut to the middle, on the
// input canvas.

const REASONS = {
  NotAllowedError: { camera: "The browser does not allow the webcam: allow it for this page, then try again.", screen: "No screen was chosen." },
  NotFoundError: { camera: "No webcam was found." },
  NotReadableError: { camera: "The webcam does not start: another program may use it." },
};
const UNREADABLE = "The browser cannot read this file: choose a PNG, JPEG or WebP image, or an MP4 or WebM video.";

export const UNREADABLE_IMAGE = "The browser cannot read this file: choose a PNG, JPEG or WebP image.";

// An image file as a JPEG, scaled down until it only just covers a size. What is transparent becomes white.
export async function scaled(file, { width, height }) {
  const image = await createImageBitmap(file), scale = Math.min(1, Math.max(width / image.width, height / image.height));
  const canvas = Object.assign(document.createElement("canvas"), { width: Math.round(image.width * scale), height: Math.round(image.height * scale) });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  image.close();
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.95));
}

export class Source {
  constructor(canvas, brush) {
    this.canvas = canvas;
    this.brush = brush; // () => {colour, width}
    this.video = Object.assign(document.createElement("video"), { muted: true, playsInline: true });
    this.kind = null;
    this.turn = 0;
    this.listen();
  }

  async start(kind, file) {
    this.stop();
    const turn = this.turn; // a later start or stop makes this one void
    const begin = { camera: () => this.capture(kind, turn), screen: () => this.capture(kind, turn), file: () => this.read(file, turn), drawing: () => this.clear() };
    try {
      await begin[kind]();
    } catch (error) {
      if (turn !== this.turn) return;
      this.stop();
      throw new Error(kind === "file" ? UNREADABLE : (REASONS[error.name]?.[kind] ?? error.message));
    }
    if (turn !== this.turn) return;
    this.canvas.classList.toggle("drawing", kind === "drawing");
    this.kind = kind;
  }

  stop() {
    this.turn += 1;
    for (const track of this.video.srcObject?.getTracks() ?? []) track.stop();
    this.video.srcObject = null;
    if (this.video.src) {
      URL.revokeObjectURL(this.video.src);
      this.video.removeAttribute("src");
      this.video.load();
    }
    this.canvas.classList.remove("drawing");
    this.kind = null;
  }

  async capture(kind, turn) {
    const devices = navigator.mediaDevices;
    if (!devices) throw new Error("The browser gives webcams and screens to https pages and to 127.0.0.1 only.");
    const ask = { camera: () => devices.getUserMedia({ video: { width: 640, height: 480 } }), screen: () => devices.getDisplayMedia() };
    const stream = await ask[kind]();
    if (turn !== this.turn) return stream.getTracks().forEach((track) => track.stop());
    this.video.srcObject = stream;
    await this.video.play();
  }

  async read(file, turn) {
    if (file.type.startsWith("video/")) {
      Object.assign(this.video, { src: URL.createObjectURL(file), loop: true });
      return this.video.play();
    }
    const image = await createImageBitmap(file);
    if (turn === this.turn) this.cover(image);
    image.close();
  }

  // Draw the newest image of a video. Return whether there is an image.
  look() {
    if (!this.kind) return false;
    if (this.video.srcObject || this.video.src) {
      if (!this.video.videoWidth) return false;
      this.cover(this.video, this.video.videoWidth, this.video.videoHeight);
    }
    return true;
  }

  // The track of a webcam or screen; null where the source is none.
  get track() {
    return this.kind && (this.video.srcObject?.getVideoTracks()[0] ?? null);
  }

  // The newest image as a JPEG; null where there is none.
  async grab() {
    if (!this.look()) return null;
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
