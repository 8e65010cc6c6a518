// The live panel on TQAI Compress and TQAI Cache, and the text of TQAI Report and TQAI Save Pipeline. The nodes work without it.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { BYPASSED, COMPUTED, FORECAST, PACKED, UNKNOWN, advance, describe } from "./panel.js";

const EVENT = "tqai.step";
const SETTING = "tqai.panel";
const PANEL = 96; // pixels
const COLOURS = { [COMPUTED]: "#5b8fd0", [FORECAST]: "#9a9a9a", [BYPASSED]: "#c98a3a", [PACKED]: "#7a9a5a", [UNKNOWN]: "#666666" };
const PANEL_NODES = ["TQAICompress", "TQAICache"];
const TEXT_NODES = { TQAIReport: 160, TQAISavePipeline: 110 };

const panels = new WeakMap(); // node -> draw(view)
const texts = new WeakMap(); // node -> element
const views = new WeakMap(); // node -> view

/** A node by the id that the server uses; nodes inside subgraphs have ids such as "12:3". */
function find(id) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

function element(tag, style, parent) {
  const made = document.createElement(tag);
  Object.assign(made.style, style);
  parent?.appendChild(made);
  return made;
}

/** A widget that is neither saved with the workflow nor sent with the prompt. */
function attach(node, name, root, height) {
  const widget = node.addDOMWidget(name, name, root, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false;
  const least = node.computeSize();
  node.setSize([Math.max(node.size[0], least[0]), Math.max(node.size[1], least[1])]);
  return widget;
}

/** Markdown as far as our reports use it: headings and tables. */
function render(root, text) {
  root.replaceChildren();
  let table;
  for (const line of text.split("\n")) {
    if (!line.startsWith("|")) {
      table = undefined;
      if (line.trim()) element("div", { whiteSpace: "pre-wrap", fontWeight: line.startsWith("#") ? "600" : "" }, root).textContent = line.replace(/^#+ /, "");
    } else if (!/^[| -]+$/.test(line)) {
      const kind = table ? "td" : "th";
      table ??= element("table", { borderCollapse: "collapse", margin: "3px 0" }, root);
      const row = element("tr", {}, table);
      for (const cell of line.split("|").slice(1, -1)) {
        element(kind, { padding: "0 8px 0 0", textAlign: "left", verticalAlign: "top", whiteSpace: kind === "td" ? "nowrap" : "" }, row).textContent = cell.trim();
      }
    }
  }
}

function panel(node) {
  const root = element("div", { font: "12px/1.4 sans-serif", color: "var(--input-text, #ddd)", padding: "4px 6px", overflow: "hidden", minHeight: "80px" });
  root.className = "tqai-panel";
  const head = element("div", { fontWeight: "600" }, root);
  const strip = element("div", { display: "flex", gap: "1px", height: "10px", margin: "3px 0" }, root);
  const figures = element("div", { fontSize: "11px", minHeight: "15px" }, root);
  const why = element("div", { opacity: "0.75", whiteSpace: "nowrap", overflow: "hidden", textOverflow: "ellipsis" }, root);
  attach(node, "tqai_panel", root, PANEL);
  return (view) => {
    const text = describe(view);
    head.textContent = text.head;
    figures.textContent = text.figures;
    why.textContent = why.title = text.why;
    root.dataset.state = view?.state ?? "";
    const cells = (view?.cells ?? []).map((kind, i) => {
      const cell = element("div", { flex: "1 1 0", background: COLOURS[kind] });
      cell.title = `step ${i + 1}: ${kind}`;
      return cell;
    });
    for (let i = cells.length; i < (view?.total ?? 0); i++) {
      cells.push(element("div", { flex: "1 1 0", background: "rgba(128, 128, 128, 0.2)" }));
    }
    strip.replaceChildren(...cells);
  };
}

function wanted() {
  return app.extensionManager?.setting?.get(SETTING) ?? true;
}

function onStep({ detail }) {
  const node = find(detail.node);
  if (!PANEL_NODES.includes(node?.comfyClass) || !wanted()) return;
  const view = advance(views.get(node), detail);
  views.set(node, view);
  if (!panels.has(node)) panels.set(node, panel(node));
  panels.get(node)(view);
}

/** A report on nodes that have run: how close their run is to the exact one. */
function onCloseness(nodes) {
  for (const { node: id, text } of nodes) {
    const node = find(id);
    if (!views.has(node) || !panels.has(node) || !wanted()) continue;
    views.set(node, { ...views.get(node), closeness: text });
    panels.get(node)(views.get(node));
  }
}

function onExecuted({ detail }) {
  onCloseness(detail.output?.closeness ?? []);
  const node = find(detail.display_node ?? detail.node);
  const height = TEXT_NODES[node?.comfyClass];
  const text = detail.output?.text;
  if (height === undefined || text === undefined || !wanted()) return;
  if (!texts.has(node)) {
    const root = element("div", { font: "11px/1.4 sans-serif", color: "var(--input-text, #ddd)", padding: "4px 6px", overflow: "auto" });
    root.style.maxHeight = `${height}px`; // Nodes 2.0 grows a node with its content
    root.className = "tqai-text";
    attach(node, "tqai_text", root, height);
    texts.set(node, root);
  }
  render(texts.get(node), [text].flat().join("\n"));
}

app.registerExtension({
  name: "tqai",
  settings: [
    {
      id: SETTING,
      category: ["tqai", "Nodes", "Live panel"],
      name: "Live panel on TQAI Compress and TQAI Cache, text on TQAI Report",
      tooltip: "Takes effect for nodes that are added or opened afterwards.",
      type: "boolean",
      defaultValue: true,
    },
  ],
  setup() {
    api.addEventListener(EVENT, onStep);
    api.addEventListener("executed", onExecuted);
  },
  nodeCreated(node) {
    if (!PANEL_NODES.includes(node.comfyClass) || !wanted()) return;
    panels.set(node, panel(node));
    panels.get(node)(undefined);
  },
});
