"use strict";
// Reading the embedded record: node tables, differences, descent, search. No document in this part.

const DATA = JSON.parse(document.getElementById("data").textContent);
const FIELDS = ["name", "op", "target", "args", "shape", "dtype", "module", "source"];

function decodeRow(row) {
  const node = { id: row[0] };
  FIELDS.forEach((field, i) => { node[field] = DATA.strings[row[i + 1]]; });
  node.origins = row[9] === 0 ? [row[0]] : row[9];
  return node;
}

/** Dynamo's names of parameters and buffers, as their path in the model: "layers.7.input_layernorm.weight". */
function shortName(name) {
  if (!/_modules_|_parameters_|_buffers_/.test(name)) return name;
  const path = name.replace(/^.*?_(?=modules_|parameters_|buffers_)/, "").replace(/^(modules|parameters|buffers)_/, "")
    .replace(/_(modules|parameters|buffers)_/g, ".").replace(/_+$/, "");
  return path.split(".").slice(-5).join(".");
}
const shortArgs = args => args.replace(/\b[A-Za-z_]\w*_(?:modules|parameters|buffers)_\w+/g, shortName);

function decodeGraph(graph, index) {
  graph.index = index;
  graph.stages.forEach((stage, i) => {
    stage.index = i;
    stage.added = stage.added.map(decodeRow);
    stage.changed = stage.changed.map(decodeRow);
  });
  graph.remarks = graph.remarks.map(([technique, status, path, message, code, source, count]) =>
    ({ technique, status, path, message, code, source, count }));
  graph.tables = [];
  return graph;
}
DATA.graphs.forEach(decodeGraph);

/** Node table after stage `index`: {rows: Map id -> node, order: [id]}. */
function tableAt(graph, index) {
  if (index < 0) return { rows: new Map(), order: [] };
  if (graph.tables[index]) return graph.tables[index];
  const before = tableAt(graph, index - 1);
  const stage = graph.stages[index];
  const changed = stage.added.length + stage.changed.length + stage.removed.length > 0;
  if (!changed && !stage.order) return (graph.tables[index] = before);
  const rows = new Map(before.rows);
  stage.removed.forEach(id => rows.delete(id));
  [...stage.added, ...stage.changed].forEach(node => rows.set(node.id, node));
  let order = before.order;
  if (stage.order) {
    order = [];
    for (const [first, count] of stage.order) for (let i = 0; i < count; i++) order.push(first + i);
  }
  return (graph.tables[index] = { rows, order: order.filter(id => rows.has(id)) });
}

const finalTable = graph => tableAt(graph, graph.stages.length - 1);

/** The latest form of a node, removed ones included: {node, stage, removedBy}. */
function findNode(graph, id) {
  let node = null, removedBy = null;
  for (const stage of graph.stages) {
    const now = stage.added.find(n => n.id === id) || stage.changed.find(n => n.id === id);
    if (now) { node = now; removedBy = null; }
    if (stage.removed.includes(id)) removedBy = stage;
  }
  return node && { node, removedBy };
}

/** Stages that made, changed or removed a node. */
function stagesOf(graph, id) {
  return graph.stages.flatMap(stage => {
    if (stage.added.some(n => n.id === id)) return [[stage.index === 0 ? "captured" : "made by", stage]];
    if (stage.changed.some(n => n.id === id)) return [["changed by", stage]];
    if (stage.removed.includes(id)) return [["removed by", stage]];
    return [];
  });
}

const wordsOf = text => text.match(/[A-Za-z_][A-Za-z0-9_]*/g) || [];

/** Names to nodes over all stages; a name that was used twice means the later node. */
function namesOf(graph) {
  if (!graph.names) {
    graph.names = new Map();
    for (const stage of graph.stages) for (const n of [...stage.added, ...stage.changed]) graph.names.set(n.name, n);
  }
  return graph.names;
}

function usersOf(graph, node) {
  const { rows, order } = tableAt(graph, lastStageOf(graph, node.id));
  return order.map(id => rows.get(id)).filter(n => wordsOf(n.args).includes(node.name));
}

function lastStageOf(graph, id) {
  for (let i = graph.stages.length - 1; i >= 0; i--) if (tableAt(graph, i).rows.has(id)) return i;
  return 0;
}

/** Nodes that descend from a captured one and are not it. */
function descendants(graph, id) {
  return graph.stages.flatMap(s => s.added).filter(n => n.id !== id && n.origins.includes(id));
}

const within = (path, place) => !place || path === place || path.startsWith(place + ".");

/** Side-by-side rows of a pass: [{left, right, kind}], kind one of same, changed, moved, removed, added. */
function alignedRows(graph, index) {
  const before = tableAt(graph, index - 1), after = tableAt(graph, index);
  const touched = new Set(graph.stages[index].changed.map(n => n.id));
  const lines = [];
  const placed = new Set();
  let i = 0, j = 0;
  const flush = (left, right) => {
    for (let k = 0; k < Math.max(left.length, right.length); k++) {
      const kind = left[k] && right[k] ? "replaced" : left[k] ? "removed" : "added";
      lines.push({ left: left[k], right: right[k], kind });
    }
  };
  while (i < before.order.length || j < after.order.length) {
    const left = [], right = [];
    while (i < before.order.length && (!after.rows.has(before.order[i]) || placed.has(before.order[i]))) {
      if (!placed.has(before.order[i])) left.push(before.rows.get(before.order[i]));
      i++;
    }
    while (j < after.order.length && !before.rows.has(after.order[j])) right.push(after.rows.get(after.order[j++]));
    flush(left, right);
    if (j >= after.order.length) continue;
    const id = after.order[j++];
    placed.add(id);
    if (before.order[i] === id) {
      i++;
      lines.push({ left: before.rows.get(id), right: after.rows.get(id), kind: touched.has(id) ? "changed" : "same" });
    } else {
      lines.push({ left: before.rows.get(id), right: after.rows.get(id), kind: touched.has(id) ? "changed" : "moved" });
    }
  }
  return lines;
}

/** Changed lines with `around` lines of context; what lies between is a {hidden: [lines]} entry. */
function hunks(lines, around) {
  const show = new Uint8Array(lines.length);
  lines.forEach((line, i) => {
    if (line.kind === "same") return;
    for (let k = Math.max(0, i - around); k <= Math.min(lines.length - 1, i + around); k++) show[k] = 1;
  });
  const out = [];
  lines.forEach((line, i) => {
    if (show[i]) out.push(line);
    else if (out.length && out[out.length - 1].hidden) out[out.length - 1].hidden.push(line);
    else out.push({ hidden: [line] });
  });
  return out;
}

/** Changes that were shown before, in another layer, as one {again, places, entries} with the gaps between them. */
function foldRepeats(entries) {
  const groups = [];
  for (const entry of entries) {
    const last = groups[groups.length - 1];
    if (entry.hidden || !last || last[0].hidden) groups.push([entry]);
    else last.push(entry);
  }
  const seen = new Set(), out = [];
  let again = null;
  for (const group of groups) {
    const bare = text => text.replace(/\d+/g, "#");
    const key = group[0].hidden ? "" : group.map(l => [l.kind, l.left && l.left.target, l.right && l.right.target, bare((l.left || l.right).module)].join()).join("|");
    if (group[0].hidden && again) again.entries.push(group[0]);
    else if (!group[0].hidden && seen.has(key)) {
      if (!again) out.push(again = { again: 0, places: [], entries: out.length && out[out.length - 1].hidden ? [out.pop()] : [] });
      again.again += 1;
      again.places.push((group.find(l => l.kind !== "same").left || group.find(l => l.kind !== "same").right).module);
      again.entries.push(...group);
    } else {
      if (again && again.entries[again.entries.length - 1].hidden) out.push(again.entries.pop());
      again = null;
      seen.add(key);
      out.push(...group);
    }
  }
  return out;
}

/** Remarks that say the same at several places, as one: {..., paths, count}. */
function foldRemarks(remarks) {
  const groups = new Map();
  for (const r of remarks) {
    const key = [r.technique, r.status, r.code, r.message.replace(/\d+/g, "#"), r.path.replace(/\d+/g, "#")].join("\u0000");
    if (!groups.has(key)) groups.set(key, { ...r, paths: [], members: [], count: 0 });
    const group = groups.get(key);
    group.paths.push(r.path);
    group.members.push(r);
    group.count += r.count;
  }
  return [...groups.values()];
}

/** Everything that can be searched, made once: {kind, label, detail, hash, text}. */
let searchEntries = null;
function searchIndex() {
  if (searchEntries) return searchEntries;
  searchEntries = [];
  const add = (kind, label, detail, hash) =>
    searchEntries.push({ kind, label, detail, hash, text: `${label} ${detail}`.toLowerCase() });
  DATA.graphs.forEach((graph, g) => {
    const modules = new Set(), sources = new Set();
    graph.stages.forEach((s, i) => { if (i) add("pass", s.name, `graph ${graph.id}`, `g${g}.s${i}`); });
    graph.kernels.forEach((k, i) => add("kernel", k.name, k.family, `g${g}.k${i}`));
    graph.remarks.forEach(r => add("remark", `${r.technique} ${r.status} ${r.code}`, `${r.path} ${r.message}`,
      r.path ? `g${g}.m:${r.path}` : `g${g}.remarks`));
    graph.stages.forEach(s => s.added.forEach(n => {
      n.module.split(".").forEach((_, i, all) => modules.add(all.slice(0, i + 1).join(".")));
      if (n.source) sources.add(n.source);
    }));
    modules.delete("");
    modules.forEach(m => add("module", m, "", `g${g}.m:${m}`));
    sources.forEach(s => add("line", s, "", `g${g}.l:${s}`));
    graph.stages.forEach(s => s.added.forEach(n =>
      add("node", n.name, `${n.target} ${n.shape} ${n.module}`, `g${g}.n${n.id}`)));
  });
  return searchEntries;
}

function searchFor(query, most) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const found = searchIndex().filter(e => words.every(w => e.text.includes(w)));
  const first = query.trim().toLowerCase();
  const rank = e => (e.label.toLowerCase() === first ? 0 : e.label.toLowerCase().startsWith(first) ? 1 : 2);
  return found.map((e, i) => [rank(e), i, e]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).slice(0, most).map(x => x[2]);
}
