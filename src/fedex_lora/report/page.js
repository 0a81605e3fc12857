// Charts, the choice of what a heat map's colour shows, tables that sort, the theme. No state beyond the page.
const charts = JSON.parse(document.getElementById("charts").textContent);
const config = {
  background: null,
  font: "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif",
  view: { stroke: null },
  axis: { labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", gridOpacity: 1, domain: false, tickSize: 4, titlePadding: 8 },
  axisX: { grid: false },
  legend: { orient: "top", direction: "horizontal", labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", labelLimit: 280 },
};

async function draw(number) {
  const place = document.getElementById(`chart-${number}`);
  if (place.clientWidth === 0) return; // in a part that is folded: drawn when it opens
  const labels = [...new Set(charts[number].spec.data.values.map((row) => String(row.label ?? row.outcome ?? "")))];
  const columns = Math.max(1, Math.floor((place.clientWidth - 50) / (7 * Math.max(...labels.map((label) => label.length)) + 45)));
  const fitted = { ...config, legend: { ...config.legend, columns, gradientLength: Math.min(220, place.clientWidth - 40) } };
  await window.vegaEmbed(place, charts[number].spec, { mode: "vega-lite", renderer: "svg", actions: false, ast: true, config: fitted });
  // The drawing is named; its parts stand in the table under it.
  place.querySelector("svg").setAttribute("role", "img");
  place.querySelector("svg").setAttribute("aria-label", `${charts[number].spec.description}; the table below has the numbers`);
  place.querySelectorAll("svg [role], svg [aria-label]").forEach((part) => {
    for (const name of ["role", "aria-label", "aria-roledescription", "aria-hidden"]) part.removeAttribute(name);
  });
}

function drawn(within) {
  return [...within.querySelectorAll(".chart")].map((place) => Number(place.id.split("-")[1]));
}

async function drawAll(within) {
  for (const number of drawn(within)) await draw(number);
}

for (const part of document.querySelectorAll("details.part")) {
  part.addEventListener("toggle", () => {
    if (part.open && !part.dataset.drawn) {
      part.dataset.drawn = "yes";
      drawAll(part);
    }
  });
}

// On paper everything is open and drawn; afterwards it is as it was.
let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details.part:not([open]), details.setup:not([open])")];
  for (const part of opened) part.open = true;
  for (const number of drawn(document)) {
    if (!document.getElementById(`chart-${number}`).querySelector("svg")) draw(number);
  }
});
window.addEventListener("afterprint", () => {
  for (const part of opened) part.open = false;
});

for (const choice of document.querySelectorAll(".choices input")) {
  choice.addEventListener("change", () => {
    const part = choice.closest(".part");
    const chosen = [...part.querySelectorAll(".choices input")].indexOf(choice);
    for (const number of drawn(part.querySelector(".grid"))) {
      const { spec, choices } = charts[number];
      if (!choices) continue;
      const [title, domain] = choices[choice.value];
      spec.encoding.color.field = choice.value;
      spec.encoding.color.scale.domain = domain;
      spec.encoding.color.legend.title = title;
      document.querySelectorAll(`#chart-${number} + .numbers > div`).forEach((made, index) => (made.hidden = index !== chosen));
      draw(number);
    }
  });
}

function value(row, column) {
  const cell = row.cells[column];
  return cell.dataset.v === undefined ? cell.textContent : cell.dataset.v;
}

for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const table = head.closest("table");
    const descending = head.getAttribute("aria-sort") === "ascending";
    const missing = (text) => text === "–";
    const order = (left, right) => {
      const [a, b] = [value(left, head.cellIndex), value(right, head.cellIndex)];
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      const numeric = a !== "" && b !== "" && !Number.isNaN(Number(a)) && !Number.isNaN(Number(b));
      return (descending ? -1 : 1) * (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    };
    table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  });
}

const theme = document.getElementById("theme");
function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
}
function named() {
  theme.textContent = dark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", dark() ? "Use the light theme" : "Use the dark theme");
}
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  named();
});
named();

await drawAll(document);
document.documentElement.dataset.ready = "yes";
