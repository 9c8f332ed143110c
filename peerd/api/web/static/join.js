// How another machine joins: the link, its QR code for one with a camera, and the command that lends a machine.

import { getJson } from "./api.js";
import { copyButton, el, fill, svg } from "./dom.js";

// By link: what the daemon said about it. The view is drawn anew every few seconds, and a link changes seldom.
const described = new Map();

export function join(model, number) {
  if (model.invitation === null) {
    return el("p", { class: "note" }, "This daemon knows no address that others can dial. A bootstrap peer has one: peerd --listen.");
  }
  return el("div", { class: "invitation" },
    picture(model),
    el("div", { class: "grow" },
      command("talk to the model", `peerd join ${model.invitation}`, `invite-${number}`),
      command("serve some of its blocks", model.join, `join-${number}`)));
}

function command(what, text, id) {
  return el("div", { class: "code" },
    el("div", { class: "code-bar" }, el("span", {}, what), copyButton(() => text)),
    el("pre", { tabindex: "0", id, class: "wrap" }, el("code", {}, text)));
}

/** The QR code and what the link is good for, as soon as the daemon has made them. */
function picture(model) {
  const place = el("figure", { class: "qr" });
  const known = described.get(model.invitation);
  if (known) draw(place, known);
  else {
    getJson(`/peerd/v1/invitation?model=${encodeURIComponent(model.name)}`).then((found) => {
      described.set(found.link, found);
      draw(place, found);
    }, () => {}); // Without it the link is there to be copied.
  }
  return place;
}

function draw(place, found) {
  const reach = {
    internet: "Works from anywhere.",
    network: "Works inside this network only.",
    machine: "Works on this machine only: no peer is known that others can dial.",
  }[found.reach];
  const secret = found.private ? " The swarm is private: whoever joins needs the file with its key too." : "";
  fill(place, found.qr && code(found.qr), el("figcaption", {}, reach + secret));
}

/** Dark on white in either theme, with the border of four that readers need. */
function code(rows) {
  const size = rows.length + 8;
  const dark = rows.flatMap((row, y) => [...row.matchAll(/1+/g)].map((run) => `M${run.index + 4} ${y + 4}h${run[0].length}v1h-${run[0].length}z`));
  return svg("svg", { viewBox: `0 0 ${size} ${size}`, role: "img", "aria-label": "The link as a QR code" },
    svg("rect", { width: size, height: size, class: "qr-light" }), svg("path", { d: dark.join(""), class: "qr-dark" }));
}
