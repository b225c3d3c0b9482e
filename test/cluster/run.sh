#!/usr/bin/env bash
# make verify: hosts in network namespaces with something odd about one of them (odd-hosts.lab.ts). About three minutes.
set -u
cd "$(dirname "$0")/../.."
: "${BUN:=bun}"
"$BUN" test ./test/cluster/odd-hosts.lab.ts
