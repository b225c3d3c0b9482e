#!/usr/bin/env bash
# copy_programs.sh ROOT FILE... — copies each file to the same path under ROOT, with the shared libraries that it is linked with.
set -euo pipefail
root=$1
shift
put() {
  mkdir -p "$root$(dirname "$1")"
  [ -e "$root$1" ] || cp -L "$1" "$root$1"
}
for file in "$@"; do
  put "$file"
  { ldd "$file" 2>/dev/null || true; } | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^[[:space:]]*\(\/[^ ]*\) (.*/\1/p' | while read -r library; do put "$library"; done
done
