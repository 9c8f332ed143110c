// Starts the page: which view is shown, the token, the theme, and whether the daemon is there.

import { getJson, setToken, takeToken } from "./api.js";
import { Chat } from "./chat.js";
import { PeerView } from "./peer.js";
import { Swarm } from "./swarm.js";

const REFRESH_MS = 3000;
const THEME = "peerd.theme";

takeToken();
applyTheme(localStorage.getItem(THEME));

const chat = new Chat(document.getElementById("view-chat"));
const views = {
  chat: { refresh: () => chat.loadModels() },
  swarm: new Swarm(document.getElementById("view-swarm")),
  peer: new PeerView(document.getElementById("view-peer")),
};
let current = "";

function show() {
  const wanted = location.hash.slice(1);
  current = wanted in views ? wanted : "chat";
  for (const name of Object.keys(views)) document.getElementById(`view-${name}`).hidden = name !== current;
  for (const link of document.querySelectorAll("[data-view]")) {
    if (link.dataset.view === current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  refresh();
}

async function refresh() {
  const health = document.getElementById("health");
  try {
    if (current !== "swarm") await views[current].refresh();
    // Every view shows the delays of the chain and whether the models are covered.
    const models = await views.swarm.refresh();
    const uncovered = models.filter((model) => !model.covered);
    health.className = uncovered.length ? "pill thin" : "pill good";
    health.textContent = uncovered.length ? `waiting for servers of ${uncovered[0].name}` : "ready";
    health.title = health.textContent;
  } catch (error) {
    health.className = "pill bad";
    health.textContent = error.status === 401 ? "needs a token" : "no answer";
    health.title = error.message;
  }
}

function applyTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

function switchTheme() {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  const theme = dark ? "light" : "dark";
  localStorage.setItem(THEME, theme);
  applyTheme(theme);
}

function askForToken() {
  const dialog = document.getElementById("login");
  if (dialog.open) return;
  dialog.showModal();
}

document.getElementById("login").addEventListener("close", () => {
  const input = document.getElementById("token");
  if (input.value.trim()) setToken(input.value.trim());
  input.value = "";
  refresh();
});
document.getElementById("theme").addEventListener("click", switchTheme);
document.addEventListener("peerd:login", askForToken);
addEventListener("hashchange", () => {
  takeToken();
  show();
});
show();
setInterval(() => document.hidden || refresh(), REFRESH_MS);
