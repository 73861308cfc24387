// The chat page. Conversations stay in this browser (localStorage); the server keeps nothing.
// Text of the model and of people reaches the page through textContent only (markdown.js makes DOM nodes).

import { render } from "./markdown.js";
import { WORDS } from "./words.js";

const $ = (id) => document.getElementById(id);
const STORE = "minigpt.chat.v1";
const SLIDERS = [
  // name, least, most, step
  ["temperature", 0, 2, 0.05],
  ["top_p", 0.05, 1, 0.05],
  ["top_k", 0, 200, 1],
  ["repetition_penalty", 1, 1.5, 0.01],
  ["max_tokens", 16, 4096, 16],
];
const SWITCH = { auto: null, on: true, off: false };

const state = {
  conversations: [], // {id, title, messages: [{role, content, reasoning, stats, error}], first}, newest first;
  // `first` is the oldest message that is still sent; an empty `reasoning` is thinking that was switched off
  current: null,
  settings: {}, // what differs from the server's defaults
  language: navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en",
  theme: "auto",
};
let defaults = { temperature: 0.7, top_p: 0.9, top_k: 0, repetition_penalty: 1, max_tokens: 512, think: "auto" };
let model = null;
let running = null; // {controller, conversation, message, node}

// ---------------------------------------------------------------------------------------------------------- small parts

const words = () => WORDS[state.language];
const setting = (name) => {
  const value = state.settings[name] ?? defaults[name];  // what was set for a model with a longer context still stands here
  return name === "max_tokens" && model ? Math.min(value, model.max_model_len) : value;
};
const conversation = () => state.conversations.find((c) => c.id === state.current);

function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

function button(text, act, className = "") {
  const node = element("button", className, text);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE)) ?? {};
    if (Array.isArray(kept.conversations)) state.conversations = kept.conversations.filter((c) => Array.isArray(c?.messages));
    for (const c of state.conversations) {
      // kept by an earlier page, for which an empty `reasoning` said nothing
      if (!Number.isInteger(c.first)) for (const m of c.messages) if (!m?.reasoning) delete m?.reasoning;
    }
    if (kept.settings && typeof kept.settings === "object") state.settings = kept.settings;
    if (kept.language in WORDS) state.language = kept.language;
    if (["auto", "light", "dark"].includes(kept.theme)) state.theme = kept.theme;
  } catch { /* unreadable: begin anew */ }
}

function save() {
  const { conversations, settings, language, theme } = state;
  for (let keep = conversations.length; ; keep = Math.floor(keep / 2)) {
    try {
      localStorage.setItem(STORE, JSON.stringify({ conversations: conversations.slice(0, keep), settings, language, theme }));
      return;
    } catch {
      if (!keep) return; // storage is full or forbidden: the page works, it only forgets
    }
  }
}

// Another tab has saved: its list of conversations is the newer one, but for the answer that is being written here.
function adopt() {
  const mine = running?.conversation, editing = document.querySelector(".editor");
  load();
  if (mine) state.conversations = [mine, ...state.conversations.filter((c) => c.id !== mine.id)];
  if (!conversation()) state.current = null;
  drawConversations();
  if (!editing && !(mine && mine.id === state.current)) drawMessages();
}

function headers() {
  const all = { "Content-Type": "application/json" };
  if (state.settings.key) all.Authorization = `Bearer ${state.settings.key}`;
  return all;
}

// -------------------------------------------------------------------------------------------------------------- drawing

function drawWords() {
  document.documentElement.lang = state.language === "zh" ? "zh-CN" : "en";
  if (state.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = state.theme;
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = words()[node.dataset.word];
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = words()[node.dataset.placeholder];
  for (const node of document.querySelectorAll("[data-label]")) {
    const label = words()[node.dataset.label];
    if (typeof label === "string") {
      node.setAttribute("aria-label", label);
      if (node.matches("button")) node.title = label;
    }
  }
  $("language").textContent = words().language;
  $("language").setAttribute("aria-label", words().languageLabel);
  $("language").title = words().languageLabel;
  $("theme").textContent = words().theme[state.theme];
  $("theme").removeAttribute("aria-label");
  $("examples").replaceChildren(...words().examples.map((text) => button(text, () => send(text))));
  drawSettings();
  drawBusy();
}

function drawSettings() {
  $("think").textContent = words().think[setting("think")];
  $("think").dataset.value = setting("think");
  $("system").value = state.settings.system ?? "";
  $("key").value = state.settings.key ?? "";
  $("sliders").replaceChildren(...SLIDERS.map(([name, least, most, step]) => {
    const row = element("div", "slider"), label = element("label", "", words()[name]);
    const input = element("input"), output = element("output"), help = element("p", "small", words()[`${name}Help`]);
    most = name === "max_tokens" && model ? Math.min(most, model.max_model_len) : most;
    Object.assign(input, { type: "range", id: `set-${name}`, min: least, max: most, step, value: setting(name) });
    label.htmlFor = output.htmlFor = input.id;
    output.textContent = input.value;
    input.addEventListener("input", () => {
      output.textContent = input.value;
      state.settings[name] = Number(input.value);
      save();
    });
    row.append(label, output, input, help);
    return row;
  }));
}

function drawConversations() {
  $("conversations").replaceChildren(...state.conversations.map((c) => {
    const row = element("li", c.id === state.current ? "current" : "");
    const open = button(c.title || words().untitled, () => select(c.id));
    if (c.id === state.current) open.setAttribute("aria-current", "true");
    const remove = button("✕", () => removeConversation(c.id), "remove");
    remove.setAttribute("aria-label", `${words().remove}: ${c.title}`);
    row.append(open, remove);
    return row;
  }));
}

function drawMessages() {
  const messages = conversation()?.messages ?? [];
  $("welcome").hidden = messages.length > 0;
  $("messages").replaceChildren(...messages.map((message, index) => drawMessage(message, index)));
  if (running && running.conversation === conversation()) {
    running.node = $("messages").children[running.conversation.messages.indexOf(running.message)];
  }
  scrollDown();
}

function drawMessage(message, index) {
  const node = element("article", `message ${message.role}`);
  node.setAttribute("aria-label", message.role === "user" ? words().you : words().assistant);
  if (message.role === "user") {
    const actions = element("div", "actions");
    actions.append(button(words().copy, (e) => copy(e.target, message.content)), button(words().edit, () => edit(index), "edit"));
    node.append(element("div", "bubble", message.content), actions);
    return node;
  }
  const avatar = element("img", "avatar"), body = element("div", "body");
  Object.assign(avatar, { src: "icon.svg", alt: "" });
  const thoughts = element("details", "thinking");
  thoughts.append(element("summary"), element("div", "thoughts"));
  body.append(thoughts, element("div", "text"));
  node.append(avatar, body, element("div", "actions"));
  fill(node, message, index);
  return node;
}

// Brings the node of an answer up to date with its message; the open or closed thinking part stays as it is.
function fill(node, message, index) {
  const busy = running?.message === message;
  const thoughts = node.querySelector(".thinking"), text = node.querySelector(".text"), actions = node.querySelector(".actions");
  node.classList.toggle("busy", busy);
  thoughts.hidden = !message.reasoning;
  thoughts.querySelector(".thoughts").textContent = message.reasoning ?? "";
  thoughts.querySelector("summary").textContent =
    busy && !message.content ? words().thinking : message.thinkSeconds ? words().thought(message.thinkSeconds) : words().thoughtShort;
  text.replaceChildren(render(message.content));
  actions.replaceChildren();
  const last = index === conversation().messages.length - 1; // to answer again would delete what follows
  if (message.error) {
    const box = element("div", "error", message.error);
    box.setAttribute("role", "alert");
    if (last) box.append(button(words().retry, () => regenerate(index)));
    text.append(box);
  } else if (!busy) {
    if (!message.content && !message.reasoning) text.append(element("p", "small", words().empty));
    actions.append(button(words().copy, (e) => copy(e.target, message.content)));
    if (last) actions.append(button(words().regenerate, () => regenerate(index), "regenerate"));
  }
  const stats = message.stats;
  if (stats?.tokens) {
    const notes = [words().stats(stats.tokens, stats.rate), words().reason[message.finish]].filter(Boolean);
    actions.append(element("span", "stats", notes.join(" · ")));
  }
  if (message.forgotten) actions.append(element("span", "stats", words().forgotten));
}

function drawBusy() {
  const busy = running !== null;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("hint").textContent = busy ? words().hintBusy : words().hint;
  $("messages").setAttribute("aria-busy", String(busy));
  $("send").disabled = !$("input").value.trim();
}

let atEnd = true;
function scrollDown(force = true) {
  if (force || atEnd) $("scroller").scrollTop = $("scroller").scrollHeight;
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 220)}px`;
}

async function copy(target, text) {
  try {
    await navigator.clipboard.writeText(text);
    target.textContent = words().copied;
    setTimeout(() => { target.textContent = words().copy; }, 1500);
  } catch { /* no permission */ }
}

// -------------------------------------------------------------------------------------------------------- conversations

function select(id) {
  state.current = id;
  closeMenu();
  drawConversations();
  drawMessages();
  $("input").focus();
}

function removeConversation(id) {
  if (running?.conversation.id === id) stop();
  state.conversations = state.conversations.filter((c) => c.id !== id);
  if (state.current === id) state.current = null;
  save();
  drawConversations();
  drawMessages();
}

function send(text) {
  text = text.trim();
  if (!text || running) return;
  let chat = conversation();
  if (!chat) {
    chat = { id: `${Date.now()}-${Math.random().toString(36).slice(2)}`, title: text.slice(0, 60), messages: [] };
    state.conversations.unshift(chat);
    state.current = chat.id;
  }
  chat.messages.push({ role: "user", content: text });
  answer(chat);
}

function regenerate(index) {
  if (running) return;
  const chat = conversation();
  chat.messages.length = index;
  answer(chat);
}

function edit(index) {
  if (running) return;
  const chat = conversation(), node = $("messages").children[index];
  const form = element("form", "editor"), field = element("textarea"), row = element("div", "buttons");
  field.value = chat.messages[index].content;
  field.setAttribute("aria-label", words().editLabel);
  const done = element("button", "primary", words().saveEdit);
  const cancel = () => { drawMessages(); $("input").focus(); };
  row.append(button(words().cancelEdit, cancel), done);
  form.append(field, row);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (!text || running) return;
    chat.messages.length = index;
    if (index === 0) chat.title = text.slice(0, 60);
    chat.messages.push({ role: "user", content: text });
    answer(chat);
    $("input").focus();
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
    if (sends(event)) { event.preventDefault(); form.requestSubmit(); }
  });
  node.replaceChildren(form);
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
}

// -------------------------------------------------------------------------------------------------------------- answers

// Asks for the answer to a conversation that ends with a message of the user, and shows it as it comes.
async function answer(chat) {
  const message = { role: "assistant", content: "" };
  const mine = { controller: new AbortController(), conversation: chat, message, node: null };
  const asked = chat.messages.slice();
  if (!(chat.first < asked.length)) chat.first = 0; // new, or cut back by an edit
  message.forgotten = chat.first > 0;
  chat.messages.push(message);
  running = mine;
  state.conversations = [chat, ...state.conversations.filter((c) => c.id !== chat.id)];
  save();
  drawConversations();
  drawMessages();
  drawBusy();
  const started = performance.now();
  let first = 0, planned = 0;
  const show = () => {
    planned = 0;
    if (mine.node?.isConnected && running === mine) {
      fill(mine.node, message, chat.messages.length - 1);
      scrollDown(false);
    }
  };
  try {
    for await (const piece of pieces(chat, asked, message, mine.controller.signal)) {
      const now = performance.now();
      const choice = piece.choices?.[0], delta = choice?.delta ?? {};
      if (piece.error) throw new Error(piece.error.message);
      if (delta.reasoning_content != null) message.reasoning = (message.reasoning ?? "") + delta.reasoning_content;
      if (delta.content) {
        if (message.reasoning && !message.content) message.thinkSeconds = Math.max(1, Math.round((now - started) / 1000));
        message.content += delta.content;
      }
      for (const call of delta.tool_calls ?? []) message.content += `\n\`\`\`\n${call.function.name} ${call.function.arguments}\n\`\`\`\n`;
      if (choice?.finish_reason) message.finish = choice.finish_reason;
      const tokens = piece.usage?.completion_tokens ?? 0;
      if (tokens) {
        first ||= now;
        mine.base ??= tokens;
        // the rate of all tokens behind the first ones; of very short answers, of the whole answer
        const rate = now - first > 100 ? (tokens - mine.base) / (now - first) : tokens / (now - started);
        const perSecond = 1000 * rate;
        message.stats = { tokens, rate: perSecond >= 10 ? Math.round(perSecond) : Number(perSecond.toFixed(1)) };
      }
      planned ||= requestAnimationFrame(show);
    }
  } catch (error) {
    if (mine.controller.signal.aborted) message.finish = "stopped";
    else message.error = error instanceof TypeError ? words().offline : error.message;
  }
  cancelAnimationFrame(planned);
  running = running === mine ? null : running;
  save();
  if (mine.node?.isConnected) fill(mine.node, message, chat.messages.length - 1);
  scrollDown(false);
  drawBusy();
}

// The events of an answer. A conversation that leaves too little room in the context is asked again without its oldest
// turns, and so are its later questions: an answer gets what it may be long, but not more than a quarter of the context.
async function* pieces(chat, asked, message, signal) {
  if (!model) await connect();
  const system = setting("system") ? [{ role: "system", content: setting("system") }] : [];
  for (;;) {
    const turns = asked.slice(chat.first).filter((m) => !m.error);
    const body = {
      messages: [...system, ...turns.map(({ role, content, reasoning }) => ({ role, content, reasoning_content: reasoning }))],
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
      chat_template_kwargs: { enable_thinking: SWITCH[setting("think")] },
    };
    for (const [name] of SLIDERS) body[name] = setting(name);
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    const next = asked.findIndex((m, i) => i > chat.first && m.role === "user");
    const context = model?.max_model_len ?? Infinity, wanted = Math.min(body.max_tokens, context / 4);
    const error = response.ok ? null : (await response.json().catch(() => null))?.error;
    let tight = response.status === 413 || ["context_length_exceeded", "array_above_max_length"].includes(error?.code);
    if (response.ok) {
      for await (const piece of events(response.body)) {
        tight = next > 0 && context - (piece.usage?.prompt_tokens ?? 0) < wanted;
        if (tight) break;
        yield piece;
      }
      if (!tight) return;
    }
    if (tight && next > 0) {
      chat.first = next;
      message.forgotten = true;
      continue;
    }
    throw new Error(response.status === 401 ? words().needKey : error?.message ?? `HTTP ${response.status}`);
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        if (line === "data: [DONE]") return;
        yield JSON.parse(line.slice(6));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function stop() {
  running?.controller.abort();
}

// --------------------------------------------------------------------------------------------------------------- events

// Enter sends; not while an input method composes Chinese, where Enter chooses a word.
const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

function submit() {
  if (running || !$("input").value.trim()) return;
  const text = $("input").value;
  $("input").value = "";
  grow();
  send(text);
}

function closeMenu() {
  $("sidebar").classList.remove("open");
  $("shade").hidden = true;
  $("menu").setAttribute("aria-expanded", "false");
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("input").addEventListener("input", () => { grow(); drawBusy(); });
$("input").addEventListener("keydown", (event) => { if (sends(event)) { event.preventDefault(); submit(); } });
$("stop").addEventListener("click", () => { stop(); $("input").focus(); });
$("new-chat").addEventListener("click", () => select(null));
$("menu").addEventListener("click", () => {
  const open = $("sidebar").classList.toggle("open");
  $("shade").hidden = !open;
  $("menu").setAttribute("aria-expanded", String(open));
  if (open) $("new-chat").focus();
});
$("shade").addEventListener("click", closeMenu);
$("settings-button").addEventListener("click", () => { drawSettings(); $("settings").showModal(); });
$("settings").addEventListener("click", (event) => { if (event.target === $("settings")) $("settings").close(); });
$("settings").addEventListener("close", connect);
$("system").addEventListener("input", () => { state.settings.system = $("system").value; save(); });
$("key").addEventListener("input", () => { state.settings.key = $("key").value.trim(); save(); });
$("reset").addEventListener("click", () => {
  state.settings = { key: state.settings.key };
  save();
  drawSettings();
});
$("forget").addEventListener("click", () => {
  if (!confirm(words().forgetSure)) return;
  stop();
  state.conversations = [];
  state.current = null;
  save();
  drawConversations();
  drawMessages();
  $("settings").close();
});
$("think").addEventListener("click", () => {
  const order = ["auto", "on", "off"];
  state.settings.think = order[(order.indexOf(setting("think")) + 1) % 3];
  save();
  drawSettings();
});
$("language").addEventListener("click", () => {
  state.language = state.language === "en" ? "zh" : "en";
  save();
  drawWords();
  drawConversations();
  drawMessages();
});
$("theme").addEventListener("click", () => {
  const order = ["auto", "light", "dark"];
  state.theme = order[(order.indexOf(state.theme) + 1) % 3];
  save();
  drawWords();
});
$("scroller").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = $("scroller");
  atEnd = scrollHeight - scrollTop - clientHeight < 60;
  $("to-end").hidden = atEnd;
});
$("to-end").addEventListener("click", () => scrollDown());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || $("settings").open) return;
  if ($("sidebar").classList.contains("open")) closeMenu();
  else stop();
});

window.addEventListener("storage", (event) => { if (event.key === STORE) adopt(); });
// What has come of an answer stays when the page goes; and when it comes back, the server may have another model.
window.addEventListener("pagehide", () => running && save());
document.addEventListener("visibilitychange", () => (document.hidden ? running && save() : connect()));

// Asks the server for its model and defaults.
async function connect() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) {
      $("model").textContent = words().needKey;
      return;
    }
    model = (await response.json()).data[0];
    const { max_new_tokens, ...rest } = model.defaults;
    defaults = { ...defaults, ...rest, max_tokens: max_new_tokens };
    $("model").textContent = model.id;
    $("size").textContent = `${(model.parameters / 1e6).toFixed(1)} M`;
    $("pretrained").hidden = model.chat;
    drawSettings();
  } catch {
    $("model").textContent = words().offline;
  }
}

load();
drawWords();
drawConversations();
drawMessages();
connect();
$("input").focus();
