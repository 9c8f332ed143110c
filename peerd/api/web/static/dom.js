// Builds elements. Text always becomes a text node, so nothing from a model or a peer is ever read as HTML.

/**
 * An element. `props` named on...: listeners; class, data-*, aria-* and other attributes by name; `false` and null leave
 * an attribute out. `children`: nodes or text; null leaves one out.
 */
export function el(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  append(element, children);
  return element;
}

export function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
}

/** Put `children` in the place of whatever `element` held. */
export function fill(element, ...children) {
  element.replaceChildren();
  append(element, children);
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  append(element, children);
  return element;
}

/** A button that copies what `text()` returns, and says that it did. */
export function copyButton(text, label = "Copy") {
  const button = el("button", { type: "button", class: "quiet small" }, label);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Copying is not allowed here";
    }
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

/** A PeerId shortened as `peerd` shortens it on the terminal. */
export function shortId(peerId) {
  return peerId.length > 18 ? `${peerId.slice(0, 8)}..${peerId.slice(-6)}` : peerId;
}

/** An error's message as a sentence; PeerIds are shortened. */
export function sentence(message) {
  const text = message.trim().replace(/\b12D3KooW\w{44}\b/g, shortId);
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}

export function count(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}

/** Seconds as people say them: "12 s", "5 min", "3 h", "2 d". */
export function duration(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

/** Blocks as the documentation writes them: the first, and the one after the last. */
export function blocks(start, end) {
  return `${start}:${end}`;
}
