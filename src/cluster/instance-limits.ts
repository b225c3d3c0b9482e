// How long an instance waits for what, how often it tries, and how many a node owns. Milliseconds.

/** A rank that was asked for must show in its node's record within this. */
export const START_MS = 10_000;
/** Loading that makes no progress. */
export const STALL_MS = 120_000;
/** After ranks lost each other: until links and beats have told who is really gone (link silence 1.5 s). */
export const REPLACE_MS = 2000;
/** A placement that was refused is looked at again: memory may have come free. It costs milliseconds. */
export const REFUSED_MS = 5000;
/** Ranks of the earlier epoch give back their memory before the next is placed, at most so long. */
export const FREE_MS = 10_000;
/** Failures of loading in a row. */
export const MOST_ATTEMPTS = 5;
/** Ranks that did not find each other that often are left alone for so long: the network between them may heal unseen. */
export const REGROUP_MS = 60_000;
/** An instance that was ready so long has got over what failed before. */
export const HEALTHY_MS = 60_000;
/** A lost node that is back must have been here so long before anything moves to it. */
export const RETURN_MS = 10_000;
/** How much faster a move must make it. */
export const MOVE_GAIN = 1.1;
/** Running requests may end in so long before an instance stops or moves. */
export const DRAIN_MS = 30_000;
/** Idle instances that were asked to go. */
export const UNLOAD_MS = 20_000;
/** Whether they have gone is looked at that often. */
export const UNLOAD_CHECK_MS = 500;
/** How long a stopped instance is shown. */
export const GONE_SHOWN_MS = 10_000;
/** Lists in records are bounded (net/wire.ts). */
export const MOST_OWNED = 64;
export const MOST_LOST = 64;
