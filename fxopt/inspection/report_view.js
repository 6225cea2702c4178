// Building the document. Every text goes in as text: el() never parses markup.

const MARKS = { applied: "●", missed: "○", blocked: "■", analysis: "·" };
const WORDS = { applied: "applied", missed: "did not match", blocked: "not allowed", analysis: "note" };

function el(tag, props, ...children) {
  const [name, ...classes] = tag.split(".");
  const node = document.createElement(name);
  if (classes.length) node.className = classes.join(" ");
  for (const [key, value] of Object.entries(props || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, String(value));
  }
  node.append(...children.flat(4).filter(c => c !== null && c !== undefined && c !== false).map(String_));
  return node;
}
const String_ = c => (c instanceof Node ? c : document.createTextNode(String(c)));
const link = (hash, text, cls) => el("a" + (cls ? "." + cls : ""), { href: "#" + encodeURI(hash) }, text);
const number = n => Number(n).toLocaleString("en-US");
const time = s => (s >= 1 ? `${s.toFixed(2)} s` : s >= 0.001 ? `${(s * 1000).toFixed(1)} ms`
  : s >= 1e-5 ? `${Math.round(s * 1e6)} µs` : s >= 1e-6 ? `${(s * 1e6).toFixed(1)} µs` : s > 0 ? `${Math.round(s * 1e9)} ns` : "0");
const plural = (n, word) => `${number(n)} ${word}${n === 1 ? "" : word.endsWith("s") ? "es" : "s"}`;
const badge = status => el("span.badge." + status, {}, `${MARKS[status]} ${WORDS[status]}`);

/** Fill a <details> when it is opened for the first time. */
function lazy(details, fill) {
  const once = () => { if (details.open && !details.filled) { details.filled = true; details.append(...[fill()].flat()); } };
  details.addEventListener("toggle", once);
  details.fillNow = () => { details.open = true; once(); };
  return details;
}

// -- one graph ------------------------------------------------------------------------------------------------------

function graphSection(graph) {
  const g = graph.index;
  const planned = graph.role.startsWith("plan"), least = graph.least.filter(s => s > 0);
  const facts = [
    ["nodes", `${number(graph.before)} → ${number(graph.after)}`],
    ["passes", graph.stages.length ? graph.stages.length - 1 : 0],
    [planned ? "planned in" : "compiled in", time(graph.seconds)],
    !planned && ["Inductor", graph.inductor ? time(graph.inductor) : "not run"],
    least.length > 0 && [`least time on ${graph.work.device}`, `${time(least[0])} → ${time(least[least.length - 1])}`],
  ].filter(Boolean);
  return el("section.graph", { id: `g${g}` },
    el("h2", {}, `${graph.model} `, el("span.quiet", {}, `${graph.role} ${graph.inputs}  graph ${graph.id}`)),
    graph.error && el("p.error", { role: "alert" }, "This compilation failed: ", el("code", {}, graph.error)),
    el("dl.facts", {}, facts.map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, v)))),
    stripBlock(graph),
    graph.settings.length ? settingsBlock(graph) : null,
    graph.remarks.length ? remarksBlock(graph) : null,
    graph.stages.length ? passesBlock(graph) : null,
    graph.work && graph.work.rows.length ? workBlock(graph) : null,
    graph.measured ? measuredBlock(graph) : null,
    graph.kernels.length ? kernelsBlock(graph) : null,
    treeBlock(graph));
}

function settingsBlock(graph) {
  return el("div.block", {}, el("h3", {}, "Settings"),
    el("table.plain", {}, el("tbody", {}, graph.settings.map(([key, value, origin]) =>
      el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, el("code", {}, value)), el("td.quiet", {}, `from ${origin}`))))));
}

// The strip: techniques down, layers across, neighbours that nothing distinguishes in one cell.
function stripBlock(graph) {
  const asked = graph.techniques;
  if (!asked.length) return el("div.block", {}, el("p.quiet", {}, "No technique was asked for; Inductor compiled the graph as captured."));
  return el("div.block.strips", {}, graph.strips.map(strip => stripOf(graph, strip)),
    el("p.legend", {}, ["applied", "missed", "blocked", "analysis"].map(s => badge(s)),
      el("span.quiet", {}, "= exact   ~ approximate   empty: nothing there that it rewrites, or the setting does not name the layer")));
}

function stripOf(graph, strip) {
  const sizes = strip.runs.map(r => `minmax(${r.paths.length > 1 ? 3.4 : 2}rem, ${Math.max(1, Math.sqrt(r.paths.length))}fr)`);
  const odd = strip.differ;
  const title = strip.path
    ? [el("code", {}, strip.path), ` ×${strip.count}`,
      el("span.quiet", {}, odd.length ? `, ${odd.length} differ: ${odd.slice(0, 12).join(", ")}${odd.length > 12 ? ", ..." : ""}` : ", all alike")]
    : [strip.runs[0].label];
  const techniques = graph.techniques.filter(([name]) => strip.path || strip.runs.some(r => r.cells[name]));
  const grid = el("div.strip", { style: `grid-template-columns:max-content ${sizes.join(" ")}`, role: "table" },
    strip.path && [el("span", {}), strip.runs.map(run => el("span.axis", {}, run.label, run.paths.length > 1 && el("b", {}, ` ×${run.paths.length}`)))],
    techniques.map(([name, exact]) => [
      el("span.name", {}, el("b", { title: exact ? "exact" : "approximate" }, exact ? "= " : "~ "), name),
      strip.runs.map(run => stripCell(graph, run, name)),
    ]));
  return el("figure", {}, el("figcaption", {}, title), grid);
}

function stripCell(graph, run, technique) {
  const all = run.cells[technique] || [], told = all.filter(([status]) => status !== "analysis");
  const seen = told.length ? told : all;  // a note says why there was nothing to do; beside an outcome it says more
  const states = [...new Set(seen.map(([status]) => status))];
  const kind = states.length > 1 ? "mixed" : states[0] || "none";
  const words = seen.map(([status, code, count]) => `${count} ${WORDS[status]}${code ? " " + code : ""}`).join(", ") || "left as it is";
  const where = run.paths[0] || "the graph";
  const name = run.paths.length > 1 ? `${where} and ${run.paths.length - 1} alike` : where;
  const target = run.paths[0] ? `g${graph.index}.m:${run.paths[0]}` : `g${graph.index}.remarks`;
  return el("a.cell." + kind, { href: "#" + encodeURI(target), title: `${technique} at ${name}: ${words}`, "aria-label": `${technique} at ${name}: ${words}` },
    states.map(s => MARKS[s]).join(""));
}

function remarksBlock(graph) {
  const rows = foldRemarks(graph.remarks);
  const list = el("div.remarks", {});
  const counts = status => graph.remarks.filter(r => r.status === status).reduce((n, r) => n + r.count, 0);
  const draw = only => list.replaceChildren(...rows.filter(r => !only || r.status === only).map(r => remarkRow(graph, r)));
  const chips = ["", "applied", "missed", "blocked", "analysis"].filter(s => !s || counts(s)).map(s =>
    el("button.chip", { type: "button", "aria-pressed": s === "", onclick: event => {
      chips.forEach(c => c.setAttribute("aria-pressed", String(c === event.currentTarget)));
      draw(s);
    } }, s ? `${WORDS[s]} ${counts(s)}` : "all"));
  draw("");
  return el("div.block", { id: `g${graph.index}.remarks` }, el("h3", {}, "Why, and why not"), el("p.chips", {}, chips), list);
}

function remarkRow(graph, r) {
  const reason = DATA.reasons[r.code];
  const places = r.paths.length > 1
    ? [moduleLink(graph, r.paths[0]), lazy(el("details.inline", {}, el("summary", {}, `and ${r.paths.length - 1} more`)), () =>
        el("ul", {}, r.members.slice(1).map(m => el("li", {}, moduleLink(graph, m.path), ` ${m.message}`))))]
    : [moduleLink(graph, r.paths[0])];
  return el("article.remark", {},
    el("div.head", {}, badge(r.status), el("b", {}, r.technique), el("span", {}, places),
      r.count > 1 && el("span.quiet", {}, `×${r.count}`)),
    el("p", {}, r.message),
    reason && el("p.reason", { id: r.code }, el("b", {}, `${r.code} ${reason[0]}. `), `${reason[1]} `, el("em", {}, reason[2])),
    r.source && el("p.quiet", {}, lineLink(graph, r.source)));
}

const moduleLink = (graph, path, text) => (path ? link(`g${graph.index}.m:${path}`, text || path, "mono") : el("span.quiet", {}, "the whole graph"));
const lineLink = (graph, source) => (source ? link(`g${graph.index}.l:${source}`, source, "mono") : "");
const nodeLink = (graph, node) => link(`g${graph.index}.n${node.id}`, shortName(node.name), "mono");

// -- passes ---------------------------------------------------------------------------------------------------------

function passesBlock(graph) {
  const longest = Math.max(graph.inductor, ...graph.stages.map(s => s.seconds), 1e-9);
  const items = [];
  let idle = [];
  const flush = () => {
    if (idle.length) items.push(el("li.noop", {}, el("details", {},
      el("summary", {}, `${plural(idle.length, "pass")} changed nothing`),
      el("ul", {}, idle.map(s => el("li", { id: `g${graph.index}.s${s.index}` }, s.name, el("span.quiet", {}, ` ${time(s.seconds)}`)))))));
    idle = [];
  };
  graph.stages.slice(1).forEach(stage => {
    if (stage.noop) { idle.push(stage); return; }
    flush();
    items.push(el("li", {}, passDetails(graph, stage, longest)));
  });
  flush();
  if (!items.length) items.push(el("li.noop", {}, "no pass ran"));
  const tail = el("li.noop.tail", {}, graph.inductor ? ["Inductor finished the graph", bar(graph.inductor, longest)] : graph.role.startsWith("plan") ? "a plan: nothing was compiled" : "Inductor did not run");
  return el("div.block", { id: `g${graph.index}.passes` }, el("h3", {}, "Passes"), el("ol.passes", {},
    el("li.noop", {}, `captured by Dynamo: ${number(graph.before)} nodes`, graph.stages[0].code ? codeDetails(graph.stages[0]) : null),
    items, tail));
}

const bar = (seconds, longest) => el("span.time", {}, el("i", { style: `width:${Math.max(1, Math.round(100 * seconds / longest))}%` }), time(seconds));
const codeDetails = stage => lazy(el("details", {}, el("summary", {}, "Python of the graph")), () => el("pre", {}, stage.code));

function passDetails(graph, stage, longest) {
  const [added, removed, changed] = stage.counts;
  const details = el("details.pass", { id: `g${graph.index}.s${stage.index}` },
    el("summary", {}, el("b", {}, stage.exact ? "= " : "~ ", stage.name),
      el("span.delta", {}, el("span.plus", {}, `+${added}`), " ", el("span.minus", {}, `−${removed}`), " ", el("span.tilde", {}, `~${changed}`)),
      el("span.quiet", {}, `${number(stage.before)} → ${number(stage.after)} nodes, ${stage.level} level`),
      worth(graph, stage.index), bar(stage.seconds, longest)));
  return lazy(details, () => [
    stage.added.length + stage.removed.length + stage.changed.length ? differenceTable(graph, stage)
      : el("p.quiet", {}, "The node tables were not kept (FXOPT_RECORD=0, or left out to keep the page small)."),
    stage.code ? codeDetails(stage) : "",
  ]);
}

/** What a pass takes off the least time of the graph, where that tells: reads and products saved. */
function worth(graph, index) {
  const before = graph.least[index - 1], after = graph.least[index];
  if (!before || !after || Math.abs(after / before - 1) < 0.0005) return null;
  const percent = 100 * (after / before - 1);
  return el("span.worth" + (percent < 0 ? ".less" : ""), { title: `least time on ${graph.work.device}: ${time(before)} → ${time(after)}` },
    `${percent < 0 ? "−" : "+"}${Math.abs(percent).toFixed(Math.abs(percent) < 10 ? 1 : 0)}% least time`);
}

function differenceTable(graph, stage) {
  const body = el("div.diff", { role: "table", "aria-label": `what ${stage.name} changed` },
    el("div.line.headline", {}, el("span", {}, "before"), el("span", {}, `after ${stage.name}`)));
  const entries = foldRepeats(hunks(alignedRows(graph, stage.index), 1));
  const AT_ONCE = 300;
  let next = 0, module = null;
  const more = el("button.more", { type: "button", onclick: () => draw() });
  const drawLine = line => {
    const at = (line.left || line.right).module;
    if (at !== module) { module = at; body.append(el("div.where", {}, at ? moduleLink(graph, at) : "outside of modules")); }
    const label = { same: "", changed: "~", moved: "↕", removed: "−", added: "+", replaced: "±" }[line.kind];
    body.append(el("div.line." + line.kind, { "data-mark": label }, side(graph, line.left, "minus"), side(graph, line.right, "plus")));
  };
  const fold = (text, fill) => {
    const button = el("button.gap", { type: "button", onclick: () => {
      const before = button.previousSibling;
      button.remove();
      module = null;
      const kept = [];
      while (body.lastChild !== before) { kept.unshift(body.lastChild); body.lastChild.remove(); }
      fill();
      body.append(...kept);
    } }, text);
    module = null;
    body.append(button);
  };
  const drawEntry = entry => {
    if (entry.again) {
      const ends = [...new Set(entry.places)];
      fold(`the same change ${entry.again} more ${entry.again === 1 ? "time" : "times"}: ${ends.slice(0, 2).join(", ")}${ends.length > 3 ? ", ..." : ""}${ends.length > 2 ? ", " + ends[ends.length - 1] : ""}`,
        () => entry.entries.forEach(drawEntry));
    } else if (entry.hidden) {
      fold(`${plural(entry.hidden.length, "node")} unchanged`, () => {
        entry.hidden.slice(0, 400).forEach(drawLine);
        if (entry.hidden.length > 400) body.append(el("div.where", {}, `${number(entry.hidden.length - 400)} more unchanged nodes: see the module tree`));
      });
    } else drawLine(entry);
  };
  const draw = () => {
    more.remove();
    const end = Math.min(entries.length, next + AT_ONCE);
    for (; next < end; next++) drawEntry(entries[next]);
    if (next < entries.length) { more.textContent = `show ${number(entries.length - next)} more lines`; body.append(more); }
  };
  draw();
  return body;
}

function side(graph, node, kind) {
  if (!node) return el("span.side.empty", {});
  return el("span.side" + (kind ? "." + kind : ""), {}, nodeLink(graph, node), callOf(node, 90), shapeOf(node));
}
const callOf = (node, most) => (/placeholder|get_attr/.test(node.op) ? "" : ` = ${node.target}(${clip(shortArgs(node.args), most)})`);
const shapeOf = node => (node.shape || node.dtype ? el("span.shape", {}, ` ${node.dtype}[${node.shape}]`) : "");
const clip = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

// -- kernels, tree --------------------------------------------------------------------------------------------------

const MEASURES = ["registers", "spills", "shared bytes"];

/** Resources of a kernel's functions as one table: {"async_split registers": 96, ...}. */
function functionsTable(kernel) {
  const rows = new Map();
  for (const [key, value] of Object.entries(kernel.resources)) {
    const measure = MEASURES.find(m => key === m || key.endsWith(" " + m));
    if (!measure || typeof value === "object") continue;
    const name = key === measure ? kernel.family : key.slice(0, -measure.length - 1);
    rows.set(name, { ...rows.get(name), [measure]: value });
  }
  if (!rows.size) return null;
  return el("table.plain.functions", {}, el("tbody", {}, el("tr", {}, el("th"), MEASURES.map(m => el("th", { scope: "col" }, m))),
    [...rows].map(([name, found]) => el(Number(found.spills) > 0 ? "tr.warn" : "tr", {}, el("th", { scope: "row" }, name),
      MEASURES.map(m => el("td", {}, m in found ? number(found[m]) : ""))))));
}

function kernelsBlock(graph) {
  const isText = v => typeof v === "string" && (v.includes("\n") || v.length > 200);
  const short = object => Object.entries(object).filter(([k, v]) => !isText(v) && !MEASURES.some(m => k === m || k.endsWith(" " + m)));
  const words = entries => entries.map(([k, v]) => [el("span.pairname", {}, k), ` ${typeof v === "object" ? JSON.stringify(v) : v}   `]);
  const texts = object => Object.entries(object).filter(([, v]) => isText(v))
    .map(([k, v]) => lazy(el("details", {}, el("summary", {}, k, el("span.quiet", {}, ` ${number(v.split("\n").length)} lines`))), () => el("pre", {}, v)));
  const folded = modules => {
    const groups = new Map();
    for (const m of modules) { const key = m.replace(/(^|\.)\d+(?=\.|$)/g, "$1*"); groups.set(key, [...(groups.get(key) || []), m]); }
    return [...groups].map(([key, members], n) => [n ? ", " : "", moduleLink(graph, members[0], members.length > 1 ? key : members[0]), members.length > 1 ? ` ×${members.length}` : ""]);
  };
  return el("div.block", { id: `g${graph.index}.kernels` }, el("h3", {}, "Kernels"), graph.kernels.map((k, i) =>
    el("article.kernel", { id: `g${graph.index}.k${i}` }, el("h4", {}, k.name, el("span.quiet", {}, `  ${k.family}`)),
      k.modules.length > 0 && el("p", {}, "for ", folded(k.modules)),
      k.nodes.length > 0 && el("p", {}, "computes ", k.nodes.slice(0, 12).map((id, n) => [n ? ", " : "", nodeById(graph, id)]),
        k.nodes.length > 12 && el("span.quiet", {}, ` and ${number(k.nodes.length - 12)} more`)),
      el("p.pairs", {}, words(short(k.configuration)), words(short(k.resources))), functionsTable(k),
      k.source && lazy(el("details", {}, el("summary", {}, "generated source", el("span.quiet", {}, ` ${number(k.source.split("\n").length)} lines`)), ), () => el("pre", {}, k.source)),
      texts(k.resources))));
}

const nodeById = (graph, id) => { const found = findNode(graph, id); return found ? nodeLink(graph, found.node) : `node ${id}`; };

function treeBlock(graph) {
  if (!graph.stages.some(s => s.added.length)) return null;
  const holder = el("div.tree", {});
  const draw = index => holder.replaceChildren(...branch(graph, tableAt(graph, index), ""));
  const select = el("select", { "aria-label": "Stage", onchange: event => draw(Number(event.target.value)) },
    graph.stages.map((s, i) => (s.noop && i > 0 ? null : el("option", { value: i, selected: i === graph.stages.length - 1 }, i ? `after ${s.name}` : "as captured"))));
  const block = el("details.block.folded", { id: `g${graph.index}.tree` }, el("summary", {}, el("h3", {}, "Module tree")));
  return lazy(block, () => {
    const last = graph.stages.map((s, i) => (s.noop && i ? -1 : i)).filter(i => i >= 0).pop();
    select.value = String(last);
    draw(last);
    return [el("p", {}, "Show the graph ", select), holder];
  });
}

/** Nodes and submodules at `path`, in order of first appearance; layers that are alike folded. */
function branch(graph, table, path) {
  const depth = path ? path.split(".").length : 0;
  const items = new Map();
  for (const id of table.order) {
    const node = table.rows.get(id);
    if (!within(node.module, path)) continue;
    const child = node.module.split(".")[depth];
    const key = node.module === path || child === undefined ? `\u0000${id}` : child;
    if (!items.has(key)) items.set(key, { child: key[0] === "\u0000" ? null : child, nodes: [] });
    items.get(key).nodes.push(node);
  }
  const strip = graph.strips.find(s => s.path === path && path);
  const done = new Set();
  return [...items.values()].flatMap(item => {
    if (item.child === null) return [nodeLine(graph, item.nodes[0])];
    const full = path ? `${path}.${item.child}` : item.child;
    if (done.has(full)) return [];
    const run = strip && strip.runs.find(r => r.paths.includes(full));
    const present = run ? run.paths.filter(p => items.has(p.slice(path.length + 1))) : [];
    if (present.length > 1) {
      present.forEach(p => done.add(p));
      return [folder(graph, table, present[0], item.nodes.length, ` ×${present.length} alike: ${run.label}`)];
    }
    return [folder(graph, table, full, item.nodes.length, "")];
  });
}

function folder(graph, table, path, count, note) {
  return lazy(el("details", {}, el("summary", {}, moduleLink(graph, path), el("b", {}, note), el("span.quiet", {}, ` ${plural(count, "node")}`))),
    () => el("div.indent", {}, branch(graph, table, path)));
}

const nodeLine = (graph, node) => el("div.node", {}, nodeLink(graph, node), callOf(node, 120), shapeOf(node));

// -- pictures of behaviour ------------------------------------------------------------------------------------------

function picturesBlock(pictures) {
  if (!pictures.length) return null;
  return el("section.graph", { id: "behaviour" }, el("h2", {}, "Behaviour"), pictures.map(p =>
    el("figure.picture", {}, el("figcaption", {}, p.title), p.kind === "histogram" ? histogram(p) : shades(p))));
}

function histogram(p) {
  const most = Math.max(...p.values[0], 1), all = p.values[0].reduce((a, b) => a + b, 0) || 1;
  return el("table.plain.histogram", {}, el("tbody", {}, p.columns.map((name, i) => el("tr", {},
    el("th", { scope: "row" }, name),
    el("td", {}, el("i", { style: `width:${(18 * p.values[0][i] / most).toFixed(2)}rem` }),
      ` ${number(p.values[0][i])} (${Math.round(100 * p.values[0][i] / all)}%)`)))));
}

function shades(p) {
  return el("div.shades", { role: "table", style: `grid-template-columns:max-content repeat(${p.columns.length}, minmax(3px, 1fr))` },
    p.rows.map((row, r) => [el("span.name", {}, row), p.columns.map((column, c) => {
      const words = `${row}, ${column}: ${Math.round(100 * p.values[r][c])}%`;
      return el("i", { style: `opacity:${(0.06 + 0.94 * p.values[r][c]).toFixed(3)}`, title: words, "aria-label": words });
    })]));
}
