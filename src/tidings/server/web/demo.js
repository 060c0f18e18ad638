// The demonstration: choose a person, and be them. What it does with the SDK is what any page does.
import { define } from "/sdk/components/src/index.js";
import { Client } from "/sdk/js/src/index.js";
import { keepPush, onPushOpen, pushOffered, subscribePush, unsubscribePush } from "/sdk/js/src/push.js";

const at = (id) => document.getElementById(id);
const { people } = await (await fetch("/demo/people")).json();
const me = people.find(({ id }) => id === new URLSearchParams(location.search).get("as"));

let leaving;
const toast = (text) => {
  at("toast").textContent = text;
  at("toast").classList.add("shown");
  clearTimeout(leaving);
  // Four seconds, or as long as it takes to read.
  leaving = setTimeout(() => at("toast").classList.remove("shown"), Math.max(4000, text.length * 80));
};

if (me) enter();
else choose();

function choose() {
  at("people").replaceChildren(
    ...people.map(({ id, name, about }, place) => {
      const item = document.createElement("li");
      const link = document.createElement("a");
      link.href = `?as=${id}`;
      const initials = document.createElement("span");
      initials.className = `initials tint${place % 4}`;
      initials.ariaHidden = "true";
      initials.textContent = name.replace(/^Dr\. /, "").split(" ").map((word) => word[0]).join("");
      const words = document.createElement("span");
      const title = document.createElement("b");
      title.textContent = name;
      const line = document.createElement("small");
      line.textContent = about;
      words.append(title, line);
      link.append(initials, words);
      item.append(link);
      return item;
    }),
  );
  at("welcome").hidden = false;
}

function enter() {
  define();
  const chat = new Client({
    url: location.origin,
    name: me.id,
    token: async () => {
      const response = await fetch("/demo/session", { method: "POST", body: JSON.stringify({ user: me.id }) });
      if (!response.ok) throw new Error(`The demonstration is not available (${response.status}).`);
      return (await response.json()).token;
    },
  }).start();
  // For whoever opens the console, and for the tests.
  globalThis.chat = chat;

  const box = document.createElement("tidings-chat");
  box.client = chat;
  at("place").append(box);
  at("me").textContent = me.name;
  document.title = `${me.name} · Tidings demo`;
  const other = people.find(({ id }) => id !== me.id);
  at("other").textContent = `Open as ${other.name}`;
  at("other").href = `?as=${other.id}`;
  at("app").hidden = false;

  chat.unread.subscribe(({ total }) => {
    document.title = `${total ? `(${total}) ` : ""}${me.name} · Tidings demo`;
  });

  chat.on("diagnostic", ({ code, detail }) => {
    if (code === "storage_full") toast(detail);
  });

  let missed = 0;
  let counting = false;
  chat.on("message.created", ({ by }) => {
    if (counting && by !== me.id) missed += 1;
  });
  at("offline").addEventListener("change", ({ target }) => {
    if (target.checked) return chat.goOffline();
    missed = 0;
    counting = true;
    chat.goOnline();
    chat.connected({ timeout_ms: 15_000 }).then(
      () => {
        counting = false;
        toast(missed ? `Caught up: ${missed} ${missed === 1 ? "message" : "messages"} while you were away` : "Nothing was missed");
      },
      (error) => toast(error.detail ?? String(error)),
    );
  });

  onPushOpen(({ channel }) => box.open(channel));
  globalThis.offered = offerNotifications(chat);

  at("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
    document.documentElement.dataset.theme = box.theme = now === "dark" ? "light" : "dark";
  });
}

async function offerNotifications(chat) {
  // Each person of this page has a subscription of their own: what is for Amira does not open Lena's page.
  const options = { serviceWorker: "/demo/worker.js", scope: `/demo?as=${me.id}`, language: navigator.language };
  const say = (error) => toast(inWords(error));
  await chat.connected();
  // Without https there is no asking the browser; the switch tells why.
  if (isSecureContext && !(await pushOffered(chat).catch(() => false))) return;
  if (isSecureContext) at("notify").checked = (await keepPush(chat, options).catch((error) => (say(error), {}))).subscribed === true;
  at("notify").addEventListener("change", async ({ target }) => {
    const wanted = target.checked;
    target.disabled = true;
    try {
      if (wanted) await subscribePush(chat, options);
      else await unsubscribePush(chat);
      toast(wanted ? "You will be notified of messages that come while this page is closed or offline" : "No more notifications");
    } catch (error) {
      target.checked = !wanted;
      say(error);
    }
    target.disabled = false;
    target.focus();
  });
  at("bell").hidden = false;
}

function inWords({ code, detail, message }) {
  if (code === "not_supported") {
    return isSecureContext
      ? "This browser cannot show notifications of this page"
      : "Notifications need https: open this page over https, or as localhost on this computer";
  }
  if (code === "not_allowed") {
    return Notification.permission === "denied"
      ? "Notifications are blocked for this page. Allow them in the browser's settings for this site, then try again"
      : "The browser has not been allowed to show notifications. Try again, and choose “Allow”";
  }
  if (code === "push_failed") return "The browser did not reach its push service. Is it blocked here, or switched off in the browser?";
  return detail ?? message;
}
