// Notifications when no page is open: Web Push, and what the user wants to be told of. A module of its own, so that pages
// which do without do not load it. The other half runs in the service worker: push-worker.js.
import { TidingsError } from "./errors.js";

/**
 * @typedef {object} PushState
 * @property {boolean} supported whether this browser can (on iOS only web apps on the home screen can)
 * @property {"default" | "denied" | "granted"} permission what the person has said to the browser
 * @property {boolean} subscribed whether this browser would be woken
 */

const KEY = "/v1/push/webpush-key";
const PATIENCE_MS = 20_000;

/** The surroundings, so that tests can be others. @returns {any} */
const here = () => globalThis;

/** @param {any} around */
const supported = (around) => Boolean(around.navigator?.serviceWorker && around.PushManager && around.Notification);

/**
 * @typedef {object} PushOptions
 * @property {string} serviceWorker the address of your service worker, which imports push-worker.js
 * @property {string} [scope] the pages that it is for, where those are not the ones below its own address
 * @property {string} [language] of what is shown
 * @property {number} [timeout_ms] how long the browser may take (20,000): without its push service some try for ever
 */

/**
 * Whether there is anything to offer: this browser can, and the app has a Web Push provider. Asks the server, and nobody else.
 * @param {any} client
 * @param {any} [around]
 * @returns {Promise<boolean>}
 */
export async function pushOffered(client, around = here()) {
  if (!supported(around)) return false;
  try {
    await client.request("GET", KEY);
    return true;
  } catch (error) {
    if (/** @type {TidingsError} */ (error).code === "not_found") return false;
    throw error;
  }
}

/**
 * Where things stand; asks nobody for anything.
 * @param {any} [around]
 * @returns {Promise<PushState>}
 */
export async function pushState(around = here()) {
  if (!supported(around)) return { supported: false, permission: "denied", subscribed: false };
  const registration = await around.navigator.serviceWorker.getRegistration();
  const subscription = await registration?.pushManager.getSubscription();
  return { supported: true, permission: around.Notification.permission, subscribed: Boolean(subscription) };
}

/**
 * Have this browser woken. Call it from a click: browsers ask the person only then.
 * @param {any} client a Client that has started
 * @param {PushOptions} options
 * @param {any} [around]
 * @returns {Promise<PushState>} rejected with TidingsError: `not_supported`, `not_allowed`, `not_found` without a Web Push
 *   provider, `push_failed` where the browser cannot (its push service is not reached, say), or what the server refuses
 */
export async function subscribePush(client, options, around = here()) {
  if (around.isSecureContext === false) throw new TidingsError("not_supported", "Browsers have notifications only for pages that come over https.");
  if (!supported(around)) throw new TidingsError("not_supported", "This browser has no notifications for pages like this.");
  // A person who has said yes is not asked again: some browsers refuse to ask outside of a click.
  const permission = around.Notification.permission === "granted" ? "granted" : await around.Notification.requestPermission();
  if (permission !== "granted") throw new TidingsError("not_allowed", "The person has not allowed notifications.");
  const key = await client.request("GET", KEY);
  const { user, device } = known(client);
  const work = within(subscribed(options, key.public_key, around), options.timeout_ms ?? PATIENCE_MS);
  const subscription = await work.catch((/** @type {any} */ error) => {
    if (error instanceof TidingsError) throw error;
    if (error?.name === "NotAllowedError") throw new TidingsError("not_allowed", "The browser has not allowed notifications.");
    throw new TidingsError("push_failed", `The browser could not subscribe: ${error?.message ?? error}`, { retry: "later" });
  });
  const { language } = options;
  const body = { provider: key.provider, subscription: plain(subscription), ...(language ? { language } : {}) };
  await client.request("PUT", tokenPath(user, device), { body });
  return pushState(around);
}

/** @param {PushOptions} options @param {string} key @param {any} around */
async function subscribed({ serviceWorker, scope }, key, around) {
  const made = await around.navigator.serviceWorker.register(serviceWorker, { type: "module", ...(scope ? { scope } : {}) });
  // `ready` would wait for ever.
  if (made?.scope && !around.location?.href?.startsWith(made.scope)) {
    throw new TidingsError("push_failed", `The service worker is for pages below ${made.scope} and not for this one.`);
  }
  const registration = await around.navigator.serviceWorker.ready;
  const wanted = bytesOf(key);
  let subscription = await registration.pushManager.getSubscription();
  if (subscription && !same(subscription.options?.applicationServerKey, wanted)) {
    // Made for a key that the app no longer has: nothing would arrive.
    await subscription.unsubscribe();
    subscription = null;
  }
  return subscription ?? registration.pushManager.subscribe({ userVisibleOnly: true, applicationServerKey: wanted });
}

/**
 * Tell the server of this browser's subscription, if it has one: at each start of a page, since browsers exchange subscriptions
 * and servers forget those that have ended; and as long as the page lives, when the browser exchanges it. Asks nobody.
 * @param {any} client a Client that has connected
 * @param {PushOptions} options as with subscribePush
 * @param {any} [around]
 * @returns {Promise<PushState>} rejected as that of subscribePush
 */
export async function keepPush(client, options, around = here()) {
  const tell = async () => {
    const state = await pushState(around);
    return state.subscribed && state.permission === "granted" ? subscribePush(client, options, around) : state;
  };
  around.navigator?.serviceWorker?.addEventListener("message", (/** @type {any} */ { data }) => {
    // What fails now is told at the next start.
    if (data?.type === "tidings.resubscribe") tell().catch(() => {});
  });
  return tell();
}

/**
 * Wake this browser no more: when somebody signs out, or switches it off.
 * @param {any} client
 * @param {any} [around]
 */
export async function unsubscribePush(client, around = here()) {
  const registration = await around.navigator?.serviceWorker?.getRegistration();
  const subscription = await registration?.pushManager.getSubscription();
  const { user, device } = known(client);
  try {
    await client.request("DELETE", tokenPath(user, device));
  } catch (error) {
    if (/** @type {TidingsError} */ (error).code !== "not_found") throw error;
  }
  await subscription?.unsubscribe();
  return pushState(around);
}

/**
 * Hear of clicks on notifications while a page is open, and of the one that opened this page.
 * @param {(opened: {channel: string, message?: string}) => void} fn
 * @param {any} [around]
 * @returns {() => void} ends it
 */
export function onPushOpen(fn, around = here()) {
  const heard = (/** @type {any} */ { data }) => {
    if (data?.type === "tidings.open") fn({ channel: data.channel, message: data.message });
  };
  around.navigator?.serviceWorker?.addEventListener("message", heard);
  const asked = new URLSearchParams(around.location?.search ?? "");
  const channel = asked.get("tidings-channel");
  if (channel) fn({ channel, message: asked.get("tidings-message") ?? undefined });
  return () => around.navigator?.serviceWorker?.removeEventListener("message", heard);
}

/**
 * What the user wants to be told of: on all devices, on this one (`{device: client.device}`), in one channel.
 * @param {any} client
 */
export function preferences(client) {
  const own = () => `/v1/users/${encodeURIComponent(known(client).user)}/notifications`;
  const of = (/** @type {string} */ id) => `/v1/channels/${encodeURIComponent(id)}/notifications`;
  return {
    /** @param {{device?: string}} [query] @returns {Promise<any>} */
    get: (query = {}) => client.request("GET", own(), { query }),
    /** Replace them. @param {any} said `{level, quiet_hours, snoozed_until, language}` @param {{device?: string}} [query] */
    set: (said, query = {}) => client.request("PUT", own(), { query, body: said }),
    /** @param {string} id @param {{device?: string}} [query] @returns {Promise<any>} */
    channel: (id, query = {}) => client.request("GET", of(id), { query }),
    /** @param {string} id @param {"all" | "mentions" | "none" | null} level @param {{device?: string}} [query] */
    setChannel: (id, level, query = {}) => client.request("PUT", of(id), { query, body: { level } }),
  };
}

/** @param {any} client @returns {{user: string, device: string}} */
function known({ user, device }) {
  if (!user || !device) throw new TidingsError("not_connected", "The client has not been connected yet.", { retry: "later" });
  return { user, device };
}

/** @template T @param {Promise<T>} work @param {number} ms @returns {Promise<T>} */
function within(work, ms) {
  /** @type {any} */ let timer;
  const late = new Promise((_, reject) => {
    const error = new TidingsError("push_failed", "The browser has not reached its push service in time.", { retry: "later" });
    timer = setTimeout(() => reject(error), ms);
  });
  return Promise.race([work, /** @type {Promise<never>} */ (late)]).finally(() => clearTimeout(timer));
}

/** @param {string} user @param {string} device */
const tokenPath = (user, device) => `/v1/users/${encodeURIComponent(user)}/devices/${encodeURIComponent(device)}/push`;

/** @param {any} subscription */
function plain(subscription) {
  const { endpoint, keys } = subscription.toJSON();
  return { endpoint, keys: { p256dh: keys.p256dh, auth: keys.auth } };
}

/** @param {string} text base64url @returns {Uint8Array} */
function bytesOf(text) {
  const padded = text.replaceAll("-", "+").replaceAll("_", "/");
  return Uint8Array.from(atob(padded), (character) => character.charCodeAt(0));
}

/** @param {ArrayBuffer | null | undefined} made @param {Uint8Array} wanted */
function same(made, wanted) {
  if (!made) return false;
  const bytes = new Uint8Array(made);
  return bytes.length === wanted.length && bytes.every((byte, at) => byte === wanted[at]);
}
