// OpenAI's client for Node: chat, stream, tools, responses, errors. Reports as checks.py does.
import OpenAI from "openai";

const { AFD_URL, AFD_MODEL: model, AFD_API_KEY: apiKey = "none" } = process.env;
const client = new OpenAI({ baseURL: `${AFD_URL}/v1`, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 } },
  required: ["city"],
  additionalProperties: false,
};
const tool = { type: "function", function: { name: "get_weather", parameters } };

async function check(name, run) {
  let report;
  try {
    report = { check: name, ok: true, shown: String(await run()).slice(0, 200) };
  } catch (error) {
    report = { check: name, ok: false, shown: String(error).slice(0, 400) };
  }
  console.log(JSON.stringify(report));
}

await check("chat", async () => {
  const answer = await client.chat.completions.create({ model, messages, max_tokens: 24, temperature: 0 });
  return answer.choices[0].message.content;
});

await check("chat stream with usage", async () => {
  const options = { stream: true, stream_options: { include_usage: true } };
  const stream = await client.chat.completions.create({ model, messages, max_tokens: 24, ...options });
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  if (!usage?.completion_tokens) throw new Error("no usage");
  return text;
});

await check("a stream that is left early", async () => {
  const stream = await client.chat.completions.create({ model, messages, max_tokens: 500, stream: true });
  for await (const chunk of stream) if (chunk.choices[0]?.delta?.content) break;
  return "left";
});

await check("tool call, streamed by the client's own helper", async () => {
  const runner = client.chat.completions.stream({
    model, messages, tools: [tool], tool_choice: "required", max_tokens: 200,
  });
  const call = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0];
  JSON.parse(call.function.arguments);
  return `${call.function.name}(${call.function.arguments})`;
});

await check("responses stream", async () => {
  const stream = client.responses.stream({ model, input: messages, max_output_tokens: 24 });
  return (await stream.finalResponse()).output_text;
});

await check("errors are typed", async () => {
  try {
    await client.chat.completions.create({ model: "no-such-model", messages });
  } catch (error) {
    if (error instanceof OpenAI.NotFoundError) return error.message;
    throw error;
  }
  throw new Error("no error");
});
