/** Everything that can be made one's own stands first, as a property with its default. docs/guides/theming.md lists them. */
const CSS = `
:host {
  --_accent: var(--tidings-accent, #0f766e);
  --_on-accent: var(--tidings-on-accent, #fff);
  --_ink: var(--tidings-ink, #17211f);
  --_soft: var(--tidings-ink-soft, #5a6764);
  --_paper: var(--tidings-paper, #fff);
  --_tint: var(--tidings-paper-tint, #f3f6f5);
  --_line: var(--tidings-line, #dfe5e3);
  --_mine: var(--tidings-bubble-mine, #d8f0ec);
  --_mine-ink: var(--tidings-bubble-mine-ink, #0e2b27);
  --_theirs: var(--tidings-bubble-theirs, #eef2f1);
  --_theirs-ink: var(--tidings-bubble-theirs-ink, #17211f);
  --_alert: var(--tidings-alert, #b42318);
  --_radius: var(--tidings-radius, 1.1rem);
  --_gap: var(--tidings-gap, 1rem);
  font: var(--tidings-font, 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif);
  color: var(--_ink); background: var(--_paper); display: block; contain: content; min-height: 0;
}
/* What it offers while one writes stands above it. */
:host(tidings-composer) { contain: layout style; }
:host([hidden]), [hidden] { display: none !important; }
@media (prefers-color-scheme: dark) { :host(:not([theme="light"])) { DARK } }
:host([theme="dark"]) { DARK }
*, *::before { box-sizing: border-box; }
button, input, textarea { font: inherit; color: inherit; }
button { cursor: pointer; border: 0; background: none; padding: 0; }
:focus-visible { outline: 2px solid var(--_accent); outline-offset: 2px; border-radius: .4rem; }
.icon { width: 1.25rem; height: 1.25rem; fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linecap: round; stroke-linejoin: round; flex: none; }
:host(:dir(rtl)) .icon-back, :host(:dir(rtl)) .icon-send, :host(:dir(rtl)) .icon-reply { transform: scaleX(-1); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.avatar { width: 2.5rem; height: 2.5rem; border-radius: 50%; display: grid; place-items: center; font-weight: 600; font-size: .85em; color: #fff; flex: none; position: relative; overflow: hidden; letter-spacing: .02em; }
.avatar img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: cover; }
.tint0 { background: #0f766e } .tint1 { background: #6d28d9 } .tint2 { background: #b45309 } .tint3 { background: #be185d }
.tint4 { background: #1d4ed8 } .tint5 { background: #4d7c0f } .tint6 { background: #a21caf } .tint7 { background: #9f1239 }
.round { width: 2.25rem; height: 2.25rem; border-radius: 50%; display: grid; place-items: center; color: var(--_soft); }
.round:hover { background: var(--_tint); color: var(--_ink); }
@media (forced-colors: active) {
  .bubble, .badge, .day span, .actions, .latest { border: 1px solid CanvasText; }
  .people li[aria-selected="true"], .channel[aria-current="true"], .reaction[aria-pressed="true"] { outline: 2px solid Highlight; outline-offset: -2px; }
  .dot.on::after { background: Highlight; forced-color-adjust: none; }
}
@media (prefers-reduced-motion: reduce) { *, *::before { animation: none !important; transition: none !important; scroll-behavior: auto !important; } }

/* the whole */
.chat { display: grid; grid-template-columns: minmax(16rem, 22rem) 1fr; height: 100%; min-height: 0; }
.side { border-inline-end: 1px solid var(--_line); min-height: 0; min-width: 0; display: flex; flex-direction: column; }
.talk { min-height: 0; min-width: 0; display: flex; flex-direction: column; }
.narrow .chat { grid-template-columns: 1fr; }
.narrow .side { border: 0; }
.narrow.open .side, .narrow:not(.open) .talk { display: none; }
.head { display: flex; align-items: center; gap: .75rem; padding: .6rem var(--_gap); border-bottom: 1px solid var(--_line); min-height: 3.75rem; }
.head .words { min-width: 0; flex: 1; }
.head h2 { font-size: 1rem; font-weight: 650; margin: 0; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.head p { margin: 0; font-size: .82rem; color: var(--_soft); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.banner { padding: .4rem var(--_gap); font-size: .85rem; background: var(--_tint); color: var(--_soft); text-align: center; border-bottom: 1px solid var(--_line); }
.banner.bad { color: var(--_alert); }
.choose { flex: 1; display: grid; place-items: center; color: var(--_soft); padding: 2rem; text-align: center; }
tidings-message-list, tidings-channel-list { flex: 1; min-height: 0; }

.thread { display: flex; flex-direction: column; height: 100%; min-height: 0; }
.aside-pane { min-width: 0; min-height: 0; display: flex; flex-direction: column; border-inline-start: 1px solid var(--_line); }
.aside-pane tidings-thread { flex: 1; min-height: 0; }
.threaded .chat { grid-template-columns: minmax(16rem, 20rem) 1fr minmax(18rem, 24rem); }
.threaded.middle .chat { grid-template-columns: minmax(16rem, 22rem) 1fr; }
.threaded.narrow .chat { grid-template-columns: 1fr; }
.threaded.middle .talk, .threaded.narrow .talk { display: none; }
.threaded.narrow .aside-pane { border: 0; }

/* channels */
.channels { height: 100%; display: flex; flex-direction: column; min-height: 0; }
.filter { padding: .75rem var(--_gap) .5rem; }
.filter input { width: 100%; border: 1px solid transparent; background: var(--_tint); border-radius: 2rem; padding: .5rem .9rem; }
.filter input::placeholder { color: var(--_soft); opacity: 1; }
.channels ul { list-style: none; margin: 0; padding: .25rem .5rem 1rem; overflow-y: auto; flex: 1; min-height: 0; }
.channel { width: 100%; display: flex; gap: .75rem; align-items: center; padding: .6rem .6rem; border-radius: .9rem; text-align: start; }
.channel:hover { background: var(--_tint); }
.channel[aria-current="true"] { background: color-mix(in srgb, var(--_accent) 13%, var(--_paper)); }
.channel .words { flex: 1; min-width: 0; }
.channel .top, .channel .below { display: flex; gap: .5rem; align-items: baseline; }
.channel .name { font-weight: 600; flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.channel time { font-size: .75rem; color: var(--_soft); flex: none; }
.channel .last { flex: 1; min-width: 0; color: var(--_soft); font-size: .86rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.channel .last.typing { color: var(--_accent); }
.channel.unread .last { color: var(--_ink); }
.badge { background: var(--_accent); color: var(--_on-accent); border-radius: 1rem; font-size: .72rem; font-weight: 650; min-width: 1.3rem; padding: .1rem .4rem; text-align: center; flex: none; }
.dot { position: relative; flex: none; }
.dot.on::after { content: ""; position: absolute; inset-inline-end: 0; bottom: 0; width: .75rem; height: .75rem; border-radius: 50%; background: #16a34a; border: 2px solid var(--_paper); }
.empty { color: var(--_soft); text-align: center; padding: 2rem 1rem; }

/* messages */
.messages { position: relative; height: 100%; }
.scroll { height: 100%; overflow-y: auto; overflow-anchor: none; padding: .5rem 0 .75rem; overscroll-behavior: contain; scrollbar-gutter: stable; }
.row { padding: 0 var(--_gap); }
.aside { position: absolute; inset-inline: 0; inset-block-start: 0; opacity: 0; pointer-events: none; }
.day { text-align: center; padding: 1rem 0 .6rem; }
.day span { font-size: .76rem; color: var(--_soft); background: var(--_tint); padding: .2rem .75rem; border-radius: 1rem; }
.fresh { display: flex; align-items: center; gap: .75rem; color: var(--_alert); font-size: .76rem; font-weight: 650; padding: .6rem var(--_gap); }
.fresh::before, .fresh::after { content: ""; flex: 1; height: 1px; background: currentColor; opacity: .35; }
.message { display: flex; gap: .6rem; align-items: flex-end; padding: .1rem 0; position: relative; }
.first .message { padding-top: .65rem; }
.message .face { width: 2rem; flex: none; }
.message .avatar { width: 2rem; height: 2rem; font-size: .7rem; }
.mine .message { flex-direction: row-reverse; }
.mine .face { display: none; }
.body { max-width: min(34rem, 78%); min-width: 0; display: flex; flex-direction: column; align-items: flex-start; }
.mine .body { align-items: flex-end; }
.author { font-size: .78rem; font-weight: 600; color: var(--_soft); padding: 0 .8rem .15rem; }
.bubble { background: var(--_theirs); color: var(--_theirs-ink); border-radius: var(--_radius); padding: .5rem .8rem; overflow-wrap: anywhere; white-space: pre-wrap; position: relative; }
.mine .bubble { background: var(--_mine); color: var(--_mine-ink); }
.row:not(.mine).last .bubble { border-end-start-radius: .3rem; }
.mine.last .bubble { border-end-end-radius: .3rem; }
.bubble { max-width: 100%; }
.mention { font-weight: 650; color: color-mix(in srgb, var(--_accent) 55%, currentColor); }
.mention.me { background: color-mix(in srgb, var(--_accent) 22%, transparent); color: inherit; border-radius: .35rem; padding: 0 .2rem; }
.bubble a { color: inherit; text-decoration: underline; text-underline-offset: 2px; }
.emoji .bubble { background: none; font-size: 2.4rem; line-height: 1.2; padding: .1rem .2rem; }
.gone .bubble { background: none; border: 1px dashed var(--_line); color: var(--_soft); font-style: italic; }
.quote { display: block; width: 100%; text-align: start; font-size: .86rem; border-inline-start: 3px solid var(--_accent); padding: .05rem .6rem; margin-bottom: .35rem; opacity: .85; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; max-width: 26rem; }
.quote b { display: block; font-weight: 600; }
.quote span { display: block; overflow: hidden; text-overflow: ellipsis; }
.meta { display: inline-flex; gap: .3rem; align-items: center; font-size: .7rem; color: var(--_soft); padding: .1rem .5rem 0; }
.meta .icon { width: .95rem; height: .95rem; stroke-width: 2.2; }
.meta .icon-ticks.is-read { color: var(--_accent); }
.failed .meta { color: var(--_alert); }
.failed .meta button { text-decoration: underline; padding: .25rem; min-height: 1.6rem; min-width: 1.6rem; }
.reactions { display: flex; flex-wrap: wrap; gap: .3rem; padding: .25rem .3rem 0; }
.reaction { border: 1px solid var(--_line); background: var(--_paper); border-radius: 1rem; font-size: .8rem; padding: .1rem .5rem; min-height: 1.6rem; }
.reaction[aria-pressed="true"] { border-color: var(--_accent); background: color-mix(in srgb, var(--_accent) 13%, var(--_paper)); }
.answers { display: inline-flex; gap: .35rem; align-items: center; min-height: 1.6rem; padding: .15rem .6rem; margin-top: .15rem; border-radius: 1rem; font-size: .8rem; font-weight: 600; color: var(--_accent); }
.answers:hover { background: var(--_tint); }
.answers .icon { width: 1rem; height: 1rem; }
.row.root { border-bottom: 1px solid var(--_line); padding-bottom: .75rem; }
.row.root + .row { padding-top: .5rem; }
.found .bubble { animation: found 1.6s ease-out; }
@keyframes found { 0%, 40% { box-shadow: 0 0 0 3px var(--_accent) } 100% { box-shadow: 0 0 0 3px transparent } }
.attachments { display: grid; gap: .4rem; margin-bottom: .3rem; }
.attachments img { display: block; max-width: 100%; max-height: 20rem; height: auto; border-radius: calc(var(--_radius) - .4rem); background: var(--_tint); }
.file { display: flex; gap: .6rem; align-items: center; text-decoration: none; }
.actions { position: absolute; inset-block-start: -.9rem; inset-inline-end: 2.5rem; display: flex; background: var(--_paper); border: 1px solid var(--_line); border-radius: 2rem; padding: .15rem; box-shadow: 0 2px 10px #0002; opacity: 0; pointer-events: none; z-index: 1; }
.mine .actions { inset-inline-end: auto; inset-inline-start: 2.5rem; }
.message:hover .actions, .message:focus-within .actions { opacity: 1; pointer-events: auto; }
.actions button { width: 1.9rem; height: 1.9rem; border-radius: 50%; display: grid; place-items: center; color: var(--_soft); font-size: 1rem; }
.actions button:hover { background: var(--_tint); color: var(--_ink); }
.actions .icon { width: 1.05rem; height: 1.05rem; }
@media (max-width: 26rem) { .actions { inset-inline-end: .25rem; } .mine .actions { inset-inline-start: .25rem; } }
.latest { position: absolute; inset-block-end: .9rem; inset-inline-end: 1.2rem; background: var(--_paper); border: 1px solid var(--_line); border-radius: 2rem; padding: .45rem .9rem; display: flex; gap: .4rem; align-items: center; font-size: .84rem; font-weight: 600; box-shadow: 0 4px 16px #0003; color: var(--_accent); }
.latest[hidden] { display: none; }
.typing-line { min-height: 1.4rem; padding: 0 calc(var(--_gap) + .2rem); font-size: .8rem; color: var(--_soft); }
.bouncing { display: inline-flex; gap: .2rem; margin-inline-end: .4rem; }
.bouncing i { width: .35rem; height: .35rem; border-radius: 50%; background: currentColor; animation: bounce 1.2s infinite; }
.bouncing i:nth-child(2) { animation-delay: .15s } .bouncing i:nth-child(3) { animation-delay: .3s }
@keyframes bounce { 0%, 60%, 100% { transform: none } 30% { transform: translateY(-.25rem) } }

/* composer */
.composer { padding: .5rem var(--_gap) .8rem; }
.field { display: flex; align-items: flex-end; gap: .4rem; background: var(--_tint); border: 1px solid transparent; border-radius: 1.5rem; padding: .25rem .3rem .25rem .9rem; }
:host(:dir(rtl)) .field { padding: .25rem .9rem .25rem .3rem; }
.field { position: relative; }
.people { position: absolute; inset-block-end: calc(100% + .4rem); inset-inline: 0; margin: 0; padding: .35rem; list-style: none; background: var(--_paper); border: 1px solid var(--_line); border-radius: var(--_radius); box-shadow: 0 6px 24px #0003; z-index: 2; max-height: 18rem; overflow-y: auto; }
.people li { display: flex; align-items: center; gap: .6rem; padding: .4rem .6rem; border-radius: .7rem; cursor: pointer; }
.people li[aria-selected="true"], .people li:hover { background: color-mix(in srgb, var(--_accent) 13%, var(--_paper)); }
.people .avatar { width: 1.9rem; height: 1.9rem; font-size: .68rem; }
.field:focus-within { border-color: var(--_accent); }
.field textarea { flex: 1; min-width: 0; border: 0; background: none; resize: none; padding: .5rem 0; max-height: 9rem; line-height: 1.4; outline: none; }
.field textarea::placeholder { color: var(--_soft); opacity: 1; }
.field .send { width: 2.4rem; height: 2.4rem; border-radius: 50%; background: var(--_accent); color: var(--_on-accent); display: grid; place-items: center; flex: none; }
.field .send[disabled] { background: transparent; color: var(--_soft); cursor: default; }
.context { display: flex; align-items: center; gap: .5rem; font-size: .85rem; color: var(--_soft); padding: .2rem .9rem .35rem; }
.context .words { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; border-inline-start: 3px solid var(--_accent); padding-inline-start: .6rem; }
.context b { color: var(--_ink); font-weight: 600; display: block; }
.problem { color: var(--_alert); font-size: .82rem; padding: .3rem .9rem 0; }
.closed { text-align: center; color: var(--_soft); padding: .6rem; }
`;
const DARK = `
  --_accent: var(--tidings-accent, #2dd4bf); --_on-accent: var(--tidings-on-accent, #06201d); --_ink: var(--tidings-ink, #e6ecea); --_soft: var(--tidings-ink-soft, #9fadaa);
  --_paper: var(--tidings-paper, #141a19); --_tint: var(--tidings-paper-tint, #1e2625); --_line: var(--tidings-line, #2f3a38);
  --_mine: var(--tidings-bubble-mine, #134e48); --_mine-ink: var(--tidings-bubble-mine-ink, #e6fffb);
  --_theirs: var(--tidings-bubble-theirs, #232d2b); --_theirs-ink: var(--tidings-bubble-theirs-ink, #e6ecea); --_alert: var(--tidings-alert, #fda29b);
`;

/** @type {CSSStyleSheet | undefined} */ let sheet;

/** One sheet for all elements of a page. */
export function styles() {
  if (!sheet) {
    sheet = new CSSStyleSheet();
    sheet.replaceSync(CSS.replaceAll("DARK", DARK));
  }
  return sheet;
}
