// The page in a real Chromium (Debian's package), against a scripted model: what a person does with it, its security
// headers at work, and axe-core's opinion. Skipped, saying so, where there is no Chromium.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { existsSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import { type Browser, type BrowserContextOptions, chromium, type Page } from "playwright-core";
import { createApp } from "../../src/api/app.ts";
import { Lifecycle } from "../../src/api/lifecycle.ts";
import { type RunningServer, startServer } from "../../src/api/server.ts";
import type { ApiSettings } from "../../src/api/settings.ts";
import { createLogger } from "../../src/log.ts";
import type { Script } from "../tools/scripted-engine.ts";
import { type ScriptedModels, sayScript, scriptedModels } from "../tools/scripted-models.ts";

const root = join(import.meta.dir, "../..");
const program = ["/usr/bin/chromium", "/usr/bin/chromium-browser"].find((path) => existsSync(path));
if (program === undefined)
  console.log("skipped: the page's browser tests (no Chromium: apt-get install chromium)");

const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

describe.skipIf(program === undefined)("the page", () => {
  let browser: Browser;
  const servers: RunningServer[] = [];
  /** Errors that a page wrote to its console or threw. */
  let complaints: string[] = [];

  beforeAll(async () => {
    browser = await chromium.launch({ executablePath: program ?? "", args: FLAGS });
  }, 60_000);

  afterAll(async () => {
    await browser?.close();
    for (const server of servers) await server.drain();
  });

  async function open(
    script: Script,
    settings: Partial<ApiSettings> = {},
    context: BrowserContextOptions = {},
  ): Promise<{ page: Page; models: ScriptedModels; url: string }> {
    const models = scriptedModels(script);
    const lifecycle = new Lifecycle();
    const log = createLogger({ level: "silent" });
    const app = createApp({ models, lifecycle, settings, log });
    const server = startServer({
      app,
      lifecycle,
      host: "127.0.0.1",
      port: 0,
      drainSeconds: 0,
      keyed: true,
      log,
    });
    servers.push(server);
    const page = await (await browser.newContext(context)).newPage();
    complaints = [];
    page.on("pageerror", (error) => complaints.push(error.message));
    page.on("console", (message) => {
      if (message.type() === "error") complaints.push(message.text());
    });
    await page.goto(server.url);
    return { page, models, url: server.url };
  }

  async function say(page: Page, text: string): Promise<void> {
    await page.fill("#prompt", text);
    await page.keyboard.press("Enter");
  }

  test("answers by keyboard alone and shows the statistics", async () => {
    const { page, models } = await open(sayScript("It scatters."));
    await page.waitForSelector("#send:not([disabled])");
    await say(page, "Why is the sky blue?");
    await page.waitForSelector(".turn.assistant .stats:not(:empty)");
    expect(await page.textContent(".turn.user .text")).toBe("Why is the sky blue?");
    expect(await page.textContent(".turn.assistant .text")).toBe("It scatters.");
    expect(await page.textContent(".turn.assistant .stats")).toContain("tokens written");
    expect(models.engine.requests).toHaveLength(1);
    expect(complaints).toEqual([]);
  }, 30_000);

  test("keeps the conversation, regenerates, and starts a new one", async () => {
    const { page, models } = await open(sayScript("Yes."));
    await page.waitForSelector("#send:not([disabled])");
    await say(page, "One?");
    await page.waitForSelector(".turn.assistant .stats:not(:empty)");
    await say(page, "Two?");
    await page.waitForSelector(".turn:nth-of-type(4) .stats:not(:empty)");
    const second = models.engine.requests[1]?.tokens.length ?? 0;
    await page.click("#again");
    await page.waitForSelector(".turn:nth-of-type(4) .stats:not(:empty)");
    expect(models.engine.requests).toHaveLength(3);
    expect(models.engine.requests[2]?.tokens.length).toBe(second);
    await page.click("#clear");
    expect(await page.locator(".turn").count()).toBe(0);
    expect(complaints).toEqual([]);
  }, 30_000);

  test("stops an answer, which cancels it in the engine", async () => {
    const { page, models } = await open({
      ...sayScript("x".repeat(500)),
      // A few tokens come, the rest never does.
      gate: (position) => (position > 20 ? new Promise(() => {}) : undefined),
    });
    await page.waitForSelector("#send:not([disabled])");
    await say(page, "Go on for ever");
    await page.waitForSelector(".turn.assistant .text:not(:empty)");
    await page.click("#stop");
    await page.waitForSelector(".turn.assistant .stats:text-is('stopped')");
    expect(models.engine.cancelled).toHaveLength(1);
  }, 30_000);

  test("shows hostile text as text", async () => {
    const hostile = '<img src=x onerror="document.title=1"><script>document.title=2</script>';
    const { page } = await open(sayScript(hostile));
    await page.waitForSelector("#send:not([disabled])");
    await say(page, hostile);
    await page.waitForSelector(".turn.assistant .stats:not(:empty)");
    expect(await page.textContent(".turn.assistant .text")).toBe(hostile);
    expect(await page.locator("#log img, #log script").count()).toBe(0);
    expect(await page.title()).toBe("caravan");
  }, 30_000);

  test("asks for the key and works with it", async () => {
    const { page } = await open(sayScript("Open."), { apiKeys: ["sesame"] });
    await page.waitForSelector("#state:has-text('Settings')");
    await page.click("#settings-toggle");
    await page.fill("#key", "sesame");
    await page.keyboard.press("Tab");
    await page.waitForSelector("#send:not([disabled])");
    await say(page, "Hi");
    await page.waitForSelector(".turn.assistant .stats:not(:empty)");
    expect(await page.textContent(".turn.assistant .text")).toBe("Open.");
    expect(await page.inputValue("#key")).toBe("");
    expect(await page.evaluate("document.cookie")).toBe("");
    await page.reload();
    await page.waitForSelector("#send:not([disabled])");
  }, 30_000);

  test("asks nobody else for anything", async () => {
    const { page, url } = await open(sayScript("Hi."));
    const asked: string[] = [];
    page.on("request", (request) => asked.push(request.url()));
    await page.reload();
    await page.waitForSelector("#send:not([disabled])");
    expect(asked.length).toBeGreaterThan(2);
    expect(asked.filter((address) => !address.startsWith(url) && !address.startsWith("data:"))).toEqual([]);
  }, 30_000);

  for (const [name, context] of Object.entries({
    "light, on a desktop": { colorScheme: "light", viewport: { width: 1000, height: 700 } },
    "dark, on a phone": { colorScheme: "dark", viewport: { width: 390, height: 780 } },
  } satisfies Record<string, BrowserContextOptions>)) {
    test(`has no serious accessibility problem: ${name}`, async () => {
      const { page } = await open(sayScript("It scatters."), {}, { ...context, bypassCSP: true });
      await page.waitForSelector("#send:not([disabled])");
      await say(page, "Why is the sky blue?");
      await page.waitForSelector(".turn.assistant .stats:not(:empty)");
      await page.click("#settings-toggle");
      await page.addScriptTag({ path: join(root, "node_modules/axe-core/axe.min.js") });
      const violations: string[] = await page.evaluate(
        "axe.run().then((found) => found.violations.map(({ id, impact }) => impact + ': ' + id))",
      );
      expect(violations.filter((line) => /^(serious|critical)/.test(line))).toEqual([]);
      expect(await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")).toBe(true);
      mkdirSync(join(root, "build/screenshots"), { recursive: true });
      await page.screenshot({ path: join(root, `build/screenshots/page-${name.split(",")[0]}.png`) });
    }, 30_000);
  }
});
