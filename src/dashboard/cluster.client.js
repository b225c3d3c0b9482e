// The cluster as a picture and tables that follow its events; letting machines in; placing a model and ending it.
// @ts-check

import { showLedgers } from "/ledger.js";
import { askApi, element, gigabytes, messageOf, row, svg } from "/requests.js";

/** @typedef {{ id: string, name: string, reachable: boolean, chip?: string, memory?: { total: number, available: number }, ledger?: import("/ledger.js").Ledger, models?: { model: string, bytes: number, total: number }[], round_trip_us?: number, bandwidth?: number }} Node */
/** @typedef {{ from: string, to: string, kind: string, round_trip_us: number, bandwidth: number }} Link */
/** @typedef {{ id: string, model: string, owner: string, phase: string, progress: number, reason: string, tensor: number, pipeline: number, context: number, outstanding_tokens: number, ranks: { node: string, rank: number, bytes: number }[] }} Instance */
/** @typedef {{ cluster: { name: string } | string | null, self?: { id: string, name: string }, nodes?: Node[], away?: { id: string, name: string }[], conflict?: string, links?: Link[], instances?: Instance[], join_requests?: { name: string, from: string, waiting_seconds: number }[], problems?: unknown[] }} State */
/** @typedef {{ recommended: boolean, tensor: number, pipeline: number, context: number, tokens_per_second: number | null, warnings: string[], ranks: { node: string, node_id: string, bytes: { total: number, usable: number } }[] }} Placement */

const view = element("cluster", HTMLElement);
const picture = element("picture", SVGSVGElement);
const notice = element("cluster-notice", HTMLParagraphElement);
const placements = element("placements", HTMLTableElement);
const placeModel = element("place-model", HTMLSelectElement);

/** Predicted tokens/s of what was placed from this page, by instance. @type {Map<string, number>} */
const predictions = new Map();
/** @type {State | undefined} */
let latest;
/** Memory of this machine. @type {{ total: number, available: number } | undefined} */
let machine;
/** Measured tokens/s by model, from the last requests. @type {Map<string, number>} */
const measured = new Map();

/** Id of the node whose removal waits for the second press. @type {string | undefined} */
let removing;

/** What this machine says of itself where there is no cluster. @param {State} state @returns {Node[]} */
function alone({ self }) {
  if (self === undefined) return [];
  return [{ ...self, reachable: true, ...(machine === undefined ? {} : { memory: machine }) }];
}

/** What is typed at a terminal. @param {string} text */
function command(text) {
  const code = document.createElement("code");
  code.textContent = text;
  return code;
}

/** @param {State} state */
function show(state) {
  latest = state;
  const clustered = state.cluster !== null && state.cluster !== undefined;
  const nodes = clustered ? (state.nodes ?? []) : alone(state);
  element("several", HTMLDivElement).hidden = !clustered;
  const name = typeof state.cluster === "string" ? state.cluster : state.cluster?.name;
  element("cluster-state", HTMLParagraphElement).replaceChildren(
    ...(name === undefined
      ? [
          ...["This machine is in no cluster. ", command("caravan cluster create NAME"), " makes one; "],
          ...[command("caravan join"), " on another machine asks to be let in."],
        ]
      : [
          `Cluster ${name}: ${nodes.length} ${nodes.length === 1 ? "node" : "nodes"}, ${nodes.filter(({ reachable }) => reachable).length} reachable.`,
        ]),
  );
  picture.toggleAttribute("hidden", !clustered);
  draw(nodes, state.links ?? [], state.self?.id);
  const away = (state.away ?? []).map((node) => ({ ...node, reachable: false }));
  body("nodes").replaceChildren(...[...nodes, ...away].map((node) => nodeRow(node, state.self?.id)));
  showLedgers(nodes);
  if (state.conflict !== undefined) say(`Other nodes do not want this one: ${state.conflict}.`);
  const waiting = state.join_requests ?? [];
  element("joining", HTMLDivElement).hidden = waiting.length === 0;
  element("join-requests", HTMLUListElement).replaceChildren(
    ...waiting.map(({ name: who, from, waiting_seconds: seconds }) =>
      item(`${who} (${from}), for ${Math.round(seconds)} s`),
    ),
  );
  const instances = (state.instances ?? []).filter(({ phase }) => phase !== "gone");
  element("instances", HTMLUListElement).replaceChildren(
    ...(instances.length === 0 ? [item("None.")] : instances.map((each) => instanceItem(each, nodes))),
  );
}

/** @param {string} id */
function body(id) {
  const found = element(id, HTMLTableElement).tBodies[0];
  if (found === undefined) throw new Error(`the table ${id} has no body`);
  return found;
}

/** @param {string} text */
function item(text) {
  const li = document.createElement("li");
  li.textContent = text;
  return li;
}

/** Takes a node out of the cluster, after a second press. @param {Node} node */
function removeButton(node) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = removing === node.id ? "Press again to remove" : "Remove";
  button.setAttribute("aria-label", `${button.textContent} ${node.name}`);
  button.addEventListener("click", () => {
    if (removing !== node.id) {
      removing = node.id;
      button.textContent = "Press again to remove";
      button.setAttribute("aria-label", `${button.textContent} ${node.name}`);
      return;
    }
    removing = undefined;
    button.disabled = true;
    askApi("/cluster/remove", { method: "POST", body: JSON.stringify({ node: node.id }) }).then(
      ({ removed, away }) =>
        say(
          `${removed} is removed.${away.length === 0 ? "" : ` Told when they are back: ${away.join(", ")}.`}`,
        ),
      (thrown) => say(messageOf(thrown)),
    );
  });
  return button;
}

/** @param {Node} node @param {string | undefined} self */
function nodeRow(node, self) {
  const { memory } = node;
  const used = memory === undefined ? 0 : memory.total - memory.available;
  const meter = document.createElement("meter");
  if (memory !== undefined) {
    meter.max = memory.total;
    meter.value = used;
    meter.setAttribute("aria-label", `memory of ${node.name}`);
  }
  const cell = document.createElement("span");
  if (memory !== undefined) cell.append(meter, ` ${gigabytes(used)} of ${gigabytes(memory.total)}`);
  return row([
    `${node.name}${node.reachable ? "" : " (not reachable)"}`,
    node.chip ?? "",
    cell,
    node.round_trip_us === undefined ? "" : `${node.round_trip_us.toFixed(0)} µs`,
    node.bandwidth === undefined ? "" : `${(node.bandwidth / 1e9).toFixed(2)} GB/s`,
    (node.models ?? []).map(({ model }) => model).join(", "),
    node.id === self ? "" : removeButton(node),
  ]);
}

/** Nodes on an ellipse, lines between those that have measured each other. @param {Node[]} nodes @param {Link[]} links @param {string | undefined} self */
function draw(nodes, links, self) {
  const places = new Map(
    nodes.map(({ id }, i) => {
      const angle = (i / nodes.length) * 2 * Math.PI - Math.PI / 2;
      return [
        id,
        {
          x: 300 + (nodes.length > 1 ? 210 * Math.cos(angle) : 0),
          y: 160 + (nodes.length > 1 ? 110 * Math.sin(angle) : 0),
        },
      ];
    }),
  );
  /** @type {Element[]} */
  const parts = [];
  const drawn = new Set();
  for (const { from, to, kind, round_trip_us: trip } of links) {
    const a = places.get(from);
    const b = places.get(to);
    const pair = [from, to].sort().join();
    if (a === undefined || b === undefined || drawn.has(pair)) continue;
    drawn.add(pair);
    parts.push(
      svg("line", { x1: a.x, y1: a.y, x2: b.x, y2: b.y, class: `link ${kind === "rdma" ? "rdma" : "tcp"}` }),
    );
    parts.push(
      svg(
        "text",
        { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 - 4, class: "link-label" },
        `${kind} ${trip.toFixed(0)} µs`,
      ),
    );
  }
  for (const node of nodes) {
    const at = places.get(node.id);
    if (at === undefined) continue;
    const { memory } = node;
    const share = memory === undefined || memory.total === 0 ? 0 : 1 - memory.available / memory.total;
    const around = 2 * Math.PI * 30;
    parts.push(svg("circle", { cx: at.x, cy: at.y, r: 30, class: `node${node.reachable ? "" : " lost"}` }));
    parts.push(
      svg("circle", {
        ...{ cx: at.x, cy: at.y, r: 30, class: "used", transform: `rotate(-90 ${at.x} ${at.y})` },
        "stroke-dasharray": `${share * around} ${around}`,
      }),
    );
    parts.push(svg("text", { x: at.x, y: at.y + 4, class: "percent" }, `${Math.round(share * 100)} %`));
    parts.push(
      svg(
        "text",
        { x: at.x, y: at.y + 48, class: "name" },
        `${node.name}${node.id === self ? " (this)" : ""}`,
      ),
    );
  }
  picture.setAttribute(
    "aria-label",
    `${nodes.length} nodes and ${drawn.size} links; the table below says the same in words`,
  );
  picture.replaceChildren(...parts);
}

/** @param {Instance} instance @param {Node[]} nodes */
function instanceItem(instance, nodes) {
  const on = instance.ranks.map(
    ({ node, bytes }) =>
      `${nodes.find(({ id }) => id === node)?.name ?? node.slice(0, 8)} (${gigabytes(bytes)})`,
  );
  const before = predictions.get(instance.id);
  const after = measured.get(instance.model);
  const speed = [
    before === undefined ? "" : `predicted ${before.toFixed(1)} tokens/s`,
    after === undefined ? "" : `measured ${after.toFixed(1)} tokens/s`,
  ].filter((text) => text !== "");
  const li = item(
    `${instance.model}: ${shape(instance)} on ${on.join(", ")}; ${instance.phase}${instance.reason === "" ? "" : `: ${instance.reason}`}${speed.length === 0 ? "" : `; ${speed.join(", ")}`} `,
  );
  if (instance.phase === "fetching" || instance.phase === "loading") {
    const progress = document.createElement("progress");
    progress.max = 1;
    progress.value = instance.progress;
    progress.setAttribute("aria-label", `${instance.phase} ${instance.model}`);
    li.append(progress, ` ${Math.floor(instance.progress * 100)} % `);
  }
  const end = document.createElement("button");
  end.type = "button";
  end.textContent = "End";
  end.setAttribute("aria-label", `End ${instance.model}`);
  end.addEventListener("click", () => {
    end.disabled = true;
    askApi(`/cluster/instances/${instance.id}`, { method: "DELETE" }).then(
      () => say(`${instance.model} is ending.`),
      (thrown) => say(messageOf(thrown)),
    );
  });
  li.append(end);
  return li;
}

/** @param {{ tensor: number, pipeline: number }} placement */
function shape({ tensor, pipeline }) {
  if (tensor * pipeline === 1) return "one node";
  if (pipeline === 1) return `tensor ${tensor}`;
  return tensor === 1 ? `pipeline ${pipeline}` : `tensor ${tensor} × pipeline ${pipeline}`;
}

/** @param {string} text */
function say(text) {
  notice.textContent = text;
}

/** @param {string} model @param {Placement} placement */
function placementRow(model, placement) {
  const load = document.createElement("button");
  load.type = "button";
  load.textContent = "Load";
  load.setAttribute("aria-label", `Load ${model}, ${shape(placement)}`);
  load.addEventListener("click", async () => {
    load.disabled = true;
    try {
      const { tensor, pipeline, context } = placement;
      const nodes = [...new Set(placement.ranks.map(({ node_id: id }) => id))];
      const asked = { model, tensor, pipeline, context, nodes };
      const { id } = await askApi("/cluster/instances", { method: "POST", body: JSON.stringify(asked) });
      if (placement.tokens_per_second !== null) predictions.set(id, placement.tokens_per_second);
      say(`${model} is being loaded.`);
    } catch (thrown) {
      say(messageOf(thrown));
    }
    load.disabled = false;
  });
  return row([
    `${shape(placement)}${placement.recommended ? " (recommended)" : ""}`,
    placement.ranks.map(({ node }) => node).join(", "),
    placement.tokens_per_second === null ? "unknown" : placement.tokens_per_second.toFixed(1),
    placement.ranks.map(({ bytes }) => `${gigabytes(bytes.total)} of ${gigabytes(bytes.usable)}`).join(", "),
    placement.warnings.join("; "),
    load,
  ]);
}

element("place", HTMLFormElement).addEventListener("submit", async (event) => {
  event.preventDefault();
  const model = placeModel.value;
  if (model === "") return;
  const reason = element("plan-reason", HTMLParagraphElement);
  reason.textContent = "Planning …";
  try {
    const query = new URLSearchParams({ model });
    const { value } = element("place-context", HTMLInputElement);
    if (value !== "") query.set("context", value);
    const plan = await askApi(`/cluster/plan?${query}`);
    reason.textContent = plan.reason;
    placements.hidden = plan.placements.length === 0;
    body("placements").replaceChildren(
      ...plan.placements.map((/** @type {Placement} */ each) => placementRow(model, each)),
    );
  } catch (thrown) {
    reason.textContent = messageOf(thrown);
    placements.hidden = true;
  }
});

element("accept", HTMLFormElement).addEventListener("submit", async (event) => {
  event.preventDefault();
  const code = element("code", HTMLInputElement);
  try {
    const { accepted } = await askApi("/cluster/accept", {
      method: "POST",
      body: JSON.stringify({ code: code.value.trim() }),
    });
    code.value = "";
    say(`${accepted} is let in.`);
  } catch (thrown) {
    say(messageOf(thrown));
  }
});

/** @type {EventSource | undefined} */
let source;

/** Follows the cluster while its part of the page is seen. */
async function follow() {
  if (view.hidden) {
    source?.close();
    source = undefined;
    return;
  }
  if (source !== undefined) return;
  try {
    const { data } = await askApi("/v1/models");
    placeModel.replaceChildren(...data.map((/** @type {{ id: string }} */ { id }) => new Option(id, id)));
    show(await askApi("/cluster/state"));
  } catch (thrown) {
    say(messageOf(thrown));
    return;
  }
  source = new EventSource("/cluster/events");
  source.addEventListener("state", (event) => show(JSON.parse(event.data)));
  source.addEventListener("error", () => {
    // Closed for good: this process takes part in no cluster.
    if (source?.readyState !== EventSource.CLOSED) say("The connection to this node is lost; trying again.");
  });
  source.addEventListener("open", () => say(""));
}

addEventListener("figures", (event) => {
  if (!(event instanceof CustomEvent)) return;
  const { speeds, memory } = event.detail;
  for (const [model, speed] of speeds) measured.set(model, speed);
  machine = memory.total > 0 ? memory : undefined;
  // In a cluster the node's own events say it.
  if (latest !== undefined && (latest.cluster === null || speeds.size > 0)) show(latest);
});
new MutationObserver(() => void follow()).observe(view, { attributes: true, attributeFilter: ["hidden"] });
void follow();
