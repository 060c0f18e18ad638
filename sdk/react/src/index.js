import { createContext, createElement, useCallback, useContext, useEffect, useMemo, useSyncExternalStore } from "react";

/** @typedef {import("@tidings/client").Client} Client */
/** @typedef {import("@tidings/client").Channel} Channel */

const Context = createContext(/** @type {Client | null} */ (null));

/**
 * Gives the components below it a client. It is started here, and stopped by whoever made it.
 * @param {{client: Client, children?: any}} props
 */
export function TidingsProvider({ client, children }) {
  useEffect(() => {
    client.start();
  }, [client]);
  return createElement(Context.Provider, { value: client }, children);
}

/** The client of the nearest provider. @returns {Client} */
export function useClient() {
  const client = useContext(Context);
  if (!client) throw new Error("There is no <TidingsProvider> above this component.");
  return client;
}

/**
 * A value of the SDK as it is now; the component is rendered again when it changes.
 * @template T
 * @param {{get(): T, subscribe(fn: (value: T) => void): () => void}} value
 * @returns {T}
 */
export function useValue(value) {
  const subscribe = useCallback((/** @type {() => void} */ changed) => value.subscribe(() => changed()), [value]);
  const get = useCallback(() => value.get(), [value]);
  return useSyncExternalStore(subscribe, get, get);
}

/** Where the connection stands. */
export const useStatus = () => useValue(useClient().status);

/** The user's channels, the newest activity first. */
export const useChannels = () => useValue(useClient().channels);

/** Over all channels: `{total, mentions, channels}`. */
export const useUnread = () => useValue(useClient().unread);

/** A profile, fetched when it is first asked for. @param {string} id */
export const useUser = (id) => useValue(useClient().userOf(id));

/** Whether somebody is there; watched as long as the component is. @param {string} id */
export const usePresence = (id) => useValue(useClient().presence(id));

/**
 * A channel, open as long as the component is there: `{channel, state, summary}`. What can be done with it are methods of `channel`.
 * @param {string} id
 */
export function useChannel(id) {
  const client = useClient();
  const channel = useMemo(() => client.channel(id), [client, id]);
  useEffect(() => {
    channel.open();
    return () => channel.close();
  }, [channel]);
  return { channel, state: useValue(channel.state), summary: useValue(channel.summary) };
}

/**
 * The messages of a channel that are loaded, and how to load more: `{messages, loadBefore, loadAfter, state}`.
 * @param {string} id
 */
export function useMessages(id) {
  const { channel, state } = useChannel(id);
  const messages = useValue(channel.messages);
  return {
    messages,
    state,
    loadBefore: useCallback(() => channel.loadBefore(), [channel]),
    loadAfter: useCallback(() => channel.loadAfter(), [channel]),
  };
}

/** Who of the others types in a channel, and how many: `{users, count}`. @param {string} id */
export function useTyping(id) {
  const channel = useClient().channel(id);
  return { users: useValue(channel.typing), count: useValue(channel.typingCount) };
}

/** What is written in a channel and not sent: `[text, setText]`. @param {string} id */
export function useDraft(id) {
  const channel = useClient().channel(id);
  return /** @type {const} */ ([useValue(channel.draft), useCallback((/** @type {string} */ text) => channel.setDraft(text), [channel])]);
}
