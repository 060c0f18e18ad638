/**
 * A value that tells when it has changed. `get()` is immutable: a change is another object, so it fits React's
 * `useSyncExternalStore`, Vue's `shallowRef` and Svelte's stores as it is.
 * @template T
 * @typedef {{get(): T, subscribe(fn: (value: T) => void): () => void}} Readable
 */

/** Changes in quick succession are told once in this time, the first of them at once: one frame of a screen. */
const FRAME_MS = 16;

/**
 * @template T
 * @implements {Readable<T>}
 */
export class Value {
  /** @type {Set<(value: T) => void>} */ #readers = new Set();
  /** @type {(() => T) | null} */ #make = null;
  #value;
  #waiting = false;
  #told = 0;
  /** Called when the first reader comes and when the last one goes. @type {((used: boolean) => void) | undefined} */
  onUsed;

  /** @param {T} value */
  constructor(value) {
    this.#value = value;
  }

  get() {
    if (this.#make) {
      this.#value = this.#make();
      this.#make = null;
    }
    return this.#value;
  }

  /** @param {(value: T) => void} fn */
  subscribe(fn) {
    const reader = (/** @type {T} */ value) => fn(value);
    this.#readers.add(reader);
    if (this.#readers.size === 1) this.onUsed?.(true);
    fn(this.get());
    return () => {
      if (this.#readers.delete(reader) && !this.#readers.size) this.onUsed?.(false);
    };
  }

  /** @param {T} value */
  set(value) {
    if (!this.#make && Object.is(value, this.#value)) return;
    this.#make = null;
    this.#value = value;
    this.#changed();
  }

  /** The next `get` makes the value: what nobody looks at costs nothing. @param {() => T} make */
  lazily(make) {
    this.#make = make;
    this.#changed();
  }

  #changed() {
    if (this.#waiting || !this.#readers.size) return;
    this.#waiting = true;
    const wait = this.#told + FRAME_MS - Date.now();
    if (wait > 0) setTimeout(() => this.#tell(), wait);
    else queueMicrotask(() => this.#tell());
  }

  #tell() {
    this.#waiting = false;
    this.#told = Date.now();
    const value = this.get();
    for (const reader of [...this.#readers]) reader(value);
  }
}
