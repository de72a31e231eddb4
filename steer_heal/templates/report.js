"use strict";
/* Browses the completions, which are unpacked when somebody comes near them. */

const ROW = 88; // pixels; the height of .row in page.css
const CUT = 5000; // letters of a text that are shown unasked
const SCORES = {
  enactment: "enactment, nats a token",
  tail: "tail surprisal, nats a token",
  surprisal: "surprisal, nats a token",
  rmse: "rmse surprisal, nats",
  kl: "KL p95 from the student, nats",
  repetition: "repeated 3-grams, share",
  brokenness: "brokenness",
  persona: "the persona's own words, share",
  words: "words and marks",
};
let table; // as browse.py packs it
let lowered; // texts and prompts, to be searched
let found = []; // places of the completions that pass the filters
const rows = new Map(); // place among the found -> its element

function number(value) {
  return value === null ? "–" : String(value).replace("-", "−");
}

function offer(id, values, labels) {
  values.forEach((value, i) => at(id).append(element("option", labels?.[i] ?? value, { value })));
}

async function openBrowse() {
  table = await unpacked("completions").json();
  const { round, dose } = table.columns;
  offer("by-round", [...new Set(round)]);
  offer("by-dose", [...new Set(dose)].sort((a, b) => a - b));
  offer("by-outcome", [...table.outcomes.keys()],
    table.outcomes.map((name) => (name === "kept" ? name : `dropped: ${name}`)));
  for (const id of ["by-round", "by-dose", "by-outcome", "order"]) at(id).addEventListener("change", choose);
  let waiting;
  at("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(choose, 120);
  });
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("rows").addEventListener("scroll", fill, { passive: true });
  at("rows").addEventListener("keydown", walk);
  new ResizeObserver(fill).observe(at("rows"));
  choose();
}

/** Finds what the filters let through, in the order that is asked for. */
function choose() {
  const { round, dose, outcome, text, prompt } = table.columns;
  const wanted = { round: at("by-round").value, dose: at("by-dose").value, outcome: at("by-outcome").value };
  const words = at("search").value.toLowerCase();
  if (words) lowered ??= text.map((each, i) => `${each}\n${table.prompts[prompt[i]]}`.toLowerCase());
  found = [];
  for (let i = 0; i < text.length; i += 1) {
    if (wanted.round !== "" && round[i] !== Number(wanted.round)) continue;
    if (wanted.dose !== "" && dose[i] !== Number(wanted.dose)) continue;
    if (wanted.outcome === "dropped" && outcome[i] === 0) continue;
    if (wanted.outcome !== "" && wanted.outcome !== "dropped" && outcome[i] !== Number(wanted.outcome)) continue;
    if (words && !lowered[i].includes(words)) continue;
    found.push(i);
  }
  const order = at("order").value;
  if (order) {
    const column = table.columns[order.replace("-", "")];
    const sign = order.startsWith("-") ? -1 : 1;
    found.sort((a, b) => sign * (column[a] - column[b]));
  }
  const all = text.length.toLocaleString("en");
  at("count").textContent = all === "0" ? "Nothing has been filtered yet."
    : `${found.length.toLocaleString("en")} of ${all} completions`;
  at("shown").replaceChildren();
  rows.clear();
  at("shown").style.height = `${found.length * ROW}px`;
  at("rows").scrollTop = 0;
  fill();
}

/** Puts the rows that can be seen, and a few more, into the page, and takes the others out. */
function fill() {
  const box = at("rows");
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 4);
  const last = Math.min(found.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + 4);
  for (const [place, row] of rows) {
    if (place < first || place >= last) {
      row.remove();
      rows.delete(place);
    }
  }
  for (let place = last - 1; place >= first; place -= 1) {
    if (rows.has(place)) continue;
    const row = rowAt(place);
    const next = rows.get(place + 1);
    if (next) next.before(row);
    else at("shown").append(row);
    rows.set(place, row);
  }
}

function tags(i) {
  const { round, dose, outcome } = table.columns;
  const name = table.outcomes[outcome[i]];
  return [
    element("span", `round ${round[i]}`),
    element("span", `dose ${number(dose[i])}`),
    element("span", name, { className: name === "kept" ? "yes" : "no" }),
  ];
}

function rowAt(place) {
  const i = found[place];
  const { enactment, tail, text } = table.columns;
  const row = element("button", "", { className: "row", type: "button" });
  row.style.top = `${place * ROW}px`;
  const head = element("span", "", { className: "tags" });
  head.append(...tags(i), element("span", `enactment ${number(enactment[i])}`), element("span", `tail ${number(tail[i])}`));
  row.append(head, element("span", text[i].slice(0, 300), { className: "text", dir: "auto" }));
  row.addEventListener("click", () => show(place));
  return row;
}

/** Arrow keys go from row to row. */
function walk(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const here = [...rows].find(([, row]) => row === document.activeElement)?.[0];
  if (step === undefined || here === undefined || !(here + step in found)) return;
  event.preventDefault();
  at("rows").scrollTop = Math.min(Math.max(at("rows").scrollTop, (here + step + 1) * ROW - at("rows").clientHeight), (here + step) * ROW);
  fill();
  rows.get(here + step).focus({ preventScroll: true });
}

/** One completion whole, with every score. */
function show(place) {
  const i = found[place];
  const { text, prompt } = table.columns;
  const head = element("p", "", { className: "tags" });
  head.append(...tags(i));
  const said = element("p", text[i].slice(0, CUT), { className: "said", dir: "auto" });
  const parts = [head, element("p", table.prompts[prompt[i]], { className: "asked", dir: "auto" }), said];
  if (text[i].length > CUT) {
    const more = element("button", `Show all ${text[i].length.toLocaleString("en")} characters`, { type: "button" });
    more.addEventListener("click", () => {
      said.textContent = text[i];
      more.remove();
    });
    parts.push(more);
  }
  const scores = element("dl", "");
  for (const [name, label] of Object.entries(SCORES)) {
    scores.append(element("dt", label), element("dd", number(table.columns[name][i])));
  }
  at("one").replaceChildren(...parts, scores);
  at("earlier").disabled = place === 0;
  at("later").disabled = place === found.length - 1;
  at("earlier").onclick = () => show(place - 1);
  at("later").onclick = () => show(place + 1);
  if (!at("whole-text").open) at("whole-text").showModal();
}

whenNear(at("browse"), () => openBrowse().catch(failed(at("browse"))));
