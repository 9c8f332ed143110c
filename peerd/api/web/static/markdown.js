// Markdown as models write it, as DOM nodes: headings, lists, tables, quotes, code, and emphasis.
// It never sets innerHTML. HTML in an answer is shown as text.

import { copyButton, el } from "./dom.js";

const FENCE = /^(\s*)(```+|~~~+)\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^\s{0,3}>\s?(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** The nodes of a text. A fence that is still open, as in an answer that is being written, holds all that follows. */
export function markdown(text) {
  return blocksOf(text.replaceAll("\r\n", "\n").split("\n"));
}

function blocksOf(lines) {
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at += 1;
    } else if ((match = FENCE.exec(line))) {
      const end = endOfFence(lines, at + 1, match[2]);
      nodes.push(codeBlock(lines.slice(at + 1, end).map((one) => without(one, match[1].length)), match[3]));
      at = end + 1;
    } else if ((match = HEADING.exec(line))) {
      // The page's own headings are h1 and h2.
      nodes.push(el(`h${Math.min(match[1].length + 2, 6)}`, {}, inline(match[2])));
      at += 1;
    } else if (RULE.test(line)) {
      nodes.push(el("hr"));
      at += 1;
    } else if (QUOTE.test(line)) {
      const end = endWhere(lines, at, (one) => !QUOTE.test(one));
      nodes.push(el("blockquote", {}, blocksOf(lines.slice(at, end).map((one) => QUOTE.exec(one)[1]))));
      at = end;
    } else if (ITEM.test(line)) {
      const end = endOfList(lines, at);
      nodes.push(list(lines.slice(at, end)));
      at = end;
    } else if (line.includes("|") && at + 1 < lines.length && TABLE_RULE.test(lines[at + 1])) {
      const end = endWhere(lines, at + 2, (one) => !one.trim() || !one.includes("|"));
      nodes.push(table(lines.slice(at, end)));
      at = end;
    } else {
      const end = endWhere(lines, at + 1, (one) => !one.trim() || startsBlock(one));
      nodes.push(el("p", {}, withBreaks(lines.slice(at, end))));
      at = end;
    }
  }
  return nodes;
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || ITEM.test(line) || RULE.test(line);
}

function endWhere(lines, from, isEnd) {
  let at = from;
  while (at < lines.length && !isEnd(lines[at])) at += 1;
  return at;
}

function endOfFence(lines, from, fence) {
  return endWhere(lines, from, (one) => one.trim().startsWith(fence) && !one.trim().slice(fence.length).trim());
}

/** A list ends at a line that is neither an item, nor indented below one, nor the blank line before such a line. */
function endOfList(lines, from) {
  const margin = ITEM.exec(lines[from])[1].length;
  let at = from + 1;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) {
      const next = lines[at + 1] ?? "";
      if (!(ITEM.test(next) || indent(next) > margin) || !next.trim()) return at;
    } else if (!ITEM.test(line) && indent(line) <= margin && startsBlock(line)) {
      return at;
    }
    at += 1;
  }
  return at;
}

function list(lines) {
  const [, margin, marker] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(marker);
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= margin.length + 1) items.push([match[3]]);
    else items.at(-1).push(without(line, margin.length + 2));
  }
  const number = parseInt(marker, 10);
  const attributes = ordered && number !== 1 ? { start: String(number) } : {};
  return el(ordered ? "ol" : "ul", attributes, items.map((item) => el("li", {}, itemContent(item))));
}

/** A short item is text; one with blocks in it has paragraphs. */
function itemContent(lines) {
  const nodes = blocksOf(lines);
  const [first, ...others] = nodes;
  if (first && first.tagName === "P" && !lines.some((line) => !line.trim())) return [...first.childNodes, ...others];
  return nodes;
}

function table(lines) {
  const [head, , ...rows] = lines.map(cells);
  const row = (one, tag) => el("tr", {}, head.map((_, column) => el(tag, {}, inline(one[column] ?? ""))));
  const body = el("table", {}, el("thead", {}, row(head, "th")), el("tbody", {}, rows.map((one) => row(one, "td"))));
  return el("div", { class: "scroll", tabindex: "0" }, body);
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function codeBlock(lines, language) {
  const text = lines.join("\n");
  const bar = el("div", { class: "code-bar" }, el("span", {}, language || "code"), copyButton(() => text));
  return el("div", { class: "code" }, bar, el("pre", { tabindex: "0" }, el("code", {}, text)));
}

function withBreaks(lines) {
  const nodes = [];
  lines.forEach((line, number) => {
    if (number) nodes.push(/ {2}$/.test(lines[number - 1]) ? el("br") : "\n");
    nodes.push(...inline(line.trim()));
  });
  return nodes;
}

function indent(line) {
  return line.length - line.trimStart().length;
}

function without(line, width) {
  return line.slice(Math.min(width, indent(line)));
}

// One alternative for each kind; which group is there says which it is.
const INLINE =
  /(?<code>`+)(?<coded>.+?)\k<code>(?!`)|\*\*(?<strong>\S(?:.*?\S)?)\*\*|__(?<strong2>\S(?:.*?\S)?)__(?!\w)|\*(?<em>[^\s*](?:[^*]*[^\s*])?)\*|(?<![\w])_(?<em2>[^\s_](?:[^_]*[^\s_])?)_(?!\w)|~~(?<del>.+?)~~|\[(?<label>[^\]]+)\]\((?<href>[^)\s]+)\)|(?<url>https?:\/\/[^\s<>()]*[^\s<>().,;:!?'"])|\\(?<escaped>[\\`*_{}[\]()#+.!|~>-])/;

function inline(text) {
  const nodes = [];
  let rest = text;
  for (;;) {
    const match = INLINE.exec(rest);
    if (!match) break;
    if (match.index) nodes.push(rest.slice(0, match.index));
    nodes.push(inlineNode(match.groups, match[0]));
    rest = rest.slice(match.index + match[0].length);
  }
  if (rest) nodes.push(rest);
  return nodes;
}

function inlineNode(groups, whole) {
  if (groups.coded !== undefined) return el("code", {}, groups.coded.replace(/^ (.+) $/, "$1"));
  const strong = groups.strong ?? groups.strong2;
  if (strong !== undefined) return el("strong", {}, inline(strong));
  const emphasis = groups.em ?? groups.em2;
  if (emphasis !== undefined) return el("em", {}, inline(emphasis));
  if (groups.del !== undefined) return el("del", {}, inline(groups.del));
  if (groups.escaped !== undefined) return groups.escaped;
  const href = groups.href ?? groups.url;
  // Only links that leave the page; a script or a path of ours would act with the reader's rights.
  if (!/^(https?:\/\/|mailto:)/i.test(href)) return whole;
  return el("a", { href, target: "_blank", rel: "noopener noreferrer" }, inlineLabel(groups.label ?? href));
}

function inlineLabel(label) {
  return label.startsWith("http") ? label : inline(label);
}
