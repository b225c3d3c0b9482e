#!/usr/bin/env bash
# Builds the executables of a release (make dist) and checks them:
#   1. the Mach-O file and its C library as macOS reads them, page by page; what the others import (executables.test.ts);
#   2. those for Linux run: x86-64 here, arm64 under qemu where it is;
#   3. a second build from the same files in another folder has the same bytes.
# Needs python3 with pip, Bun, and the package registries. Run by `make verify`; BUN may name the Bun.
set -u
cd "$(dirname "$0")/../.."
BUN=${BUN:-$(command -v bun || echo "$PWD/.tools/node_modules/.bin/bun")}
export PATH="$(dirname "$BUN"):$PATH"
passed=0 failed=0 skipped=0

check() { # check NAME COMMAND…
  local name=$1 start=$SECONDS
  shift
  if "$@"; then
    echo "ok - $name ($((SECONDS - start)) s)"
    passed=$((passed + 1))
  else
    echo "not ok - $name"
    failed=$((failed + 1))
  fi
}
skip() {
  echo "skipped: $1"
  skipped=$((skipped + 1))
}
finish() {
  echo " $passed pass"
  [ $skipped -eq 0 ] || echo " $skipped skip"
  [ $failed -eq 0 ] || echo " $failed fail"
  [ $failed -eq 0 ]
  exit
}

if [ "$(uname -s)" != Linux ]; then
  skip "the executables of a release are built on Linux"
  finish
fi
if ! command -v python3 >/dev/null; then
  skip "the executables of a release: there is no python3"
  finish
fi
mkdir -p build/release
if ! make --no-print-directory -f release/dist.mk release-tools >build/release/tools.log 2>&1; then
  skip "the executables of a release: their tools cannot be had ($(tail -n 1 build/release/tools.log))"
  finish
fi

build() { # build LOG FOLDER
  make --no-print-directory -C "$2" -f release/dist.mk -j2 >"$1" 2>&1 || { tail -n 20 "$1"; return 1; }
}
check "the executables for macOS and Linux build" build build/release/build.log .
[ $failed -eq 0 ] || finish

says_version() { # says_version COMMAND…
  local said
  said=$("$@" --version) && [ "$said" = "caravan $(sed -nE 's/^  "version": "(.*)",$/\1/p' package.json)" ] || { echo "it says: $said"; return 1; }
}
processor() { # its kernels' set, from `doctor`: the C library was found and loaded
  HOME=$PWD/build/release/home "$@" doctor --json | grep -q '"name":"processor","ok":true'
}
if [ "$(uname -m)" = x86_64 ]; then
  check "the one for x86-64 runs" says_version dist/caravan-linux-x64
  check "the one for x86-64 loads its C library" processor dist/caravan-linux-x64
else
  skip "running the executable for x86-64: this is another processor"
fi
emulator=$(command -v qemu-aarch64-static || command -v qemu-aarch64 || ls "$PWD"/.tools/arm64/root/usr/bin/qemu-aarch64* 2>/dev/null | head -n 1)
sysroot=$(ls -d /usr/aarch64-linux-gnu "$PWD"/.tools/arm64/root/usr/aarch64-linux-gnu 2>/dev/null | head -n 1)
if [ -n "$emulator" ] && [ -n "$sysroot" ]; then
  check "the one for arm64 runs under qemu" says_version "$emulator" -cpu max -L "$sysroot" dist/caravan-linux-arm64
  check "the one for arm64 loads its C library" processor "$emulator" -cpu max -L "$sysroot" dist/caravan-linux-arm64
else
  skip "running the executable for arm64: there is no qemu-aarch64 with an arm64 C library"
fi

again() {
  local folder=build/release/again
  rm -rf $folder && mkdir -p $folder || return 1
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' each; do [ -f "$each" ] && printf '%s\0' "$each"; done | tar -cf - --null -T - | tar -xf - -C $folder || return 1
  ln -s "$PWD/.tools" $folder/.tools
  build build/release/again.log $folder || return 1
  diff dist/SHA256SUMS $folder/dist/SHA256SUMS && rm -rf $folder
}
if git rev-parse --git-dir >/dev/null 2>&1; then
  check "a build in another folder has the same bytes" again
else
  skip "building a second time: this is no git checkout"
fi

echo " $passed pass"
[ $skipped -eq 0 ] || echo " $skipped skip"
[ $failed -eq 0 ] || echo " $failed fail"
"$BUN" test ./test/release --timeout 60000 || failed=$((failed + 1))
[ $failed -eq 0 ]
