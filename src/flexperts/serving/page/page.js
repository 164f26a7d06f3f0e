// A chat with a silo's models in every state, side by side. Texts are only ever set as text, never as HTML.

const KEY = "flexperts.key";
const STAGES = {
  zero_shot: { title: "Base", about: () => "before any silo trained it" },
  global: { title: "Global", about: () => "with what all silos learned together" },
  personalized: { title: "Personalized", about: (silo) => `with what ${silo} keeps to itself` },
  chosen: { title: "Chosen", about: (silo) => `the one that was best on rows which ${silo} held back` },
};
const at = (id) => document.getElementById(id);
let silos = [];
let running = null; // the AbortController of the question in work
let before = {}; // state -> the turns so far: every model sees its own answers

// --- the server ---

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, options = {}) {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem(KEY) ?? ""}`, "Content-Type": "application/json" };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new Refused(response.status, told?.error?.message ?? `The server answered ${response.status}.`);
}

// Yields the JSON of every server-sent event, up to [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Refused(0, "The connection was lost.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

// --- which view ---

function show(view) {
  for (const id of ["door", "wait", "talk"]) at(id).hidden = id !== view;
  for (const id of ["composer", "silo-label", "change-key"]) at(id).hidden = view !== "talk";
}

function askForKey(message = "") {
  sessionStorage.removeItem(KEY);
  at("key-error").textContent = message;
  at("key").setAttribute("aria-invalid", String(message !== ""));
  show("door");
  at("key").focus();
}

async function open() {
  if (!sessionStorage.getItem(KEY)) return askForKey();
  try {
    silos = (await (await call("v1/models")).json()).data;
  } catch (error) {
    if (error.status === 401) return askForKey("This key is not valid. Check it, or ask your operator for a new one.");
    at("wait-text").textContent = error.message;
    show("wait");
    return setTimeout(open, 2000);
  }
  at("silo").replaceChildren(...silos.map((silo) => new Option(silo.id)));
  welcome();
  show("talk");
  at("question").focus();
}

const silo = () => silos.find((one) => one.id === at("silo").value);

function welcome() {
  document.querySelector(".silo-name").textContent = silo().id;
  at("stages").replaceChildren(...Object.keys(silo().states).map((state) => {
    const [item, title, about] = ["li", "h3", "p"].map((tag) => document.createElement(tag));
    item.dataset.state = state;
    title.textContent = STAGES[state].title;
    about.textContent = STAGES[state].about(silo().id);
    item.append(title, about);
    return item;
  }));
}

// --- one question ---

function startChat() {
  running?.abort();
  before = {};
  at("turns").replaceChildren();
  at("welcome").hidden = false;
  at("new-chat").hidden = true;
}

async function ask(question, passage) {
  const { id, states } = silo();
  const turn = at("turn-template").content.cloneNode(true).firstElementChild;
  turn.querySelector(".asked").textContent = id;
  turn.querySelector(".question").textContent = question;
  turn.querySelector(".about").hidden = !passage;
  turn.querySelector(".about p").textContent = passage;
  const content = passage ? `${question}\n\n${passage}` : question;
  const made = Object.entries(states).map(([state, model]) => new Answer(state, id, model));
  turn.querySelector(".answers").append(...made.map((answer) => answer.card));
  at("welcome").hidden = true;
  at("new-chat").hidden = false;
  at("turns").append(turn);
  turn.scrollIntoView({ block: "start", behavior: "smooth" });

  running = new AbortController();
  work(true);
  const chat = before; // a new chat replaces it
  await Promise.all(made.map(async (answer) => {
    const messages = [...(chat[answer.state] ?? []), { role: "user", content }];
    await answer.run(messages, running.signal);
    const said = answer.text.textContent;
    if (!answer.failed && said) chat[answer.state] = [...messages, { role: "assistant", content: said }];
  }));
  running = null;
  work(false);
  const failed = made.filter((answer) => answer.failed).length;
  at("status").textContent = failed ? `${failed} of ${made.length} answers failed` : `${made.length} answers are there`;
}

function work(going) {
  if (document.activeElement === at("stop")) at("question").focus(); // it is about to disappear
  at("send").hidden = going;
  at("stop").hidden = !going;
  at("silo").disabled = going;
  if (going) at("status").textContent = "Waiting for answers";
}

class Answer {
  constructor(state, silo, model) {
    this.model = model;
    this.state = state;
    this.failed = false;
    this.card = at("answer-template").content.cloneNode(true).firstElementChild;
    this.card.dataset.state = state;
    const title = this.card.querySelector("h3");
    title.textContent = STAGES[state].title;
    this.card.setAttribute("aria-label", `${STAGES[state].title}, ${STAGES[state].about(silo)}`);
    this.text = this.card.querySelector(".text");
    this.foot = this.card.querySelector("footer");
    this.copy = this.card.querySelector(".copy");
    this.copy.addEventListener("click", () => this.toClipboard());
  }

  async run(messages, signal) {
    this.started = performance.now();
    this.say("waiting");
    const clock = setInterval(() => this.say(this.first ? "writing" : "waiting"), 100);
    try {
      await this.read(messages, signal);
      this.say(this.finish === "length" ? "cut at the limit" : "");
    } catch (error) {
      if (error.name === "AbortError") this.say("stopped");
      else this.fail(error);
    }
    clearInterval(clock);
    this.text.setAttribute("aria-busy", "false");
    this.copy.hidden = this.failed || !this.text.textContent;
  }

  async read(messages, signal) {
    const body = { model: this.model, messages, stream: true, ...options() };
    body.stream_options = { include_usage: true };
    const response = await call("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Refused(0, chunk.error.message);
      this.tokens = chunk.usage?.completion_tokens;
      const [choice] = chunk.choices;
      this.finish = choice?.finish_reason ?? this.finish;
      if (!choice?.delta.content) continue;
      this.last = performance.now();
      this.first ??= this.last;
      this.text.append(choice.delta.content);
      this.say("writing");
    }
  }

  // The line below the answer: how it stands, tokens, tokens per second between the first and the last, seconds.
  say(how) {
    const parts = [`${((performance.now() - this.started) / 1000).toFixed(1)} s`];
    const writing = (this.last - this.first) / 1000;
    if (this.tokens > 1 && writing > 0) parts.unshift(`${((this.tokens - 1) / writing).toFixed(1)} tokens/s`);
    if (this.tokens) parts.unshift(`${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}`);
    if (how) parts.unshift(how);
    this.foot.textContent = parts.join(" · ");
  }

  fail(error) {
    this.failed = true;
    const note = document.createElement("span");
    note.className = "error";
    note.textContent = error.message;
    this.text.append(note);
    this.say("failed");
  }

  async toClipboard() {
    try {
      await navigator.clipboard.writeText(this.text.textContent);
      this.copy.textContent = "Copied";
    } catch { // browsers allow it on https and on this machine alone
      getSelection().selectAllChildren(this.text);
      this.copy.textContent = "Selected";
    }
    setTimeout(() => (this.copy.textContent = "Copy"), 1500);
  }
}

function options() {
  const numbers = { max_tokens: at("longest").valueAsNumber, temperature: at("temperature").valueAsNumber };
  return Object.fromEntries(Object.entries(numbers).filter(([, number]) => !Number.isNaN(number)));
}

// --- what people do ---

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value.trim());
  at("key").value = "";
  open();
});
at("change-key").addEventListener("click", () => {
  startChat();
  at("composer").reset();
  showPassage();
  askForKey();
});
at("silo").addEventListener("change", () => {
  startChat();
  welcome();
});
at("new-chat").addEventListener("click", () => {
  startChat();
  at("question").focus();
});
at("stop").addEventListener("click", () => running?.abort());
at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (running || !question) return;
  at("question").value = "";
  fit(at("question"));
  fold("add-passage", true);
  fold("show-options", true);
  ask(question, at("passage").value.trim());
  at("question").focus();
});
at("composer").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.target.id !== "question") return;
  event.preventDefault();
  at("composer").requestSubmit();
});

document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());

function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}
for (const area of document.querySelectorAll("textarea")) area.addEventListener("input", () => fit(area));

// Opens or closes what a button controls.
function fold(button, away) {
  const box = at(at(button).getAttribute("aria-controls"));
  box.hidden = away;
  at(button).setAttribute("aria-expanded", String(!away));
  if (!away) box.querySelector("textarea, input").focus();
}
for (const button of ["add-passage", "show-options"]) {
  at(button).addEventListener("click", () => fold(button, at(button).getAttribute("aria-expanded") === "true"));
}
function showPassage() {
  at("add-passage").textContent = at("passage").value.trim() ? "Passage added" : "Passage";
}
at("passage").addEventListener("input", showPassage);

// The command prints a link that carries the key behind '#', which browsers do not send to any server.
const carried = new URLSearchParams(location.hash.slice(1)).get("key");
if (carried) {
  sessionStorage.setItem(KEY, carried);
  history.replaceState(null, "", location.pathname);
}
open();
