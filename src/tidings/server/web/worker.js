// The demonstration's service worker, which lives on when its pages are closed. One for each person: its scope says whose.
import { handlePushes } from "/sdk/js/src/push-worker.js";

handlePushes({
  open: (channel) => `${self.registration.scope}&tidings-channel=${encodeURIComponent(channel)}`,
  icon: "/demo/icon.svg",
});
