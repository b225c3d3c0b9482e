// caravan tokenize: ids of strings, as user text (nothing becomes a special token).

import * as v from "valibot";
import { TextService } from "../chat/text-service.ts";
import type { Command } from "./command.ts";
import { readJsonFile, writeJsonFile } from "./json-file.ts";
import { textFolder } from "./model-argument.ts";

export const tokenize: Command = {
  name: "tokenize",
  summary: "turn strings into token ids",
  positionals: "MODEL",
  count: [1, 1],
  options: {
    in: { value: "FILE", help: "JSON array of strings" },
    out: { value: "FILE", help: "JSON array of id arrays, written here" },
  },
  details:
    "MODEL is a card's name, a hub id, or a folder (tokenizer files are enough).\nText is user text: the names of special tokens in it stay text.",
  async run(args) {
    const out = args.required("out");
    const strings = readJsonFile(args.required("in"), v.array(v.string()));
    const dir = textFolder(args.positional(0));
    const service = await TextService.start(dir);
    try {
      const ids: number[][] = [];
      for (const text of strings) ids.push(await service.encode(text, { specials: false }));
      await writeJsonFile(out, ids);
    } finally {
      service.close();
    }
    return 0;
  },
};
