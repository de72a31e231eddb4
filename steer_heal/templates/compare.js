"use strict";
/* Draws the charts of compare.html in the reader's theme. Nothing is fetched. */

const textOf = (id) => document.getElementById(id).textContent;

/** Plotly, from gzip in base64. */
async function library() {
  const bytes = Uint8Array.from(atob(textOf("plotly")), (letter) => letter.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(plain).text();
  document.head.append(script);
}

/** Charts are made in the light colours: these names stand for them in either theme. */
function drawAll() {
  const style = getComputedStyle(document.documentElement);
  const { figures, colors } = JSON.parse(textOf("drawn"));
  for (const [id, figure] of Object.entries(figures)) {
    const { data, layout } = JSON.parse(JSON.stringify(figure), (_, value) =>
      colors[value] === undefined ? value : style.getPropertyValue(colors[value]).trim());
    Plotly.react(id, data, layout, { displayModeBar: false, responsive: true });
  }
}

library().then(() => {
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
}).catch((error) => {
  const said = document.createElement("p");
  said.className = "alarm";
  said.textContent = `This browser cannot draw the charts, the tables have the numbers: ${error.message}`;
  document.querySelector("main").prepend(said);
});
