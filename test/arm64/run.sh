#!/usr/bin/env bash
# Checks the arm64 build on another processor: the C tests and the whole program run under qemu's user emulation.
#   1. the library compiles and links for Linux and macOS with clang's warnings as errors;
#   2. each emulated processor picks the kernel set that it should, and every set has scalar's bits (compiled by gcc too);
#   3. the executable's logits equal, bit for bit, those of this machine's executable, and its server answers.
# Needs dist/caravan (make) and what tools.sh fetches. Run by `make verify`; BUN may name the Bun to use.
set -u
cd "$(dirname "$0")/../.."
BUN=${BUN:-$(command -v bun || echo "$PWD/.tools/node_modules/.bin/bun")}
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

finish() {
  echo " $passed pass"
  [ $skipped -eq 0 ] || echo " $skipped skip"
  echo " $failed fail"
  [ $failed -eq 0 ] || exit 1
  exit 0
}

if [ "$(uname -sm)" != "Linux x86_64" ]; then
  echo "skipped: arm64 under an emulator: only from Linux on x86-64 (an arm64 machine runs these tests itself)"
  echo " 1 skip"
  exit 0
fi
. test/arm64/tools.sh
out=build/arm64
mkdir -p $out
# Two runs at once would build into the same files.
exec 9>$out/lock
flock -w 600 9 || { echo "another run of test/arm64/run.sh has been busy for ten minutes" >&2; exit 1; }
export QEMU_LD_PREFIX=$SYSROOT ARM64_EMULATOR=$EMULATOR

build() { make --no-print-directory -f test/arm64/arm64.mk -j2 CLANG="$CLANG" "$1"; }
check "the library and the C tests build for arm64 Linux" build arm64-linux
check "the library builds for arm64 macOS" build arm64-macos
[ $failed -eq 0 ] || finish

picks() { # picks CPU SET
  local got
  got=$(QEMU_CPU=$1 "$EMULATOR" $out/kernel_set)
  [ "$got" = "$2" ] || { echo "$1 picks $got, not $2"; return 1; }
}
check "a Cortex-A53 (no dot product) picks plain NEON" picks cortex-a53 neon
check "a Neoverse N1 (no int8 matrix product) picks the dot-product set" picks neoverse-n1 neon-dotprod
check "a processor with everything picks the int8-matrix set" picks max neon-i8mm

# The C tests count themselves; their last line is `N passed, N failed`.
c_test() { # c_test CPU PROGRAM SETS…: the sets must be among those compared
  local log="$out/$2-$1.log" set
  QEMU_CPU=$1 "$EMULATOR" "$out/$2" >"$log" 2>&1 || { grep -v '^ok' "$log"; return 1; }
  tail -n 1 "$log"
  for set in "${@:3}"; do grep -q "^ok - $set: qmatmul" "$log" || { echo "$set was not compared"; return 1; }; done
}
check "every kernel set has scalar's bits" c_test max test_kernels neon neon-dotprod neon-i8mm
check "plain NEON needs nothing that a Cortex-A53 lacks" c_test cortex-a53 test_kernels neon
check "the engine passes its tests" c_test max test_engine

# Most arm64 Linux machines build with gcc, which has other ideas of what to contract, reorder and inline.
if [ -n "$GCC" ]; then
  gcc_kernels() { make --no-print-directory -f test/arm64/arm64.mk -j2 GCC="$GCC" arm64-gcc && c_test max gcc/test_kernels neon neon-dotprod neon-i8mm; }
  check "every kernel set has scalar's bits when gcc compiles it" gcc_kernels
else
  echo "skipped: kernels compiled by gcc: there is no aarch64-linux-gnu-gcc (package gcc-aarch64-linux-gnu)"
  skipped=$((skipped + 1))
fi

bundle() {
  "$BUN" build --compile --no-compile-autoload-dotenv --no-compile-autoload-bunfig --minify-syntax --minify-whitespace --target=bun-linux-arm64 \
    --compile-executable-path="$BUN_ARM64" --root src \
    src/main.ts src/chat/text-worker.ts $out/libcaravan.so --outfile $out/caravan-arm64 >$out/bundle.log 2>&1 || { cat $out/bundle.log; return 1; }
  cat >$out/caravan <<END
#!/bin/sh
export QEMU_CPU="\${QEMU_CPU:-max}" QEMU_LD_PREFIX="$QEMU_LD_PREFIX" ARM64_EMULATOR="$EMULATOR"
exec "$EMULATOR" -E LD_PRELOAD="$PWD/$out/exec_emulated.so" "$PWD/$out/caravan-arm64" "\$@"
END
  chmod +x $out/caravan
}
check "the executable builds for arm64 Linux" bundle
[ $failed -eq 0 ] || finish

CARAVAN_TEST_ARM64="$PWD/$out/caravan" "$BUN" test ./test/arm64/emulated.ts --timeout 120000 || failed=$((failed + 1))
finish
