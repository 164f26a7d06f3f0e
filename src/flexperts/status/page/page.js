// A run's status: asked for every two seconds, and drawn. Texts are only ever set as text, never as HTML.

const EVERY = 2000;
const KEY = "flexperts.status.key";
const SCORES = { nll: "NLL", rouge_l: "ROUGE-L", reward_accuracy: "Reward accuracy, %", reward_margin: "Reward margin" };
const STATES = { zero_shot: "zero-shot", global: "global", personalized: "personalized" };
const at = (id) => document.getElementById(id);
let seen = "";
let status = null;

// --- numbers as text ---

const plain = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });
const counted = (value) => value.toLocaleString("en");
function size(value) {
  const power = value < 1000 ? 0 : value < 1e6 ? 1 : value < 1e9 ? 2 : 3;
  return `${plain(value / 1000 ** power)} ${["B", "kB", "MB", "GB"][power]}`;
}
function duration(seconds) {
  const whole = Math.round(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return parts.map((part, i) => (i ? String(part).padStart(2, "0") : part)).join(":");
}
const shown = (value, as) => (value == null ? "–" : as(value));

// --- elements ---

function make(tag, settings = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) element.setAttribute(name, value);
  element.append(...inside);
  return element;
}

function draw(tag, settings, ...inside) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(settings)) element.setAttribute(name, value);
  element.append(...inside);
  return element;
}

function table(head, rows, isLate = () => false) {
  const line = (cells, i) => make("tr", isLate(i) ? { class: "late" } : {}, ...cells.map((cell, j) =>
    j ? make("td", head[j] === "last refusal" ? { class: "words" } : {}, cell) : make("th", { scope: "row" }, cell)));
  const top = make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name))));
  const box = { class: "scroll", tabindex: "0", role: "region", "aria-label": "table" };
  return make("div", box, make("table", {}, top, make("tbody", {}, ...rows.map(line))));
}

// Keeps open what the reader has opened.
function fold(id, title, open, ...inside) {
  const settings = { id };
  if (at(id)?.open ?? open) settings.open = "";
  return make("details", settings, make("summary", {}, title), ...inside);
}

// --- the charts: each has lines with a name, and a function from a round to its number ---

function charts(runs) {
  const points = runs.flatMap((run) => run.points);
  const named = [...new Set(points.flatMap((point) => Object.keys(point.scores)))];
  const ofScore = (score) => named.filter((name) => name.split(".")[0] === score).map((name) =>
    [STATES[name.split(".")[1]] ?? name, (point) => point.scores[name]]);
  return [
    { title: "Training loss", as: plain, lines: [["loss", (p) => p.loss]], band: (p) => p.losses, about: "The band is from the lowest to the highest loss of a silo." },
    ...Object.entries(SCORES).map(([score, title]) => ({ title, as: plain, lines: ofScore(score), about: "The mean over the silos that were scored." })),
    { title: "Silos", as: counted, zero: true, lines: ["used", "drawn", "missing", "refused"].map((name) => [name, (p) => p[name]]) },
    { title: "Bytes of a round", as: size, zero: true, lines: [["from silos", (p) => p.bytes.uplink], ["to silos", (p) => p.bytes.downlink]] },
    { title: "Seconds of a round", as: plain, zero: true, lines: ["training", "evaluation"].map((name) => [name, (p) => p.seconds[name]]) },
    { title: "Epsilon", as: plain, zero: true, lines: [["epsilon", (p) => p.epsilon]] },
  ].filter(({ lines }) => lines.some(([, value]) => points.some((point) => value(point) != null)));
}

function ticks(low, high) {
  const rough = (high - low || Math.abs(high) || 1) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((found) => found >= rough * 0.999);
  const first = Math.floor(low / step);
  const found = [];
  for (let i = first; (i - 1) * step < high || found.length < 2; i += 1) found.push(i * step);
  return found;
}

function chart({ title, as, lines, band, about, zero }, runs) {
  const [left, right, top, bottom] = [58, 390, 12, 172];
  const numbers = runs.flatMap((run) => run.points.flatMap((p) => [...lines.map(([, value]) => value(p)), ...(band?.(p) ?? [])]));
  const finite = numbers.filter((value) => value != null);
  const marks = ticks(zero ? 0 : Math.min(...finite), Math.max(...finite));
  const last = Math.max(...runs.flatMap((run) => run.points.map((p) => p.number)));
  const x = (number) => left + ((number - 1) / Math.max(1, last - 1)) * (right - left);
  const y = (value) => bottom - ((value - marks[0]) / (marks.at(-1) - marks[0])) * (bottom - top);
  const parts = marks.flatMap((mark) => [
    draw("line", { class: "grid", x1: left, x2: right, y1: y(mark), y2: y(mark) }),
    draw("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, as(mark)),
  ]);
  for (const number of new Set([1, Math.ceil(last / 2), last])) {
    parts.push(draw("text", { x: x(number), y: bottom + 19, "text-anchor": number === 1 ? "start" : number === last ? "end" : "middle" }, counted(number)));
  }
  const keys = [];
  const told = [];
  runs.forEach((run, second) => lines.forEach(([name, value], colour) => {
    const points = run.points.filter((p) => value(p) !== undefined); // a round without scores is passed over; null is a gap
    const known = points.filter((p) => value(p) !== null);
    if (!known.length) return;
    const place = (p, number) => `${x(p.number).toFixed(1)} ${y(number).toFixed(1)}`;
    const path = points.map((p, i) => (value(p) === null ? "" : `${i && value(points[i - 1]) !== null ? "L" : "M"}${place(p, value(p))}`));
    const banded = band ? run.points.filter((p) => band(p)) : [];
    if (banded.length > 1) {
      const around = [...banded.map((p) => place(p, band(p)[0])), ...banded.map((p) => place(p, band(p)[1])).reverse()];
      parts.push(draw("polygon", { class: `band c${colour}`, fill: "currentColor", points: around.join(" ") }));
    }
    const look = `c${colour} ${second ? "second" : ""}`;
    parts.push(draw("path", { class: `line ${look}`, stroke: "currentColor", d: path.join("") }));
    if (known.length < 40) parts.push(...known.map((p) => draw("circle", { class: look, fill: "currentColor", cx: x(p.number), cy: y(value(p)), r: 3 })));
    const newest = as(value(known.at(-1)));
    const label = runs.length > 1 ? `${run.method}, ${name}` : name;
    const swatch = draw("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, draw("path", { class: `line ${look}`, stroke: "currentColor", d: "M0 5H26" }));
    keys.push(make("li", {}, swatch, `${label} ${newest}`));
    told.push(`${label}: ${as(value(known[0]))} in round ${known[0].number}, ${newest} in round ${known.at(-1).number}`);
  }));
  const picture = draw("svg", { viewBox: "0 0 400 200", role: "img", "aria-label": `${title} over rounds. ${told.join("; ")}` }, ...parts);
  return make("figure", {}, make("figcaption", {}, title), picture, make("ul", { class: "key" }, ...keys), make("p", { class: "note" }, about ?? ""));
}

// --- a run ---

function facts(run) {
  const { done, planned } = run.rounds;
  const newest = run.points.at(-1);
  const left = status.state === "running" && run === status.runs.at(-1) && run.round_seconds ? Math.max(0, planned - done) * run.round_seconds : 0;
  const told = [
    ["rounds", `${counted(done)} of ${counted(planned)}`],
    ["training loss", shown(newest?.loss, plain)],
    ["a round takes", shown(run.round_seconds, duration)],
    ...(left ? [["left, about", duration(left)]] : []),
    ["from silos", size(run.bytes.uplink)],
    ["to silos", size(run.bytes.downlink)],
    ...(run.epsilon == null ? [] : [["epsilon", plain(run.epsilon)]]),
  ];
  const bar = make("progress", { max: Math.max(planned, done, 1), value: done, "aria-label": `rounds of ${run.method}` });
  const list = make("dl", { class: "facts" }, ...told.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  const late = run.silos.filter((silo) => silo.late).map((silo) => silo.name);
  const missing = late.length ? [make("p", { class: "late" }, make("strong", {}, `Missing in their last round: ${late.join(", ")}`))] : [];
  return make("section", {}, make("h2", {}, run.method), bar, list, ...missing);
}

function tables(run, place) {
  const counts = ["drawn", "used", "missing", "refused"];
  const head = ["silo", ...counts, "last used", "loss", ...(run.silos.some((silo) => silo.refusal) ? ["last refusal"] : [])];
  const silos = run.silos.map((silo) => [silo.name, ...counts.map((name) => counted(silo[name])), shown(silo.last_used, counted), shown(silo.loss, plain), silo.refusal ?? ""].slice(0, head.length));
  const columns = charts([run]).flatMap(({ title, as, lines }) => lines.map(([name, value]) => [`${title}: ${name}`, (p) => shown(value(p), as)]));
  const rounds = [...run.points].reverse().map((p) => [counted(p.number), ...columns.map(([, text]) => text(p))]);
  const more = run.more_silos ? `${counted(run.silos.length)} of ${counted(run.silos.length + run.more_silos)}: first those that were late, missing or refused. flexperts status RUN --json has all.` : "";
  const every = run.every > 1 ? `One of every ${counted(run.every)} rounds.` : "";
  return [
    fold(`silos-${place}`, `Silos of ${run.method}`, true, make("p", { class: "note" }, more), table(head, silos, (i) => run.silos[i].late)),
    fold(`rounds-${place}`, `Rounds of ${run.method}`, false, make("p", { class: "note" }, every), table(["round", ...columns.map(([name]) => name)], rounds)),
  ];
}

function show() {
  const { run, state, writer, runs } = status;
  const begun = runs.filter((one) => one.points.length);
  const newest = runs.at(-1);
  document.title = `${newest.rounds.done} of ${newest.rounds.planned}, ${run}`;
  at("run").textContent = run;
  at("state").textContent = state;
  at("state").dataset.state = state;
  at("state").title = writer ?? "";
  at("news").textContent = `${state}: ${newest.rounds.done} of ${newest.rounds.planned} rounds of ${newest.method}`;
  at("runs").replaceChildren(...runs.map(facts));
  at("charts-part").hidden = !begun.length;
  at("charts").replaceChildren(...charts(begun).map((one) => chart(one, begun)));
  at("tables").replaceChildren(...begun.flatMap(tables));
}

function showUnderWay(lines) {
  at("under-way").replaceChildren(...lines.map(({ text, facts: told, done, total }) => {
    const bar = make("progress", { "aria-label": text, ...(total ? { max: total, value: done } : {}) });
    return make("li", {}, make("span", {}, text), bar, make("span", {}, told));
  }));
}

function warn(text) {
  if (at("alert").textContent !== text) at("alert").textContent = text;
  at("alert").hidden = !text;
}

async function look() {
  let found;
  try {
    const key = sessionStorage.getItem(KEY) ?? "";
    const response = await fetch(`status.json?seen=${seen}`, { headers: { Authorization: `Bearer ${key}` }, cache: "no-store" });
    if (response.status === 401) return warn("This page needs its key: open the link that the command printed.");
    if (!response.ok) throw new Error();
    found = await response.json();
  } catch {
    at("under-way").replaceChildren();
    if (status?.state === "finished") return warn("");
    warn("The command that serves this page does not answer. The numbers are the last that it sent.");
    return setTimeout(look, 5 * EVERY);
  }
  warn(found.error ?? "");
  showUnderWay(found.under_way);
  if (!status) at("state").textContent = "starting";
  if (found.status) {
    ({ version: seen, status } = found);
    show();
  }
  if (status?.last_round_at) at("when").textContent = `The last round ended ${duration(Math.max(0, Date.now() / 1000 - status.last_round_at))} ago.`;
  return setTimeout(look, EVERY);
}

// The command prints a link that carries the key behind '#', which browsers do not send to any server.
const carried = new URLSearchParams(location.hash.slice(1)).get("key");
if (carried) {
  sessionStorage.setItem(KEY, carried);
  history.replaceState(null, "", location.pathname);
}
addEventListener("hashchange", () => location.reload()); // another link was entered here
look();
