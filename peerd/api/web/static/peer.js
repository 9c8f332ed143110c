// This peer: its identity, what it serves, how others reach it, and how programs use its API.

import { getJson } from "./api.js";
import { copyButton, count, duration, el, fill, shortId } from "./dom.js";

const REACH = {
  public: "Others can dial this peer.",
  private: "Others cannot dial this peer.",
  unknown: "It is not known yet whether others can dial this peer.",
};

export class PeerView {
  constructor(root) {
    this.root = root;
    this.shown = "";
  }

  async refresh() {
    const status = await getJson("/peerd/v1/status");
    // Redraw the rest only where it has changed, so that a selection stays.
    const { uptime_s: uptime, ...rest } = status;
    const now = JSON.stringify(rest);
    if (now !== this.shown) {
      this.shown = now;
      fill(this.root, identity(status), serving(status), peers(status), api(status));
    }
    document.getElementById("uptime").textContent = duration(uptime);
  }
}

function facts(rows) {
  return el("dl", { class: "facts" }, rows.filter(Boolean).map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

function identity(status) {
  const { reachability } = status;
  return el("article", {}, el("h2", {}, "This peer"), facts([
    ["PeerId", el("span", {}, el("code", {}, status.peer_id), " ", copyButton(() => status.peer_id))],
    ["Version", status.version],
    ["Up for", el("span", { id: "uptime" })],
    ["Listens at", status.addresses.length ? list(status.addresses) : "nowhere that others can dial"],
    ["Reachable", `${REACH[reachability.state] ?? reachability.state}${reachability.why ? ` (${reachability.why})` : ""}`],
    status.relayed_by.length && ["Relayed by", list(status.relayed_by.map((relay) => shortId(relay.peer_id)))],
    status.relaying && ["Relays for others", `${status.relaying.slots} of ${status.relaying.max_slots} places, ${status.relaying.circuits} circuits`],
    ["Connections", count(status.peers.length, "peer")],
    ["Answers in the making", String(status.answering)],
  ]));
}

function list(texts) {
  return el("ul", { class: "plain" }, texts.map((text) => el("li", {}, el("code", {}, text))));
}

function serving(status) {
  if (!status.serving.length) {
    return el("article", {}, el("h2", {}, "Served here"),
      el("p", {}, "Nothing. To serve blocks, start the daemon with ", el("code", {}, "--serve-blocks auto --model MODEL"), "."));
  }
  const rows = status.serving.map((span) => el("tr", {}, el("th", { scope: "row" }, span.blocks), el("td", {}, el("code", {}, span.model.slice(0, 12))),
    el("td", {}, `${span.free_tokens.toLocaleString("en")} of ${span.total_tokens.toLocaleString("en")} tokens`),
    el("td", {}, span.positions_computed.toLocaleString("en"))));
  const head = ["Blocks", "Model's digest", "Free cache", "Positions computed"].map((name) => el("th", { scope: "col" }, name));
  return el("article", {}, el("h2", {}, "Served here"), el("p", {}, `${count(status.sessions, "session")} of others now.`),
    el("div", { class: "scroll", tabindex: "0" }, el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows))));
}

function peers(status) {
  if (!status.peers.length) return null;
  const rows = status.peers.map((peer) => el("tr", {}, el("th", { scope: "row", title: peer.peer_id }, shortId(peer.peer_id)),
    el("td", {}, peer.rtt_ms === null ? "not measured" : `${peer.rtt_ms} ms`),
    el("td", {}, peer.relay === null ? peer.way : `relayed by ${shortId(peer.relay)}`)));
  const head = ["Peer", "Delay", "Way"].map((name) => el("th", { scope: "col" }, name));
  return el("article", {}, el("h2", {}, "Connected peers"),
    el("div", { class: "scroll", tabindex: "0" }, el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows))));
}

function api(status) {
  const base = `${location.origin}/v1`;
  const model = status.models[0]?.name ?? "MODEL";
  const command = [
    `curl ${base}/chat/completions -H "Authorization: Bearer $(cat TOKEN_FILE)" \\`,
    `  -H "Content-Type: application/json" -d '${JSON.stringify({ model, messages: [{ role: "user", content: "Hello" }] })}'`,
  ].join("\n");
  return el("article", {}, el("h2", {}, "For programs"),
    el("p", {}, "Any client of OpenAI's API works: its base URL is ", el("code", {}, base), ", its key the daemon's token. ",
      "The daemon printed the token's file when it started."),
    el("div", { class: "code" }, el("div", { class: "code-bar" }, el("span", {}, "shell"), copyButton(() => command)),
      el("pre", { tabindex: "0" }, el("code", {}, command))));
}
