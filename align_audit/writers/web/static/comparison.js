/* Two runs beside each other: how each stands, their curves in the same charts, and where each was changed. */

const LETTERS = ["A", "B"];

/* The probe set that both runs have been audited on, the worst of the first; else the worst of each. */
function commonSets(sides) {
  const [first, second] = sides.map((side) => side.data.sets);
  for (const set of first) {
    const same = second.find((each) => each.name === set.name);
    if (same) return [set, same];
  }
  return [first[0], second[0]];
}

function standing(side, set, letter, open) {
  const { make, foreign } = window.AlignAudit;
  const since = set.status.since === null || set.status.word === "HEALTHY" ? "" : " since step " + set.status.since;
  const probes = set.name === null ? [] : [foreign("p", "Probe pairs: " + set.name)];
  return make("div", { class: "banner " + set.status.word.toLowerCase() },
    make("h2", {}, letter + " · ", make("span", { class: "word", text: set.status.word + since }), " · ", foreign("bdi", side.name)),
    ...probes, ...set.status.sentences.map((words) => foreign("p", words)),
    make("p", {}, make("button", { type: "button", class: "open", text: "Open", "aria-label": "Open the page of run " + letter, on: { click: () => open(side.key) } })));
}

function panels(sets) {
  const { make, table, chart, shown } = window.AlignAudit;
  const charts = window.AlignAuditCharts;
  return sets[0].panels.map((panel) => {
    const both = [panel, sets[1].panels.find((each) => each.key === panel.key)];
    const there = both.map((each, at) => ({ panel: each, letter: LETTERS[at] })).filter((each) => each.panel);
    const now = there.map((each) => each.letter + " " + each.panel.now).join(" · ");
    const says = panel.title + ": " + now;
    const series = there.map((each) => ({
      name: each.letter, x: each.panel.steps, y: each.panel.mean, low: each.panel.low, high: each.panel.high,
    }));
    const rows = () => there.map((each) => table(each.letter + ", " + panel.title, ["step", "value", "low", "high"],
      each.panel.steps.map((step, at) => [String(step), ...[each.panel.mean, each.panel.low, each.panel.high].map((values) => shown(values[at], panel.share))])));
    return make("div", { class: "panel" }, make("h3", { text: panel.title }),
      make("p", { class: "now" }, make("span", { class: "pair-of-values", text: now }), make("span", { class: "unit", text: panel.share ? "" : panel.unit })),
      chart(says, "compare-" + panel.key, (place) => charts.curves(place, series, "step", "", panel.share), rows));
  });
}

function where(set, letter) {
  const { make, foreign, table, chart, shown } = window.AlignAudit;
  const there = set.where;
  if (!there) return make("div", {}, make("h3", { text: letter }), make("p", { text: "Not measured: no full audit has patched the layers yet." }));
  const last = there.steps.length - 1;
  const series = there.transplant[last];
  const claimed = there.claims[last].length || there.peaks[last] === null ? there.claims[last] : [there.peaks[last]];
  const says = letter + ", step " + there.steps[last] + ": what each layer's update does alone. " + there.sentences[last];
  const rows = () => table(letter, ["layer", "nats", "low", "high"], series.mean.map((value, layer) => [String(layer), shown(value), shown(series.low[layer]), shown(series.high[layer])]));
  return make("div", {}, make("h3", {}, letter + ", step " + there.steps[last]), foreign("p", there.sentences[last], { class: "finding" }),
    chart(says, "compare-where-" + letter, (place) => window.AlignAuditCharts.layerBars(place, series, { unit: "nats", share: false }, claimed), rows));
}

/* What `align-audit compare` says of them: a sentence, and a table where they meet. */
function tables(said, name) {
  const { make, foreign, table } = window.AlignAudit;
  const set = said.sets.find((each) => each.name === name) || said.sets[0];
  if (!set) return [foreign("p", "They cannot be compared: " + said.reason)];
  const wide = (each) => each.rows.map((cells) => each.head.map((_, column) => cells[column] || ""));
  const meeting = (each) => make("div", {}, foreign("h3", each.heading),
    ...(each.rows.length ? [table("", each.head, wide(each))] : []), ...each.notes.map((words) => foreign("p", words, { class: "legend" })));
  return [foreign("p", set.sentence, { class: "finding" }), make("div", { class: "side-by-side meetings" }, ...set.tables.map(meeting)),
    ...set.notes.map((words) => foreign("p", words))];
}

/* Draws it; `said` is what comparing them says, `open` shows the page of one run. */
export function comparison(root, sides, said, open) {
  const { make, redraw } = window.AlignAudit;
  const sets = commonSets(sides);
  const part = (title, ...children) => make("section", { "aria-label": title }, make("h2", { text: title }), ...children);
  const curves = sets.every((set) => set.panels.length)
    ? [make("p", { class: "legend", text: "at each audit: mean and " + sets[0].confidence + " interval · each run's limits stand in its page" }),
      make("div", { class: "panels" }, ...panels(sets))]
    : [make("p", { text: "Not known: of one of them no audit has come through." })];
  root.replaceChildren(
    make("div", { class: "standings" }, ...sides.map((side, at) => standing(side, sets[at], LETTERS[at], open))),
    make("main", {}, part("Is the model all right?", ...curves),
      part("Side by side", ...tables(said, sets[0].name)), part("Where?", make("div", { class: "side-by-side" }, ...sets.map((set, at) => where(set, LETTERS[at]))))));
  document.title = "Comparison · align_audit";
  redraw(root);
}
