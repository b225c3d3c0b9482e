// The version of everything that nodes say to each other: control messages, beacons, runner orders, frames between ranks.
// Nodes of different versions refuse each other and name both. Raise it with every change that an older node misreads.

export const CARAVAN_PROTOCOL = 3;
