// Drives the real ComfyUI page. Reads a job as JSON from stdin, prints what it saw as JSON.
//
// Job: {url, chromium, open: {name: workflow}, pictures: {name: file}, run: {name, ui | api, places: {id: [x, y]}}, vue, picture, size: [w, h], types}
// needs playwright-core (NODE_PATH) and a chromium.
const { readFileSync } = require("fs");
const { chromium } = require("playwright-core");

const job = JSON.parse(readFileSync(0, "utf8"));
const LIMIT = 120000;

(async () => {
  const browser = await chromium.launch({
    executablePath: job.chromium,
    headless: true,
    args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
  });
  const seen = { errors: [], prompts: {}, missing: {}, widgets: {} };
  try {
    const [width, height] = job.size ?? [1600, 900];
    const page = await browser.newPage({ viewport: { width, height } });
    page.on("pageerror", (error) => seen.errors.push(String(error.stack ?? error).slice(0, 500)));
    await page.goto(job.url, { waitUntil: "domcontentloaded", timeout: LIMIT });
    await page.waitForFunction(
      (types) => window.app?.graph && window.app.extensionManager && types.every((t) => window.LiteGraph?.registered_node_types?.[t]),
      job.types,
      { timeout: LIMIT },
    );
    await page.waitForTimeout(1000);
    await page.evaluate(async (vue) => {
      const setting = window.app.extensionManager.setting;
      await setting.set("Comfy.VueNodes.Enabled", vue);
      await setting.set("Comfy.Minimap.Visible", false);
      await setting.set("Comfy.TutorialCompleted", true); // else the template browser opens over everything, sooner or later
    }, Boolean(job.vue));

    for (const [name, workflow] of Object.entries(job.open ?? {})) {
      const found = await page.evaluate(async (ui) => {
        await window.app.loadGraphData(ui, true, true, null);
        const nodes = window.app.graph._nodes;
        return {
          prompt: (await window.app.graphToPrompt()).output,
          missing: nodes.filter((n) => !window.LiteGraph.registered_node_types[n.type]).map((n) => n.type),
          widgets: Object.fromEntries(nodes.map((n) => [n.id, [n.type, ...(n.widgets ?? []).map((w) => w.name)]])),
        };
      }, workflow);
      seen.prompts[name] = found.prompt;
      seen.missing[name] = found.missing;
      seen.widgets[name] = found.widgets;
      if (job.pictures?.[name]) {
        await page.keyboard.press("Escape");
        await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.Canvas.FitView"));
        await page.waitForTimeout(1500);
        await page.screenshot({ path: job.pictures[name], type: "jpeg", quality: 88 });
      }
    }

    if (job.run) {
      await page.evaluate(async ({ name, ui, api, places }) => {
        if (ui) await window.app.loadGraphData(ui, true, true, null);
        else await window.app.loadApiJson(api, name);
        for (const [id, place] of Object.entries(places ?? {})) {
          const node = window.app.graph.getNodeById(id);
          if (node) node.pos = place;
        }
      }, job.run);
      await page.keyboard.press("Escape");
      await page.waitForTimeout(800);
      seen.before = await page.evaluate(panels);
      await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.Canvas.FitView"));
      await page.waitForTimeout(500);
      await page.evaluate(() => window.app.queuePrompt(0, 1));
      await page.waitForFunction(
        () => [...document.querySelectorAll(".tqai-panel")].some((p) => p.dataset.state),
        null,
        { timeout: LIMIT },
      );
      seen.during = await page.evaluate(panels);
      await page.waitForFunction(
        () => {
          const all = [...document.querySelectorAll(".tqai-panel")];
          return all.length && all.every((p) => p.innerText.includes(", done")) && document.querySelector(".tqai-text");
        },
        null,
        { timeout: LIMIT },
      );
      await page.waitForTimeout(1500);
      seen.after = await page.evaluate(panels);
      seen.text = await page.evaluate(() => [...document.querySelectorAll(".tqai-text")].map((e) => e.innerText));
      seen.vue = await page.evaluate(() => document.querySelectorAll("[data-node-id]").length > 0);
      // the panel is in neither the saved workflow nor the prompt
      seen.saved = await page.evaluate(() => window.app.graph.serialize().nodes.map((n) => [n.type, n.widgets_values ?? []]));
      seen.prompt = await page.evaluate(async () => (await window.app.graphToPrompt()).output);
      if (job.picture) {
        const busy = () =>
          page.evaluate(async () => {
            const queue = await (await fetch("/queue")).json();
            return queue.queue_running.length + queue.queue_pending.length;
          });
        while (await busy()) await page.waitForTimeout(500);
        await page.keyboard.press("Escape");
        await page.waitForTimeout(4000); // pictures load, messages go
        await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.Canvas.FitView"));
        await page.waitForTimeout(1200);
      }
      if (job.picture) await page.screenshot({ path: job.picture, type: "jpeg", quality: 88 });
    }
  } catch (error) {
    seen.failed = String(error.stack ?? error);
  } finally {
    await browser.close();
  }
  process.stdout.write(JSON.stringify(seen));
})();

function panels() {
  return [...document.querySelectorAll(".tqai-panel")].map((p) => {
    const [head, strip, figures, why] = p.children;
    const box = p.getBoundingClientRect();
    return {
      head: head.textContent, figures: figures.textContent, why: why.textContent, state: p.dataset.state,
      cells: [...strip.children].map((c) => c.title.split(": ")[1] ?? ""), visible: box.width > 20 && box.height > 20,
    };
  });
}
