export { Channel } from "./channel.js";
export { Client } from "./client.js";
export { TidingsError } from "./errors.js";
export { Value } from "./readable.js";
export { memoryStorage } from "./storage.js";
