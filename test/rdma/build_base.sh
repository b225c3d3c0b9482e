#!/usr/bin/env bash
# build_base.sh DIR — makes DIR/base.cpio from what fetch_kernel.sh has put there: busybox, iproute2, libibverbs with the rxe provider,
# the kernel modules and guest_init.sh as /init.
set -euo pipefail
dir=$(readlink -f "${1:?directory}")
here=$(dirname "$(readlink -f "$0")")
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
export PATH=$PATH:/sbin:/usr/sbin
mkdir -p "$root"/{bin,sbin,etc/libibverbs.d,proc,sys,dev,tmp,run,modules,test,usr/bin,usr/lib,root}
cp "$(command -v busybox)" "$root/bin/busybox"
for applet in mount umount insmod cat echo ls sleep sed grep awk poweroff mkdir dmesg cut head tail date kill seq wc rm cp chmod true false timeout ps free nproc printf test uname sync tr sort basename dirname; do
  ln -s busybox "$root/bin/$applet"
done
"$here/copy_programs.sh" "$root" /bin/dash "$(command -v ip)" "$(command -v tc)" "$(command -v rdma)" \
  "$(ls /usr/lib/*/libibverbs.so.1 | head -n 1)" "$(ls /usr/lib/*/libibverbs/librxe-rdmav*.so | head -n 1)"
# dash, not busybox's shell, which prefers an `ip` of its own.
ln -s dash "$root/bin/sh"
cp /etc/libibverbs.d/rxe.driver "$root/etc/libibverbs.d/"
[ ! -d /usr/lib/tc ] || cp -r /usr/lib/tc "$root/usr/lib/"
cp "$dir"/modules/*.ko "$dir/modules.list" "$root/modules/"
cp "$here/guest_init.sh" "$root/init"
chmod 755 "$root/init"
echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
echo '127.0.0.1 localhost' >"$root/etc/hosts"
(cd "$root" && find . -print0 | cpio --null -o -H newc --quiet) >"$dir/base.cpio.tmp"
mv "$dir/base.cpio.tmp" "$dir/base.cpio"
