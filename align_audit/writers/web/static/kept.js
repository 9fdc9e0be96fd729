/* What somebody has unfolded, chosen and scrolled to in a page, kept while the page is made anew of newer data. */

const inside = (root, selector) => root.querySelector(selector);

/* Where the focus is: a selector, and the place among all that it selects. Null: nowhere that can be found again. */
function focusIn(root) {
  const focused = root.contains(document.activeElement) ? document.activeElement : null;
  const name = focused && focused.className.split(" ")[0];
  const selector = !focused ? null
    : focused.id ? "#" + CSS.escape(focused.id)
      : focused.matches("summary") ? "details[data-fold='" + CSS.escape(focused.parentElement.dataset.fold) + "'] > summary"
        : name ? "." + CSS.escape(name) : null;
  return selector && { selector, place: [...root.querySelectorAll(selector)].indexOf(focused) };
}

export function keep(root, data) {
  const select = inside(root, "#probe-set");
  const set = data.sets[select ? Number(select.value) : 0];
  const slider = inside(root, "#audit-slider");
  const measure = inside(root, "#measure");
  return {
    set: set.name,
    // Who looks at the last audit wants the last one.
    step: slider && slider.value !== slider.max ? set.where.steps[Number(slider.value)] : null,
    measure: measure && measure.value,
    folds: new Map([...root.querySelectorAll("details")].map((each) => [each.dataset.fold, each.open])),
    focus: focusIn(root),
    scroll: window.scrollY,
  };
}

function choose(control, value, event) {
  if (!control || value === null || value < 0 || control.value === String(value)) return;
  control.value = String(value);
  control.dispatchEvent(new Event(event));
}

export function restore(root, data, kept) {
  const place = data.sets.findIndex((set) => set.name === kept.set);
  choose(inside(root, "#probe-set"), place, "change");
  const where = data.sets[Math.max(place, 0)].where;
  choose(inside(root, "#measure"), kept.measure, "change");
  if (where && kept.step !== null) choose(inside(root, "#audit-slider"), where.steps.indexOf(kept.step), "input");
  // What is unfolded is filled, and may hold more that was unfolded.
  const changed = () => [...root.querySelectorAll("details")].filter((each) => kept.folds.has(each.dataset.fold) && kept.folds.get(each.dataset.fold) !== each.open);
  for (let folds = changed(); folds.length; folds = changed()) {
    folds.forEach((each) => {
      each.open = !each.open;
      each.dispatchEvent(new Event("toggle"));
    });
  }
  const focus = kept.focus && root.querySelectorAll(kept.focus.selector)[kept.focus.place];
  if (focus) focus.focus({ preventScroll: true });
  window.scrollTo(0, kept.scroll);
}
