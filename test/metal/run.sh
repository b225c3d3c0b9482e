#!/usr/bin/env bash
# Checks the Metal backend on a machine without Metal:
#   1. the tools themselves: strict check, executor, fake runtime (seeded mistakes must be reported, correct code must pass);
#   2. the kernels: strict check, faults put into them are caught;
#   3. the backend's operations against double precision: as they are, with race, bounds and uninitialised checks, with fast math;
#   4. whole models: logits of the tiny checkpoints through `--device metal` on the fake runtime;
#   5. the host's code compiles for macOS.
# Nothing here runs on Apple hardware: docs/metal.md says what that leaves open.
# Needs gcc, nm, addr2line, python3 with pip (for the ziglang package's clang) and Bun. Run by `make verify`; BUN may name the Bun.
# METAL_ROUNDS: how many rounds of random shapes (default 3).
set -u
cd "$(dirname "$0")/../.."
BUN=${BUN:-$(command -v bun || echo "$PWD/.tools/node_modules/.bin/bun")}
out=$PWD/build/metal
rounds=${METAL_ROUNDS:-3}
passed=0 failed=0

skip() {
  echo "skipped: Metal on the fake runtime: $1"
  echo " 1 skip"
  exit 0
}

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

[ "$(uname -s)" = Linux ] || skip "only on Linux (a Mac runs the kernels themselves)"
for tool in gcc nm addr2line python3; do command -v $tool >/dev/null || skip "$tool is not here"; done
mkdir -p "$out/cache"

# clang: the one of the releases or of the arm64 tests when it is there, else the PyPI package in an environment of its own.
ZIG_PACKAGE=ziglang==0.17.1
find_zig() {
  local each
  for each in .tools/release/zig/ziglang/zig .tools/arm64/zig/ziglang/zig "$out"/venv/lib/python3*/site-packages/ziglang/zig; do
    [ -x "$each" ] && ZIG=$(realpath "$each") && return 0
  done
  return 1
}
if ! find_zig; then
  python3 -m venv "$out/venv" >"$out/pip.log" 2>&1 && "$out/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$ZIG_PACKAGE" >>"$out/pip.log" 2>&1
  find_zig || skip "no clang: pip cannot install $ZIG_PACKAGE ($(tail -n 1 "$out/pip.log"))"
fi
export ZIG_GLOBAL_CACHE_DIR=$out/zig-cache ZIG_LOCAL_CACHE_DIR=$out/zig-cache
export MSL_CLANG="$ZIG clang" MSLC="$BUN $PWD/test/metal/compiler/mslc.ts" MSL_CACHE=$out/cache CARAVAN_METAL_LIBRARY=$out/libfakemetal.so CARAVAN_METAL_CACHE=
# Compiled kernels are kept by the hash of their source alone: those of another compiler, shim or executor must go.
tools=$(cat test/metal/compiler/*.ts test/metal/shim/*.h test/metal/executor/*.cpp test/metal/executor/*.h | cksum)
[ "$(cat "$out/cache/tools" 2>/dev/null)" = "$tools" ] || { rm -f "$out"/cache/*.so "$out"/*.o; echo "$tools" >"$out/cache/tools"; }

build() { make --no-print-directory -f test/metal/ops/ops.mk metal-tests build/libcaravan.so; }
check "the library, the fake runtime and the test programs build" build
if [ $failed -ne 0 ]; then
  echo " $failed fail"
  exit 1
fi

# Programs that count themselves: their last line is `N passed, N failed`.
program() { # program NAME ARGUMENTS…
  local log="$out/$1.log"
  timeout 600 "$out/$1" "${@:2}" >"$log" 2>&1 || { grep -v '^ok' "$log"; return 1; }
  tail -n 1 "$log"
}
checked() { FAKEMETAL_CHECKED=1 program "$@"; }
counted() { FAKEMETAL_CHECKED=1 FAKEMETAL_LINES=1 program "$@"; }
fast() { FAKEMETAL_FAST_MATH=1 program "$@"; }
races() { CARAVAN_METAL_LIBRARY=$out/tsan/libfakemetal.so TSAN_OPTIONS=halt_on_error=1:exitcode=66 program tsan/hand_over_test; }

macos() { # the backend's C files, for the system that it is for
  local file
  for file in native/backend/metal/*.c; do
    "$ZIG" cc -target aarch64-macos.13.0 -std=c11 -O1 -Wall -Wextra -Werror -c "$file" -o "$out/macos.o" || return 1
  done
}

check "the fake runtime reports mistakes and behaves like a GPU" program fake_test
check "GPU and host hand over in every way, late, failing and stopped" program hand_over_test
check "they hand over without races (ThreadSanitizer)" races
check "the kernel that hands over stays in bounds and has no races" checked hand_over_test spin
check "compiled kernels are kept on disk, and made again where they are not right" program archive_test
# Whole models and the tools' own tests run beside the programs, on another core.
"$BUN" test ./test/metal/tests --timeout 240000 >"$out/tests.log" 2>&1 &
tests=$!
trap 'kill "$tests" 2>/dev/null' INT TERM

check "products, experts and logits equal double precision, $rounds rounds" program products_test "$rounds"
check "attention equals double precision, $rounds rounds" program attention_test "$rounds"
check "products, experts and logits have no races and stay in bounds" checked products_test 1 short
check "attention has no races and stays in bounds" checked attention_test 1 short
check "products, experts and logits bear fast math" fast products_test 1 short
check "attention bears fast math" fast attention_test 1 short
check "weights are read once, in whole lines" counted counts_test
check "real models' shapes: results, threadgroups" program shapes_test
check "the backend compiles for arm64 macOS" macos
echo " $passed pass"
[ $failed -eq 0 ] || echo " $failed fail"
wait "$tests" || failed=$((failed + 1))
cat "$out/tests.log"
[ $failed -eq 0 ]
