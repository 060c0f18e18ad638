/**
 * What outlives a reload, in one transaction each time: positions and mark, the outbox, the newest messages of each
 * channel, what the channel list shows, drafts.
 *
 * @typedef {object} Stored
 * @property {Record<string, any>} meta `device`, `user`, `mark`
 * @property {Map<string, {seq: number, epoch?: string}>} positions
 * @property {Map<string, any>} outbox by key, oldest first
 * @property {Map<string, any>} channels
 * @property {Map<string, string>} drafts
 *
 * @typedef {object} Changes
 * @property {Map<string, any>} meta
 * @property {Map<string, any>} positions undefined: gone
 * @property {Map<string, any>} outbox undefined: gone
 * @property {Map<string, any>} channels undefined: gone
 * @property {Map<string, any>} drafts
 * @property {boolean} [wipe] first, all messages of all channels go
 * @property {Array<{channel: string, seq: number, message?: any, merge?: (old: any) => any, drop?: boolean}>} messages
 *   `merge` changes one that is there; `drop`: all of the channel up to `seq`
 *
 * @typedef {object} Storage
 * @property {"indexeddb" | "memory"} kind
 * @property {() => Promise<Stored>} load
 * @property {(changes: Changes) => Promise<void>} save all of it or nothing
 * @property {(channel: string, limit: number) => Promise<any[]>} messages the newest, ascending
 * @property {() => Promise<void>} clear
 * @property {() => void} close
 */

const VERSION = 1;
/** Messages that are kept of a channel. */
export const CACHED = 200;
const STORES = /** @type {const} */ (["meta", "positions", "outbox", "channels", "drafts"]);

/** @returns {Changes} */
export const noChanges = () => ({
  wipe: false,
  meta: new Map(),
  positions: new Map(),
  outbox: new Map(),
  channels: new Map(),
  drafts: new Map(),
  messages: [],
});

/** @returns {Storage} */
export function memoryStorage() {
  return {
    kind: "memory",
    load: async () => ({ meta: {}, positions: new Map(), outbox: new Map(), channels: new Map(), drafts: new Map() }),
    save: async () => {},
    messages: async () => [],
    clear: async () => {},
    close: () => {},
  };
}

/**
 * @param {IDBFactory} factory
 * @param {string} name of the database: one for each user of each app
 * @returns {Promise<Storage>} rejected where there is no IndexedDB, or it may not be used
 */
export async function indexedStorage(factory, name) {
  const opening = factory.open(name, VERSION);
  opening.onupgradeneeded = () => {
    const db = opening.result;
    // What another version has kept is not worth guessing at: it is all on the server. (There is no other version yet.)
    for (const store of [...db.objectStoreNames]) db.deleteObjectStore(store);
    for (const store of STORES) db.createObjectStore(store);
    db.createObjectStore("messages");
  };
  opening.onblocked = () => {};
  const db = await done(opening);
  // Somebody deletes it, or opens it with a newer version of this library: let go.
  db.onversionchange = () => db.close();

  return {
    kind: "indexeddb",
    async load() {
      const tx = db.transaction([...STORES]);
      const read = await Promise.all(
        STORES.map(async (store) => {
          const at = tx.objectStore(store);
          const [keys, values] = await Promise.all([done(at.getAllKeys()), done(at.getAll())]);
          return new Map(keys.map((key, place) => [String(key), values[place]]));
        }),
      );
      const [meta, positions, outbox, channels, drafts] = read;
      const oldest = new Map([...outbox].sort(([, a], [, b]) => a.order - b.order));
      return { meta: Object.fromEntries(meta), positions, outbox: oldest, channels, drafts };
    },
    save(changes) {
      return new Promise((resolve, reject) => {
        const tx = db.transaction([...STORES, "messages"], "readwrite", { durability: "relaxed" });
        tx.oncomplete = () => resolve();
        // Not at `error`, which comes before it: the reason is known only here.
        tx.onabort = () => reject(tx.error ?? new Error("The transaction was aborted."));
        const messages = tx.objectStore("messages");
        if (changes.wipe) messages.clear();
        for (const store of STORES) {
          const at = tx.objectStore(store);
          for (const [key, value] of changes[store]) value === undefined ? at.delete(key) : at.put(value, key);
        }
        for (const { channel, seq, message, merge, drop } of changes.messages) {
          const key = [channel, seq];
          if (drop) messages.delete(IDBRange(factory, [channel, 0], key));
          else if (message) messages.put(message, key);
          else if (merge) {
            const found = messages.get(key);
            found.onsuccess = () => found.result && messages.put(merge(found.result), key);
          }
        }
      });
    },
    async messages(channel, limit) {
      const at = db.transaction("messages").objectStore("messages");
      /** @type {any[]} */ const found = [];
      await new Promise((resolve, reject) => {
        const cursor = at.openCursor(IDBRange(factory, [channel, 0], [channel, Infinity]), "prev");
        cursor.onerror = () => reject(cursor.error);
        cursor.onsuccess = () => {
          const row = cursor.result;
          if (!row || found.length >= limit) return resolve(undefined);
          found.push(row.value);
          row.continue();
        };
      });
      return found.reverse();
    },
    async clear() {
      db.close();
      await done(factory.deleteDatabase(name));
    },
    close: () => db.close(),
  };
}

/** @param {any} factory @param {any} from @param {any} to */
function IDBRange(factory, from, to) {
  // Tests bring a factory of their own, and its ranges with it.
  const ranges = factory.KeyRange ?? globalThis.IDBKeyRange;
  return ranges.bound(from, to);
}

/**
 * @template T
 * @param {IDBRequest<T>} request
 * @returns {Promise<T>}
 */
function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error ?? new Error("IndexedDB refused."));
  });
}

/** Whether a failure means that the disk, or this site's part of it, is full. @param {any} error */
export const isFull = (error) => error?.name === "QuotaExceededError";

/**
 * The part of changes that only takes away, the cached messages with it, and needs no room.
 * @param {Changes} changes
 * @returns {Changes}
 */
export function removals(changes) {
  const gone = noChanges();
  gone.wipe = true;
  for (const store of STORES) for (const [key, value] of changes[store]) if (value === undefined) gone[store].set(key, value);
  return gone;
}

/**
 * Changes that were not stored, and those that came after them. Messages are left out, and with them all that are cached:
 * what lies between would be missing.
 * @param {Changes} before
 * @param {Changes} after
 * @returns {Changes}
 */
export function together(before, after) {
  const both = noChanges();
  both.wipe = true;
  for (const store of STORES) both[store] = new Map([...before[store], ...after[store]]);
  both.messages = after.messages;
  return both;
}
