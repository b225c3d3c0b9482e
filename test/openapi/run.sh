#!/usr/bin/env bash
# Fuzzes the HTTP API from its own description with schemathesis (a PyPI package, installed into build/venv): no request
# may end with 500 or with a reply that the description does not allow, wrong requests must be refused, and no route may
# work without its key. Bounded in time; the same seed gives the same requests.
#   BUN=path/to/bun test/openapi/run.sh [examples an operation]
set -u
cd "$(dirname "$0")/../.."
bun=${BUN:-bun}
examples=${1:-20}
package=schemathesis==4.32.5
venv=build/venv-openapi

skip() { echo "skipped: test/openapi ($1)"; exit 0; }
command -v python3 >/dev/null || skip "no python3"
if [ ! -x $venv/bin/schemathesis ]; then
  python3 -m venv $venv 2>/dev/null || skip "python3 has no venv"
  $venv/bin/python -m pip install --quiet --disable-pip-version-check "$package" || skip "pip cannot fetch $package"
fi

folder=$(mktemp -d)
trap 'exec 9>&-; rm -rf "$folder"' EXIT
mkfifo "$folder/input"
"$bun" test/openapi/server.ts fuzzing-key-of-this-run <"$folder/input" >"$folder/url" &
server=$!
exec 9>"$folder/input"
for _ in $(seq 100); do [ -s "$folder/url" ] && break; sleep 0.1; done
url=$(cat "$folder/url")
[ -n "$url" ] || { echo "the server did not start"; exit 1; }

# positive_data_acceptance is left out: parameters that only make sense together, and the context's length, are refused
# with 400 by rules that a schema cannot say.
# That making examples is slow on a busy machine says nothing about the API.
# Its own notes go into the folder too. The report is written into a file first: a pipe would hide the exit code.
(cd "$folder" && "$OLDPWD"/$venv/bin/schemathesis run "$url/openapi.json" -H "Authorization: Bearer fuzzing-key-of-this-run" \
  --phases coverage,fuzzing --max-examples "$examples" --seed 20260 --warnings off --request-timeout 20 \
  --suppress-health-check too_slow --exclude-checks positive_data_acceptance) >"$folder/report" 2>&1
code=$?
exec 9>&-
wait "$server"; served=$?
cut -c1-400 "$folder/report" | grep -v '^ *$' | tail -n "$([ $code -eq 0 ] && echo 12 || echo 200)"
[ $served -eq 0 ] || { echo "the server ended with $served"; code=1; }
[ $code -eq 0 ] && { echo " 1 pass"; echo " 0 fail"; } || { echo " 0 pass"; echo " 1 fail"; }
exit $code
