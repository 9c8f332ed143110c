// The swarm: which blocks of each model have servers, which peers these are, the last hour, and how to join.

import { getJson } from "./api.js";
import { delays, inUse } from "./chain.js";
import { blocks, count, duration, el, fill, shortId, svg } from "./dom.js";
import { join } from "./join.js";

export class Swarm {
  constructor(root) {
    this.root = root;
    this.shown = "";
  }

  /** Ask and draw. Returns the models, each as the daemon described it. */
  async refresh() {
    const swarm = await getJson("/peerd/v1/swarm");
    for (const model of swarm.models) {
      for (const server of model.servers) if (server.rtt_ms !== null) delays.set(server.peer_id, server.rtt_ms);
    }
    // Redraw only what has changed, and give the focus back to the element that had it, for keyboard users.
    const now = JSON.stringify([swarm, [...inUse]]);
    if (now === this.shown) return swarm.models;
    this.shown = now;
    const open = this.root.contains(document.activeElement) ? document.activeElement.id : null;
    fill(this.root, swarm.models.map((model, number) => modelView(model, swarm.history, number)),
      swarm.models.length ? null : el("p", { class: "empty" }, "This daemon offers no model: start it with --model."));
    if (open) document.getElementById(open)?.focus();
    return swarm.models;
  }
}

function modelView(model, history, number) {
  return el("article", { class: "model" },
    el("h2", {}, model.name),
    verdict(model),
    coverageBar(model),
    legend(),
    el("h3", {}, count(model.server_count, "server")),
    servers(model, number),
    el("h3", {}, "The last hour"),
    hour(model, history),
    el("h3", {}, "Invite another machine"),
    join(model, number));
}

/** In words what the bar shows in colours: what nobody serves, and what hangs on one peer. */
function verdict(model) {
  const named = (runs) => runs.map((run) => blocks(run.start, run.end)).join(", ");
  const missing = model.coverage.filter((run) => run.servers === 0);
  const single = model.coverage.filter((run) => run.servers === 1);
  if (missing.length) {
    return el("p", { class: "verdict bad" }, `Nobody serves blocks ${named(missing)}: no answer is possible until somebody does.`);
  }
  if (single.length) {
    return el("p", { class: "verdict thin" },
      `All ${model.block_count} blocks are served. Each of blocks ${named(single)} has one server only: if that leaves, answers wait for another.`);
  }
  return el("p", { class: "verdict good" }, `All ${model.block_count} blocks have two servers or more.`);
}

const kindOf = (servers) => (servers === 0 ? "none" : servers === 1 ? "one" : "many");

function coverageBar(model) {
  const width = 1000;
  const scale = width / model.block_count;
  const parts = model.coverage.map((run) => svg("rect", {
    x: run.start * scale, y: 0, width: Math.max(1, (run.end - run.start) * scale - 2), height: 28, rx: 3, class: kindOf(run.servers),
  }, svg("title", {}, `blocks ${blocks(run.start, run.end)}: ${run.servers === 0 ? "nobody" : count(run.servers, "server")}`)));
  const text = model.coverage.map((run) => `${blocks(run.start, run.end)} ${count(run.servers, "server")}`).join(", ");
  return el("div", { class: "coverage" },
    svg("svg", { viewBox: `0 0 ${width} 28`, preserveAspectRatio: "none", role: "img", "aria-label": `Coverage: ${text}` }, parts),
    el("div", { class: "ends", "aria-hidden": "true" }, el("span", {}, "block 0"), el("span", {}, `block ${model.block_count - 1}`)));
}

function legend() {
  return el("ul", { class: "legend" }, [["many", "two servers or more"], ["one", "one server"], ["none", "nobody"]].map(
    ([kind, text]) => el("li", {}, el("span", { class: `swatch ${kind}` }), text)));
}

function servers(model, number) {
  if (!model.servers.length) return el("p", { class: "note" }, "Nobody serves this model now.");
  const head = ["Peer", "Blocks", "Speed", "Free cache", "Delay", "Way", "Seen for"];
  const body = el("tbody", {}, model.servers.map((server) => row(server, model.block_count)));
  const table = el("table", {}, el("caption", { class: "hidden" }, `Servers of ${model.name}`),
    el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))), body);
  return el("div", { class: "scroll", tabindex: "0", id: `servers-${number}`, role: "region", "aria-label": `Servers of ${model.name}` }, table);
}

function row(server, blockCount) {
  const state = server.reached ? server.state : "not reached";
  const marks = [state !== "online" && el("span", { class: "badge" }, state), server.is_us && el("span", { class: "badge" }, "this peer"),
    inUse.has(server.peer_id) && el("span", { class: "badge live" }, "answers you")];
  const delay = server.rtt_ms === null ? "not measured" : `${server.rtt_ms < 10 ? server.rtt_ms.toFixed(1) : Math.round(server.rtt_ms)} ms`;
  const kind = server.quantization === "none" ? server.dtype : server.quantization;
  return el("tr", { class: state === "online" ? null : "away" },
    el("th", { scope: "row", title: server.peer_id }, shortId(server.peer_id), marks),
    el("td", {}, `${blocks(server.start, server.end)} `, spanBar(server, blockCount), el("small", {}, ` ${kind}`)),
    el("td", {}, `${server.positions_a_second.toLocaleString("en")} tokens/s`),
    el("td", {}, `${server.free_tokens.toLocaleString("en")} tokens`),
    el("td", {}, delay),
    el("td", {}, server.way ?? "not connected"),
    el("td", {}, duration(Date.now() / 1000 - server.seen_since)));
}

/** Where in the model a span lies. */
function spanBar(server, blockCount) {
  return svg("svg", { viewBox: `0 0 ${blockCount} 4`, class: "span-bar", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { x: 0, y: 0, width: blockCount, height: 4, class: "track" }),
    svg("rect", { x: server.start, y: 0, width: server.end - server.start, height: 4, class: "span" }));
}

function hour(model, history) {
  if (history.length < 2) return el("p", { class: "note" }, "The first figures come after two minutes.");
  const least = Math.min(...history.map((sample) => sample.coverage[model.name] ?? 0));
  const tokens = history.reduce((sum, sample) => sum + sample.tokens, 0);
  return el("div", { class: "lines" },
    line("Blocks served", history.map((sample) => sample.coverage[model.name] ?? 0), 1, `at least ${Math.round(least * 100)} %`),
    line("Tokens a minute, all models", history.map((sample) => sample.tokens), null, `${tokens.toLocaleString("en")} in all`));
}

function line(label, values, most, text) {
  const top = most ?? Math.max(1, ...values);
  const points = values.map((value, at) => `${(at / (values.length - 1)) * 300},${46 - (value / top) * 42}`).join(" ");
  return el("figure", {}, svg("svg", { viewBox: "0 0 300 48", role: "img", "aria-label": `${label}: ${text}`, preserveAspectRatio: "none" },
    svg("polyline", { points })), el("figcaption", {}, `${label}: ${text}`));
}
