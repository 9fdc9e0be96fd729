/* The tab "Align audit" of TensorBoard: a list of runs, the worst first, and the report's page of one of them, or two compared.
   TensorBoard imports this file in a frame of its own and calls render(). */
import { keep, restore } from "./kept.js";

const HERE = new URL(".", import.meta.url);
const STYLES = ["align_audit.css", "comparison.css", "tab.css"];
const SCRIPTS = ["plotly-cartesian.min.js", "charts.js", "align_audit.js", "comparison.js"];
const EVERY = 10000;

/* Scripts of the report: each sees what those before it have put into the window. */
function load(tag, options) {
  return new Promise((done, failed) => {
    const node = Object.assign(document.createElement(tag), options);
    node.addEventListener("load", done);
    node.addEventListener("error", () => failed(new Error("cannot load " + (options.src || options.href))));
    document.head.append(node);
  });
}

async function ask(route, ...runs) {
  const address = new URL(route, HERE);
  runs.forEach((run) => address.searchParams.append("run", run));
  const answer = await fetch(address);
  const value = await answer.json();
  if (value.error) throw new Error(value.error);
  return value;
}

const stateOf = (sides) => sides.map((side) => side.key + side.version).join();

class Tab {
  constructor(body) {
    const { make } = window.AlignAudit;
    this.list = make("ul", {});
    this.looked = make("p", { class: "hint" });
    this.hint = make("p", { class: "hint" });
    this.notice = make("p", { class: "notice", role: "status", dir: "auto", hidden: "" });
    this.page = make("div", { id: "align-audit" });
    const runs = make("nav", { class: "runs", "aria-label": "Runs" }, make("h1", { text: "Runs" }), this.hint, this.list, this.looked);
    body.append(make("div", { class: "tab" }, runs, make("div", {}, this.notice, this.page)));
    this.rows = [];
    this.listed = "";
    this.open = null;
    this.ticked = [];
    /* Of runs that were asked for: key → version and data. */
    this.pages = new Map();
    this.drawn = "";
    this.shown = null;
    this.turn = 0;
    this.empty = "";
  }

  /* Looks for news, and draws what has changed. */
  async refresh() {
    try {
      const listing = await ask("runs");
      this.rows = listing.runs;
      this.empty = listing.hint;
      this.hint.textContent = this.rows.length > 1 ? "The worst first. Tick two to compare them." : "";
      this.looked.textContent = "Looked at " + new Date().toLocaleTimeString() + ", every " + EVERY / 1000 + " s.";
    } catch (error) {
      this.say("No news: " + error.message + ". What is shown may be old.");
      return;
    }
    const keys = this.rows.map((row) => row.key);
    this.ticked = this.ticked.filter((key) => keys.includes(key));
    if (!keys.includes(this.open)) this.open = keys.length ? keys[0] : null;
    this.drawList();
    await this.draw();
  }

  say(words) {
    this.notice.textContent = words;
    this.notice.hidden = !words;
  }

  drawList() {
    const words = JSON.stringify(this.rows);
    if (this.listed !== words) this.fillList();
    this.listed = words;
    for (const item of this.list.children) {
      item.querySelector("input").checked = this.ticked.includes(item.dataset.run);
      const current = this.ticked.length < 2 && item.dataset.run === this.open;
      item.querySelector("button").setAttribute("aria-current", String(current));
    }
  }

  fillList() {
    const { make, foreign } = window.AlignAudit;
    const focused = this.list.contains(document.activeElement) ? document.activeElement : null;
    const place = focused && [focused.closest("li").dataset.run, focused.tagName];
    this.list.replaceChildren(...this.rows.map((row) => {
      const tick = (event) => this.tick(row.key, event.target.checked);
      const when = [row.since === null ? "" : "since step " + row.since, row.step === null ? "no audit" : "at step " + row.step].filter(Boolean).join(", ");
      return make("li", { class: "run", "data-run": row.key },
        make("input", { type: "checkbox", "aria-label": "Compare " + row.name, on: { change: tick } }),
        make("button", { type: "button", title: row.reason, on: { click: () => this.choose(row.key) } },
          make("span", { class: "word " + row.word.toLowerCase(), text: row.word }), " ", make("span", { class: "when", text: when }),
          foreign("bdi", row.name, { class: "name" })));
    }));
    const again = place && [...this.list.children].find((item) => item.dataset.run === place[0]);
    if (again) again.querySelector(place[1]).focus();
  }

  choose(key) {
    this.open = key;
    this.ticked = [];
    this.drawList();
    return this.draw();
  }

  tick(key, on) {
    this.ticked = this.ticked.filter((each) => each !== key);
    // Two at a time: the one that was ticked first makes room.
    if (on) this.ticked = [...this.ticked, key].slice(-2);
    this.drawList();
    return this.draw();
  }

  async data(key) {
    const row = this.rows.find((each) => each.key === key);
    const kept = this.pages.get(key);
    if (kept && kept.version === row.version) return kept;
    const page = { version: row.version, key, name: row.name, data: await ask("data", key) };
    this.pages.set(key, page);
    return page;
  }

  /* What comparing two of them says; asked for again where one of them has changed. */
  async compared(sides) {
    if (sides.length !== 2) return null;
    if (this.shown && this.shown.state === stateOf(sides)) return this.shown.said;
    return ask("compare", ...sides.map((side) => side.key));
  }

  async draw() {
    const turn = ++this.turn;
    const keys = this.ticked.length === 2 ? this.ticked : this.open === null ? [] : [this.open];
    let sides, said;
    try {
      if (this.drawn !== keys.join()) this.page.setAttribute("aria-busy", "true");
      sides = await Promise.all(keys.map((key) => this.data(key)));
      said = await this.compared(sides);
    } catch (error) {
      if (turn === this.turn) {
        this.page.replaceChildren();
        this.drawn = "";
        this.shown = null;
        this.say(error.message);
      }
      return;
    }
    if (turn !== this.turn) return;
    this.page.removeAttribute("aria-busy");
    this.say(sides.length ? sides.map((side) => side.data.trouble).filter(Boolean).join(" ") : this.empty);
    const state = stateOf(sides);
    if (this.shown && this.shown.state === state) return;
    this.show(keys.join(), state, sides, said);
  }

  show(drawn, state, sides, said) {
    const again = this.drawn === drawn;
    const kept = again && sides.length ? keep(this.page, this.shown.sides[0].data) : null;
    if (sides.length === 0) this.page.replaceChildren();
    else if (sides.length === 1) window.AlignAudit.render(this.page, sides[0].data);
    else window.AlignAuditComparison.render(this.page, sides, said, { open: (key) => this.choose(key) });
    this.drawn = drawn;
    this.shown = { state, sides, said };
    if (kept) restore(this.page, sides[0].data, kept);
    else window.scrollTo(0, 0);
  }

  /* In other colours. */
  redraw() {
    if (this.shown) this.show(this.drawn, this.shown.state, this.shown.sides, this.shown.said);
  }
}

/* TensorBoard says in the page around this frame whether it is dark. */
function followTheme(changed) {
  let around;
  try {
    around = window.parent.document.body;
  } catch (error) {
    return; // shown in a page of another host: the browser's choice, and the button of the page
  }
  const theme = () => (around.classList.contains("dark-mode") ? "dark" : "light");
  let last = theme();
  document.documentElement.dataset.theme = last;
  new MutationObserver(() => {
    if (theme() === last) return;
    last = theme();
    document.documentElement.dataset.theme = last;
    changed();
  }).observe(around, { attributes: true, attributeFilter: ["class"] });
}

export async function render() {
  document.documentElement.lang = "en";
  const styles = STYLES.map((name) => load("link", { rel: "stylesheet", href: new URL(name, HERE).href }));
  try {
    for (const name of SCRIPTS) await load("script", { src: new URL(name, HERE).href });
    await Promise.all(styles);
  } catch (error) {
    document.body.textContent = "The tab cannot be shown: " + error.message + ". Reload the page; if that does not help, restart tensorboard.";
    return;
  }
  const tab = new Tab(document.body);
  followTheme(() => tab.redraw());
  // One drawing that breaks ends no others.
  const refresh = () => tab.refresh().catch((error) => console.error(error));
  await refresh();
  // Nobody looks at a hidden window, nor at this frame while another tab of TensorBoard is open; nothing can be drawn there.
  const seen = () => !document.hidden && window.innerWidth > 0;
  const again = async () => {
    if (seen()) await refresh();
    setTimeout(again, EVERY);
  };
  setTimeout(again, EVERY);
  let hidden = false;
  const back = () => {
    if (seen() && hidden) refresh();
    hidden = !seen();
  };
  document.addEventListener("visibilitychange", back);
  window.addEventListener("resize", back);
}
