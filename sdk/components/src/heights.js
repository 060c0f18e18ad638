/** Rows whose heights are added up together: few enough to walk through, enough to skip many at once. */
const BLOCK = 256;

/**
 * How high each of many rows is, and where each begins, in px. Asking costs the square root of their number or so: a list of
 * 100,000 rows asks several times in every frame.
 */
export class Heights {
  /** What a row counts for until it has been measured. @type {number} */ #guess;
  /** @type {number[]} */ #sizes = [];
  /** @type {number[]} */ #blocks = [];

  /** @param {number} guess */
  constructor(guess) {
    this.#guess = guess;
  }

  get length() {
    return this.#sizes.length;
  }

  /** @param {number} place */
  at(place) {
    return this.#sizes[place];
  }

  /**
   * Rows go, and others come in their place.
   * @param {number} place @param {number} count how many go @param {(number | undefined)[]} heights of those that come, as far as they are known
   */
  replace(place, count, heights) {
    this.#sizes = [...this.#sizes.slice(0, place), ...heights.map((height) => height ?? this.#guess), ...this.#sizes.slice(place + count)];
    const { length } = this.#sizes;
    this.#blocks.length = Math.ceil(length / BLOCK);
    for (let block = Math.floor(place / BLOCK); block < this.#blocks.length; block += 1) {
      let sum = 0;
      for (let one = block * BLOCK; one < Math.min(length, (block + 1) * BLOCK); one += 1) sum += this.#sizes[one];
      this.#blocks[block] = sum;
    }
  }

  /** @param {number} place @param {number} height */
  set(place, height) {
    this.#blocks[Math.floor(place / BLOCK)] += height - this.#sizes[place];
    this.#sizes[place] = height;
  }

  /** Where a row begins; with no place, where the last one ends. @param {number} [place] */
  top(place = this.#sizes.length) {
    const block = Math.floor(place / BLOCK);
    let sum = 0;
    for (let one = 0; one < block; one += 1) sum += this.#blocks[one];
    for (let one = block * BLOCK; one < place; one += 1) sum += this.#sizes[one];
    return sum;
  }

  /** The row at a height: the first one that ends below it. The number of rows if none does. @param {number} top */
  find(top) {
    let sum = 0;
    let place = 0;
    for (let block = 0; block < this.#blocks.length && sum + this.#blocks[block] < top; block += 1) {
      sum += this.#blocks[block];
      place += BLOCK;
    }
    const { length } = this.#sizes;
    for (place = Math.min(place, length); place < length && sum + this.#sizes[place] < top; place += 1) sum += this.#sizes[place];
    return place;
  }
}
