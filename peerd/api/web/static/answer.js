// One answer while it comes: its text, its figures, and how often it is painted.

import { count } from "./dom.js";

/** One answer as its pieces come: its text goes into the message, its figures are kept here. */
export class Answer {
  constructor(message) {
    this.message = message;
    this.chain = [];
    this.failovers = 0;
    this.tokens = 0;
    this.prompt = 0;
    this.cached = 0;
    this.finish = null;
    this.started = performance.now();
    this.first = null;
    this.last = null;
  }

  take(piece) {
    if (piece.peerd) ({ chain: this.chain, failovers: this.failovers } = piece.peerd);
    if (piece.usage) {
      this.tokens = piece.usage.completion_tokens;
      this.prompt = piece.usage.prompt_tokens;
      this.cached = piece.usage.prompt_tokens_details?.cached_tokens ?? 0;
    }
    const [choice] = piece.choices;
    if (!choice) return;
    this.message.content += choice.delta.content ?? "";
    if (choice.delta.reasoning_content) this.message.thought = (this.message.thought ?? "") + choice.delta.reasoning_content;
    this.finish = choice.finish_reason ?? this.finish;
    if (choice.delta.role) return;
    this.last = performance.now();
    this.first ??= this.last;
    this.tokens += 1;
  }

  figures() {
    const seconds = (this.last - this.first) / 1000;
    return {
      chain: this.chain,
      failovers: this.failovers,
      tokens: this.tokens,
      prompt: this.prompt,
      cached: this.cached,
      finish: this.finish,
      firstTokenMs: this.first === null ? null : Math.round(this.first - this.started),
      tokensPerSecond: this.tokens > 1 && seconds > 0 ? (this.tokens - 1) / seconds : null,
      text: count(this.tokens, "token"),
    };
  }
}

/** Paints at most once a frame, however fast the pieces come. */
export class Painter {
  constructor(paint) {
    this.paint = paint;
    this.frame = null;
  }

  soon() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.paint();
    });
  }

  stop() {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.frame = null;
  }
}
