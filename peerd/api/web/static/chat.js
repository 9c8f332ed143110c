// The chat: conversations on the left, the one that is open on the right, and the chain that answers it below.

import { Answer, Painter } from "./answer.js";
import { getJson, streamChat } from "./api.js";
import { chainStrip } from "./chain.js";
import { copyButton, el, fill, sentence } from "./dom.js";
import { markdown } from "./markdown.js";
import { loadConversations, newConversation, requestOf, saveConversations, titleOf } from "./store.js";

// Pixels of the box in which a question is typed; a longer one scrolls.
const TALLEST = 240;
const EXAMPLES = [
  "Explain in three sentences why the sky is blue.",
  "Write a Python function that tells whether a word is a palindrome.",
  "Give me five names for a cat that is afraid of mice.",
];
const FIELDS = [
  ["temperature", "Temperature", "0 to 2", { min: 0, max: 2, step: 0.05 }],
  ["top_p", "Top p", "0 to 1", { min: 0, max: 1, step: 0.01 }],
  ["max_tokens", "Longest answer", "tokens", { min: 1, step: 1 }],
  ["seed", "Seed", "any number", { step: 1 }],
];

export class Chat {
  constructor(root) {
    this.conversations = loadConversations();
    this.models = [];
    this.open = this.conversations[0] ?? newConversation("");
    /** The answer in the making: its AbortController; null while there is none. */
    this.running = null;
    this.build(root);
    this.render();
  }

  build(root) {
    this.listBox = el("ul", { class: "conversations" });
    const fresh = el("button", { type: "button", class: "primary wide", onclick: () => this.start() }, "New conversation");
    this.side = el("aside", { class: "side", "aria-label": "Conversations" }, fresh, this.listBox);
    this.log = el("div", { class: "log", role: "log", "aria-label": "Conversation", tabindex: "0" });
    this.strip = el("div", { class: "strip" });
    this.input = el("textarea", {
      id: "prompt", rows: "1", placeholder: "Ask something", "aria-label": "Your message",
      onkeydown: (event) => this.onKey(event), oninput: () => this.grow(),
    });
    this.send = el("button", { type: "submit", class: "primary" }, "Send");
    this.stop = el("button", { type: "button", onclick: () => this.running?.abort(), hidden: true }, "Stop");
    this.model = el("select", { "aria-label": "Model", onchange: () => this.chooseModel() });
    this.settings = el("div", { class: "fields", id: "settings", hidden: true });
    this.knob = el("button", { type: "button", class: "quiet", "aria-expanded": "false", "aria-controls": "settings",
      onclick: () => this.showSettings(this.settings.hidden) }, "Settings");
    const list = el("button", { type: "button", class: "quiet only-narrow", "aria-label": "Conversations",
      onclick: () => this.side.classList.toggle("open") }, "☰");
    // On a phone the conversations lie over the talk: a touch beside them puts them away.
    const close = () => this.side.classList.remove("open");
    const form = el("form", { class: "composer", onsubmit: (event) => this.onSubmit(event) }, this.input, this.stop, this.send);
    const top = el("div", { class: "chat-top" }, list, this.model, this.knob);
    fill(root, this.side, el("div", { class: "veil", onclick: close }),
      el("div", { class: "talk" }, top, this.settings, this.log, this.strip, form));
    document.addEventListener("keydown", (event) => event.key === "Escape" && (close(), this.running?.abort()));
  }

  /** Which models the daemon offers; called again whenever that may have changed. */
  async loadModels() {
    const { data } = await getJson("/v1/models");
    const models = data.map((model) => model.id);
    // Redraw only after a change, because the user may be typing into the settings.
    if (models.join("\n") === this.models.join("\n")) return;
    this.models = models;
    if (!this.models.includes(this.open.model)) this.open.model = this.models[0] ?? "";
    this.renderTop();
    if (!this.open.messages.length) fill(this.log, this.welcome());
  }

  showSettings(shown) {
    this.settings.hidden = !shown;
    this.knob.setAttribute("aria-expanded", String(shown));
  }

  start() {
    this.running?.abort();
    this.open = newConversation(this.open.model);
    this.side.classList.remove("open");
    this.render();
    this.input.focus();
  }

  choose(conversation) {
    this.running?.abort();
    this.open = conversation;
    if (this.models.length && !this.models.includes(conversation.model)) conversation.model = this.models[0];
    this.side.classList.remove("open");
    this.render();
  }

  remove(conversation) {
    this.conversations = this.conversations.filter((one) => one !== conversation);
    if (conversation === this.open) this.choose(this.conversations[0] ?? newConversation(this.open.model));
    this.save();
  }

  chooseModel() {
    this.open.model = this.model.value;
    this.save();
    if (!this.open.messages.length) fill(this.log, this.welcome());
  }

  save() {
    if (this.open.messages.length && !this.conversations.includes(this.open)) this.conversations.unshift(this.open);
    saveConversations(this.conversations);
    this.renderList();
  }

  onKey(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.onSubmit(event);
  }

  onSubmit(event) {
    event.preventDefault();
    const text = this.input.value.trim();
    if (!text || this.running) return;
    this.input.value = "";
    this.grow();
    this.ask(text);
  }

  grow() {
    this.input.style.height = "auto";
    const height = this.input.scrollHeight + 2;
    this.input.style.height = `${Math.min(height, TALLEST)}px`;
    this.input.style.overflowY = height > TALLEST ? "auto" : "hidden";
  }

  ask(text) {
    this.open.messages.push({ role: "user", content: text });
    this.answer();
  }

  /** Answer again from the last question on; or from an earlier one, edited. */
  again(number, text = null) {
    if (this.running) return;
    this.open.messages.length = number;
    if (text !== null) this.open.messages.push({ role: "user", content: text });
    this.answer();
  }

  async answer() {
    const { open: conversation } = this;
    const request = requestOf(conversation);
    const message = { role: "assistant", content: "" };
    conversation.messages.push(message);
    this.running = new AbortController();
    this.save();
    this.render();
    const bubble = this.log.lastElementChild;
    bubble.setAttribute("aria-busy", "true");
    const answer = new Answer(message);
    const painter = new Painter(() => this.paint(conversation, bubble, message, answer));
    try {
      for await (const piece of streamChat(request, this.running.signal)) {
        answer.take(piece);
        painter.soon();
      }
    } catch (error) {
      if (error.name === "AbortError") message.stopped = true;
      else Object.assign(message, { failed: error.message, retryAfterS: error.retryAfterS });
    }
    painter.stop();
    message.figures = answer.figures();
    this.running = null;
    this.save();
    if (this.open === conversation) {
      this.render();
      this.strip.classList.remove("live");
    }
  }

  paint(conversation, bubble, message, answer) {
    if (this.open !== conversation) return;
    const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 80;
    fill(bubble.querySelector(".text"), markdown(message.content));
    this.paintThought(bubble.querySelector(".thought"), message);
    fill(this.strip, chainStrip(answer.chain, answer.figures()));
    this.strip.classList.add("live");
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  paintThought(box, message) {
    box.hidden = !message.thought;
    fill(box.lastElementChild, message.thought);
    // While the model still thinks there is nothing else to see.
    if (!message.content) box.open = true;
  }

  render() {
    this.renderList();
    this.renderTop();
    const { messages } = this.open;
    if (messages.length) fill(this.log, messages.map((message, number) => this.bubble(message, number)));
    else fill(this.log, this.welcome());
    this.log.scrollTop = this.log.scrollHeight;
    this.send.hidden = this.running !== null;
    this.stop.hidden = this.running === null;
    const last = messages.findLast((message) => message.figures);
    fill(this.strip, last ? chainStrip(last.figures.chain, last.figures) : null);
  }

  welcome() {
    const examples = EXAMPLES.map((text) => el("button", { type: "button", onclick: () => this.ask(text) }, text));
    return el("div", { class: "welcome" }, el("h2", {}, this.open.model ? `Ask ${this.open.model}` : "Ask the swarm"),
      el("div", { class: "examples" }, examples),
      el("p", { class: "note" }, "The peers that compute an answer can read it, and the question."));
  }

  renderList() {
    fill(this.listBox, this.conversations.map((conversation) => {
      const isOpen = conversation === this.open;
      const open = el("button", { type: "button", class: "title", "aria-current": isOpen ? "true" : null,
        onclick: () => this.choose(conversation) }, titleOf(conversation));
      const remove = el("button", { type: "button", class: "quiet small", "aria-label": `Delete ${titleOf(conversation)}`,
        onclick: () => this.remove(conversation) }, "✕");
      return el("li", {}, open, remove);
    }));
  }

  renderTop() {
    fill(this.model, this.models.map((name) => el("option", { value: name, selected: name === this.open.model }, name)));
    this.model.value = this.open.model;
    const change = (name) => (event) => {
      this.open.settings[name] = event.target.value;
      this.save();
    };
    const fields = FIELDS.map(([name, label, hint, limits]) => el("label", {}, el("span", {}, label),
      el("input", { type: "number", placeholder: hint, value: this.open.settings[name], onchange: change(name), ...limits })));
    const system = el("label", { class: "wide" }, el("span", {}, "System prompt"),
      el("textarea", { rows: "3", value: this.open.settings.system, onchange: change("system"),
        placeholder: "How the model should behave. Empty: as its template says." }));
    fill(this.settings, system, fields);
  }

  bubble(message, number) {
    const isUser = message.role === "user";
    const isLast = number === this.open.messages.length - 1;
    const busy = isLast && this.running !== null && !isUser;
    const text = el("div", { class: "text" }, isUser ? message.content : markdown(message.content));
    const tools = busy ? [] : [
      message.content && copyButton(() => message.content),
      isUser && el("button", { type: "button", class: "quiet small", onclick: () => this.edit(message, number) }, "Edit"),
      !isUser && el("button", { type: "button", class: "quiet small", onclick: () => this.again(number) }, "Retry"),
    ];
    const notes = [
      message.failed && el("div", { class: "failure", role: "alert" }, el("strong", {}, "No answer"),
        el("p", {}, sentence(message.failed), message.retryAfterS ? ` Try again in ${message.retryAfterS} s.` : null)),
      message.stopped && el("p", { class: "note" }, "Stopped."),
      message.figures?.finish === "length" && el("p", { class: "note" }, "The answer has reached its longest length."),
    ];
    return el("article", { class: `message ${message.role}`, "aria-label": isUser ? "You" : "The model" },
      !isUser && thoughtBox(message), text, notes, el("div", { class: "tools" }, tools));
  }

  edit(message, number) {
    if (this.running) return;
    const box = el("textarea", { rows: "3", value: message.content, "aria-label": "Edit your message" });
    const save = () => this.again(number, box.value.trim() || message.content);
    const form = el("form", { class: "edit", onsubmit: (event) => (event.preventDefault(), save()) }, box,
      el("button", { type: "submit", class: "primary small" }, "Send again"),
      el("button", { type: "button", class: "small", onclick: () => this.render() }, "Cancel"));
    fill(this.log.children[number], form);
    box.focus();
  }
}

/** What the model thought before it answered, folded away. */
function thoughtBox(message) {
  return el("details", { class: "thought", hidden: !message.thought }, el("summary", {}, "Thoughts"), el("div", {}, message.thought));
}
