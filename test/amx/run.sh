#!/usr/bin/env bash
# AMX's real instructions without the hardware: boots a small program (guest.c) on a processor emulator that knows them and compares the tile kernel,
# as it was compiled for the library, with scalar.c and the VNNI kernel. Needs a Bochs with AMX (3.0 was tried; Debian 13 and later: bochs, bochsbios,
# vgabios) and the library's objects (make lib). BOCHS may name its program and BXSHARE the folder of its BIOS. Run by `make verify`.
set -u
cd "$(dirname "$0")/../.."
skip() {
  echo "skipped: AMX's instructions under an emulator: $1"
  echo " 1 skip"
  exit 0
}

[ "$(uname -sm)" = "Linux x86_64" ] || skip "only from Linux on x86-64"
bochs=${BOCHS:-$(command -v bochs-bin || command -v bochs)} share=${BXSHARE:-/usr/share/bochs} out=build/amx objects=build/obj/backend/cpu
[ -n "$bochs" ] || skip "there is no Bochs (apt-get install bochs, from Debian 13 on)"
"$bochs" --help cpu 2>&1 | grep -q '^sapphire_rapids' || skip "this Bochs has no processor with AMX (3.0 has)"
for file in BIOS-bochs-legacy VGABIOS-lgpl-latest; do [ -f "$share/$file" ] || skip "$share/$file is not here (apt-get install bochsbios vgabios)"; done
for object in scalar x86/amx x86/amx_tile x86/vnni_tile; do [ -f $objects/$object.o ] || { make --no-print-directory lib || exit 1; break; }; done

mkdir -p $out
exec 9>$out/lock
flock -w 600 9 || { echo "another run of test/amx/run.sh has been busy for ten minutes" >&2; exit 1; }
cc=${CC:-cc}
{
  $cc -c -DCHUNKS=16 test/amx/boot.S -o $out/boot.o &&
    ld -Ttext=0x7c00 --oformat binary -e boot $out/boot.o -o $out/boot.bin &&
    $cc -std=c11 -D_GNU_SOURCE -O2 -ffp-contract=off -fno-builtin -fno-stack-protector -fno-pic -fno-asynchronous-unwind-tables -Wall -Wextra -Werror -c test/amx/guest.c -o $out/guest.o &&
    ld -T test/amx/guest.ld -static --no-warn-rwx-segments $out/guest.o $objects/scalar.o $objects/x86/amx.o $objects/x86/amx_tile.o $objects/x86/vnni_tile.o -o $out/guest.elf &&
    objcopy -O binary $out/guest.elf $out/guest.bin
} || exit 1
# 20 cylinders of 16 heads of 63 sectors.
rm -f $out/disk.img.lock
cat $out/boot.bin $out/guest.bin >$out/disk.img && truncate -s $((20 * 16 * 63 * 512)) $out/disk.img
# Bochs wants a screen: none where it has that choice, else one that waits for nobody to look.
screen='rfb, options="timeout=0"'
"$bochs" --help features 2>&1 | grep -qw nogui && screen=nogui
cat >$out/bochsrc <<END
config_interface: textconfig
display_library: $screen
megs: 512
romimage: file=$share/BIOS-bochs-legacy
vgaromimage: file=$share/VGABIOS-lgpl-latest
cpu: model=sapphire_rapids, count=1, ips=50000000, reset_on_triple_fault=0
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, path=$out/disk.img, mode=flat, cylinders=20, heads=16, spt=63
boot: disk
log: $out/bochs.log
panic: action=fatal
port_e9_hack: enabled=1
END
timeout 300 "$bochs" -q -f $out/bochsrc >$out/guest.log 2>&1 </dev/null
code=$?
grep -aE '^(ok|not ok|#)' $out/guest.log
passed=$(grep -ac '^ok' $out/guest.log) failed=$(grep -ac '^not ok' $out/guest.log)
if ! grep -aq '^done' $out/guest.log && [ "$failed" -eq 0 ]; then
  echo "not ok - the guest has not come to its end (124: out of time): $code"
  tail -n 5 $out/guest.log
  failed=1
fi
echo " $passed pass"
echo " $failed fail"
[ "$failed" -eq 0 ]
