// The ranks of an instance whose nodes start them, seen from rank 0's process: it opens its end of the group, hands its
// address to its node, and connects when that has the addresses of all. The node watches the other ranks and says when one is lost.

import type { CaravanError } from "../errors.ts";
import { RankGroup } from "./group.ts";
import { GroupWatch } from "./group-watch.ts";
import type { Connection, GroupOptions } from "./rank-protocol.ts";
import type { Ranks, RankTimes } from "./ranks.ts";

export class RemoteRanks implements Ranks {
  readonly lost: Promise<CaravanError>;
  readonly loadedBytes = 0;
  readonly #lose: (why: CaravanError) => void;
  #connection: Connection | undefined;
  #watch: GroupWatch | undefined;
  #closed = false;

  /** Listens. Throws what opening the group does. */
  static open(options: GroupOptions, grid: { tensor: number; pipeline: number }): RemoteRanks {
    return new RemoteRanks(RankGroup.open(options), grid);
  }

  private constructor(
    readonly group: RankGroup,
    readonly grid: { tensor: number; pipeline: number },
  ) {
    const lost = Promise.withResolvers<CaravanError>();
    this.lost = lost.promise;
    this.#lose = lost.resolve;
  }

  get connection(): Connection {
    if (this.#connection === undefined) throw new Error("the ranks are not connected");
    return this.#connection;
  }

  /** addresses: of all ranks, this one's too, in order. */
  async connect(addresses: readonly Uint8Array[], timeoutMs: number): Promise<Connection> {
    this.#connection = await this.group.connect(addresses, timeoutMs);
    this.#watch = new GroupWatch(this.group, this.#lose);
    return this.#connection;
  }

  /** The node has lost a rank. */
  report(why: CaravanError): void {
    if (this.#closed) return;
    this.group.abort(why.message);
    this.#lose(why);
  }

  async close(closeEngine: () => Promise<void>): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#watch?.stop();
    await closeEngine();
    this.group.close();
  }

  times(): Promise<RankTimes[]> {
    return Promise.resolve([]);
  }

  /** Their nodes do that. */
  kill(): void {}
}
