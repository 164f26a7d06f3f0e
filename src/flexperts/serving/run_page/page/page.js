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

const maker = (space) => (tag, settings = {}, ...inside) => {
  const element = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(settings)) element.setAttribute(name, value);
  element.append(...inside);
  return element;
};
const make = maker(document.documentElement.namespaceURI);
const draw = maker("http://www.w3.org/2000/svg");
const note = (text) => (text ? [make("p", { class: "note" }, text)] : []);

// `words` is the number of the column that has words, if there is one.
function table(head, rows, { words, isLate = () => false } = {}) {
  const look = (column) => (column === words ? { class: "words" } : {});
  const top = make("tr", {}, ...head.map((name, i) => make("th", { scope: "col", ...look(i) }, name)));
  const lines = rows.map(([first, ...cells], i) =>
    make("tr", isLate(i) ? { class: "late" } : {}, make("th", { scope: "row" }, first),
      ...cells.map((cell, j) => make("td", look(j + 1), cell))));
  const box = { class: "scroll", tabindex: "0", role: "region", "aria-label": "table" };
  return make("div", box, make("table", {}, make("thead", {}, top), make("tbody", {}, ...lines)));
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
  const ofScore = (score) => named.filter((name) => name.split(".")[0] === score)
    .map((name) => [STATES[name.split(".")[1]] ?? name, (point) => point.scores[name]]);
  const scores = Object.entries(SCORES).map(([score, title]) =>
    ({ title, lines: ofScore(score), about: "The mean over the silos that were scored." }));
  const loss = {
    title: "Training loss", lines: [["loss", (p) => p.loss]], band: (p) => p.losses,
    about: "The band is from the lowest to the highest loss of a silo.",
  };
  const silos = ["used", "drawn", "missing", "refused"].map((name) => [name, (p) => p[name]]);
  const bytes = [["from silos", (p) => p.bytes.uplink], ["to silos", (p) => p.bytes.downlink]];
  const seconds = ["training", "evaluation"].map((name) => [name, (p) => p.seconds[name]]);
  return [
    loss,
    ...scores,
    { title: "Silos", as: counted, zero: true, lines: silos },
    { title: "Bytes of a round", as: size, zero: true, lines: bytes },
    { title: "Seconds of a round", zero: true, lines: seconds },
    { title: "Epsilon", zero: true, lines: [["epsilon", (p) => p.epsilon]] },
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

function chart({ title, lines, band = () => [], about, zero, as = plain }, runs) {
  const [left, right, top, bottom] = [58, 390, 12, 172];
  const numbers = runs.flatMap((run) => run.points.flatMap((p) => [...lines.map(([, value]) => value(p)), ...(band(p) ?? [])]))
    .filter((value) => value != null);
  const marks = ticks(zero ? 0 : Math.min(...numbers), Math.max(...numbers));
  const last = Math.max(...runs.map((run) => run.points.at(-1).number));
  const x = (number) => left + ((number - 1) / Math.max(1, last - 1)) * (right - left);
  const y = (value) => bottom - ((value - marks[0]) / (marks.at(-1) - marks[0])) * (bottom - top);
  const place = (p, value) => `${x(p.number).toFixed(1)} ${y(value).toFixed(1)}`;
  const parts = marks.flatMap((mark) => [
    draw("line", { class: "grid", x1: left, x2: right, y1: y(mark), y2: y(mark) }),
    draw("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, as(mark)),
  ]);
  for (const [number, anchor] of new Map([[Math.ceil(last / 2), "middle"], [last, "end"], [1, "start"]])) {
    parts.push(draw("text", { x: x(number), y: bottom + 19, "text-anchor": anchor }, counted(number)));
  }
  const keys = [], told = [];
  runs.forEach((run, second) => lines.forEach(([name, value], colour) => {
    const points = run.points.filter((p) => value(p) !== undefined); // null is a gap; a round that was not scored is none
    const known = points.filter((p) => value(p) !== null);
    if (!known.length) return;
    const paint = { class: `c${colour} ${second ? "second" : ""}` };
    const step = (p, i) => (value(p) === null ? "" : `${i && value(points[i - 1]) !== null ? "L" : "M"}${place(p, value(p))}`);
    const line = (d) => draw("path", { class: `line ${paint.class}`, d });
    const banded = run.points.filter((p) => band(p)?.length);
    const around = [...banded.map((p) => place(p, band(p)[0])), ...banded.map((p) => place(p, band(p)[1])).reverse()];
    parts.push(draw("polygon", { class: `band ${paint.class}`, points: around.join(" ") }), line(points.map(step).join("")));
    if (known.length < 40) parts.push(...known.map((p) => draw("circle", { ...paint, cx: x(p.number), cy: y(value(p)), r: 3 })));
    const label = runs.length > 1 ? `${run.method}, ${name}` : name;
    const [first, newest] = [known[0], known.at(-1)];
    keys.push(make("li", {}, draw("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, line("M0 5H26")), `${label} ${as(value(newest))}`));
    told.push(`${label}: ${as(value(first))} in round ${first.number}, ${as(value(newest))} in round ${newest.number}`);
  }));
  const label = `${title} over rounds. ${told.join("; ")}`;
  const picture = draw("svg", { viewBox: "0 0 400 200", role: "img", "aria-label": label }, ...parts);
  return make("figure", {}, make("figcaption", {}, title), picture, make("ul", { class: "key" }, ...keys), ...note(about));
}

// --- a run ---

function facts(run) {
  const { done, planned } = run.rounds;
  const goesOn = status.state === "running" && run === status.runs.at(-1) && planned > done && run.round_seconds;
  const told = [
    ["rounds", `${counted(done)} of ${counted(planned)}`],
    ["training loss", shown(run.points.at(-1)?.loss, plain)],
    ["a round takes", shown(run.round_seconds, duration)],
    ...(goesOn ? [["left, about", duration((planned - done) * run.round_seconds)]] : []),
    ["from silos", size(run.bytes.uplink)],
    ["to silos", size(run.bytes.downlink)],
    ...(run.epsilon == null ? [] : [["epsilon", plain(run.epsilon)]]),
  ];
  const bar = make("progress", { max: Math.max(planned, done, 1), value: done, "aria-label": `rounds of ${run.method}` });
  const list = told.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  const late = run.silos.filter((silo) => silo.late).map((silo) => silo.name).join(", ");
  const missing = late ? [make("p", { class: "late" }, make("strong", {}, `Missing in their last round: ${late}`))] : [];
  return make("section", {}, make("h2", {}, run.method), bar, make("dl", { class: "facts" }, ...list), ...missing);
}

function tables(run, place) {
  const counts = ["drawn", "used", "missing", "refused"];
  const silos = run.silos.map((silo) =>
    [silo.name, ...counts.map((name) => counted(silo[name])), shown(silo.last_used, counted), shown(silo.loss, plain), silo.refusal ?? ""]);
  const columns = charts([run]).flatMap(({ title, lines, as = plain }) =>
    lines.map(([name, value]) => [`${title}: ${name}`, (p) => shown(value(p), as)]));
  const rounds = run.points.map((p) => [counted(p.number), ...columns.map(([, text]) => text(p))]).reverse();
  const all = counted(run.silos.length + run.more_silos);
  const some = run.more_silos ? `${run.silos.length} of ${all} silos, those that are late and those often missing or refused first.` : "";
  const every = run.every > 1 ? `One of every ${counted(run.every)} rounds, here and in the charts.` : "";
  const ofSilos = table(["silo", ...counts, "last used", "loss", "last refusal"], silos, { words: 7, isLate: (i) => run.silos[i].late });
  const ofRounds = table(["round", ...columns.map(([name]) => name)], rounds);
  return [
    fold(`silos-${place}`, `Silos of ${run.method}`, true, ...note(some), ofSilos),
    fold(`rounds-${place}`, `Rounds of ${run.method}`, false, ...note(every), ofRounds),
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
  const places = [...document.querySelectorAll(".scroll")].map((box) => [box.scrollLeft, box.scrollTop]);
  const focused = document.activeElement.closest("details")?.id;
  at("tables").replaceChildren(...begun.flatMap(tables));
  document.querySelectorAll(".scroll").forEach((box, i) => places[i] && box.scrollTo(...places[i]));
  at(focused)?.querySelector("summary").focus({ preventScroll: true });
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
  if (!status && !found.error) at("state").textContent = "starting";
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
