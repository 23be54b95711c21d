"use strict";

const root = document.documentElement;
const figures = document.getElementById("figures").textContent;

// What all figures share, in the colours of the theme. css(name): the value of a CSS variable.
function template(css) {
  const axis = {
    gridcolor: css("--grid"),
    linecolor: css("--line"),
    tickcolor: css("--line"),
    zeroline: false,
    showline: true,
    ticks: "outside",
    ticklen: 4,
    automargin: true,
    title: { standoff: 10, font: { size: 13, color: css("--muted") } },
  };
  const colorbar = {
    title: { side: "top", font: { size: 12, color: css("--muted") } },
    tickfont: { size: 12 },
    thickness: 12,
    len: 1,
    outlinewidth: 0,
    ticks: "outside",
    ticklen: 3,
  };
  const scale = (name) => css(name).split(",").map((colour, index, all) => [index / (all.length - 1), colour.trim()]);
  return {
    layout: {
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--ink") },
      paper_bgcolor: css("--card"),
      plot_bgcolor: css("--card"),
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
      margin: { l: 64, r: 24 },
      xaxis: axis,
      yaxis: axis,
      legend: { orientation: "h", x: 0, xanchor: "left", yanchor: "bottom" },
      colorscale: { sequential: scale("--sequential"), diverging: scale("--diverging") },
      coloraxis: { colorbar },
    },
  };
}

function draw() {
  const styles = getComputedStyle(root);
  const css = (name) => styles.getPropertyValue(name).trim();
  // Traces write their colours as var(--name).
  const drawn = JSON.parse(figures.replace(/"var\((--[a-z0-9-]+)\)"/g, (_, name) => JSON.stringify(css(name))));
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]], displayModeBar: "hover" };
  for (const place of document.querySelectorAll("[data-figure]")) {
    if (place.offsetParent === null) continue;
    const { data, layout } = drawn[Number(place.dataset.figure)];
    Plotly.react(place, data, { ...layout, autosize: true, template: template(css) }, config);
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
