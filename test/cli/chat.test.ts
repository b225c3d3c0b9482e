// `caravan run`: one answer through pipes, and the chat in a real terminal (tmux).

import { afterAll, describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { built, isAlive, Place, PROGRAM, runnersOf, SMOLLM2, smollm2Here } from "../tools/built-caravan.ts";
import { MisbehavingHub } from "../tools/misbehaving-hub.ts";
import { writeTinyChatModel } from "../tools/tiny-chat-model.ts";
import { until } from "../tools/until.ts";

const place = new Place();
const model = writeTinyChatModel(place.path("tiny"));
afterAll(() => place.remove());

describe.skipIf(!built)("one answer", () => {
  test("goes to standard output alone, without escape codes, and all else to standard error", async () => {
    const ended = await place.run(["run", model, "Hi", "-n", "12", "-t", "0", "--context", "128"]);
    expect(ended).toMatchObject({ code: 0 });
    expect(ended.out).not.toContain("\x1b");
    expect(ended.err).not.toContain("\x1b");
    expect(ended.err).not.toContain("\r");
    expect(ended.err).toContain("[tiny on cpu");
    expect(ended.err).toContain("context 128 tokens]");
    expect(ended.err).toMatch(/\[prompt \d+ tokens at [\d.]+ tokens\/s; answer 12 tokens/);
    const quiet = await place.run(["run", model, "Hi", "-n", "12", "-t", "0", "-q"]);
    expect(quiet).toEqual({ code: 0, out: ended.out, err: "" });
  });

  test("takes the prompt from a pipe, and a system message", async () => {
    const args = ["run", model, "-n", "12", "-t", "0", "-q"];
    const [piped, given, system] = await Promise.all([
      place.run(args, { stdin: "Tell me\n" }),
      place.run(["run", model, "Tell me\n", "-n", "12", "-t", "0", "-q"]),
      place.run([...args, "-s", "Be brief."], { stdin: "Tell me\n" }),
    ]);
    expect(piped.out).toBe(given.out);
    expect(system.out).not.toBe(piped.out);
  });

  test("is the same for the same seed, and another for another", async () => {
    const say = async (seed: string) =>
      (await place.run(["run", model, "Hi", "-n", "12", "-q", "--seed", seed])).out;
    const [a, b, c] = await Promise.all([say("5"), say("5"), say("6")]);
    expect(a).toBe(b);
    expect(c).not.toBe(a);
  });

  test("that does not fit the context is refused with the numbers", async () => {
    const ended = await place.run(["run", model, "word ".repeat(300), "--context", "64"]);
    expect(ended).toMatchObject({ code: 1, out: "" });
    expect(ended.err).toContain("64");
    expect(ended.err).not.toMatch(/^\s+at /m);
  });

  test("stops when its reader has left", async () => {
    const script = 'set -o pipefail; "$0" run "$1" Hi -n 200000 -t 0 -q | head -c 1 >/dev/null';
    const ended = Bun.spawnSync(["bash", "-c", script, PROGRAM, model], { cwd: place.cwd, env: place.env });
    expect(ended.stderr.toString()).toBe("");
    expect(ended.exitCode).toBe(141);
  });

  test.each([
    ["SIGINT", 130],
    ["SIGTERM", 143],
    ["SIGKILL", 137],
  ] as const)("ended by %s leaves with %d and no runner behind", async (signal, code) => {
    const running = place.start(["run", model, "Hi", "-n", "200000", "-t", "0"]);
    await until(() => running.out().length > 20, "the answer has begun");
    const runners = runnersOf(running.pid);
    expect(runners).toHaveLength(1);
    running.kill(signal);
    expect((await running.ended).code).toBe(code);
    await until(() => !runners.some(isAlive), "the runner ends by itself");
  });

  test("of SmolLM2 greets", async () => {
    if (!smollm2Here()) return;
    const ended = await place.run(["run", SMOLLM2, "Hi", "-t", "0", "-n", "20"]);
    expect(ended.code).toBe(0);
    expect(ended.out).toContain("Hello");
  });
});

const tmux = Bun.which("tmux");
if (tmux === null) console.log("skipped: the chat in a terminal needs tmux");

/** A terminal of 100 columns that runs the chat. */
class Terminal {
  static #count = 0;
  /** Also the name of a server of its own: one that ends with its last session refuses a session that comes just then. */
  readonly #session = `caravan-test-${process.pid}-${++Terminal.#count}`;

  constructor(args: readonly string[], more: Record<string, string> = {}) {
    const env = Object.entries({ ...place.env, ...more, LANG: "C.UTF-8" }).flatMap(([k, v]) => [
      "-e",
      `${k}=${v}`,
    ]);
    const command = [PROGRAM, ...args].map((arg) => `'${arg}'`).join(" ");
    this.#tmux("new-session", "-d", "-x", "100", "-y", "50", ...env, `${command}; echo "left with $?"; cat`);
  }

  #tmux(command: string, ...args: string[]): string {
    const target = command === "new-session" ? ["-s", this.#session] : ["-t", this.#session];
    const ended = Bun.spawnSync(["tmux", "-L", this.#session, command, ...target, ...args]);
    if (ended.exitCode !== 0) throw new Error(ended.stderr.toString());
    return ended.stdout.toString();
  }

  type(...keys: string[]): void {
    this.#tmux("send-keys", ...keys);
  }

  screen(): string {
    return this.#tmux("capture-pane", "-p").trimEnd();
  }

  /** Waits until the screen matches. */
  async see(pattern: RegExp, limitMs = 20_000): Promise<void> {
    const deadline = performance.now() + limitMs;
    while (!pattern.test(this.screen())) {
      if (performance.now() > deadline) throw new Error(`no ${pattern} on the screen:\n${this.screen()}`);
      await Bun.sleep(30);
    }
  }

  close(): void {
    Bun.spawnSync(["tmux", "-L", this.#session, "kill-server"]);
  }
}

describe.skipIf(!built || tmux === null)("the chat in a terminal", () => {
  test("answers, keeps a history, takes many lines, and leaves with Ctrl-D", async () => {
    const terminal = new Terminal(["run", model, "-n", "6", "-t", "0", "--here"]);
    try {
      await terminal.see(/tiny on cpu.*context 262144 tokens[\s\S]*>>>$/);
      terminal.type("Hi", "Enter");
      await terminal.see(/answer 6 tokens[^\n]*\n>>>$/);
      terminal.type("Up");
      await terminal.see(/>>> Hi$/);
      terminal.type("C-c");
      await terminal.see(/>>> Hi\^C\n>>>$/);
      terminal.type("/help", "Enter");
      await terminal.see(/\/clear +forget the conversation/);
      terminal.type("one \\", "Enter");
      await terminal.see(/>>> one \\\n\.\.\.$/);
      terminal.type("two", "Enter");
      // The line of figures may be wider than the terminal.
      await terminal.see(/\.\.\. two[\s\S]*answer 6 tokens[^>]*\n>>>$/);
      terminal.type("/nothing", "Enter");
      await terminal.see(/there is no \/nothing/);
      terminal.type("C-d");
      await terminal.see(/left with 0/);
    } finally {
      terminal.close();
    }
    const later = new Terminal(["run", model, "-n", "6", "-t", "0", "--here"]);
    try {
      await later.see(/>>>$/);
      later.type("Up", "Up");
      await later.see(/>>> two$/);
      later.type("C-c", "C-d");
      await later.see(/left with 0/);
    } finally {
      later.close();
    }
  }, 120_000);

  test("stops an answer with Ctrl-C, keeps the chat, and leaves with Ctrl-C twice", async () => {
    const terminal = new Terminal(["run", model, "-n", "200000", "-t", "0", "--here"]);
    try {
      await terminal.see(/>>>$/);
      terminal.type("Hi", "Enter");
      await terminal.see(/[\s\S]{400,}/); // the model is so fast that the question may have left the screen
      terminal.type("C-c");
      await terminal.see(/\[stopped\]\n>>>$/);
      terminal.type("/clear", "Enter");
      await terminal.see(/\/clear\n>>>$/);
      terminal.type("C-c");
      await terminal.see(/Ctrl-C again or Ctrl-D leaves/);
      terminal.type("C-c");
      await terminal.see(/left with 0/);
    } finally {
      terminal.close();
    }
  }, 120_000);

  test("offers to download a model that is not here, and chats with it", async () => {
    const files = readdirSync(model).map((path) => ({
      path,
      content: new Uint8Array(readFileSync(join(model, path))),
    }));
    const hub = await MisbehavingHub.start("org/offered", files);
    const args = ["run", "org/offered", "-n", "6", "-t", "0", "--here"];
    const declined = new Terminal(args, { HF_ENDPOINT: hub.url });
    const terminal = new Terminal(args, { HF_ENDPOINT: hub.url });
    try {
      await declined.see(/org\/offered is not on this machine\. Download it\? \[y\/N\]/);
      declined.type("Enter");
      await declined.see(/caravan pull org\/offered\s+left with 1/);
      expect(hub.requests).toEqual([]);
      await terminal.see(/Download it\?/);
      terminal.type("y", "Enter");
      await terminal.see(/org\/offered on cpu[\s\S]*>>>$/);
      terminal.type("Hi", "Enter");
      await terminal.see(/answer 6 tokens[^\n]*\n>>>$/);
    } finally {
      declined.close();
      terminal.close();
      hub.stop();
    }
  }, 120_000);
});
