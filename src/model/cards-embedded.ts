// The cards that come with caravan, as text inside the executable. A test compares this list with the folder cards/.

import llama31x8b from "../../cards/llama3.1-8b.toml" with { type: "text" };
import llama31x70b from "../../cards/llama3.1-70b.toml" with { type: "text" };
import llama32x1b from "../../cards/llama3.2-1b.toml" with { type: "text" };
import llama32x3b from "../../cards/llama3.2-3b.toml" with { type: "text" };
import llama33x70b from "../../cards/llama3.3-70b.toml" with { type: "text" };
import maverick4bit from "../../cards/maverick-4bit.toml" with { type: "text" };
import maverick6bit from "../../cards/maverick-6bit.toml" with { type: "text" };
import scout4bit from "../../cards/scout-4bit.toml" with { type: "text" };
import scout6bit from "../../cards/scout-6bit.toml" with { type: "text" };
import scout8bit from "../../cards/scout-8bit.toml" with { type: "text" };
import smollm2 from "../../cards/smollm2.toml" with { type: "text" };

/** Text of each card by its file's name. */
export const EMBEDDED_CARDS: Readonly<Record<string, string>> = {
  "llama3.1-70b.toml": llama31x70b,
  "llama3.1-8b.toml": llama31x8b,
  "llama3.2-1b.toml": llama32x1b,
  "llama3.2-3b.toml": llama32x3b,
  "llama3.3-70b.toml": llama33x70b,
  "maverick-4bit.toml": maverick4bit,
  "maverick-6bit.toml": maverick6bit,
  "scout-4bit.toml": scout4bit,
  "scout-6bit.toml": scout6bit,
  "scout-8bit.toml": scout8bit,
  "smollm2.toml": smollm2,
};
