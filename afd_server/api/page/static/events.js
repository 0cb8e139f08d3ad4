// Server-sent events of a fetch: EventSource can send neither a header nor a body.

/** The data of each event, parsed. Ends with the stream, or at [DONE]. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (unread + value).split("\n\n");
      unread = events.pop();
      for (const event of events) {
        const data = event.startsWith("data: ") ? event.slice(6) : "";
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What an answer that is no success says of itself. */
export async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}
