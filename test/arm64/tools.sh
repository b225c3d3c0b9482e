# tools.sh — sourced by run.sh: finds or fetches what cross-building and emulating arm64 takes, into .tools/arm64 alone.
# Sets CLANG, EMULATOR, SYSROOT and BUN_ARM64; without one of them it says why and ends the script as skipped. Sets GCC to a
# gcc for arm64, empty where there is none.

tools=$PWD/.tools/arm64
mkdir -p "$tools"

skip() {
  echo "skipped: arm64 under an emulator: $1"
  echo " 1 skip"
  exit 0
}

# clang for every target, and the headers and C libraries to link with: the ziglang package of PyPI
ZIG_PACKAGE=ziglang==0.17.1
export ZIG_GLOBAL_CACHE_DIR=$tools/zig-cache ZIG_LOCAL_CACHE_DIR=$tools/zig-cache
if [ ! -x "$tools/zig/ziglang/zig" ]; then
  rm -rf "$tools/zig"
  python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$tools/zig" "$ZIG_PACKAGE" >"$tools/pip.log" 2>&1 ||
    skip "no compiler: pip cannot install $ZIG_PACKAGE ($(tail -n 1 "$tools/pip.log"))"
fi
CLANG="$tools/zig/ziglang/zig cc"

# Unpacks a Debian or Ubuntu package into .tools/arm64/root, without installing it and without needing root.
fetch_deb() {
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
  local apt=(-qq -o Dir::State::Lists="$tools/apt/lists" -o Dir::Cache="$tools/apt/cache" -o APT::Sandbox::User=)
  mkdir -p "$tools/apt/lists/partial" "$tools/apt/cache/archives/partial" "$tools/root"
  rm -f "$tools"/apt/*.deb
  apt-get "${apt[@]}" update >"$tools/apt.log" 2>&1 || return 1
  (cd "$tools/apt" && apt-get "${apt[@]}" download "$1") >"$tools/apt.log" 2>&1 && dpkg-deb -x "$tools"/apt/*.deb "$tools/root" && rm -f "$tools"/apt/*.deb
}

find_emulator() {
  local each
  for each in qemu-aarch64-static qemu-aarch64 "$tools/root/usr/bin/qemu-aarch64-static" "$tools/root/usr/bin/qemu-aarch64"; do
    EMULATOR=$(command -v "$each") && return 0
  done
  return 1
}
find_emulator || { fetch_deb qemu-user-static && find_emulator; } || { fetch_deb qemu-user && find_emulator; } ||
  skip "no emulator: there is no qemu-aarch64 and apt-get cannot download it (package qemu-user-static)"
# The package holds an emulator for every processor.
[ -d "$tools/root/usr/bin" ] && find "$tools/root/usr/bin" -name 'qemu-*' ! -name 'qemu-aarch64*' -delete

find_sysroot() {
  for SYSROOT in /usr/aarch64-linux-gnu "$tools/root/usr/aarch64-linux-gnu"; do
    [ -e "$SYSROOT/lib/ld-linux-aarch64.so.1" ] && return 0
  done
  return 1
}
find_sysroot || { fetch_deb libc6-arm64-cross && find_sysroot; } ||
  skip "no arm64 C library: apt-get cannot download libc6-arm64-cross"

GCC=$(command -v aarch64-linux-gnu-gcc)

# Bun for arm64, of the version that builds
bun_version=$("$BUN" --version)
BUN_ARM64=$tools/bun-$bun_version/node_modules/@oven/bun-linux-aarch64/bin/bun
if [ ! -x "$BUN_ARM64" ]; then
  mkdir -p "$tools/bun-$bun_version" && echo '{"private":true}' >"$tools/bun-$bun_version/package.json"
  (cd "$tools/bun-$bun_version" && "$BUN" add --silent --cpu arm64 --os linux "@oven/bun-linux-aarch64@$bun_version") >"$tools/bun.log" 2>&1 ||
    skip "no Bun for arm64: the package @oven/bun-linux-aarch64@$bun_version cannot be installed ($(tail -n 1 "$tools/bun.log"))"
fi
