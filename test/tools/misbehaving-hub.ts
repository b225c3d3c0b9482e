// A hub for download tests that does what real ones sometimes do: drops, stalls, lies about ranges, changes files,
// limits rates, redirects. Built on node:http, because there a response can promise a length and then break it.

import { createHash } from "node:crypto";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";

export interface HubFile {
  path: string;
  content: Uint8Array;
  /** Listed with a sha256, like big files. Default: .safetensors. */
  lfs?: boolean;
  /** What the list says instead of the truth. */
  listedSize?: number;
  listedHash?: string;
}

export interface FileRequest {
  path: string;
  /** Bytes asked for: from start to before end; undefined without a Range header. */
  range: { start: number; end: number } | undefined;
  /** How many requests for this path came before. */
  earlier: number;
}

/** What to do with one request for a file; undefined: answer it well. */
export type Misbehaviour =
  | { do: "drop"; afterBytes: number }
  | { do: "end-early"; afterBytes: number }
  | { do: "stall"; afterBytes: number }
  | { do: "status"; status: number; headers?: Record<string, string> }
  | { do: "ignore-range" }
  | { do: "content-range"; value: string }
  | { do: "other-content"; content: Uint8Array; headers?: Record<string, string> }
  | { do: "headers"; headers: Record<string, string> }
  | { do: "redirect"; to: string }
  | { do: "after"; work: () => Promise<void> | void };

export interface SeenRequest {
  url: string;
  path: string;
  authorization: string | undefined;
  range: string | undefined;
  /** Bytes of the body that were sent. */
  bytes: number;
}

export const COMMIT = "0123456789abcdef0123456789abcdef01234567";

export function gitBlobId(content: Uint8Array): string {
  return createHash("sha1").update(`blob ${content.byteLength}\0`).update(content).digest("hex");
}

export function sha256(content: Uint8Array): string {
  return createHash("sha256").update(content).digest("hex");
}

export class MisbehavingHub {
  readonly id: string;
  files: HubFile[];
  commit = COMMIT;
  /** Called for every request for a file's content. */
  behave: (request: FileRequest) => Misbehaviour | undefined = () => undefined;
  /** Called for every request to /api; the answer replaces the good one. */
  behaveApi: (
    path: string,
    earlier: number,
  ) => { status: number; headers?: Record<string, string>; body?: string } | undefined = () => undefined;
  readonly requests: SeenRequest[] = [];
  /** Splits the list of files into pages of this many. */
  pageSize = Number.POSITIVE_INFINITY;
  #server: Server;
  #port = 0;

  private constructor(id: string, files: HubFile[]) {
    this.id = id;
    this.files = files;
    this.#server = createServer((request, response) => {
      this.#answer(request, response).catch((error: unknown) =>
        response.destroy(error instanceof Error ? error : undefined),
      );
    });
  }

  static async start(id: string, files: HubFile[]): Promise<MisbehavingHub> {
    const hub = new MisbehavingHub(id, files);
    await new Promise<void>((resolve) => hub.#server.listen(0, "127.0.0.1", resolve));
    const address = hub.#server.address();
    if (address === null || typeof address === "string") throw new Error("no port");
    hub.#port = address.port;
    return hub;
  }

  get url(): string {
    return `http://127.0.0.1:${this.#port}`;
  }

  /** Body bytes sent for files (of one path). */
  bytesServed(path?: string): number {
    return this.requests
      .filter((request) => request.path !== "" && (path === undefined || request.path === path))
      .reduce((sum, request) => sum + request.bytes, 0);
  }

  requestsFor(path: string): SeenRequest[] {
    return this.requests.filter((request) => request.path === path);
  }

  stop(): void {
    this.#server.closeAllConnections();
    this.#server.close();
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const url = new URL(request.url ?? "/", this.url);
    const file =
      /^\/[^/]+\/[^/]+\/resolve\/[0-9a-f]{40}\/(.+)$/.exec(url.pathname)?.[1] ??
      /^\/files\/(.+)$/.exec(url.pathname)?.[1];
    const path = file === undefined ? "" : decodeURIComponent(file);
    const seen: SeenRequest = {
      url: url.href,
      path,
      authorization: request.headers.authorization,
      range: request.headers.range,
      bytes: 0,
    };
    const earlier = this.requests.filter((each) =>
      path === "" ? each.url === seen.url : each.path === path,
    ).length;
    this.requests.push(seen);
    if (path === "") this.#answerApi(url, earlier, response);
    else await this.#answerFile(path, earlier, seen, request, response);
  }

  #answerApi(url: URL, earlier: number, response: ServerResponse): void {
    const fault = this.behaveApi(url.pathname, earlier);
    const send = (status: number, body: string, headers: Record<string, string> = {}): void => {
      response.writeHead(status, { "content-type": "application/json", ...headers });
      response.end(body);
    };
    if (fault !== undefined) {
      send(fault.status, fault.body ?? "", fault.headers);
      return;
    }
    if (url.pathname.startsWith(`/api/models/${this.id}/revision/`)) {
      send(200, JSON.stringify({ id: this.id, sha: this.commit }));
      return;
    }
    if (url.pathname === `/api/models/${this.id}/tree/${this.commit}`) {
      const page = Number(url.searchParams.get("cursor") ?? 0);
      const size = Math.min(this.pageSize, this.files.length);
      const part = this.files.slice(page * size, (page + 1) * size);
      const next =
        (page + 1) * size < this.files.length
          ? `<${url.pathname}?recursive=true&cursor=${page + 1}>; rel="next"`
          : "";
      send(
        200,
        JSON.stringify([{ type: "directory", path: "folder", oid: "f", size: 0 }, ...part.map(listed)]),
        next === "" ? {} : { link: next },
      );
      return;
    }
    send(404, '{"error":"not found"}', { "x-error-message": "Repository not found" });
  }

  async #answerFile(
    path: string,
    earlier: number,
    seen: SeenRequest,
    request: IncomingMessage,
    response: ServerResponse,
  ): Promise<void> {
    const file = this.files.find((each) => each.path === path);
    if (file === undefined) {
      response.writeHead(404).end();
      return;
    }
    const match = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? "");
    const range = match === null ? undefined : { start: Number(match[1]), end: Number(match[2]) + 1 };
    const how = this.behave({ path, range, earlier });
    if (how?.do === "after") await how.work();
    if (how?.do === "status") {
      response.writeHead(how.status, how.headers ?? {}).end("no");
      return;
    }
    if (how?.do === "redirect") {
      response
        .writeHead(302, {
          location: how.to,
          "x-repo-commit": this.commit,
          "x-linked-etag": `"${hashOf(file)}"`,
        })
        .end();
      return;
    }
    const content = how?.do === "other-content" ? how.content : file.content;
    const asked = how?.do === "ignore-range" ? undefined : range;
    const body = asked === undefined ? content : content.subarray(asked.start, asked.end);
    const headers: Record<string, string> = {
      etag: `"${hashOf(file)}"`,
      "content-length": String(body.byteLength),
    };
    if (asked !== undefined)
      headers["content-range"] = `bytes ${asked.start}-${asked.end - 1}/${content.byteLength}`;
    if (how?.do === "content-range") headers["content-range"] = how.value;
    if (how?.do === "headers" || how?.do === "other-content") Object.assign(headers, how.headers);
    if (how?.do === "end-early") delete headers["content-length"];
    response.writeHead(asked === undefined ? 200 : 206, headers);
    const limit =
      how?.do === "drop" || how?.do === "stall" || how?.do === "end-early" ? how.afterBytes : body.byteLength;
    const sent = body.subarray(0, limit);
    seen.bytes += sent.byteLength;
    await new Promise<void>((resolve) => response.write(sent.byteLength > 0 ? sent : "", () => resolve()));
    if (how?.do === "drop") response.destroy();
    else if (how?.do !== "stall") response.end();
  }
}

function hashOf(file: HubFile): string {
  return (file.lfs ?? file.path.endsWith(".safetensors")) ? sha256(file.content) : gitBlobId(file.content);
}

function listed(file: HubFile): object {
  const size = file.listedSize ?? file.content.byteLength;
  const oid = file.listedHash ?? hashOf(file);
  const base = { type: "file", path: file.path, size };
  if (!(file.lfs ?? file.path.endsWith(".safetensors"))) return { ...base, oid };
  return { ...base, oid: "a".repeat(40), lfs: { oid, size, pointerSize: 134 } };
}
