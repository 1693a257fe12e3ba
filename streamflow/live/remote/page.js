// Shows what /osc.json holds, and posts to /osc what is moved here. Texts of others are never taken as HTML.

const PERIOD = 500;  // milliseconds between two looks
const HELD = 1000;  // milliseconds after a move, in which the slider stays where the hand has left it
const byId = (id) => document.getElementById(id);
let rows = new Map(), shown = "";

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = kind;
  return made;
}

function number(value) {
  return Number(value.toFixed(4)).toString();
}

function plain(value) {
  if (value === null || value === undefined) return "not set";
  if (typeof value === "number") return number(value);
  return typeof value === "string" ? `“${value}”` : value.map(([one, weight]) => `${one} (${number(weight)})`).join(", ");
}

function sender(address) {
  const [, kind, channel, what] = /^midi:(cc|note):(\d+):(\d+)$/.exec(address) ?? [];
  return kind ? `${kind === "cc" ? "controller" : "note"} ${what} on channel ${channel}` : "";
}

class Row {
  constructor(table, knob) {
    this.address = knob.address;
    const row = table.appendChild(element("tr")), first = row.appendChild(element("td"));
    first.append(element("code", knob.address), element("div", sender(knob.address), "note"));
    row.append(element("td", knob.field));
    const ends = (pair) => pair ? `${number(pair[0])} to ${number(pair[1])}` : "a text";
    row.append(element("td", ends(knob.source)), element("td", knob.range ? ends(knob.range) : ""));
    row.append(element("td", knob.smoothing ? `${number(knob.smoothing)} s` : ""));
    this.value = row.appendChild(element("td", "", "value"));
    this.refused = element("div", "", "refused");
    if (table.id === "osc") this.addSender(row.appendChild(element("td", "", "send")), knob);
    this.moved = -HELD;
  }

  addSender(cell, knob) {
    const form = cell.appendChild(element("form")), input = form.appendChild(element("input"));
    input.setAttribute("aria-label", `Value for ${knob.address}`);
    this.input = input;
    if (knob.type === "text") {
      input.type = "text";
      form.append(element("button", "Send"));
    } else {
      [input.type, input.step] = ["range", "any"];
      [input.min, input.max] = [Math.min(...knob.source), Math.max(...knob.source)];
      this.at = form.appendChild(element("output"));
      input.oninput = () => this.move(Number(input.value));
    }
    form.onsubmit = (event) => {
      event.preventDefault();
      if (knob.type === "text") this.move(input.value);
    };
    cell.append(this.refused);
  }

  show(knob) {
    this.value.textContent = plain(knob.value);
    this.refused.textContent = this.failed || knob.refused || "";
    if (!this.at || performance.now() - this.moved < HELD) return;
    if (knob.at !== null) this.input.value = knob.at;
    this.at.value = knob.at === null ? "" : number(knob.at);
  }

  async move(value) {  // one request at a time; of values that come meanwhile, the last one is sent
    this.moved = performance.now();
    if (this.at) this.at.value = number(value);
    this.next = value;
    if (this.busy) return;
    this.busy = true;
    while (this.next !== undefined) {
      const body = JSON.stringify({ address: this.address, value: this.next });
      this.next = undefined;
      try {
        const answer = await fetch("osc", { method: "POST", headers: { "Content-Type": "application/json" }, body });
        this.failed = answer.ok ? "" : (await answer.json()).error;
      } catch (error) {
        this.failed = `not sent: ${error.message}`;
      }
      this.refused.textContent = this.failed;
    }
    this.busy = false;
  }
}

function build(groups) {
  rows = new Map();
  for (const [id, knobs] of Object.entries(groups)) {
    const table = byId(id);
    table.replaceChildren();
    const names = ["Address", "Changes", "Knob sends", "Range of the field", "Smoothing", "Present value"];
    if (!knobs.length) continue;
    const head = table.appendChild(element("tr"));
    head.append(...[...names, ...(id === "osc" ? ["Send"] : [])].map((one) => element("th", one)));
    for (const knob of knobs) rows.set(knob.address, new Row(table, knob));
  }
}

function show(data) {
  const groups = { osc: data.osc.addresses, midi: data.midi.addresses, sound: data.sound.addresses };
  const now = JSON.stringify(Object.values(groups).map((knobs) => knobs.map(({ value, at, refused, ...rest }) => rest)));
  if (now !== shown) build(groups);
  shown = now;
  for (const knob of Object.values(groups).flat()) rows.get(knob.address).show(knob);
  byId("osc-note").textContent = data.osc.port === null
    ? "OSC is off: give --control.osc 127.0.0.1:9000 and mappings."
    : `UDP to ${data.osc.host}, port ${data.osc.port}. Addresses without a mapping are ignored.`;
  byId("midi-note").textContent = data.midi.port === null
    ? "MIDI is off: give --control.midi and the name of a port." : `Port “${data.midi.port}”.`;
  byId("sound-note").textContent = data.sound.inputs.length
    ? data.sound.inputs.join(", ") : "Sound is off: give --control.sound audio:default or link:.";
}

function enable(on, text) {
  byId("status").textContent = text;
  for (const one of document.querySelectorAll("input, button")) one.disabled = !on;
}

async function look() {
  if (!document.hidden) {
    try {
      const answer = await fetch("osc.json");
      if (!answer.ok) throw new Error((await answer.json()).error);
      show(await answer.json());
      enable(true, "connected");
    } catch (error) {
      enable(false, "the show has ended or does not answer");
    }
  }
  setTimeout(look, PERIOD);
}

look();
