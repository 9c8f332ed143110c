// The chain that computes an answer, hop by hop, with the figures of the answer.

import { blocks, count, el, shortId } from "./dom.js";

/** Delays in milliseconds by peer, as the swarm's view last had them. */
export const delays = new Map();
/** Peers of the chain that answered last; the swarm's view marks them. */
export const inUse = new Set();

let shown = "";

export function chainStrip(chain, figures) {
  const key = JSON.stringify(chain);
  const changed = key !== shown;
  shown = key;
  inUse.clear();
  for (const hop of chain) inUse.add(hop.peer);
  const hops = chain.map((hop) => el("li", { class: changed ? "hop changed" : "hop", title: hop.peer },
    el("strong", {}, shortId(hop.peer)), ` blocks ${blocks(hop.start, hop.end)}`, delayOf(hop.peer)));
  const you = () => el("li", { class: "hop end" }, "you");
  const list = chain.length ? el("ol", { class: "chain", "aria-label": "The chain that answers" }, you(), hops, you()) : null;
  return [list, el("p", { class: "figures" }, texts(figures).join(" · "))];
}

function delayOf(peer) {
  const ms = delays.get(peer);
  return ms === undefined ? null : el("small", {}, ` ${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`);
}

function texts(figures) {
  const found = figures.tokens ? [figures.text] : [];
  if (figures.tokensPerSecond) found.push(`${figures.tokensPerSecond.toFixed(1)} tokens/s`);
  if (figures.firstTokenMs) found.push(`first after ${figures.firstTokenMs} ms`);
  if (figures.cached) found.push(`${figures.cached} of ${figures.prompt} tokens read before`);
  if (figures.failovers) found.push(`${count(figures.failovers, "peer")} replaced on the way`);
  return found;
}
