// The page: controls to settings, images to the canvas, numbers to their places.

import { Link } from "./link.js";
import { Source } from "./source.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["blend", "seed", "steps", "guidance", "strength"];
const FIELDS = ["prompt", "other", "motion", "model", ...NUMBERS];
const KEPT = 120; // images over which latencies are taken
const FASTEST = 1000 / 30; // milliseconds between two images that go in

const screen = $("output").getContext("2d");
const shown = []; // [when, latency] of the last images, in milliseconds
const source = new Source($("input"), () => ({ colour: $("colour").value, width: Number($("width").value) }));
let mode = "text", running = true, known = JSON.parse(sessionStorage.getItem("settings") ?? "null");

// -- settings ---------------------------------------------------------------------------------------------------------

function settings() {
  const all = { mode, running: running && !document.hidden };
  for (const name of FIELDS) {
    const value = NUMBERS.includes(name) ? $(name).valueAsNumber : $(name).value;
    if (value === value) all[name] = value; // an empty number is not sent
  }
  return all;
}

function show(values) {
  for (const name of FIELDS) if (values[name] !== undefined) $(name).value = values[name];
  mode = values.mode ?? mode;
  label();
}

function label() {
  for (const output of document.querySelectorAll("output")) output.value = $(output.htmlFor.value).value;
  const withImage = mode === "image";
  $("tab-text").ariaSelected = !withImage;
  $("tab-image").ariaSelected = withImage;
  $("text-panel").hidden = withImage;
  $("image-panel").hidden = $("input-figure").hidden = !withImage;
}

function changed() {
  label();
  known = settings();
  sessionStorage.setItem("settings", JSON.stringify({ ...known, running: true }));
  link.set(known);
}

function welcome({ settings: first, models, limits, width, height }) {
  $("steps").max = limits.max_steps;
  $("guidance-label").hidden = !limits.guided;
  $("model").replaceChildren(...models.map((name) => new Option(name)));
  $("model-label").hidden = models.length < 2;
  for (const canvas of [$("input"), $("output")]) {
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  }
  if (!models.includes(known?.model)) known = { ...known, model: first.model };
  show({ ...first, ...known });
}

// -- images and numbers ---------------------------------------------------------------------------------------------

async function image(header, blob) {
  const bitmap = await createImageBitmap(blob);
  screen.drawImage(bitmap, 0, 0);
  bitmap.close();
  link.send({ type: "ack" });
  const now = performance.now();
  shown.push([now, header.stamp === null ? header.age_ms : now - header.stamp]);
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
  $("fps").textContent = span ? ((recent.length - 1) / span).toFixed(1) : "0";
  $("median").textContent = at(0.5);
  $("p95").textContent = at(0.95);
}

let busy = false;
async function feed() {
  if (busy || !running || document.hidden || mode !== "image" || !link.live) return;
  busy = true;
  try {
    const stamp = performance.now(), blob = await source.grab();
    if (blob) await link.sendImage(blob, stamp);
  } finally {
    busy = false;
  }
}

// -- saving -----------------------------------------------------------------------------------------------------------

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const message = (text) => ($("message").textContent = text);

// -- the connection, and what the page's parts do -----------------------------------------------------------------------

const link = new Link(settings, {
  welcome,
  image,
  settings: () => message(""),
  error: (answer) => message(answer.message),
  gif: (_, blob) => save(new Blob([blob], { type: "image/gif" }), "streamflow.gif"),
  state: (text, state) => {
    $("status").textContent = text;
    $("status").dataset.state = state;
  },
  token: (again) => {
    $("token-dialog").showModal();
    $("token-dialog").onclose = () => {
      sessionStorage.setItem("token", $("token").value);
      again();
    };
  },
});

async function choose(kind, file) {
  message("");
  try {
    await source.start(kind, file);
  } catch (error) {
    message(error.message);
  }
  for (const button of document.querySelectorAll("[data-source]")) button.ariaPressed = button.dataset.source === source.kind;
  $("brush").hidden = source.kind !== "drawing";
}

function turn(to) {
  mode = to;
  shown.length = 0;
  if (mode === "text") source.stop();
  for (const button of document.querySelectorAll("[data-source]")) button.ariaPressed = button.dataset.source === source.kind;
  changed();
}

for (const name of FIELDS) $(name).addEventListener("input", changed);
for (const name of ["text", "image"]) $(`tab-${name}`).onclick = () => turn(name);
for (const button of document.querySelectorAll("[data-source]")) {
  button.onclick = () => (button.dataset.source === "file" ? $("file").click() : choose(button.dataset.source));
}
$("file").onchange = () => $("file").files.length && choose("file", $("file").files[0]);
$("clear").onclick = () => source.clear();
$("dice").onclick = () => {
  $("seed").value = Math.floor(Math.random() * 2 ** 31);
  changed();
};
$("pause").onclick = () => {
  running = !running;
  $("pause").ariaPressed = !running;
  $("pause").textContent = running ? "Pause" : "Go on";
  changed();
};
$("save-image").onclick = () => $("output").toBlob((blob) => save(blob, "streamflow.png"));
$("save-gif").onclick = () => link.send({ type: "gif" });
$("save-settings").onclick = () => save(new Blob([JSON.stringify(settings(), null, 2)], { type: "application/json" }), "streamflow.json");
document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("visibilitychange", () => link.set(settings()));
setInterval(numbers, 500);
setInterval(feed, FASTEST);
label();
