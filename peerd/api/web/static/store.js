// Conversations, kept in this browser and nowhere else.

const KEY = "peerd.conversations";
const MOST = 200;

export const DEFAULTS = { system: "", temperature: "", top_p: "", max_tokens: "", seed: "" };

export function loadConversations() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(found) ? found.filter((one) => one?.id && Array.isArray(one.messages)).map(sound) : [];
  } catch {
    return [];
  }
}

/** What another version of the page has kept may lack something: what cannot be shown is left out. */
function sound(conversation) {
  const messages = conversation.messages.filter((one) => typeof one?.content === "string" && typeof one.role === "string");
  for (const message of messages) if (!Array.isArray(message.figures?.chain)) delete message.figures;
  return { ...conversation, model: conversation.model ?? "", settings: { ...DEFAULTS, ...conversation.settings }, messages };
}

/** Keep the newest conversations; where the browser has no room, fewer of them. Returns what could be kept. */
export function saveConversations(conversations) {
  let kept = conversations.slice(0, MOST);
  for (;;) {
    try {
      localStorage.setItem(KEY, JSON.stringify(kept));
      return kept;
    } catch {
      if (kept.length <= 1) return kept;
      kept = kept.slice(0, Math.ceil(kept.length / 2));
    }
  }
}

export function newConversation(model) {
  // `crypto.randomUUID` is missing where the page came by plain HTTP from another machine.
  const id = Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("-");
  return { id, model, settings: { ...DEFAULTS }, messages: [] };
}

/** What a conversation is called: its first question. */
export function titleOf(conversation) {
  const question = conversation.messages.find((message) => message.role === "user");
  return question ? question.content.slice(0, 60) : "New conversation";
}

/** The fields of a request that a conversation's settings make: empty ones are left to the model. */
export function requestOf(conversation) {
  const { system, ...numbers } = conversation.settings;
  const messages = conversation.messages
    .filter((message) => message.content && !message.failed)
    .map(({ role, content }) => ({ role, content }));
  const sampling = Object.entries(numbers).filter(([, value]) => value !== "").map(([name, value]) => [name, Number(value)]);
  return {
    model: conversation.model,
    messages: system.trim() ? [{ role: "system", content: system }, ...messages] : messages,
    ...Object.fromEntries(sampling),
  };
}
