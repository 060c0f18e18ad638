// What a service worker does with pushes of Tidings. A service worker of two lines:
//
//   import { handlePushes } from "/sdk/js/src/push-worker.js";
//   handlePushes({ open: (channel) => `/chat?channel=${channel}` });
//
// Registered as a module: `subscribePush` does.

/**
 * @typedef {object} PushOptions
 * @property {(channel: string, message?: string) => string} [open] where a click leads when no page is open
 * @property {string} [icon] of notifications
 * @property {string} [fallback] the text where a push has none
 */

/**
 * Show what arrives, and open what is clicked.
 * @param {PushOptions} [options]
 * @param {any} [worker] the service worker's global scope
 */
export function handlePushes(options = {}, worker = globalThis) {
  worker.addEventListener("push", (/** @type {any} */ event) => event.waitUntil(show(event.data, options, worker)));
  worker.addEventListener("notificationclick", (/** @type {any} */ event) => {
    event.notification.close();
    event.waitUntil(open(event.notification.data ?? {}, options, worker));
  });
  worker.addEventListener("pushsubscriptionchange", (/** @type {any} */ event) => event.waitUntil(renew(event, worker)));
}

/** @param {any} sent @param {PushOptions} options @param {any} worker */
async function show(sent, options, worker) {
  let push;
  try {
    push = sent?.json() ?? {};
  } catch {
    // Not of ours, or cut. Browsers insist that something is shown.
    push = {};
  }
  const { data = {}, badge, collapse_key: tag } = push;
  if (typeof badge === "number") await worker.navigator?.setAppBadge?.(badge || undefined)?.catch?.(() => {});
  if (push.silent) {
    // What was read elsewhere need not stand here.
    for (const one of await worker.registration.getNotifications({ tag })) one.close();
    return;
  }
  await worker.registration.showNotification(push.title || options.fallback || "New message", {
    body: push.body || undefined,
    tag,
    // A later one of the channel takes the place of this one, and is heard all the same.
    renotify: Boolean(tag),
    silent: push.sound ? undefined : true,
    icon: options.icon,
    data: { ...data, link: push.link },
  });
}

/** @param {any} data @param {PushOptions} options @param {any} worker */
async function open({ channel, message, link }, options, worker) {
  const pages = await worker.clients.matchAll({ type: "window", includeUncontrolled: true });
  // Other pages of this address would not know what to do with it.
  const ours = pages.filter((/** @type {any} */ one) => one.url.startsWith(worker.registration.scope));
  const page = ours.find((/** @type {any} */ one) => one.focused) ?? ours[0];
  if (page) {
    page.postMessage({ type: "tidings.open", channel, message });
    // Refused where the browser has the click for something else: the page is at the channel all the same.
    await page.focus().catch(() => {});
    return;
  }
  const query = new URLSearchParams({ "tidings-channel": channel ?? "", ...(message ? { "tidings-message": message } : {}) });
  await worker.clients.openWindow(link ?? options.open?.(channel, message) ?? `./?${query}`);
}

/** The browser has exchanged the subscription: pages tell the server, those that are open now or the next one. @param {any} event @param {any} worker */
async function renew(event, worker) {
  const { options } = event.oldSubscription ?? {};
  if (options && !event.newSubscription) await worker.registration.pushManager.subscribe(options);
  for (const page of await worker.clients.matchAll({ type: "window", includeUncontrolled: true })) {
    page.postMessage({ type: "tidings.resubscribe" });
  }
}
