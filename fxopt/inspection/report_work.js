// Work against the roofline, and measured times.

// -- work against the roofline --------------------------------------------------------------------------------------

const scaled = (value, unit) => {
  const [size, letter] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]].find(([s]) => value >= s) || [1, ""];
  return `${(value / size).toPrecision(3)} ${letter}${unit}`;
};

function workBlock(graph) {
  const { device, rows } = graph.work;
  const longest = Math.max(...rows.map(r => r[4]), 1e-12), total = rows.reduce((sum, r) => sum + r[4], 0);
  const line = ([name, places, flops, bytes, seconds, bound]) => el("tr", {}, el("th", { scope: "row" }, name),
    el("td", {}, `×${places}`), el("td", {}, scaled(flops, "FLOP")), el("td", {}, scaled(bytes, "B")),
    el("td.roof." + bound, { title: `bound by ${bound}` }, el("i", { style: `width:${(12 * seconds / longest).toFixed(2)}rem` }), ` ${time(seconds)}`));
  return el("div.block", { id: `g${graph.index}.work` }, el("h3", {}, "Work"),
    el("p.quiet", {}, `After the passes: products and attention need at least ${time(total)} on ${device}; a wide bar is dear, a striped one is bound by arithmetic, a plain one by memory.`),
    el("table.plain.work", {}, el("tbody", {}, rows.slice(0, 14).map(line))));
}

// -- measured times -------------------------------------------------------------------------------------------------

function measuredBlock(graph) {
  const { calls, seconds, rows } = graph.measured, MOST = 20;
  const longest = Math.max(...rows.map(r => r[4]), 1e-12), total = rows.reduce((sum, r) => sum + r[4], 0);
  const rate = (value, spent, unit) => (value > 0 && spent > 0 ? scaled(value / spent, unit) : "");
  const where = modules => modules.slice(0, 2).map((m, n) => [n ? ", " : "", m.includes("*") ? el("span.mono", {}, m) : moduleLink(graph, m)])
    .concat(modules.length > 2 ? [el("span.quiet", {}, ` and ${modules.length - 2} more`)] : []);
  const line = ([name, places, modules, nodes, spent, flops, bytes, least], i) => el("tr", { id: `g${graph.index}.t${i}` },
    el("th", { scope: "row", title: name }, clip(name, 30), nodes.length > 0 && el("span.quiet", {}, " ", nodeById(graph, nodes[0]))),
    el("td.roof", {}, el("i", { style: `width:${(7 * spent / longest).toFixed(2)}rem` }), ` ${time(spent)}`),
    el("td", {}, `×${places}`), el("td", {}, rate(flops, spent, "FLOP/s")), el("td", {}, rate(bytes, spent, "B/s")),
    el("td", {}, least ? `${(spent / least).toPrecision(2)} times the least` : ""), el("td.place", {}, where(modules)));
  const body = el("tbody", {}, rows.slice(0, MOST).map(line));
  const more = rows.length > MOST && el("button.more", { type: "button", onclick: event => {
    body.append(...rows.slice(MOST).map((row, i) => line(row, MOST + i)));
    event.target.remove();
  } }, `show ${plural(rows.length - MOST, "more row")}`);
  return el("div.block", { id: `g${graph.index}.measured` }, el("h3", {}, "Measured"),
    el("p.quiet", {}, `Kernels and library calls took ${time(total)} of ${time(seconds)} for the graph, medians of ${plural(calls, "call")} under the profiler, whose own cost is in short ones.`),
    el("table.plain.work", {}, body), more);
}
