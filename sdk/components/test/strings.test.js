import assert from "node:assert/strict";
import { test } from "node:test";

import { LANGUAGES, Words } from "../src/strings.js";

const holes = (/** @type {any} */ text) => [...JSON.stringify(text).matchAll(/\{(\w+)\}/g)].map(([, name]) => name);

for (const [lang, strings] of Object.entries(LANGUAGES)) {
  test(`${lang} says everything, in every number, with the same things filled in`, () => {
    assert.deepEqual(Object.keys(strings).sort(), Object.keys(LANGUAGES.en).sort());
    for (const [name, text] of Object.entries(strings)) {
      const english = LANGUAGES.en[name];
      assert.equal(typeof text, typeof english, name);
      for (const hole of holes(text)) assert.ok(holes(english).includes(hole), `${name}: {${hole}} is not known`);
      if (typeof text === "string") {
        assert.deepEqual(holes(text).sort(), holes(english).sort(), name);
        continue;
      }
      for (const form of Object.keys(text)) assert.ok(["zero", "one", "two", "few", "many", "other"].includes(form), `${name}: ${form}`);
      assert.ok(text.other, name);
    }
    const words = new Words(lang);
    for (const count of [0, 1, 2, 3, 11, 100]) for (const name of Object.keys(strings)) assert.ok(!/\{count\}/.test(words.say(name, { count, emoji: "x" })), name);
  });
}

test("one's own words replace those that are there, in their own numbers", () => {
  const words = new Words("de-AT", { replies: { one: "{count} Wort", other: "{count} Worte" } });
  assert.equal(words.say("replies", { count: 1 }), "1 Wort");
  assert.equal(words.say("replies", { count: 1234 }).replace(/\s/g, " "), "1 234 Worte");
  assert.equal(words.say("reply"), "Antworten");
});

test("a language that is not there is English, with its own numbers", () => {
  assert.equal(new Words("nl").say("replies", { count: 1234 }), "1.234 replies");
});
