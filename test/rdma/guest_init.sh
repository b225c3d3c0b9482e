#!/bin/sh
# /init of the guest: mounts, modules, then /test/cmd. The console is ttyS0; the exit code goes to ttyS1, a file on the host.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
for m in $(cat /modules/modules.list); do insmod /modules/$m.ko 2>/dev/null; done
ip link set lo up
echo "guest: kernel $(uname -r), up $(cut -d' ' -f1 /proc/uptime) s, $(nproc) processors"
cd /test
timeout "${TEST_TIMEOUT:-60}" /bin/dash /test/cmd
code=$?
[ $code = 143 ] && code=124 # busybox's timeout ended it
echo "guest: exit code $code after $(cut -d' ' -f1 /proc/uptime) s"
dmesg | grep -E 'BUG:|Oops|Kernel panic' | tail -n 15
echo "$code" >/dev/ttyS1
sync
sleep 0.1
poweroff -f
