#!/usr/bin/env bash
# make verify: 500 seeds of the simulated cluster, then bugs put into it on purpose, each of which some seed must catch.
set -u
cd "$(dirname "$0")/../.."
: "${BUN:=bun}"
"$BUN" test/simulation/run.ts --seeds 500 --jobs 2 && "$BUN" test/simulation/mutations.ts
