"use strict";

const root = document.documentElement;
const figures = JSON.parse(document.getElementById("figures").textContent);

// Colours are written as var(--name); lists of colours are spread evenly over a scale.
function resolve(value, styles, key) {
  if (typeof value === "string") {
    const found = /^var\((--[a-z0-9-]+)\)$/.exec(value);
    if (!found) return value;
    const text = styles.getPropertyValue(found[1]).trim();
    if (key !== "colorscale") return text;
    const colours = text.split(",").map((colour) => colour.trim());
    return colours.map((colour, index) => [index / (colours.length - 1), colour]);
  }
  if (Array.isArray(value)) return value.map((item) => resolve(item, styles));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, resolve(item, styles, name)]));
  }
  return value;
}

function draw() {
  const styles = getComputedStyle(root);
  const colour = (name) => styles.getPropertyValue(name).trim();
  for (const place of document.querySelectorAll("[data-figure]")) {
    if (place.offsetParent === null) continue;
    const spec = resolve(figures[Number(place.dataset.figure)], styles);
    const layout = {
      ...spec.layout,
      autosize: true,
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--ink") },
      paper_bgcolor: colour("--card"),
      plot_bgcolor: colour("--card"),
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    };
    const buttons = ["toImage"];
    const config = { responsive: true, displaylogo: false, modeBarButtons: [buttons], displayModeBar: "hover" };
    Plotly.react(place, spec.data, layout, config);
  }
}

function theme() {
  const asked = location.hash.slice(1);
  if (asked === "dark" || asked === "light") return asked;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function show(name) {
  root.dataset.theme = name;
  document.getElementById("theme").textContent = name === "dark" ? "Light theme" : "Dark theme";
  draw();
}

document.getElementById("theme").addEventListener("click", () => show(root.dataset.theme === "dark" ? "light" : "dark"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(theme()));
addEventListener("hashchange", () => show(theme()));

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});

const choice = document.getElementById("choice");
if (choice) {
  choice.addEventListener("change", () => {
    for (const part of document.querySelectorAll("[data-choice]")) part.hidden = part.dataset.choice !== choice.value;
    draw();
  });
}

show(theme());
