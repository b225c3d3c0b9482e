import { describe, expect, test } from "bun:test";
import { createApp } from "../../src/api/app.ts";
import type { RenderInput } from "../../src/api/model-directory.ts";
import { CaravanError } from "../../src/errors.ts";
import { bytesOf, byteText, END, PYTHON_END, PYTHON_START } from "../tools/byte-text.ts";
import { MODEL, sayScript, scriptedModels } from "../tools/scripted-models.ts";

const user = { role: "user", content: "Weather in Rome?" };
const tool = (name: string) => ({
  type: "function",
  function: { name, description: "d", parameters: { type: "object", properties: {} } },
});
const tools = [tool("get_weather"), tool("add")];
const call = (id: string) => ({ id, type: "function", function: { name: "add", arguments: '{"a":1}' } });

interface Reply {
  choices: { message: { content: string | null; tool_calls?: unknown[] }; finish_reason: string }[];
  error: { code: string; param: string };
}

function setup(answer: string | number[], rendered?: (input: RenderInput) => void) {
  const script = typeof answer === "string" ? sayScript(answer) : { answer: () => answer };
  const models = scriptedModels(script, {
    text: {
      ...byteText,
      renderChat(input) {
        rendered?.(input);
        return byteText.renderChat(input);
      },
    },
  });
  const app = createApp({ models });
  return async (body: object): Promise<Reply> => {
    const response = await app.request("http://localhost/v1/chat/completions", {
      method: "POST",
      body: JSON.stringify({ model: MODEL, messages: [user], tools, ...body }),
    });
    return (await response.json()) as Reply;
  };
}

async function refusal(body: object): Promise<[string, string]> {
  const { error } = await setup("x")(body);
  return [error.code, error.param];
}

describe("tools reach the template", () => {
  test("as they were given, and calls and results of the history too", async () => {
    const seen: RenderInput[] = [];
    const chat = setup("ok", (input) => seen.push(input));
    await chat({
      messages: [
        user,
        { role: "assistant", content: null, tool_calls: [call("c1"), call("c2")] },
        { role: "tool", tool_call_id: "c1", content: "15C" },
        { role: "tool", tool_call_id: "c2", content: [{ type: "text", text: "2" }], name: "add" },
      ],
    });
    expect(seen[0]?.tools).toEqual(tools as never);
    expect(seen[0]?.messages).toEqual([
      user as never,
      { role: "assistant", content: "", tool_calls: [call("c1") as never, call("c2") as never] },
      { role: "tool", content: "15C", tool_call_id: "c1" },
      { role: "tool", content: "2", tool_call_id: "c2", name: "add" },
    ]);
  });

  test("but not with tool_choice none, and then a call is text", async () => {
    const seen: RenderInput[] = [];
    const reply = await setup("[add(a=1)]", (input) => seen.push(input))({ tool_choice: "none" });
    expect(seen[0]?.tools).toBeUndefined();
    expect(reply.choices[0]?.message.content).toBe("[add(a=1)]");
    expect(reply.choices[0]?.finish_reason).toBe("stop");
  });

  test("and a template that has no place for them refuses them by name", async () => {
    const chat = setup("x", () => {
      throw new CaravanError("unsupported_parameter", "no place", { param: "tools" });
    });
    expect((await chat({})).error).toMatchObject({ code: "unsupported_parameter", param: "tools" });
  });
});

describe("answers", () => {
  test("whose markers are control tokens become calls", async () => {
    const ids = [...bytesOf("I ask. "), PYTHON_START, ...bytesOf("[add(a=1)]"), PYTHON_END, END];
    const { choices } = await setup(ids)({});
    expect(choices[0]?.message).toMatchObject({
      content: "I ask. ",
      tool_calls: [{ type: "function", function: { name: "add", arguments: '{"a":1}' } }],
    });
    expect(choices[0]?.finish_reason).toBe("tool_calls");
  });

  test("that do not call anything stay text and finish with stop", async () => {
    const { choices } = await setup("[no_such(a=1)]")({});
    expect(choices[0]?.message).toEqual({
      role: "assistant",
      content: "[no_such(a=1)]",
      refusal: null,
    } as never);
    expect(choices[0]?.finish_reason).toBe("stop");
  });

  test("cut off inside a call finish with length", async () => {
    const { choices } = await setup('{"name": "add", "parameters": {"a": 1, "b": 2}}')({ max_tokens: 38 });
    expect(choices[0]?.message.tool_calls).toHaveLength(1);
    expect(choices[0]?.finish_reason).toBe("length");
  });

  test("have one call at most without parallel_tool_calls", async () => {
    const answer = "[add(a=1), get_weather()]";
    expect((await setup(answer)({})).choices[0]?.message.tool_calls).toHaveLength(2);
    const single = await setup(answer)({ parallel_tool_calls: false });
    expect(single.choices[0]?.message.tool_calls).toMatchObject([{ function: { name: "add" } }]);
    expect(single.choices[0]?.message.content).toBeNull();
  });

  test("of several choices are parsed each for itself", async () => {
    const { choices } = await setup("[add(a=1)]")({ n: 3 });
    const ids = choices.map(({ message }) => message.tool_calls?.map((made) => (made as { id: string }).id));
    expect(ids.map((made) => made?.length)).toEqual([1, 1, 1]);
    expect(new Set(ids.flat()).size).toBe(3);
  });
});

describe("what is refused", () => {
  const unbuilt: [body: object, param: string][] = [
    [{ tool_choice: { type: "allowed_tools", mode: "auto", tools: [] } }, "tool_choice.type"],
    [{ tools: [{ type: "custom", custom: { name: "f" } }] }, "tools[0].type"],
    [{ logprobs: true }, "logprobs"],
  ];
  for (const [body, param] of unbuilt)
    test(`${JSON.stringify(body)} is not built`, async () =>
      expect(await refusal(body)).toEqual(["unsupported_parameter", param]));

  const wrong: [body: object, param: string][] = [
    [{ tools: [tool("a"), tool("a")] }, "tools[1].function.name"],
    [{ tools: [tool("a b")] }, "tools[0].function.name"],
    [{ tool_choice: "maybe" }, "tool_choice"],
    [{ messages: [user, { role: "tool", tool_call_id: "x", content: "y" }] }, "messages[1].tool_call_id"],
    [{ messages: [user, { role: "tool", content: "y" }] }, "messages[1].tool_call_id"],
    [{ messages: [user, { role: "assistant", content: null }] }, "messages[1].content"],
  ];
  for (const [body, param] of wrong)
    test(`${JSON.stringify(body)} is wrong`, async () =>
      expect(await refusal(body)).toEqual(["invalid_argument", param]));
});
