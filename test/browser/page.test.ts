// The page in a real Chromium (Debian's package), against a scripted model: what a person does with it, its security
// headers at work, and axe-core's opinion. Skipped, saying so, where there is no Chromium.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { existsSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import { type Browser, type BrowserContextOptions, chromium, type Page } from "playwright-core";
import { createApp } from "../../src/api/app.ts";
import type { ClusterService } from "../../src/api/cluster/service.ts";
import { Lifecycle } from "../../src/api/lifecycle.ts";
import type { ModelLibrary } from "../../src/api/ops/model-library.ts";
import { type RunningServer, startServer } from "../../src/api/server.ts";
import type { ApiSettings } from "../../src/api/settings.ts";
import { createLogger } from "../../src/log.ts";
import type { Script } from "../tools/scripted-engine.ts";
import { type ScriptedModels, sayScript, scriptedModels } from "../tools/scripted-models.ts";
import { until } from "../tools/until.ts";

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

const NODE_IDS = ["a", "b", "c"].map((letter) => letter.repeat(64));

/** A busy model and one that is idle on the first node, nothing on the others; two models that could come. */
function scriptedLedger(node: number) {
  const gigabyte = 1e9;
  const planned = [360, 360, 90][node] ?? 0;
  const loaded =
    node > 0
      ? []
      : [
          { instance: "i1", model: "llama-4-maverick", rank: 0, bytes: 226 * gigabyte, busy: true },
          { instance: "i2", model: "smollm2", rank: 1, bytes: 80 * gigabyte, busy: false },
        ];
  const reserved = loaded.reduce((sum, { bytes }) => sum + bytes, 0);
  const free = planned * gigabyte - reserved;
  const scout = 112 * gigabyte;
  return {
    ...{ planned: planned * gigabyte, reserved, free, loaded },
    next: [
      {
        ...{ model: "llama-4-scout", bytes: scout, default_context: 8192 },
        context_that_fits: free > scout ? 1_048_576 : 0,
        unload: node === 0 ? ["i2"] : [],
        missing: node === 2 ? scout - free : 0,
      },
      {
        ...{ model: "tiny", bytes: gigabyte, default_context: 2048, context_that_fits: 2048 },
        ...{ unload: [], missing: 0 },
      },
    ],
  };
}

/** Three nodes, one of which wants in; what the page asks for is written down and takes place at once. */
function scriptedCluster() {
  const calls: unknown[] = [];
  const watchers = new Set<() => void>();
  const instances: Record<string, unknown>[] = [];
  const changed = (): void => {
    for (const watcher of watchers) watcher();
  };
  const gigabyte = 1e9;
  const service: ClusterService = {
    state: () => ({
      cluster: { name: "home" },
      self: { id: NODE_IDS[0], name: "studio-1" },
      nodes: NODE_IDS.map((id, i) => ({
        ...{ id, name: `studio-${i + 1}`, reachable: i < 2, chip: "Apple M3 Ultra", models: [] },
        memory: { total: 512 * gigabyte, available: (400 - 100 * i) * gigabyte },
        ledger: scriptedLedger(i),
        ...(i === 0 ? {} : { round_trip_us: 40 + i, bandwidth: 5e9 }),
      })),
      links: [
        { from: NODE_IDS[0], to: NODE_IDS[1], kind: "rdma", round_trip_us: 9, bandwidth: 6e9 },
        { from: NODE_IDS[1], to: NODE_IDS[2], kind: "tcp", round_trip_us: 140, bandwidth: 1e9 },
      ],
      instances,
      away: [{ id: "9".repeat(64), name: "studio-9" }],
      join_requests: [{ name: "<b>mini</b>", from: "192.0.2.7", waiting_seconds: 4 }],
    }),
    watch: (onChange) => {
      watchers.add(onChange);
      return () => watchers.delete(onChange);
    },
    accept: async (code) => {
      calls.push({ code });
      return "mini";
    },
    plan: async (model, asked) => {
      calls.push({ model, asked });
      return {
        reason: "Two nodes are faster than one.",
        placements: [
          {
            ...{ recommended: true, tensor: 2, pipeline: 1, context: 8192, tokens_per_second: 58.2 },
            warnings: ["The slower link decides."],
            ranks: NODE_IDS.slice(0, 2).map((id, i) => ({
              ...{ node: `studio-${i + 1}`, node_id: id },
              bytes: { total: 31e9, usable: 400e9 },
            })),
          },
        ],
      };
    },
    createInstance: async (model, asked) => {
      calls.push({ create: model, asked });
      instances.push({
        ...{ id: "one", model, owner: NODE_IDS[0], phase: "loading", progress: 0.4, reason: "" },
        ...{ tensor: 2, pipeline: 1, context: 8192, outstanding_tokens: 0 },
        ranks: [{ node: NODE_IDS[0], rank: 0, bytes: 31e9 }],
      });
      changed();
      return "one";
    },
    stopInstance: async (id) => {
      calls.push({ stop: id });
      instances.length = 0;
      changed();
      return true;
    },
    removeNode: async (node) => {
      calls.push({ remove: node });
      return { name: "studio-3", told: [], away: ["studio-9"] };
    },
    cleanParts: async () => 0,
    mayPass: () => false,
    pass: async () => ({ release: () => undefined }),
  };
  return { service, calls };
}

describe.skipIf(program === undefined)("the page", () => {
  let browser: Browser;
  const servers: RunningServer[] = [];
  /** Errors that a page wrote to its console or threw. */
  let complaints: string[] = [];

  beforeAll(async () => {
    browser = await chromium.launch({ executablePath: program ?? "", args: FLAGS });
  }, 120_000);

  afterAll(async () => {
    await browser?.close();
    for (const server of servers) await server.drain();
  });

  async function open(
    script: Script,
    settings: Partial<ApiSettings> = {},
    context: BrowserContextOptions = {},
    cluster?: ClusterService,
    library?: ModelLibrary,
  ): Promise<{ page: Page; models: ScriptedModels; url: string }> {
    const models = scriptedModels(script);
    const lifecycle = new Lifecycle();
    const log = createLogger({ level: "silent" });
    const app = createApp({
      ...{ models, lifecycle, settings, log },
      ...(cluster === undefined ? {} : { cluster }),
      ...(library === undefined ? {} : { library }),
    });
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
    // Pages of earlier tests would go on asking their nodes.
    for (const old of browser.contexts()) await old.close();
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
  }, 120_000);

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
  }, 120_000);

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
  }, 120_000);

  test("shows hostile text as text", async () => {
    const hostile = '<img src=x onerror="document.title=1"><script>document.title=2</script>';
    const { page } = await open(sayScript(hostile));
    await page.waitForSelector("#send:not([disabled])");
    await say(page, hostile);
    await page.waitForSelector(".turn.assistant .stats:not(:empty)");
    expect(await page.textContent(".turn.assistant .text")).toBe(hostile);
    expect(await page.locator("#log img, #log script").count()).toBe(0);
    expect(await page.title()).toBe("caravan");
  }, 120_000);

  test("shows Markdown as elements, with code to copy, and keeps the conversation over a reload", async () => {
    const answer = [
      "# Title\n\nSome **strong** and *soft* `code` & <b>no tag</b>.",
      "```python\ndef f(x):\n    return x < 1 # **not strong**\n```",
      "1. one\n   - inner `a*b*c`\n2. two\n\n3. three",
      "| a | b |\n|---|:-:|\n| 1 | [x](https://example.test/p) |",
      "> quoted\n\n[bad](javascript:alert) ![pic](https://example.test/i.png)",
    ].join("\n\n");
    const { page } = await open(sayScript(answer));
    await page.waitForSelector("#send:not([disabled])");
    await say(page, "Show off");
    await page.waitForSelector(".turn.assistant .stats:not(:empty)");
    const text = page.locator(".turn.assistant .text");
    const check = async (): Promise<void> => {
      expect(await text.locator("h3").textContent()).toBe("Title");
      expect(await text.locator("p strong").allTextContents()).toEqual(["strong"]);
      expect(await text.locator("p").first().textContent()).toBe(
        "Some strong and soft code & <b>no tag</b>.",
      );
      expect(await text.locator("pre code").textContent()).toBe(
        "def f(x):\n    return x < 1 # **not strong**",
      );
      expect(await text.locator(".code-head span").textContent()).toBe("python");
      expect(await text.locator("ol > li").count()).toBe(3);
      expect(await text.locator("ol ul li").textContent()).toBe("inner a*b*c");
      expect(await text.locator("td").allTextContents()).toEqual(["1", "x"]);
      expect(await text.locator("blockquote").textContent()).toBe("quoted");
      expect(await text.locator("a").count()).toBe(2);
      expect(await text.locator("img").count()).toBe(0);
    };
    await check();
    await page.reload();
    await page.waitForSelector("#send:not([disabled])");
    await check();
    expect(await page.textContent(".turn.user .text")).toBe("Show off");
    expect(await page.isEnabled("#again")).toBe(true);
    expect(complaints).toEqual([]);
  }, 120_000);

  test("says how much of the prompt is read before the answer begins", async () => {
    let go: () => void = () => {};
    const held = new Promise<void>((resolve) => {
      go = resolve;
    });
    const { page } = await open({
      ...sayScript("Done."),
      progressSteps: 2,
      gate: (position) => (position === 1 ? held : undefined),
    });
    await page.waitForSelector("#send:not([disabled])");
    await say(page, "A long story");
    await page.waitForSelector(".turn.assistant .work:has-text('reading the prompt')");
    const share = Number(await page.getAttribute(".turn.assistant .work progress", "value"));
    expect(share).toBeGreaterThan(0.3);
    expect(share).toBeLessThan(0.7);
    go();
    await page.waitForSelector(".turn.assistant .stats:not(:empty)");
    expect(await page.isVisible(".turn.assistant .work")).toBe(false);
  }, 120_000);

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
  }, 120_000);

  test("asks nobody else for anything", async () => {
    const { page, url } = await open(sayScript("Hi."));
    const asked: string[] = [];
    page.on("request", (request) => asked.push(request.url()));
    await page.reload();
    await page.waitForSelector("#send:not([disabled])");
    expect(asked.length).toBeGreaterThan(2);
    expect(asked.filter((address) => !address.startsWith(url) && !address.startsWith("data:"))).toEqual([]);
  }, 120_000);

  test("draws each node's memory: what is loaded, what would go for the next model, the context that fits", async () => {
    const { service } = scriptedCluster();
    const { page } = await open(sayScript("Hi."), {}, {}, service);
    await page.click("#to-cluster");
    await page.waitForSelector("#ledgers li:nth-of-type(3)");
    const said = (node: number) => page.textContent(`#ledgers li:nth-of-type(${node})`);
    const kinds = (node: number) =>
      page
        .locator(`#ledgers li:nth-of-type(${node}) rect`)
        .evaluateAll((all) => all.map((each) => each.getAttribute("class")));
    expect(await page.locator("#next-model option").allTextContents()).toEqual(["llama-4-scout", "tiny"]);
    expect(await said(1)).toContain("54 GB of 360 GB left");
    expect(await said(1)).toContain("llama-4-maverick, 226 GB, in use; smollm2, rank 1, 80 GB, idle");
    expect(await said(1)).toContain(
      "llama-4-scout with a context of 8,192 takes 112 GB and fits after unloading smollm2.",
    );
    expect(await kinds(1)).toEqual(["room", "busy", "goes", "comes"]);
    expect(await said(2)).toContain("Nothing is loaded.");
    expect(await said(2)).toContain("contexts up to 1,048,576 fit");
    expect(await kinds(2)).toEqual(["room", "comes"]);
    expect(await said(3)).toContain("22 GB missing");
    expect(await kinds(3)).toEqual(["room", "misses"]);
    // Where it comes begins behind what stays, and is as wide as it is large on a common scale.
    const place = await page
      .locator("#ledgers .comes")
      .first()
      .evaluate((rect) => ({
        x: Number(rect.getAttribute("x")),
        width: Number(rect.getAttribute("width")),
      }));
    expect(place.x).toBeCloseTo((226 / 360) * 1000, 6);
    expect(place.width).toBeCloseTo((112 / 360) * 1000, 6);
    await page.selectOption("#next-model", "tiny");
    expect(await kinds(1)).toEqual(["room", "busy", "idle", "comes"]);
    expect(await said(3)).toContain("tiny with a context of 2,048 takes 1.0 GB; contexts up to 2,048 fit.");
    expect(complaints).toEqual([]);
  }, 30_000);

  test("shows nodes and links, lets a machine in, places a model and ends it", async () => {
    const { service, calls } = scriptedCluster();
    const { page } = await open(sayScript("Hi."), {}, {}, service);
    await page.click("#to-cluster");
    await page.waitForSelector("#nodes tbody tr:nth-of-type(4)");
    expect(await page.textContent("#cluster-state")).toBe("Cluster home: 3 nodes, 2 reachable.");
    expect(await page.locator("#picture circle.node").count()).toBe(3);
    expect(await page.locator("#picture line").count()).toBe(2);
    expect(await page.textContent("#picture .link-label")).toBe("rdma 9 µs");
    expect(await page.textContent("#join-requests")).toBe("<b>mini</b> (192.0.2.7), for 4 s");
    await page.fill("#code", "7K2QF-M9XPT");
    await page.keyboard.press("Enter");
    await page.waitForSelector("#cluster-notice:has-text('mini is let in')");
    expect(await page.textContent("#nodes tbody tr:nth-of-type(4)")).toContain("studio-9 (not reachable)");
    // Not this node itself, and not by one press.
    expect(await page.locator("#nodes tbody button").count()).toBe(3);
    await page.click("button[aria-label='Remove studio-3']");
    await page.click("button[aria-label='Press again to remove studio-3']");
    await page.waitForSelector("#cluster-notice:has-text('Told when they are back: studio-9')");
    await page.click("#place button[type=submit]");
    await page.waitForSelector("#placements tbody tr");
    expect(await page.textContent("#plan-reason")).toBe("Two nodes are faster than one.");
    expect(await page.textContent("#placements tbody")).toContain("58.2");
    await page.click("#placements tbody button");
    await page.waitForSelector("#instances progress");
    expect(await page.textContent("#instances")).toContain("predicted 58.2 tokens/s");
    await page.click("#instances button");
    await page.waitForSelector("#instances:has-text('None.')");
    expect(calls).toEqual([
      { code: "7K2QF-M9XPT" },
      { remove: NODE_IDS[2] },
      { model: "test/scripted", asked: {} },
      {
        create: "test/scripted",
        asked: { tensor: 2, pipeline: 1, context: 8192, nodes: NODE_IDS.slice(0, 2) },
      },
      { stop: "one" },
    ]);
    expect(complaints).toEqual([]);
  }, 120_000);

  test("downloads a model with progress, stops a download, and unloads a model", async () => {
    let stopped = false;
    let finish: () => void = () => {};
    const library: ModelLibrary = {
      check: () => undefined,
      pull: (name, { signal, onProgress }) =>
        new Promise((resolve, reject) => {
          onProgress({ doneBytes: 2e9, totalBytes: 8e9 });
          if (name === "org/fine") finish = () => resolve({ bytes: 8e9 });
          signal.addEventListener("abort", () => {
            stopped = true;
            reject(signal.reason);
          });
        }),
      remove: async () => 0,
    };
    const { page } = await open(sayScript("Hi."), {}, {}, undefined, library);
    await page.click("#to-cluster");
    await page.waitForSelector("#models li:has-text('test/scripted: ready')");
    // Without a cluster the page shows this machine and hides what is between machines.
    expect(await page.isVisible("#several")).toBe(false);
    expect(await page.textContent("#cluster-state code")).toBe("caravan cluster create NAME");
    await page.fill("#pull-name", "org/slow");
    await page.keyboard.press("Enter");
    await page.waitForSelector("#pull-state:has-text('2.0 GB of 8.0 GB')");
    expect(await page.getAttribute("#pull-progress", "value")).toBe("0.25");
    await page.click("#pull-stop");
    await page.waitForSelector("#pull-state:has-text('is stopped')");
    await until(() => stopped, "the node hears of it");
    await page.fill("#pull-name", "org/fine");
    await page.keyboard.press("Enter");
    await page.waitForSelector("#pull-state:has-text('2.0 GB of 8.0 GB')");
    finish();
    await page.waitForSelector("#pull-state:has-text('org/fine is here')");
    await page.click("#models button[aria-label='Unload test/scripted']");
    await page.waitForSelector("#models li:has-text('test/scripted: available')");
  }, 120_000);

  test("plots throughput and latency, and lists the last requests", async () => {
    const { page } = await open(sayScript("It scatters."));
    await page.waitForSelector("#send:not([disabled])");
    await say(page, "Why is the sky blue?");
    await page.waitForSelector(".turn.assistant .stats:not(:empty)");
    await page.click("#to-figures");
    await page.waitForSelector("#requests tbody tr");
    expect(await page.textContent("#requests tbody tr")).toContain("test/scripted");
    await page.waitForSelector("#plots figure:nth-of-type(4)");
    expect(await page.textContent("#plots figcaption")).toContain("Tokens a second");
    expect(await page.textContent("#totals")).toContain("Last hour: 1 request,");
    expect(await page.getAttribute("#requests .phases", "aria-label")).not.toBeNull();
    // A page that is opened later sees what was.
    await page.reload();
    await page.waitForSelector("#plots .line");
    await page.check("#spans input[value='360']");
    await page.waitForSelector("#plots svg[aria-label*='the last 60 minutes']");
    expect(complaints).toEqual([]);
  }, 120_000);

  for (const [name, context] of Object.entries({
    "light, on a desktop": { colorScheme: "light", viewport: { width: 1000, height: 700 } },
    "dark, on a phone": { colorScheme: "dark", viewport: { width: 390, height: 780 } },
  } satisfies Record<string, BrowserContextOptions>)) {
    test(`has no serious accessibility problem: ${name}`, async () => {
      const { service } = scriptedCluster();
      const { page } = await open(sayScript("It scatters."), {}, { ...context, bypassCSP: true }, service);
      await page.waitForSelector("#send:not([disabled])");
      await say(page, "Why is the sky blue?");
      await page.waitForSelector(".turn.assistant .stats:not(:empty)");
      await page.click("#settings-toggle");
      await page.addScriptTag({ path: join(root, "node_modules/axe-core/axe.min.js") });
      mkdirSync(join(root, "build/screenshots"), { recursive: true });
      const look = async (view: string): Promise<void> => {
        const violations: string[] = await page.evaluate(
          "axe.run().then((found) => found.violations.map(({ id, impact, nodes }) => impact + ': ' + id + ' ' + nodes[0].html))",
        );
        expect(violations.filter((line) => /^(serious|critical)/.test(line))).toEqual([]);
        expect(await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")).toBe(true);
        await page.screenshot({
          path: join(root, `build/screenshots/${view}-${name.split(",")[0]}.png`),
        });
      };
      await look("page");
      await page.click("#settings-toggle");
      await page.click("#to-cluster");
      await page.waitForSelector("#nodes tbody tr:nth-of-type(3)");
      await page.click("#place button[type=submit]");
      await page.waitForSelector("#placements tbody tr");
      await look("cluster");
      await page.locator("#memory").evaluate((part) => part.scrollIntoView());
      await look("memory");
      await page.click("#to-figures");
      await page.waitForSelector("#plots figure:nth-of-type(4)");
      await look("figures");
    }, 120_000);
  }
});
