// caravan template: chats as the prompt text and ids that serving would feed.

import * as v from "valibot";
import type { ChatInput } from "../chat/prompt-renderer.ts";
import { TextService } from "../chat/text-service.ts";
import type { Command } from "./command.ts";
import { readJsonFile, writeJsonFile } from "./json-file.ts";
import { textFolder } from "./model-argument.ts";

export const template: Command = {
  name: "template",
  summary: "render chats with the model's chat template",
  positionals: "MODEL",
  count: [1, 1],
  options: {
    in: { value: "FILE", help: 'JSON array of {"messages", "tools"?, "add_generation_prompt"?, …}' },
    out: { value: "FILE", help: 'JSON array of {"text", "ids"}, written here' },
  },
  async run(args) {
    const out = args.required("out");
    const chats = readJsonFile(
      args.required("in"),
      v.array(v.looseObject({ messages: v.array(v.unknown()) })),
    );
    const dir = textFolder(args.positional(0));
    const service = await TextService.start(dir);
    try {
      const prompts: { text: string; ids: number[] }[] = [];
      for (const chat of chats) {
        const { text, ids } = await service.renderChat(chat as unknown as ChatInput);
        prompts.push({ text, ids });
      }
      await writeJsonFile(out, prompts);
    } finally {
      service.close();
    }
    return 0;
  },
};
