// What a run of the simulation ends with when an invariant does not hold.

export class Violation extends Error {}
