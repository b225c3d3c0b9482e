#!/usr/bin/env bash
# The full sweep over ranks: every golden on every grid, whole and in pieces, over shared memory and TCP; the long golden over the
# edges of real chunks; real weights. Run by `make verify`; BUN may name the Bun. CARAVAN_SCOUT_MINI may name a folder with
# scout-mini (test/tools/make_mini.py).
set -eu
cd "$(dirname "$0")/../.."
BUN=${BUN:-$(command -v bun || echo "$PWD/.tools/node_modules/.bin/bun")}
CARAVAN_RANKS=all exec "$BUN" test --timeout 300000 test/golden/ranks.test.ts test/golden/ranks-text.test.ts
