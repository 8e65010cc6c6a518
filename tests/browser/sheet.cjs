// Looks at pages of ours, at every width and in both colour schemes. Reads a job as JSON from stdin, prints what it saw as JSON.
//
// Job: {chromium, pages: {name: url}, widths, schemes, folder}; needs playwright-core (NODE_PATH) and a chromium.
const { readFileSync } = require("fs");
const { chromium } = require("playwright-core");

const job = JSON.parse(readFileSync(0, "utf8"));

(async () => {
  const browser = await chromium.launch({ executablePath: job.chromium, headless: true, args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"] });
  const seen = [];
  try {
    for (const [name, url] of Object.entries(job.pages))
      for (const width of job.widths)
        for (const colorScheme of job.schemes) {
          const page = await browser.newPage({ viewport: { width, height: 900 }, colorScheme });
          const errors = [];
          const asked = [];
          page.on("pageerror", (error) => errors.push(String(error)));
          page.on("dialog", (dialog) => (errors.push("dialog"), dialog.dismiss()));
          page.on("request", (request) => asked.push(request.url()));
          await page.goto(url, { waitUntil: "load" });
          await page.waitForTimeout(150);
          if (job.folder) await page.screenshot({ path: `${job.folder}/${name}-${width}-${colorScheme}.png`, fullPage: true });
          seen.push({ name, width, colorScheme, errors, foreign: asked.filter((u) => !u.startsWith("file:") && !u.startsWith("data:")), ...(await page.evaluate(look)) });
          await page.close();
        }
  } finally {
    await browser.close();
  }
  process.stdout.write(JSON.stringify(seen));
})();

// What a person would complain of. Runs in the page.
function look() {
  const root = document.documentElement;
  const light = (colour) => {
    const [r, g, b, a] = colour.match(/[\d.]+/g).map(Number);
    const line = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return { value: 0.2126 * line(r) + 0.7152 * line(g) + 0.0722 * line(b), clear: a === 0 };
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = light(getComputedStyle(at).backgroundColor);
      if (!colour.clear) return colour.value;
    }
    return 1;
  };
  const small = [], cut = [], faint = [], texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    const words = node.textContent.trim();
    if (!words || ["SCRIPT", "STYLE", "title"].includes(parent.tagName)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (!box.width || !box.height) continue; // not shown at this width
    const style = getComputedStyle(parent);
    const svg = parent.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    texts.push(words);
    if (parseFloat(style.fontSize) * scale < 12) small.push(words);
    let inside = root.getBoundingClientRect(); // what the words must lie in: the window, or what hides its rest; a scroller shows all
    for (let at = parent; at; at = at.parentElement) {
      const overflow = getComputedStyle(at).overflowX;
      if (overflow === "visible") continue;
      inside = overflow === "hidden" || overflow === "clip" ? at.getBoundingClientRect() : null;
      break;
    }
    if (inside && (box.right > inside.right + 1 || box.left < inside.left - 1)) cut.push(words);
    if (svg) {
      const frame = svg.getBoundingClientRect();
      if (box.right > frame.right + 1 || box.left < frame.left - 1 || box.bottom > frame.bottom + 1) cut.push(words);
    }
    const ink = light(svg ? style.fill : style.color).value;
    const own = svg && ["rgb(255, 255, 255)", "rgb(17, 17, 17)"].includes(style.fill); // a number on the cell of a heat map
    const paper = svg ? light(getComputedStyle(svg.querySelector("rect")).fill).value : behind(parent);
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (contrast < 4.5 && !own) faint.push(`${words}: ${contrast.toFixed(1)}`);
  }
  const scrolls = [...document.querySelectorAll(".scroll, pre")].filter((e) => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX !== "auto").length;
  const broken = [...document.images].filter((i) => !i.complete || !i.naturalWidth).map((i) => i.src.slice(0, 60));
  const clips = [...document.querySelectorAll(".clip img")].map((i) => i.getAnimations()[0]?.currentTime);
  return {
    title: document.title, wide: root.scrollWidth, client: root.clientWidth, small, cut, faint, scrolls, broken, clips, text: texts.join("\n"),
    dark: behind(document.body) < 0.2, svgs: [...document.querySelectorAll("svg")].filter((s) => s.getBoundingClientRect().width).length,
  };
}
