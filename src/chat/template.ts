// Chat messages to token ids: the model's template makes the text (prompt-renderer.ts), the tokenizer the ids, in which only
// the template's own words are special tokens.

import type { SandboxLimits } from "./jinja-sandbox.ts";
import { type ChatInput, type GuardedText, PromptRenderer, templateFiles } from "./prompt-renderer.ts";
import type { Tokenizer } from "./tokenizer.ts";
import type { TokenizerFiles } from "./tokenizer-files.ts";

export interface RenderedChat {
  readonly text: string;
  readonly ids: number[];
}

export class ChatTemplate {
  readonly #tokenizer: Tokenizer;
  /** Of the files it keeps what it needs: the rest (vocabulary, merges) is large and must not stay in memory. */
  readonly renderer: PromptRenderer;
  readonly #limits: SandboxLimits | undefined;

  constructor(files: TokenizerFiles, tokenizer: Tokenizer, limits?: SandboxLimits) {
    this.#tokenizer = tokenizer;
    this.renderer = new PromptRenderer(templateFiles(files));
    this.#limits = limits;
  }

  get exists(): boolean {
    return this.renderer.exists;
  }

  /** Errors as PromptRenderer.render. */
  renderChat(input: ChatInput): RenderedChat {
    const steps = this.renderChatSteps(input);
    for (;;) {
      const step = steps.next();
      if (step.done) return step.value;
    }
  }

  /** The same, with pauses while the text is encoded (not while it is rendered). */
  *renderChatSteps(
    input: ChatInput,
    limits: SandboxLimits | undefined = this.#limits,
  ): Generator<void, RenderedChat> {
    const rendered = this.renderer.render(input, limits);
    yield;
    return yield* this.encodeSteps(rendered);
  }

  /** Ids of a rendered prompt. */
  *encodeSteps({ text, guard }: GuardedText): Generator<void, RenderedChat> {
    const ids = yield* this.#tokenizer.encodeWithSpecialsSteps(text, guard);
    return { text: guard === "" ? text : text.replaceAll(guard, ""), ids };
  }
}
