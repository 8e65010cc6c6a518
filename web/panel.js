// What the live panel shows, worked out of the events of a run. No page and no ComfyUI in here.

export const COMPUTED = "computed";
export const FORECAST = "forecast";
export const BYPASSED = "bypassed";
export const UNKNOWN = "unknown";
export const PACKED = "packed";

/**
 * The view after one more event; the run's first step starts a new one.
 * An event: {state, why, step, total, skipped, error, estimate, bytes}; the one that ends a run repeats its last step.
 * One of TQAI Cache has {cache: true, layers, peak, exact, nmse_k, nmse_v} in place of skipped, error and estimate.
 */
export function advance(view, event) {
  const again = view === undefined || event.step < view.step || (view.ended && event.step <= view.step);
  const past = again ? { step: 0, skipped: 0, cells: [], peak: 0 } : view;
  const fresh = event.step - past.step;
  const cells = past.cells.slice();
  // a dropped event leaves steps of which only the number is known
  for (let i = 1; i < fresh; i++) cells.push(UNKNOWN);
  if (fresh > 0) {
    const skipped = event.skipped - past.skipped;
    if (event.cache) cells.push(event.state === "packed" ? PACKED : BYPASSED);
    else cells.push(event.state === "bypassed" ? BYPASSED : skipped === fresh ? FORECAST : skipped === 0 ? COMPUTED : UNKNOWN);
  }
  return {
    ...event,
    cells,
    peak: Math.max(past.peak, event.bytes),
    ended: fresh === 0,
  };
}

/** Lines of text for a view: head, figures, reason. */
export function describe(view) {
  if (view === undefined) return { head: "not run yet", figures: "", why: "" };
  const place = view.total && view.step <= view.total ? `step ${view.step} of ${view.total}` : `evaluation ${view.step}`;
  const head = `${view.state}${view.ended ? ", done" : ""}: ${place}`;
  // what TQAI Report measured against the exact run of the same seed, once that is linked to it
  const close = view.closeness ? ` · ${view.closeness}` : "";
  if (view.cache) return { head, figures: cached(view) + close, why: view.why ?? "" };
  const share = view.step ? Math.round((100 * view.skipped) / view.step) : 0;
  // what forecast steps may be off by; before there is one, what the last computed step would have been off by
  const [error, known] = view.estimate != null ? [view.estimate, "up to "] : [view.error, ""];
  const held = view.ended ? `${size(view.peak)} at most` : `${size(view.bytes)} held`;
  return { head, figures: `skipped ${view.skipped} (${share} %)${close} · error ${error == null ? "not measured yet" : known + percent(error)} · ${held}`, why: view.why ?? "" };
}

/** What TQAI Cache holds, and how far it is from what it was given: root of the mean squares, in the worst layer. */
function cached(view) {
  if (!view.layers) return "nothing to pack so far";
  const error = Math.sqrt(Math.max(view.nmse_k ?? 0, view.nmse_v ?? 0));
  return `${size(view.peak)} in place of ${size(view.exact)} (${(view.exact / view.peak).toFixed(1)} times smaller) · error ${percent(error)}`;
}

/** 0.0123 -> "1.2 %" */
export function percent(x) {
  const value = 100 * x;
  return `${value >= 10 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toPrecision(2)} %`;
}

/** Bytes for people. */
export function size(bytes) {
  const units = ["B", "kB", "MB", "GB"];
  let i = 0;
  let value = bytes;
  while (value >= 1024 && i < units.length - 1) {
    value /= 1024;
    i++;
  }
  return `${i === 0 ? value : value.toFixed(1)} ${units[i]}`;
}
