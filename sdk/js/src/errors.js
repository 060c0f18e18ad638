/**
 * Everything that the SDK raises. `code` is one of the server's catalogue (docs/reference/problems.md) or one of the SDK's
 * own: `not_connected`, `timeout`, `outbox_full`, `closed`, `storage_failed`.
 */
export class TidingsError extends Error {
  /**
   * @param {string} code
   * @param {string} detail what happened, in a sentence
   * @param {{field?: string, bound?: number|string, retry?: string, retry_after_ms?: number, status?: number}} [more]
   */
  constructor(code, detail, more = {}) {
    super(`${code}: ${detail}`);
    this.name = "TidingsError";
    this.code = code;
    this.detail = detail;
    /** Path of what is wrong, such as `attachments[2].url`. */
    this.field = more.field;
    /** The limit that was hit. */
    this.bound = more.bound;
    /** `never`, or `later`: the same thing may succeed after `retry_after_ms`. */
    this.retry = more.retry ?? "never";
    this.retry_after_ms = more.retry_after_ms;
    /** HTTP status, where it came by HTTP. */
    this.status = more.status;
  }
}

/**
 * An `error` frame or a problem document as an error.
 * @param {any} problem
 * @param {number} [status]
 */
export const refusal = (problem, status) =>
  new TidingsError(problem.code ?? "internal", problem.detail ?? problem.title ?? "The request failed.", {
    ...problem,
    status,
  });
