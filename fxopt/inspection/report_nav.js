// The card beside the page (node, module, source line), search, keys, deep links.

const card = document.getElementById("card");
const main = document.getElementById("main");

function showCard(title, kind, ...content) {
  card.replaceChildren(
    el("div.cardhead", {}, el("span.quiet", {}, kind), el("button", { type: "button", "aria-label": "Close", onclick: closeCard }, "×")),
    el("h3", {}, title), ...content.flat(3).filter(Boolean).map(String_));
  card.hidden = false;
  card.scrollTop = 0;
  document.body.classList.add("with-card");
}

function closeCard() {
  card.hidden = true;
  document.body.classList.remove("with-card");
  const graph = /^#(g\d+)/.exec(location.hash);
  setHash(graph ? graph[1] : "");
}
const setHash = hash => history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);

const part = (title, ...content) => {
  const inside = content.flat(3).filter(Boolean);
  return inside.length ? el("div.part", {}, el("h4", {}, title), inside) : null;
};
const list = (items, most = 40) => (items.length
  ? el("ul", {}, items.slice(0, most).map(i => el("li", {}, i)), items.length > most && el("li.quiet", {}, `and ${number(items.length - most)} more`)) : null);

function nodeCard(graph, id) {
  const found = findNode(graph, id);
  if (!found) return showCard(`node ${id}`, "node", el("p", {}, "This node is not in the record."));
  const { node, removedBy } = found;
  const names = namesOf(graph);
  const pieces = node.args.split(/([A-Za-z_][A-Za-z0-9_]*)/).map(w => {
    const other = names.get(w);
    return other && other.id !== node.id ? nodeLink(graph, other) : w;
  });
  const origins = node.origins.filter(o => o !== id);
  const kernels = graph.kernels.map((k, i) => [k, i]).filter(([k]) => k.nodes.includes(id));
  showCard(shortName(node.name), removedBy ? `node, removed by ${removedBy.name}` : "node",
    el("p.call", {}, `${node.target}(`, pieces, ")"),
    el("p", {}, el("b", {}, `${node.dtype}[${node.shape}]`), el("span.quiet", {}, ` ${node.op}, id ${node.id}`), shortName(node.name) !== node.name && el("p.quiet.mono", {}, node.name)),
    part("Module", moduleTrail(graph, node.module)),
    part("Source line", node.source && el("p", {}, lineLink(graph, node.source))),
    part("History", list(stagesOf(graph, id).map(([word, s]) => (s.index ? [`${word} `, link(`g${graph.index}.s${s.index}`, s.name)] : "captured by Dynamo")))),
    part("Descends from", list(origins.map(o => nodeById(graph, o)))),
    part("Became", list(descendants(graph, id).map(n => nodeLink(graph, n)))),
    part("Read by", list(usersOf(graph, node).map(n => nodeLink(graph, n)))),
    part("Kernels", list(kernels.map(([k, i]) => link(`g${graph.index}.k${i}`, k.name)))),
    part("Measured in", graph.measured && list(graph.measured.rows.filter(r => r[3].includes(id)).map(([name, places, , , spent]) =>
      [link(`g${graph.index}.measured`, name), ` ${time(spent / places)}${places > 1 ? ` each, ×${places}` : ""}`]))));
}

function moduleTrail(graph, path) {
  if (!path) return el("p.quiet", {}, "outside of modules");
  const pieces = path.split(".");
  return el("p", {}, pieces.map((piece, i) => [i ? "." : "", link(`g${graph.index}.m:${pieces.slice(0, i + 1).join(".")}`, piece, "mono")]));
}

function moduleCard(graph, path) {
  const remarks = graph.remarks.filter(r => within(r.path, path) || (r.path && within(path, r.path)));
  const run = graph.strips.flatMap(s => s.runs).find(r => r.paths.includes(path));
  const captured = tableAt(graph, 0), last = finalTable(graph);
  const nodes = captured.order.map(id => captured.rows.get(id)).filter(n => within(n.module, path));
  const made = last.order.filter(id => !captured.rows.has(id)).map(id => last.rows.get(id)).filter(n => within(n.module, path));
  const gone = nodes.filter(n => !last.rows.has(n.id));
  const children = [...new Set(nodes.filter(n => n.module !== path).map(n => n.module.slice(path.length + 1).split(".")[0]))];
  const kernels = graph.kernels.map((k, i) => [k, i]).filter(([k]) => k.modules.some(m => within(m, path)));
  const untouched = graph.techniques.map(t => t[0]).filter(t => !remarks.some(r => r.technique === t));
  showCard(path, run && run.paths.length > 1 ? `module, ${run.paths.length} alike (${run.label})` : "module",
    moduleTrail(graph, path),
    el("p.quiet", {}, `${plural(nodes.length, "node")} captured, ${gone.length} removed, ${made.length} made`),
    part("What was done, and why not", remarks.slice(0, 30).map(r => remarkRow(graph, { ...r, paths: [r.path], members: [r] }))),
    part("Left as it is by", untouched.length && el("p", {}, untouched.join(", "))),
    part("Kernels", list(kernels.map(([k, i]) => link(`g${graph.index}.k${i}`, k.name)))),
    part("Source lines", lineGroups(graph, [...new Set(nodes.filter(n => n.op !== "placeholder").map(n => n.source).filter(Boolean))])),
    part("Submodules", list(children.map(c => moduleLink(graph, `${path}.${c}`)))),
    part("Made by passes", list(made.map(n => nodeLine(graph, n)))),
    part("Nodes as captured", list(nodes.map(n => el(last.rows.has(n.id) ? "span" : "span.gone", {}, nodeLine(graph, n))), 120)));
}

/** Source lines by file and function: "modeling_llama.py  forward 63 64 65". */
function lineGroups(graph, sources) {
  const files = new Map();
  for (const source of sources) {
    const match = /^(.*):(\d+), in (.*)$/s.exec(source) || [source, source, "", ""];
    const file = files.get(match[1]) || files.set(match[1], new Map()).get(match[1]);
    file.set(match[3], [...(file.get(match[3]) || []), [match[2], source]]);
  }
  return [...files].map(([file, functions]) => el("div.file", {}, el("code", {}, file), [...functions].map(([name, lines]) =>
    el("div.indent", {}, el("span.quiet", {}, `${name} `), lines.map(([at, source]) => [link(`g${graph.index}.l:${source}`, at || "line", "mono"), " "])))));
}

function lineCard(graph, source) {
  const all = graph.stages.flatMap(s => s.added).filter(n => n.source === source);
  const modules = [...new Set(all.map(n => n.module).filter(Boolean))];
  const remarks = graph.remarks.filter(r => r.source === source);
  showCard(source, "source line",
    part("Remarks", remarks.slice(0, 20).map(r => remarkRow(graph, { ...r, paths: [r.path], members: [r] }))),
    part("Modules that run it", list(modules.map(m => moduleLink(graph, m)))),
    part("Nodes", list(all.map(n => nodeLine(graph, n)), 120)));
}

// -- deep links: #g0  #g0.s1  #g0.k0  #g0.n12  #g0.m:model.layers.3  #g0.l:file.py:12, in forward ---------------------

function follow() {
  const hash = decodeURI(location.hash.slice(1));
  const match = /^g(\d+)(?:\.(?!measured$)([nmlsk])(:?)(.*)|\.(remarks|passes|tree|measured))?$/s.exec(hash);
  const graph = match && DATA.graphs[Number(match[1])];
  document.querySelectorAll("#graphs a").forEach((a, i) => a.setAttribute("aria-current", String(graph ? i === graph.index : i === 0)));
  if (!graph) return;
  const [, , kind, , value] = match;
  if (kind === "n") nodeCard(graph, Number(value));
  else if (kind === "m") moduleCard(graph, value);
  else if (kind === "l") lineCard(graph, value);
  else {
    const target = document.getElementById(hash);
    if (!target) return;
    for (let at = target; at && at !== main; at = at.parentElement) {
      if (at.tagName === "DETAILS") { if (at.fillNow) at.fillNow(); else at.open = true; }
    }
    target.scrollIntoView({ block: "start" });
  }
}

// -- search ---------------------------------------------------------------------------------------------------------

const field = document.getElementById("search");
const hits = document.getElementById("hits");
let chosen = -1;

function showHits() {
  const found = searchFor(field.value, 40);
  chosen = found.length ? 0 : -1;
  hits.replaceChildren(...found.map(e => el("li", {}, el("a", { href: "#" + encodeURI(e.hash), onclick: () => { hits.hidden = true; } },
    el("span.kind", {}, e.kind), el("b", {}, e.label), el("span.quiet", {}, ` ${clip(e.detail, 90)}`)))));
  if (!found.length && field.value.trim()) hits.append(el("li.quiet", {}, "nothing found"));
  hits.hidden = !field.value.trim();
  mark();
}
const mark = () => [...hits.children].forEach((li, i) => li.classList.toggle("chosen", i === chosen));

field.addEventListener("input", showHits);
field.addEventListener("focus", () => { if (field.value) showHits(); });
field.addEventListener("keydown", event => {
  const count = hits.querySelectorAll("a").length;
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    if (count) chosen = (chosen + (event.key === "ArrowDown" ? 1 : count - 1)) % count;
    mark();
  } else if (event.key === "Enter" && count) {
    hits.querySelectorAll("a")[Math.max(0, chosen)].click();
    field.blur();
  }
});
document.addEventListener("click", event => { if (!event.target.closest(".search")) hits.hidden = true; });
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (!hits.hidden) hits.hidden = true;
    else if (document.activeElement === field) field.blur();
    else if (!card.hidden) closeCard();
    return;
  }
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (event.key === "/") { event.preventDefault(); field.focus(); field.select(); }
  if (event.key === "j" || event.key === "k") {
    const stops = [...document.querySelectorAll("h2, details.pass > summary, h3")].filter(s => s.offsetParent && !card.contains(s));
    const here = stops.findIndex(s => s.getBoundingClientRect().top > 70);
    const current = here < 0 ? stops.length : here;
    const next = event.key === "j" ? (stops[current] && stops[current].getBoundingClientRect().top < 80 ? current + 1 : current) : current - 2;
    const stop = stops[Math.min(stops.length - 1, Math.max(0, next))];
    if (stop) { stop.scrollIntoView({ block: "start" }); if (stop.tagName === "SUMMARY") stop.focus({ preventScroll: true }); }
  }
});
window.addEventListener("hashchange", follow);
window.addEventListener("beforeprint", () => document.querySelectorAll("details.pass").forEach(d => d.fillNow()));

// -- the page -------------------------------------------------------------------------------------------------------

main.append(...DATA.graphs.map(graphSection), ...[picturesBlock(DATA.pictures || [])].filter(Boolean));
if (!DATA.graphs.length) main.append(el("p.quiet", {}, "Nothing has been compiled yet."));
document.getElementById("graphs").append(...(DATA.graphs.length > 1 ? DATA.graphs.map(g =>
  link(`g${g.index}`, `${g.id} ${g.role}${g.error ? " (failed)" : ""}`)) : []));
main.append(el("footer", {}, el("p.quiet", {},
  Object.entries(DATA.environment).map(([k, v]) => `${k} ${v}`).join("   "), `   schema ${DATA.schema}`),
  DATA.leftOut.length ? el("p", {}, `Left out to keep the page small: ${DATA.leftOut.join(", ")}. The JSON report has them.`) : null,
  el("p.quiet", {}, "Keys: / search, j and k next and previous heading, Esc close. Every address with # can be shared.")));
follow();
document.body.dataset.ready = "true";
