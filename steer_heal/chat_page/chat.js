// The dialogue and its four answers a turn. All text is set as text, never as HTML.

const CONDITIONS = ["base", "prompted", "steered", "healed"];
const byId = (id) => document.getElementById(id);
const turns = []; // {user, cells: {condition: Cell}}
let about = null;

class Cell {
  constructor(condition) {
    this.condition = condition;
    this.replyIds = [];
    this.draws = ""; // the settings that are everyone's, as they were when it was asked
    this.aborter = null; // there while the answer is on its way
    this.box = element("article", "answer");
    this.box.dataset.who = condition;
    this.title = element("h2");
    this.text = element("p", "text");
    this.text.dir = "auto";
    this.cause = element("p", "cause");
    this.box.append(this.title, this.text, this.cause);
  }

  // Asks for the answer to turn number `index`, anew if there is one already.
  async ask(index) {
    this.stop();
    const aborter = (this.aborter = new AbortController());
    const settings = currentSettings();
    this.draws = drawsOf(settings);
    const note = { steered: `dose ${shown(settings.dose)}, round ${settings.round}`, healed: `round ${settings.round}` };
    this.title.replaceChildren(this.condition, " ");
    if (note[this.condition]) this.title.append(element("small", "", note[this.condition]));
    this.text.textContent = this.cause.textContent = "";
    this.replyIds = [];
    this.box.setAttribute("aria-busy", "true");
    showState();
    const earlier = turns.slice(0, index).map((turn) => ({
      user: turn.user,
      reply_ids: turn.cells[this.condition].replyIds,
    }));
    const question = { condition: this.condition, ...settings, earlier, user: turns[index].user };
    try {
      await stream(question, aborter.signal, (answer) => {
        if (aborter.signal.aborted) return;
        this.text.textContent = answer.text;
        this.replyIds = answer.reply_ids;
      });
    } catch (error) {
      if (!aborter.signal.aborted) this.cause.textContent = error.message;
    }
    if (this.aborter !== aborter) return; // asked again meanwhile
    this.aborter = null;
    this.box.setAttribute("aria-busy", "false");
    showState();
  }

  stop() {
    this.aborter?.abort();
  }
}

// Posts a question and calls `grown` with each answer so far; throws what goes wrong, which an answer
// without its end is, too.
async function stream(question, signal, grown) {
  const response = await fetch("answer", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(question),
    signal,
  });
  if (!response.ok) throw new Error(await refusal(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the server ended before the answer did");
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const { event: name, data } = fields(event);
      if (name === "end") return;
      if (name === "trouble") throw new Error(JSON.parse(data));
      if (data !== undefined) grown(JSON.parse(data));
    }
  }
}

// The fields of one server-sent event: name -> value; comments have none.
function fields(event) {
  const lines = event.split("\n").map((line) => line.match(/^(\w+): ?(.*)$/s)).filter(Boolean);
  return Object.fromEntries(lines.map(([, name, value]) => [name, value]));
}

async function refusal(response) {
  const { detail } = await response.json().catch(() => ({}));
  const what = Array.isArray(detail) ? detail.map((each) => `${each.loc.slice(1).join(".")}: ${each.msg}`).join("; ") : response.statusText;
  return `not answered: ${what}`;
}

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

const shown = (dose) => String(Number(Number(dose).toPrecision(3)));

const currentSettings = () => ({
  round: Number(byId("round").value),
  dose: Number(byId("dose").value),
  seed: Number(byId("seed").value),
  temperature: Number(byId("temperature").value),
  max_new_tokens: Number(byId("tokens").value),
});

// What all four of a turn are to have the same of: else they would differ by more than who answers.
const drawsOf = ({ seed, temperature, max_new_tokens }) => [seed, temperature, max_new_tokens].join();

const allCells = () => turns.flatMap((turn) => Object.values(turn.cells));
const isBusy = () => allCells().some((cell) => cell.aborter);

function showState() {
  const busy = isBusy();
  byId("send").disabled = busy || !about;
  byId("settings").disabled = !about; // what was typed earlier would be overwritten
  byId("stop").disabled = !busy;
  byId("again").disabled = busy || !turns.length;
  byId("new").disabled = !turns.length;
}

// Answers the last turn again, by those whom a changed setting concerns, and by those who answered
// it with another seed, temperature or length than is set now.
function again(conditions) {
  const last = turns.at(-1);
  const wrong = document.querySelector(".settings :invalid");
  if (!last || wrong) return wrong?.reportValidity();
  const draws = drawsOf(currentSettings());
  const asked = CONDITIONS.filter((condition) => conditions.includes(condition) || last.cells[condition].draws !== draws);
  for (const condition of asked) last.cells[condition].ask(turns.length - 1);
}

function send() {
  const box = byId("user");
  if (!about || isBusy() || !box.value.trim()) return; // Enter also sends where the button is off
  const cells = Object.fromEntries(CONDITIONS.map((condition) => [condition, new Cell(condition)]));
  turns.push({ user: box.value, cells });
  const shown = element("section", "turn");
  const user = element("p", "user", box.value);
  const answers = element("div", "answers");
  user.dir = "auto";
  answers.append(...CONDITIONS.map((condition) => cells[condition].box));
  shown.append(user, answers);
  byId("dialogue").append(shown);
  box.value = "";
  again(CONDITIONS);
  shown.scrollIntoView({ block: "start" });
}

function showDose() {
  byId("dose-shown").textContent = shown(byId("dose").value);
}

function takeRound() {
  byId("dose").value = about.doses[Number(byId("round").value) - 1];
  showDose();
}

async function begin() {
  const response = await fetch("about");
  about = await response.json();
  byId("run").textContent = `${about.run} · model ${about.model} · trait ${about.trait}`;
  byId("persona").textContent = about.persona;
  about.doses.forEach((_, index) => {
    const number = index + 1;
    byId("round").append(new Option(number === about.best_round ? `${number} (best)` : `${number}`, number));
  });
  byId("round").value = about.best_round ?? about.doses.length;
  byId("dose").max = about.most_dose;
  byId("tokens").value = about.max_new_tokens;
  takeRound();
  showState();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("user").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") byId("stop").click();
});
byId("stop").addEventListener("click", () => allCells().forEach((cell) => cell.stop()));
byId("again").addEventListener("click", () => again(CONDITIONS));
byId("new").addEventListener("click", () => {
  allCells().forEach((cell) => cell.stop());
  turns.length = 0;
  byId("dialogue").replaceChildren();
  showState();
  byId("user").focus();
});
byId("dose").addEventListener("input", showDose);
byId("dose").addEventListener("change", () => again(["steered"]));
byId("round").addEventListener("change", () => {
  takeRound();
  again(["steered", "healed"]);
});
begin().catch((error) => {
  byId("trouble").textContent = `the server does not answer (${error.message})`;
});
