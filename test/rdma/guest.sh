#!/usr/bin/env bash
# guest.sh [-t SECONDS] [-n PROCESSORS] [-m MIB] [-f FILE]... -c 'shell line' — boots the guest, copies each FILE (with its shared libraries)
# to the same path in it, runs the line there and exits with its code. 124: not done in time; 125: the guest did not boot.
# The processor is emulated (no KVM needed): good for behaviour, not for speed.
set -uo pipefail
here=$(dirname "$(readlink -f "$0")")
cache=${RDMA_CACHE:-$here/../../.tools/rdma}
seconds=90 processors=2 memory=384 files=() line=
while getopts t:n:m:f:c: option; do
  case $option in
  t) seconds=$OPTARG ;;
  n) processors=$OPTARG ;;
  m) memory=$OPTARG ;;
  f) files+=("$(readlink -f "$OPTARG")") ;;
  c) line=$OPTARG ;;
  *) exit 2 ;;
  esac
done
"$here/fetch_kernel.sh" "$cache" || exit 125
if [ ! "$cache/base.cpio" -nt "$here/guest_init.sh" ] || [ ! "$cache/base.cpio" -nt "$here/build_base.sh" ]; then "$here/build_base.sh" "$cache" || exit 125; fi
work=$(mktemp -d)
guest=
trap '[ -n "$guest" ] && kill "$guest" 2>/dev/null; rm -rf "$work"' EXIT
mkdir -p "$work/root/test"
echo "$line" >"$work/root/test/cmd"
[ ${#files[@]} -eq 0 ] || "$here/copy_programs.sh" "$work/root" "${files[@]}" || exit 125
(cd "$work/root" && find . -print0 | cpio --null -o -H newc --quiet) >"$work/more.cpio"
cat "$cache/base.cpio" "$work/more.cpio" >"$work/initrd"
qemu-system-x86_64 -accel tcg,thread=multi -M pc,usb=off,vmport=off,hpet=off -cpu max -smp "$processors" -m "$memory" -nodefaults -no-user-config \
  -display none -vga none -net none -no-reboot -kernel "$cache/vmlinux" -initrd "$work/initrd" \
  -append "console=ttyS0 quiet loglevel=3 mitigations=off nokaslr panic=-1 random.trust_cpu=on tsc=unstable clocksource=acpi_pm no_timer_check rdinit=/init TEST_TIMEOUT=$seconds" \
  -serial stdio -serial file:"$work/code" </dev/null &
guest=$!
# Booting and powering off have forty seconds on top.
limit=$((SECONDS + seconds + 40))
while kill -0 "$guest" 2>/dev/null; do
  if [ $SECONDS -gt $limit ]; then
    echo "the guest is over time" >&2
    exit 124
  fi
  sleep 0.1
done
wait "$guest"
guest=
code=$(tr -dc '0-9' <"$work/code" 2>/dev/null)
exit "${code:-125}"
