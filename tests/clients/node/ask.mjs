// Asks about a picture with the `openai` package for JavaScript: whole, streamed, as JSON, by the newer endpoint, and wrongly.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const [baseURL, model, file] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 0 });
const url = `data:image/png;base64,${readFileSync(file).toString("base64")}`;
const text = "What is in the image?";
const messages = [{ role: "user", content: [{ type: "image_url", image_url: { url } }, { type: "text", text }] }];
const told = {};

const whole = await client.chat.completions.create({ model, messages });
told.whole = whole.choices[0].message.content;

let streamed = "";
let pieces = 0;
const stream = await client.chat.completions.create({
  model,
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  const delta = chunk.choices[0]?.delta?.content;
  if (delta) {
    streamed += delta;
    pieces += 1;
  }
  if (chunk.usage) told.tokens = chunk.usage.completion_tokens;
}
Object.assign(told, { streamed, pieces });

const schema = {
  type: "object",
  properties: { color: { enum: ["red", "green", "blue"] } },
  required: ["color"],
  additionalProperties: false,
};
const formed = await client.chat.completions.create({
  model,
  messages,
  response_format: { type: "json_schema", json_schema: { name: "shape", strict: true, schema } },
});
told.formed = JSON.parse(formed.choices[0].message.content);

const input = [
  { role: "user", content: [{ type: "input_image", image_url: url, detail: "auto" }, { type: "input_text", text }] },
];
told.responses = (await client.responses.create({ model, input })).output_text;

try {
  await client.chat.completions.create({ model, messages, temperature: -1 });
} catch (error) {
  told.refused = { bad: error instanceof OpenAI.BadRequestError, param: error.param };
}
console.log(JSON.stringify(told));
