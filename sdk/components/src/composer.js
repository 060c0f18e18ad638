import { h, icon } from "./dom.js";
import { TidingsElement } from "./element.js";
import { Mentions } from "./mentions.js";

const LENGTH = 20_000;

/** Where messages are written. Tells `tidings-send`, which can be prevented, and `tidings-error`. */
export class Composer extends TidingsElement {
  /** @type {any} */ #channel;
  /** @type {any} */ #text;
  /** @type {any} */ #send;
  /** @type {any} */ #context;
  /** @type {any} */ #problem;
  /** @type {any} */ #about = null;
  /** @type {any} */ #mentions;

  begin() {
    const id = this.getAttribute("channel");
    this.#about = null;
    if (!id && !this.source) return this.root.replaceChildren();
    this.#channel = this.source ?? this.client.channel(id);
    this.#context = h("div", { class: "context", hidden: true });
    this.#problem = h("div", { class: "problem", role: "alert", hidden: true });
    this.#text = h("textarea", {
      rows: "1",
      "aria-label": this.getAttribute("hint") ?? this.say("write"),
      placeholder: this.getAttribute("hint") ?? this.say("write"),
      enterkeyhint: "send",
      dir: "auto",
      part: "input",
      oninput: () => this.#written(),
      onkeydown: (/** @type {KeyboardEvent} */ event) => this.#key(event),
      onblur: () => {
        this.#channel.setTyping(false);
        this.#mentions.close();
      },
      onclick: () => this.#mentions.look(),
    });
    this.#mentions = new Mentions(this, this.#channel, this.#text, () => this.#written());
    this.#send = h("button", { type: "submit", class: "send", part: "send", "aria-label": this.say("send"), title: this.say("send") }, icon("send"));
    const form = h(
      "form",
      {
        class: "composer",
        onsubmit: (/** @type {Event} */ event) => {
          event.preventDefault();
          this.#submit();
        },
      },
      this.#context,
      h("div", { class: "field" }, this.#mentions.list, this.#text, this.#send),
      this.#mentions.said,
      this.#problem,
    );
    const closed = h("p", { class: "composer closed", hidden: true });
    this.root.replaceChildren(form, closed);
    this.#text.value = this.#channel.draft.get();
    this.watch(this.#channel.draft, (/** @type {string} */ draft) => {
      // A draft that was read from the disk, or written in another tab; not one's own words coming back.
      if (this.#about?.edit || this.root.activeElement === this.#text) return;
      this.#text.value = draft;
      this.#grow();
    });
    this.watch(this.#channel.state, (/** @type {any} */ { left, frozen }) => {
      form.hidden = !!(left || frozen);
      closed.hidden = !form.hidden;
      closed.textContent = left ? this.say("left") : frozen ? this.say("frozen") : "";
    });
    this.#grow();
  }

  focus() {
    this.#text?.focus();
  }

  /** Answer a message. @param {any} message */
  reply(message) {
    this.#set({ reply: message });
  }

  /** Change one's own message. @param {any} message */
  edit(message) {
    this.#set({ edit: message });
    this.#text.value = message.text;
    this.#mentions.keep(message.mentions ?? []);
    this.#grow();
  }

  /** @param {any} about */
  #set(about) {
    this.#about = about;
    this.#context.hidden = !about;
    const message = about?.reply ?? about?.edit;
    if (about) {
      const title = about.edit ? this.say("editing") : this.say("replying", { name: message.mine ? this.say("you") : this.nameOf(message.user) });
      this.#context.replaceChildren(
        h("div", { class: "words" }, h("b", {}, title), message.text || this.say("attachment")),
        h("button", { type: "button", class: "round", "aria-label": this.say("cancel"), onclick: () => this.#cancel() }, icon("close")),
      );
    }
    this.focus();
  }

  #cancel() {
    if (this.#about?.edit) this.#text.value = this.#channel.draft.get();
    this.#set(null);
    this.#grow();
  }

  #written() {
    const text = this.#text.value;
    if (!this.#about?.edit) this.#channel.setDraft(text);
    if (text) this.#channel.setTyping();
    else this.#channel.setTyping(false);
    this.#grow();
    this.#mentions.look();
  }

  #grow() {
    this.#text.style.height = "auto";
    this.#text.style.height = `${this.#text.scrollHeight}px`;
    const text = this.#text.value;
    const over = [...text].length - (this.client.limits.text_length ?? LENGTH);
    this.#problem.hidden = over <= 0;
    if (over > 0) this.#problem.textContent = this.say("too_long", { over });
    this.#send.disabled = !text.trim() || over > 0;
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    // While characters are being composed Enter chooses one.
    if (event.isComposing || event.keyCode === 229) return;
    if (this.#mentions.key(event)) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.#submit();
    } else if (event.key === "Escape" && this.#about) {
      event.preventDefault();
      this.#cancel();
    } else if (event.key === "ArrowUp" && !this.#text.value) {
      const own = this.#channel.messages.get().findLast((/** @type {any} */ one) => one.mine && one.seq && one.text && !one.deleted_at);
      if (own) {
        event.preventDefault();
        this.edit(own);
      }
    }
  }

  #submit() {
    const text = this.#text.value.trim();
    if (!text || this.#send.disabled) return;
    const { reply, edit } = this.#about ?? {};
    this.#channel.setTyping(false);
    if (edit) {
      const mentions = this.#mentions.in(text);
      if (text !== edit.text) this.#channel.edit(edit.id, { text, ...(mentions.length || edit.mentions?.length ? { mentions } : {}) }).catch((/** @type {any} */ error) => this.tell("error", { error }));
      return this.#cancel();
    }
    const mentions = this.#mentions.in(text);
    const message = { text, ...(mentions.length ? { mentions } : {}), ...(reply ? { reply_to: reply.id } : {}) };
    if (!this.tell("send", { channel: this.#channel.id, message })) return;
    this.#channel.send(message);
    this.#channel.setDraft("");
    this.#text.value = "";
    this.#mentions.forget();
    if (this.#about) this.#set(null);
    this.#grow();
  }
}
