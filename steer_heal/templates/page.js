"use strict";
/* Draws the charts of a page in the reader's theme as they come near. Nothing is fetched. */

const at = (id) => document.getElementById(id);

function element(tag, text, properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, properties);
}

/** A block of the page that is gzip in base64, unpacked. */
function unpacked(id) {
  const letters = atob(at(id).textContent);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i += 1) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream);
}

/** Calls back once, when an element comes near the window. */
function whenNear(element, call) {
  const watch = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) {
      watch.disconnect();
      call();
    }
  }, { rootMargin: "600px" });
  watch.observe(element);
}

/** Says in the page what it could not do; the tables have the numbers all the same. */
function failed(where) {
  return (error) => {
    where.prepend(element("p", `This browser cannot show this part: ${error.message}`, { className: "alarm" }));
  };
}

// ---------------------------------------------------------------------------------------- charts

const drawn = JSON.parse(at("drawn").textContent);

/** A figure with the theme's colours where it has their names. */
function themed(value, colors) {
  if (typeof value === "string") return colors[value] ?? value;
  if (Array.isArray(value)) return value.map((each) => themed(each, colors));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, themed(each, colors)]));
}

function draw(chart) {
  const style = getComputedStyle(document.documentElement);
  const colors = Object.fromEntries(
    Object.entries(drawn.colors).map(([light, name]) => [light, style.getPropertyValue(name).trim()]),
  );
  const { data, layout } = themed(drawn.figures[chart.id], colors);
  return Plotly.react(chart, data, layout, { displayModeBar: false, responsive: true });
}

async function drawCharts() {
  document.head.append(element("script", await unpacked("plotly").text()));
  const charts = [...document.querySelectorAll(".chart")];
  const begun = new Set();
  const begin = (chart) => begun.has(chart) || (begun.add(chart), draw(chart));
  for (const chart of charts) whenNear(chart, () => begin(chart));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => begun.forEach(draw));
  addEventListener("beforeprint", () => charts.forEach(begin));
}

drawCharts().catch(failed(document.querySelector("main")));
