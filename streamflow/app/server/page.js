// The page: controls to settings, images to the canvas, numbers to their places.

import { Link } from "./link.js";
import { scaled, Source, UNREADABLE_IMAGE } from "./source.js";
import { Media } from "./webrtc.js";

const $ = (id) => document.getElementById(id);
const all = (selector) => document.querySelectorAll(selector);
const NUMBERS = ["blend", "seed", "steps", "guidance", "strength"];
const FIELDS = ["prompt", "other", "negative", "motion", "model", ...NUMBERS];
const KEPT = 120; // images over which latencies are taken
const FASTEST = 1000 / 30; // milliseconds between two images that go in
const RECORDED = ["video/webm;codecs=vp9", "video/webm", "video/mp4"]; // the first that the browser can record
// For each state of the connection: its kind, which is also the word in the header; the words over the image; what follows.
const STATES = {
  connecting: ["connecting", "Connecting to the server", ""],
  "loading the model": ["loading", "Loading the model", "model"],
  "warming up": ["warming up", "Warming up", "slot"],
  "waiting for a slot": ["waiting", "Waiting for a free slot", "The page tries again by itself."],
  "token required": ["waiting", "This server asks for a token", ""],
  "no connection": ["no connection", "No connection", ""],
  "shutting down": ["no connection", "The server is shutting down", ""],
  "the model's thread has ended; it is restarting": ["loading", "The model is loaded again after an error", ""],
  "the model's thread has ended": ["error", "The model has stopped after an error", "The server's log has the reason. The server must be started again."],
  "the model cannot be opened": ["error", "The model cannot be opened", "The server's log has the reason. The server must be started again."],
  refused: ["error", "The server refused the connection", ""],
};

const screen = $("output").getContext("2d");
const shown = []; // [when, latency] of the last images, in milliseconds
const source = new Source($("input"), () => ({ colour: $("colour").value, width: Number($("width").value) }));
let mode = "text", running = true, drawn = false, recorder = null, about = {};
let styled = [], style = null; // the models that take a style image, and the one in use as a blob
let status = { state: "connecting", at: performance.now() };
let webrtc = null, refusal = ""; // what the server has of WebRTC, and why it is not used
let known = { ...JSON.parse(sessionStorage.getItem("settings") ?? "{}"), ...fromLink() };

// -- settings ---------------------------------------------------------------------------------------------------------

function settings() {
  const values = { mode, running: running && !document.hidden, show_control: $("show-control").checked };
  for (const name of FIELDS) {
    const value = NUMBERS.includes(name) ? $(name).valueAsNumber : $(name).value;
    if (value === value) values[name] = value; // an empty number is not sent
  }
  return values;
}

function show(values) {
  $("guidance").max = 30; // label() sets the model's own
  for (const name of FIELDS) {
    const offered = $(name).options ? [...$(name).options].some(({ value }) => value === values[name]) : values[name] !== undefined;
    if (offered) $(name).value = values[name];
  }
  if (["text", "image"].includes(values.mode)) mode = $("tab-text").hidden ? "image" : values.mode;
  label();
}

// Whatever follows from the values of the controls.
function label() {
  const live = !$("prompt").matches(":disabled"), withImage = mode === "image", { examples = [], prompt, guidance, max_guidance } = about[$("model").value] ?? {};
  $("guidance").max = max_guidance ?? 12;
  for (const output of all("output")) output.value = live ? $(output.htmlFor.value).value : "–";
  $("tab-text").ariaSelected = !withImage;
  $("tab-image").ariaSelected = withImage;
  $("text-panel").hidden = withImage;
  $("image-panel").hidden = $("input-figure").hidden = !withImage;
  $("control-figure").hidden = !$("show-control").checked;
  document.body.dataset.mode = mode;
  document.body.dataset.source = source.kind ?? "none";
  for (const button of all("button[data-source]")) button.ariaPressed = button.dataset.source === source.kind;
  $("brush").hidden = source.kind !== "drawing";
  for (const [note, text] of [[$("prompt-note"), prompt], [$("guidance-note"), guidance]]) {
    note.textContent = text ?? "";
    note.hidden = !text;
  }
  $("chips").hidden = !examples.length;
  if ($("chips").childElementCount !== examples.length) $("chips").replaceChildren(...examples.map(chip));
  for (const one of $("chips").children) one.ariaPressed = one.textContent === $("prompt").value;
  $("style-panel").hidden = !styled.includes($("model").value);
  $("pause").ariaPressed = !running;
  $("pause").textContent = running ? "Pause" : "Resume";
  $("record").ariaPressed = recorder !== null;
  $("record").textContent = recorder ? "Stop recording" : "Record video";
  carry();
  veil();
}

function chip(text) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.onclick = () => {
    $("prompt").value = text;
    changed();
  };
  return button;
}

function keep() {
  known = settings();
  sessionStorage.setItem("settings", JSON.stringify({ ...known, running: true }));
}

function changed() {
  restoreAddress();
  label();
  keep();
  link.set(known);
}

function welcome({ settings: first, models, about: notes, limits, styled: names, width, height }) {
  about = notes;
  styled = names;
  webrtc = limits.webrtc;
  $("steps").max = limits.max_steps;
  $("guidance-panel").hidden = !limits.guided;
  $("tab-text").hidden = limits.control; // control images are made from images
  $("show-control-label").hidden = !limits.control;
  if (!limits.control) $("show-control").checked = false;
  $("negative-label").hidden = !limits.negative;
  $("model").replaceChildren(...models.map((name) => new Option(name)));
  $("model-label").hidden = models.length < 2;
  for (const canvas of [$("input"), $("control"), $("output")]) {
    if (canvas.width === width && canvas.height === height) continue;
    Object.assign(canvas, { width, height });
    drawn = false;
  }
  for (const one of all("fieldset, [role=tab]")) one.disabled = false;
  document.body.dataset.model = limits.video ? "video" : "images";
  show(first);
  if (!limits.video) show(known); // a video is drawn for all viewers, as it is
  keep();
}

// -- webcams and screens by WebRTC ----------------------------------------------------------------------------------------

const choice = new URLSearchParams(location.search).get("transport");

// Why a webcam or screen is sent by the WebSocket; empty where WebRTC can be used.
function withoutWebRTC() {
  if (choice === "websocket") return "chosen in the address";
  if (!webrtc) return "the server has no WebRTC";
  if (!window.RTCPeerConnection || !HTMLVideoElement.prototype.requestVideoFrameCallback) return "the browser has no WebRTC";
  return refusal;
}

// Start or end the connection as the source needs it, and say what carries the images.
function carry() {
  const track = mode === "image" && link.live && status.state === "drawing" ? source.track : null, reason = withoutWebRTC();
  if (track && !reason) {
    if (!media.connection) media.start(track, $("output"), webrtc.ice_servers);
  } else media.stop();
  $("transport").hidden = !track;
  $("transport").textContent = media.connected ? "WebRTC" : reason ? `WebSocket (${reason})` : "WebRTC is connecting";
}

function shows(video) {
  screen.drawImage(video, 0, 0, $("output").width, $("output").height);
  $("output-video").hidden = false;
  first();
}

function first() {
  if (drawn) return;
  drawn = true;
  veil();
}

// -- the style image --------------------------------------------------------------------------------------------------

async function chooseStyle(file) {
  message("");
  let blob;
  try {
    blob = await scaled(file, $("output"));
  } catch {
    return message(UNREADABLE_IMAGE);
  }
  putStyle(blob);
}

// The server answers with the style image in use. Without a connection it is sent once there is one.
function putStyle(blob) {
  if (link.live) link.sendStyle(blob);
  else showStyle(blob);
}

function showStyle(blob) {
  style = blob;
  URL.revokeObjectURL($("style-thumbnail").src);
  if (style) $("style-thumbnail").src = URL.createObjectURL(style);
  else $("style-thumbnail").removeAttribute("src");
  for (const name of ["style-thumbnail", "style-remove"]) $(name).hidden = !style;
  $("style-choose").textContent = style ? "Replace" : "Choose or drop an image";
}

// -- a link that carries the settings -------------------------------------------------------------------------------

// The settings in the address, after "#". Other names are ignored, and the server checks the values.
function fromLink() {
  const values = {};
  for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
    if (!NUMBERS.includes(name)) values[name] = text;
    else if (text && Number.isFinite(Number(text))) values[name] = Number(text);
  }
  restoreAddress();
  return Object.fromEntries(Object.entries(values).filter(([name]) => name === "mode" || FIELDS.includes(name)));
}

// Take the settings out of the address bar.
function restoreAddress() {
  if (location.hash) history.replaceState(null, "", location.pathname + location.search);
}

async function copyLink() {
  const { running: _, show_control: __, ...values } = settings();
  const address = new URL(location.pathname + location.search, location.href);
  address.hash = new URLSearchParams(values);
  try {
    await navigator.clipboard.writeText(address.href);
    message("The link with these settings is copied.", "note");
  } catch {
    history.replaceState(null, "", address);
    message("The link is in the address bar until a setting is changed: copy it from there.", "note");
  }
}

// -- states, images and numbers -------------------------------------------------------------------------------------

// The words over the image, and the word in the header.
function veil() {
  let [kind, title, detail] = STATES[status.state] ?? ["drawing", "", ""];
  const opening = status.of !== undefined, { done, of } = status;
  const choosing = kind === "drawing" && running && mode === "image" && !source.kind;
  if (opening) {
    const seconds = Math.round(status.seconds + (performance.now() - status.at) / 1000);
    detail = `${of > 1 ? `${detail} ${done + 1} of ${of}, ` : ""}${seconds} s so far`;
  } else if (status.message && status.message !== status.state) detail = `${sentence(status.message)} ${detail}`;
  if (kind === "drawing") {
    if (!running) kind = "paused";
    if (!running && !drawn) title = "Paused";
    else if (choosing) [kind, title, detail] = ["waiting", "Choose a source", "A webcam, the screen, a drawing, or an image or video file."];
    else if (running && !drawn) title = "Drawing the first image";
  }
  if ($("status").textContent !== kind) $("status").textContent = kind;
  $("status").dataset.state = kind;
  $("veil").hidden = !title;
  const figure = $(choosing ? "input-figure" : "output-figure");
  if ($("veil").parentElement !== figure) figure.querySelector("figcaption").before($("veil"));
  $("veil").dataset.over = drawn && !choosing ? "image" : "nothing";
  $("veil-title").textContent = title;
  $("veil-detail").textContent = detail;
  $("veil-progress").hidden = !opening;
  if (opening && of > 1) Object.assign($("veil-progress"), { max: of, value: done });
  else $("veil-progress").removeAttribute("value");
  document.querySelector("#output-figure figcaption").textContent = kind === "paused" ? "paused" : recorder ? "recording" : "out";
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

function message(text, kind = "error") {
  $("message").textContent = text && sentence(text);
  $("message").dataset.kind = kind;
  $("message").hidden = !text;
}

// An image, or what is said of one that the video shows.
async function image(header, blob) {
  if (blob) {
    const bitmap = await createImageBitmap(blob);
    if (!media.live) screen.drawImage(bitmap, 0, 0);
    bitmap.close();
    link.send({ type: "ack" });
    first();
  }
  const now = performance.now();
  shown.push([now, header.stamp === null ? header.age_ms + (blob ? 0 : media.delay) : now - header.stamp]);
  if (shown.length > KEPT) shown.shift();
  $("frame").textContent = header.frame;
  $("ring").replaceChildren(...header.ring.map((frame, stage) => stageOf(frame, stage, header.ring.length)));
}

function stageOf(frame, stage, stages) {
  const item = Object.assign(document.createElement("li"), { textContent: frame ?? "–", className: frame === null ? "none" : "" });
  const clean = stages > 1 ? stage / (stages - 1) : 1;
  item.style.background = `color-mix(in oklab, #64708a, #ff8a4c ${Math.round(100 * clean)}%)`;
  item.title = `stage ${stage + 1} of ${stages}`;
  return item;
}

function numbers() {
  const since = performance.now() - 3000, recent = shown.filter(([when]) => when > since);
  const span = recent.length > 1 ? (recent.at(-1)[0] - recent[0][0]) / 1000 : 0;
  const sorted = shown.map(([, latency]) => latency).sort((a, b) => a - b);
  const at = (share) => (sorted.length ? `${Math.round(sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))])} ms` : "–");
  $("fps").textContent = span ? ((recent.length - 1) / span).toFixed(1) : drawn ? "0" : "–";
  $("median").textContent = at(0.5);
  $("p95").textContent = at(0.95);
  media.measure();
  veil();
}

let busy = false;
async function feed() {
  if (busy || !running || document.hidden || mode !== "image" || !link.live) return;
  if (media.connected) return source.look();
  busy = true;
  try {
    const stamp = performance.now(), blob = await source.grab();
    if (blob) await link.sendImage(blob, stamp);
  } finally {
    busy = false;
  }
}

async function controlImage(_, blob) {
  const bitmap = await createImageBitmap(blob);
  $("control").getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
}

// -- saving -----------------------------------------------------------------------------------------------------------

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function record() {
  if (recorder) return recorder.stop();
  const type = RECORDED.find((one) => window.MediaRecorder?.isTypeSupported(one));
  if (!type) return message("This browser cannot record video.");
  const stream = $("output").captureStream(), parts = [];
  const again = setInterval(() => screen.drawImage($("output"), 0, 0), 100); // a canvas that stays the same gives no frames
  const end = () => {
    clearInterval(again);
    for (const track of stream.getTracks()) track.stop();
    recorder = null;
    label();
  };
  try {
    recorder = new MediaRecorder(stream, { mimeType: type, videoBitsPerSecond: 4e6 });
    recorder.ondataavailable = ({ data }) => parts.push(data);
    recorder.onstop = () => {
      end();
      save(new Blob(parts, { type }), type.includes("webm") ? "streamflow.webm" : "streamflow.mp4");
    };
    recorder.start(1000);
    label();
  } catch (error) {
    end();
    message(`The browser cannot record this: ${error.message}`);
  }
}

// -- the connection, and what the page's parts do -----------------------------------------------------------------------

const link = new Link(settings, {
  welcome,
  image,
  control: controlImage,
  settings: (answer) => {
    message("");
    if (!answer.shared) return; // of a video, another viewer's change
    show(answer.settings);
    keep();
  },
  error: (answer) => message(answer.message),
  style: (_, blob) => {
    message("");
    showStyle(blob.size ? blob : null);
  },
  answer: (message) => media.answer(message),
  webrtc: ({ message: reason }) => media.ended(reason),
  gif: (_, blob) => save(new Blob([blob], { type: "image/gif" }), "streamflow.gif"),
  status: (now) => {
    status = { ...now, at: performance.now() };
    carry();
    veil();
    if (now.state !== "drawing" || !style) return; // the server has a new viewer, without a style image
    if ($("style-panel").hidden) showStyle(null);
    else link.sendStyle(style);
  },
  token: (again, wrong) => {
    $("token-note").hidden = !wrong;
    $("token-dialog").showModal();
    $("token-dialog").onclose = () => {
      sessionStorage.setItem("token", $("token").value);
      again();
    };
  },
});

const media = new Media(link, $("output-video"), {
  changed: carry,
  frame: shows,
  closed: (reason) => {
    refusal = reason && `WebRTC: ${reason}`;
    $("output-video").hidden = true;
    if (reason) link.set(settings()); // what was sent by the data channel may be lost
    carry();
  },
});

async function choose(kind, file) {
  message("");
  source.stop(); // first, or its track would be sent again
  media.stop();
  refusal = "";
  try {
    await source.start(kind, file);
  } catch (error) {
    message(error.message);
  }
  label();
}

function turn(to) {
  mode = to;
  shown.length = 0;
  if (mode === "text") source.stop();
  changed();
}

for (const name of [...FIELDS, "show-control"]) $(name).addEventListener("input", changed);
for (const name of ["text", "image"]) $(`tab-${name}`).onclick = () => turn(name);
for (const button of all("button[data-source]")) {
  button.onclick = () => (button.dataset.source === "file" ? $("file").click() : choose(button.dataset.source));
}
$("file").onchange = () => {
  if ($("file").files.length) choose("file", $("file").files[0]);
  $("file").value = ""; // the same file can be chosen again
};
$("style-choose").onclick = () => $("style-file").click();
$("style-file").onchange = () => {
  if ($("style-file").files.length) chooseStyle($("style-file").files[0]);
  $("style-file").value = "";
};
$("style-remove").onclick = () => putStyle(null);
for (const name of ["dragover", "dragleave", "drop"]) {
  $("style-panel").addEventListener(name, (event) => {
    event.preventDefault();
    $("style-panel").toggleAttribute("data-over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) chooseStyle(event.dataTransfer.files[0]);
  });
}
$("clear").onclick = () => source.clear();
$("dice").onclick = () => {
  $("seed").value = Math.floor(Math.random() * 2 ** 31);
  changed();
};
$("pause").onclick = () => {
  running = !running;
  changed();
};
$("record").onclick = record;
$("save-image").onclick = () => $("output").toBlob((blob) => save(blob, "streamflow.png"));
$("save-gif").onclick = () => link.send({ type: "gif" });
$("save-settings").onclick = () => save(new Blob([JSON.stringify(settings(), null, 2)], { type: "application/json" }), "streamflow.json");
$("copy-link").onclick = copyLink;
$("full-screen").hidden = !document.fullscreenEnabled;
$("full-screen").onclick = () => (document.fullscreenElement ? document.exitFullscreen() : $("output-figure").requestFullscreen());
$("settings").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("visibilitychange", () => link.set(settings()));
window.addEventListener("hashchange", () => {
  known = { ...known, ...fromLink() };
  if ($("prompt").matches(":disabled")) return; // `welcome` shows them
  show(known);
  if (mode === "text") source.stop();
  changed();
});
setInterval(numbers, 500);
setInterval(feed, FASTEST);
label();
