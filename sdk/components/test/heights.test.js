import assert from "node:assert/strict";
import { test } from "node:test";

import { Heights } from "../src/heights.js";

/** The same, added up one by one. @param {number[]} sizes */
const plain = (sizes) => ({
  top: (/** @type {number} */ place) => sizes.slice(0, place).reduce((sum, size) => sum + size, 0),
  find: (/** @type {number} */ top) => {
    let sum = 0;
    let place = 0;
    while (place < sizes.length && sum + sizes[place] < top) sum += sizes[place++];
    return place;
  },
});

test("rows begin where those above them end, however they came and changed", () => {
  let seed = 7;
  const random = (/** @type {number} */ below) => (seed = (seed * 48271) % 2147483647) % below;
  const heights = new Heights(56);
  /** @type {number[]} */ let sizes = [];
  for (let turn = 0; turn < 300; turn += 1) {
    const place = random(sizes.length + 1);
    const count = turn % 3 ? 0 : random(Math.min(400, sizes.length - place) + 1);
    const come = Array.from({ length: random(300) }, () => (random(4) ? 20 + random(200) : undefined));
    heights.replace(place, count, come);
    sizes = [...sizes.slice(0, place), ...come.map((height) => height ?? 56), ...sizes.slice(place + count)];
    if (sizes.length) {
      const one = random(sizes.length);
      sizes[one] = 1 + random(300);
      heights.set(one, sizes[one]);
    }
    const { top, find } = plain(sizes);
    assert.equal(heights.top(), top(sizes.length));
    for (const at of [0, sizes.length, random(sizes.length + 1), 256, 255, 257]) if (at <= sizes.length) assert.equal(heights.top(at), top(at));
    for (const at of [-1, 0, 1, random(heights.top() + 1), heights.top(), heights.top() + 1]) assert.equal(heights.find(at), find(at));
  }
});
