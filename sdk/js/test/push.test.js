import assert from "node:assert/strict";
import { test } from "node:test";
import { keepPush, onPushOpen, preferences, pushOffered, pushState, subscribePush, unsubscribePush } from "../src/push.js";
import { handlePushes } from "../src/push-worker.js";

const KEY = "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4";
const KEYS = { p256dh: KEY, auth: "BTBZMqHH6r4Tts7J_aSIgg" };

/** A browser with a service worker. */
function browser({ permission = "default", answer = "granted" } = {}) {
  const heard = new Set();
  const around = {
    made: [],
    registered: [],
    subscription: null,
    PushManager: class {},
    asked: 0,
    Notification: {
      permission,
      requestPermission: async () => {
        around.asked += 1;
        return (around.Notification.permission = answer);
      },
    },
    location: { search: "", href: "https://app.example/chat" },
    say: (data) => heard.forEach((fn) => fn({ data })),
  };
  const registration = {
    pushManager: {
      getSubscription: async () => around.subscription,
      subscribe: async (options) => {
        around.made.push(options);
        const endpoint = `https://push.example/${around.made.length}`;
        return (around.subscription = {
          options: { applicationServerKey: options.applicationServerKey.buffer },
          toJSON: () => ({ endpoint, expirationTime: null, keys: KEYS }),
          unsubscribe: async () => (around.subscription = null),
        });
      },
    },
  };
  around.navigator = {
    serviceWorker: {
      getRegistration: async () => registration,
      register: async (...what) => {
        around.registered.push(what);
        return { scope: new URL(what[1].scope ?? "./", new URL(what[0], around.location.href)).href };
      },
      ready: Promise.resolve(registration),
      addEventListener: (_, fn) => heard.add(fn),
      removeEventListener: (_, fn) => heard.delete(fn),
    },
  };
  return around;
}

function client(key = KEY) {
  const asked = [];
  return {
    user: "alice",
    device: "web/1",
    asked,
    request: async (method, path, what = {}) => {
      asked.push([method, path, what]);
      return path === "/v1/push/webpush-key" ? { provider: "web", public_key: key } : {};
    },
  };
}

test("a browser is registered with the app's key, once, and told to the server", async () => {
  const around = browser();
  const chat = client();
  assert.deepEqual(await pushState(around), { supported: true, permission: "default", subscribed: false });
  const state = await subscribePush(chat, { serviceWorker: "/worker.js", language: "de" }, around);
  assert.deepEqual(state, { supported: true, permission: "granted", subscribed: true });
  assert.deepEqual(around.registered, [["/worker.js", { type: "module" }]]);
  assert.equal(around.made[0].applicationServerKey.length, 65);
  assert.deepEqual(chat.asked.at(-1), [
    "PUT",
    "/v1/users/alice/devices/web%2F1/push",
    { body: { provider: "web", subscription: { endpoint: "https://push.example/1", keys: KEYS }, language: "de" } },
  ]);
  await subscribePush(chat, { serviceWorker: "/worker.js" }, around);
  assert.equal(around.made.length, 1);
});

test("whether there is something to offer is asked of the server, and only where the browser can", async () => {
  const chat = client();
  assert.equal(await pushOffered(chat, {}), false);
  assert.deepEqual(chat.asked, []);
  assert.equal(await pushOffered(chat, browser()), true);
  const refusing = (code) => ({ request: async () => Promise.reject(Object.assign(new Error(), { code })) });
  assert.equal(await pushOffered(refusing("not_found"), browser()), false);
  await assert.rejects(pushOffered(refusing("unavailable"), browser()), { code: "unavailable" });
});

test("a page outside of the worker's scope is told so instead of waiting for ever", async () => {
  const around = browser();
  const chat = client();
  await assert.rejects(subscribePush(chat, { serviceWorker: "/push/worker.js" }, around), { code: "push_failed" });
  await subscribePush(chat, { serviceWorker: "/push/worker.js", scope: "/chat" }, around);
  assert.deepEqual(around.registered.at(-1), ["/push/worker.js", { type: "module", scope: "/chat" }]);
});

test("at its start, and when the browser exchanges the subscription, a page tells the server and asks nobody", async () => {
  const around = browser();
  const chat = client();
  const told = () => chat.asked.filter(([method]) => method === "PUT").length;
  assert.equal((await keepPush(chat, { serviceWorker: "/worker.js" }, around)).subscribed, false);
  assert.deepEqual([told(), around.asked, around.registered.length], [0, 0, 0]);
  await subscribePush(chat, { serviceWorker: "/worker.js" }, around);
  assert.deepEqual([told(), around.asked], [1, 1]);
  assert.equal((await keepPush(chat, { serviceWorker: "/worker.js" }, around)).subscribed, true);
  assert.deepEqual([told(), around.asked], [2, 1]);
  const again = new Promise((resolve) => {
    const { request } = chat;
    chat.request = async (...what) => (what[0] === "PUT" && resolve(), request(...what));
  });
  around.say({ type: "tidings.resubscribe" });
  await again;
  around.Notification.permission = "denied";
  await keepPush(chat, { serviceWorker: "/worker.js" }, around);
  assert.equal(around.asked, 1);
});

test("what the browser itself refuses has a code, too", async () => {
  for (const [name, code] of [["AbortError", "push_failed"], ["NotAllowedError", "not_allowed"]]) {
    const around = browser();
    around.navigator.serviceWorker.register = async () => Promise.reject(Object.assign(new Error("no"), { name }));
    await assert.rejects(subscribePush(client(), { serviceWorker: "/w.js" }, around), { code });
  }
  const around = browser();
  around.navigator.serviceWorker.register = () => new Promise(() => {});
  await assert.rejects(subscribePush(client(), { serviceWorker: "/w.js", timeout_ms: 1 }, around), { code: "push_failed" });
});

test("a subscription for a key that the app no longer has is made anew", async () => {
  const around = browser();
  await subscribePush(client(), { serviceWorker: "/worker.js" }, around);
  await subscribePush(client(`BD${KEY.slice(2)}`), { serviceWorker: "/worker.js" }, around);
  assert.equal(around.made.length, 2);
});

test("what the person does not allow, or the browser cannot, is said and tells the server nothing", async () => {
  const chat = client();
  await assert.rejects(subscribePush(chat, { serviceWorker: "/w.js" }, browser({ answer: "denied" })), { code: "not_allowed" });
  await assert.rejects(subscribePush(chat, { serviceWorker: "/w.js" }, {}), { code: "not_supported" });
  await assert.rejects(subscribePush(chat, { serviceWorker: "/w.js" }, { isSecureContext: false }), { code: "not_supported", detail: /https/ });
  await assert.rejects(subscribePush({ request: chat.request }, { serviceWorker: "/w.js" }, browser()), { code: "not_connected" });
  assert.deepEqual(await pushState({}), { supported: false, permission: "denied", subscribed: false });
  assert.ok(chat.asked.every(([method]) => method === "GET"));
});

test("signing out takes the token away, also when there is none", async () => {
  const around = browser();
  const chat = client();
  await subscribePush(chat, { serviceWorker: "/worker.js" }, around);
  await unsubscribePush(chat, around);
  assert.equal(around.subscription, null);
  assert.deepEqual(chat.asked.at(-1).slice(0, 2), ["DELETE", "/v1/users/alice/devices/web%2F1/push"]);
  chat.request = async () => {
    throw Object.assign(new Error(), { code: "not_found" });
  };
  await unsubscribePush(chat, around);
});

test("preferences go to their addresses", async () => {
  const chat = client();
  const said = preferences(chat);
  await said.set({ level: "mentions" }, { device: "web/1" });
  await said.setChannel("ward 3", "none");
  await said.get();
  await said.channel("ward 3");
  assert.deepEqual(chat.asked, [
    ["PUT", "/v1/users/alice/notifications", { query: { device: "web/1" }, body: { level: "mentions" } }],
    ["PUT", "/v1/channels/ward%203/notifications", { query: {}, body: { level: "none" } }],
    ["GET", "/v1/users/alice/notifications", { query: {} }],
    ["GET", "/v1/channels/ward%203/notifications", { query: {} }],
  ]);
});

/** A service worker's global scope. */
function scope(pages = []) {
  const on = {};
  const worker = {
    shown: [],
    opened: [],
    closed: 0,
    badge: undefined,
    addEventListener: (type, fn) => (on[type] = fn),
    navigator: { setAppBadge: async (count) => (worker.badge = count) },
    registration: {
      scope: "https://app.example/chat",
      showNotification: async (title, options) => worker.shown.push({ title, ...options }),
      getNotifications: async ({ tag }) => worker.shown.filter((one) => one.tag === tag).map(() => ({ close: () => worker.closed++ })),
      pushManager: { subscribe: async (options) => (worker.resubscribed = options) },
    },
    clients: { matchAll: async () => pages, openWindow: async (url) => worker.opened.push(url) },
    async tell(type, event) {
      let work;
      on[type]({ ...event, waitUntil: (promise) => (work = promise) });
      await work;
    },
    push: (data) => worker.tell("push", { data: { json: () => data } }),
    click: (data) => worker.tell("notificationclick", { notification: { data, close: () => {} } }),
  };
  return worker;
}

const PUSH = {
  id: "m/1",
  title: "Clinic",
  body: "You have a new message.",
  data: { channel: "ward", message: "m_1" },
  badge: 3,
  sound: "default",
  collapse_key: "ward",
};

test("a push is shown with its badge, one per channel", async () => {
  const worker = scope();
  handlePushes({ icon: "/icon.png" }, worker);
  await worker.push(PUSH);
  const [shown] = worker.shown;
  assert.deepEqual([shown.title, shown.body, shown.tag, shown.icon], ["Clinic", "You have a new message.", "ward", "/icon.png"]);
  assert.deepEqual(shown.data, { channel: "ward", message: "m_1", link: undefined });
  assert.equal(worker.badge, 3);
  assert.equal(shown.silent, undefined);
  await worker.push({ ...PUSH, sound: undefined });
  assert.equal(worker.shown[1].silent, true);
});

test("a silent one only clears, and one that cannot be read still shows something", async () => {
  const worker = scope();
  handlePushes({}, worker);
  await worker.push(PUSH);
  await worker.push({ silent: true, badge: 0, collapse_key: "ward" });
  assert.deepEqual([worker.shown.length, worker.closed, worker.badge], [1, 1, undefined]);
  await worker.tell("push", { data: { json: () => JSON.parse("{") } });
  assert.equal(worker.shown.at(-1).title, "New message");
});

test("a click focuses the page that is open and tells it the channel", async () => {
  const said = [];
  const page = (url, focused) => ({
    url: `https://app.example${url}`,
    focused,
    focus: async () => {
      said.push(["focus", url]);
      throw new Error("Not allowed to focus a window.");
    },
    postMessage: (data) => said.push([data, url]),
  });
  const worker = scope([page("/news", true), page("/chat?one"), page("/chat?two", true)]);
  handlePushes({}, worker);
  await worker.click({ channel: "ward", message: "m_1" });
  const told = { type: "tidings.open", channel: "ward", message: "m_1" };
  assert.deepEqual(said, [[told, "/chat?two"], ["focus", "/chat?two"]]);
  assert.deepEqual(worker.opened, []);
  const around = browser();
  const opened = [];
  const end = onPushOpen((one) => opened.push(one), around);
  around.say(told);
  around.say({ type: "other" });
  end();
  around.say(told);
  assert.deepEqual(opened, [{ channel: "ward", message: "m_1" }]);
});

test("without a page a click opens one: the link, the app's own, or the one that the page understands", async () => {
  for (const [data, options, url] of [
    [{ channel: "ward", link: "https://a.example/w" }, {}, "https://a.example/w"],
    [{ channel: "ward" }, { open: (channel) => `/chat/${channel}` }, "/chat/ward"],
    [{ channel: "ward", message: "m_1" }, {}, "./?tidings-channel=ward&tidings-message=m_1"],
  ]) {
    const worker = scope([{ url: "https://app.example/news", focused: true }]);
    handlePushes(options, worker);
    await worker.click(data);
    assert.deepEqual(worker.opened, [url]);
  }
  const opened = [];
  onPushOpen((one) => opened.push(one), { ...browser(), location: { search: "?tidings-channel=ward" } });
  assert.deepEqual(opened, [{ channel: "ward", message: undefined }]);
});

test("when the browser exchanges its subscription pages are told", async () => {
  const said = [];
  const worker = scope([{ postMessage: (data) => said.push(data) }]);
  handlePushes({}, worker);
  await worker.tell("pushsubscriptionchange", { oldSubscription: { options: { userVisibleOnly: true } } });
  assert.deepEqual([worker.resubscribed, said], [{ userVisibleOnly: true }, [{ type: "tidings.resubscribe" }]]);
});
