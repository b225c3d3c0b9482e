// Reasons travel in every node's record, whose texts are bounded: a record that is refused for one long sentence would take
// its whole node out of the cluster.

const MOST_CHARACTERS = 1000;

/** The sentence, or its beginning. */
export function reasonOf(text: string): string {
  return text.length <= MOST_CHARACTERS ? text : `${text.slice(0, MOST_CHARACTERS - 1)}…`;
}
