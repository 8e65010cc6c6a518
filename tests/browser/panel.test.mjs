// node --test tests/browser/panel.test.mjs
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

// by its text: a .js file is a module to a browser and, without a package.json, not to every node
const source = readFileSync(new URL("../../web/panel.js", import.meta.url));
const { advance, describe, percent, size } = await import(`data:text/javascript;base64,${source.toString("base64")}`);

const event = (step, skipped, more = {}) => ({ state: "active", why: "w", step, total: 4, skipped, error: null, estimate: null, bytes: 100 * step, ...more });
const play = (...events) => events.reduce(advance, undefined);

test("each step is one cell, told apart by the count of skipped steps", () => {
  const view = play(event(1, 0), event(2, 0), event(3, 1), event(4, 1));
  assert.deepEqual(view.cells, ["computed", "computed", "forecast", "computed"]);
  assert.equal(view.ended, false);
});

test("the repeated last step ends the run and shows the most that was held", () => {
  const view = play(event(1, 0), event(2, 1), event(2, 1, { bytes: 0 }));
  assert.equal(view.ended, true);
  assert.deepEqual(view.cells, ["computed", "forecast"]);
  assert.match(describe(view).head, /^active, done: step 2 of 4$/);
  assert.match(describe(view).figures, /200 B at most$/);
});

test("the next run starts anew, even one of a single step", () => {
  assert.deepEqual(play(event(1, 0), event(2, 1), event(2, 1), event(1, 0)).cells, ["computed"]);
  assert.deepEqual(play(event(1, 0), event(1, 0), event(1, 0)).cells, ["computed"]);
  assert.deepEqual(play(event(1, 0), event(2, 1), event(3, 1), event(1, 0)).cells, ["computed"], "a run that was interrupted");
});

test("a dropped event leaves an unknown step, and no wrong one", () => {
  assert.deepEqual(play(event(1, 0), event(4, 1)).cells, ["computed", "unknown", "unknown", "unknown"]);
  assert.deepEqual(play(event(1, 0), event(3, 2)).cells, ["computed", "unknown", "forecast"]);
});

test("bypassed steps say so, with the reason", () => {
  const view = play(event(1, 0, { state: "bypassed", why: "EasyCache is on this model too" }));
  assert.deepEqual(view.cells, ["bypassed"]);
  const { head, why } = describe(view);
  assert.equal(head, "bypassed: step 1 of 4");
  assert.equal(why, "EasyCache is on this model too");
});

test("samplers may evaluate more often than they step", () => {
  assert.equal(describe(play(event(5, 0))).head, "active: evaluation 5");
  assert.equal(describe(play(event(5, 0, { total: null }))).head, "active: evaluation 5");
});

test("the error against the exact run stands beside what was skipped, until the next run", () => {
  const view = { ...play(event(1, 0), event(2, 1), event(2, 1)), closeness: "45.2 dB to exact" };
  assert.match(describe(view).figures, /^skipped 1 \(50 %\) · 45\.2 dB to exact · error/);
  assert.doesNotMatch(describe(advance(view, event(1, 0))).figures, /dB/);
});

test("a packed cache shows its size beside the uncompressed one, and the worse of two errors", () => {
  const cache = (step, more = {}) => ({ cache: true, state: "packed", why: "", step, total: 4, layers: 2, bytes: 1000, peak: 1000, exact: 3900, nmse_k: 0.0001, nmse_v: 0.01, ...more });
  const view = play(cache(1), cache(2), cache(2, { bytes: 0 }));
  assert.deepEqual(view.cells, ["packed", "packed"]);
  assert.equal(describe(view).head, "packed, done: step 2 of 4");
  assert.equal(describe(view).figures, "1000 B in place of 3.8 kB (3.9 times smaller) · error 10 %");
  assert.match(describe({ ...view, closeness: "45.2 dB to exact" }).figures, /error 10 % · 45\.2 dB to exact$/);
  const idle = play(cache(1, { state: "idle", why: "no cache node", layers: 0, peak: 0, exact: 0, nmse_k: null, nmse_v: null }));
  assert.deepEqual(idle.cells, ["bypassed"]);
  assert.equal(describe(idle).figures, "nothing to pack so far");
  assert.equal(describe(idle).why, "no cache node");
});

test("figures are short", () => {
  assert.equal(describe(undefined).head, "not run yet");
  assert.match(describe(play(event(1, 0))).figures, /^skipped 0 \(0 %\) · error not measured yet · 100 B held$/);
  assert.match(describe(play(event(4, 1, { error: 0.0123 }))).figures, /skipped 1 \(25 %\) · error 1\.2 %/);
  assert.match(describe(play(event(4, 1, { error: 0.3, estimate: 0.04 }))).figures, /error up to 4\.0 %/);
  assert.deepEqual([0.5, 0.0123, 0.00123, 0].map(percent), ["50 %", "1.2 %", "0.12 %", "0.0 %"]);
  assert.deepEqual([12, 2048, 3 * 2 ** 20, 5000 * 2 ** 30].map(size), ["12 B", "2.0 kB", "3.0 MB", "5000.0 GB"]);
});
