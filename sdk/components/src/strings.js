/**
 * Every word that a reader sees, by language. `{name}` is filled in; where there is a number, the form is chosen by
 * `Intl.PluralRules`. An element's `strings` property replaces any of them.
 * @typedef {Record<string, string | Record<string, string>>} Strings
 */

/** @type {Record<string, Strings>} */
export const LANGUAGES = {
  en: {
    conversations: "Conversations",
    search: "Search conversations",
    no_conversations: "No conversations yet",
    no_matches: "Nothing found",
    choose: "Choose a conversation",
    back: "Back to conversations",
    messages: "Messages",
    write: "Write a message",
    send: "Send",
    empty: "No messages yet. Say hello!",
    new: "New",
    today: "Today",
    yesterday: "Yesterday",
    edited: "edited",
    deleted: "This message was deleted",
    you: "You",
    latest: "Jump to latest",
    more_new: { one: "{count} new message", other: "{count} new messages" },
    unread: { one: "{count} unread message", other: "{count} unread messages" },
    typing_one: "{name} is typing …",
    typing_two: "{name} and {other} are typing …",
    typing_many: { one: "{count} person is typing …", other: "{count} people are typing …" },
    queued: "Waiting to be sent",
    sending: "Sending",
    sent: "Sent",
    delivered: "Delivered",
    read: "Read",
    failed: "Not sent: {reason}",
    retry: "Try again",
    discard: "Discard",
    react: "React with {emoji}",
    reactions: { one: "{emoji}: {count} person", other: "{emoji}: {count} people" },
    reply: "Reply",
    open_thread: "Open thread",
    thread: "Thread",
    close_thread: "Close thread",
    reply_in_thread: "Reply in thread",
    people: "People to mention",
    found: { one: "{count} person found", other: "{count} people found" },
    replies: { one: "{count} reply", other: "{count} replies" },
    edit: "Edit",
    delete: "Delete",
    actions: "Actions for the message of {name}",
    replying: "Reply to {name}",
    editing: "Edit your message",
    cancel: "Cancel",
    too_long: "The message is {over} characters too long.",
    frozen: "This conversation is closed for new messages.",
    left: "You are not in this conversation any more.",
    offline: "You are offline. What you write is sent when you are back.",
    connecting: "Connecting …",
    catching_up: "Catching up …",
    refused: "Disconnected: {reason}",
    online: "online",
    last_seen: "last seen {when}",
    members: { one: "{count} member", other: "{count} members" },
    attachment: "Attachment",
    loading: "Loading …",
    error: "This could not be loaded.",
  },
  de: {
    conversations: "Unterhaltungen",
    search: "Unterhaltungen durchsuchen",
    no_conversations: "Noch keine Unterhaltungen",
    no_matches: "Nichts gefunden",
    choose: "Wähle eine Unterhaltung",
    back: "Zurück zu den Unterhaltungen",
    messages: "Nachrichten",
    write: "Nachricht schreiben",
    send: "Senden",
    empty: "Noch keine Nachrichten. Sag hallo!",
    new: "Neu",
    today: "Heute",
    yesterday: "Gestern",
    edited: "bearbeitet",
    deleted: "Diese Nachricht wurde gelöscht",
    you: "Du",
    latest: "Zur neuesten Nachricht",
    more_new: { one: "{count} neue Nachricht", other: "{count} neue Nachrichten" },
    unread: { one: "{count} ungelesene Nachricht", other: "{count} ungelesene Nachrichten" },
    typing_one: "{name} schreibt …",
    typing_two: "{name} und {other} schreiben …",
    typing_many: { one: "{count} Person schreibt …", other: "{count} Personen schreiben …" },
    queued: "Wartet auf den Versand",
    sending: "Wird gesendet",
    sent: "Gesendet",
    delivered: "Zugestellt",
    read: "Gelesen",
    failed: "Nicht gesendet: {reason}",
    retry: "Erneut versuchen",
    discard: "Verwerfen",
    react: "Mit {emoji} reagieren",
    reactions: { one: "{emoji}: {count} Person", other: "{emoji}: {count} Personen" },
    reply: "Antworten",
    open_thread: "Thread öffnen",
    thread: "Thread",
    close_thread: "Thread schließen",
    reply_in_thread: "Im Thread antworten",
    people: "Personen zum Erwähnen",
    found: { one: "{count} Person gefunden", other: "{count} Personen gefunden" },
    replies: { one: "{count} Antwort", other: "{count} Antworten" },
    edit: "Bearbeiten",
    delete: "Löschen",
    actions: "Aktionen für die Nachricht von {name}",
    replying: "Antwort an {name}",
    editing: "Nachricht bearbeiten",
    cancel: "Abbrechen",
    too_long: "Die Nachricht ist {over} Zeichen zu lang.",
    frozen: "Diese Unterhaltung ist für neue Nachrichten geschlossen.",
    left: "Du bist nicht mehr in dieser Unterhaltung.",
    offline: "Du bist offline. Was du schreibst, wird gesendet, sobald du zurück bist.",
    connecting: "Verbinde …",
    catching_up: "Hole auf …",
    refused: "Getrennt: {reason}",
    online: "online",
    last_seen: "zuletzt da {when}",
    members: { one: "{count} Mitglied", other: "{count} Mitglieder" },
    attachment: "Anhang",
    loading: "Lädt …",
    error: "Das ließ sich nicht laden.",
  },
  ar: {
    conversations: "المحادثات",
    search: "البحث في المحادثات",
    no_conversations: "لا توجد محادثات بعد",
    no_matches: "لا توجد نتائج",
    choose: "اختر محادثة",
    back: "العودة إلى المحادثات",
    messages: "الرسائل",
    write: "اكتب رسالة",
    send: "إرسال",
    empty: "لا توجد رسائل بعد. ألقِ التحية!",
    new: "جديد",
    today: "اليوم",
    yesterday: "أمس",
    edited: "معدلة",
    deleted: "حُذفت هذه الرسالة",
    you: "أنت",
    latest: "الانتقال إلى الأحدث",
    more_new: { one: "رسالة جديدة", two: "رسالتان جديدتان", few: "{count} رسائل جديدة", other: "{count} رسالة جديدة" },
    unread: { one: "رسالة غير مقروءة", two: "رسالتان غير مقروءتين", few: "{count} رسائل غير مقروءة", other: "{count} رسالة غير مقروءة" },
    typing_one: "{name} يكتب …",
    typing_two: "{name} و{other} يكتبان …",
    typing_many: { other: "{count} يكتبون …" },
    queued: "بانتظار الإرسال",
    sending: "جارٍ الإرسال",
    sent: "أُرسلت",
    delivered: "وصلت",
    read: "قُرئت",
    failed: "لم تُرسل: {reason}",
    retry: "إعادة المحاولة",
    discard: "تجاهل",
    react: "تفاعل بـ {emoji}",
    reactions: { other: "{emoji}: {count}" },
    reply: "رد",
    open_thread: "فتح سلسلة الردود",
    thread: "سلسلة الردود",
    close_thread: "إغلاق سلسلة الردود",
    reply_in_thread: "الرد في السلسلة",
    people: "أشخاص يمكن ذكرهم",
    found: { one: "شخص واحد", two: "شخصان", few: "{count} أشخاص", other: "{count} شخصًا" },
    replies: { zero: "لا ردود", one: "رد واحد", two: "ردان", few: "{count} ردود", other: "{count} ردًا" },
    edit: "تعديل",
    delete: "حذف",
    actions: "إجراءات لرسالة {name}",
    replying: "رد على {name}",
    editing: "تعديل رسالتك",
    cancel: "إلغاء",
    too_long: "الرسالة أطول من المسموح بـ {over} حرفًا.",
    frozen: "أُغلقت هذه المحادثة أمام الرسائل الجديدة.",
    left: "لم تعد في هذه المحادثة.",
    offline: "أنت غير متصل. ستُرسل رسائلك عند عودتك.",
    connecting: "جارٍ الاتصال …",
    catching_up: "جارٍ التحديث …",
    refused: "انقطع الاتصال: {reason}",
    online: "متصل",
    last_seen: "آخر ظهور {when}",
    members: { one: "عضو واحد", two: "عضوان", few: "{count} أعضاء", other: "{count} عضوًا" },
    attachment: "مرفق",
    loading: "جارٍ التحميل …",
    error: "تعذر التحميل.",
  },
};

/** Words and formats of one language. */
export class Words {
  /** @param {string} lang such as `de-AT` @param {Strings} [own] */
  constructor(lang, own = {}) {
    this.lang = lang;
    const base = LANGUAGES[lang.split("-")[0].toLowerCase()];
    /** @type {Strings} */
    this.strings = { ...LANGUAGES.en, ...base, ...own };
    this.known = base !== undefined;
    this.plural = new Intl.PluralRules(this.known ? lang : "en");
    this.time = new Intl.DateTimeFormat(lang, { hour: "numeric", minute: "2-digit" });
    this.day = new Intl.DateTimeFormat(lang, { weekday: "long", day: "numeric", month: "long" });
    this.date = new Intl.DateTimeFormat(lang, { day: "numeric", month: "long", year: "numeric" });
    this.short = new Intl.DateTimeFormat(lang, { day: "numeric", month: "short" });
    this.number = new Intl.NumberFormat(lang);
  }

  /** @param {string} name @param {Record<string, any>} [values] */
  say(name, values = {}) {
    let text = this.strings[name] ?? name;
    if (typeof text !== "string") text = text[this.plural.select(values.count)] ?? text.other;
    return text.replace(/\{(\w+)\}/g, (whole, key) => {
      const value = values[key];
      return value === undefined ? whole : typeof value === "number" ? this.number.format(value) : String(value);
    });
  }

  /** A day as people call it. @param {Date} at @param {Date} [now] */
  sayDay(at, now = new Date()) {
    const days = Math.round((midnight(now) - midnight(at)) / 86_400_000);
    if (days === 0) return this.say("today");
    if (days === 1) return this.say("yesterday");
    return at.getFullYear() === now.getFullYear() ? this.day.format(at) : this.date.format(at);
  }

  /** When, in as few characters as a list has room for. @param {Date} at @param {Date} [now] */
  sayShort(at, now = new Date()) {
    return midnight(at) === midnight(now) ? this.time.format(at) : this.short.format(at);
  }
}

/** @param {Date} at */
const midnight = (at) => new Date(at.getFullYear(), at.getMonth(), at.getDate()).getTime();
