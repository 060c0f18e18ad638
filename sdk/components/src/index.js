import { ChannelList } from "./channel_list.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { MessageList } from "./message_list.js";
import { Thread } from "./thread.js";

export { LANGUAGES, Words } from "./strings.js";
export { ChannelList, Chat, Composer, MessageList, Thread };

/** Make the elements known to the page: `<tidings-chat>` and its parts. Calling it again does nothing. */
export function define() {
  const elements = {
    "tidings-chat": Chat,
    "tidings-channel-list": ChannelList,
    "tidings-message-list": MessageList,
    "tidings-composer": Composer,
    "tidings-thread": Thread,
  };
  for (const [name, element] of Object.entries(elements)) if (!customElements.get(name)) customElements.define(name, element);
}
