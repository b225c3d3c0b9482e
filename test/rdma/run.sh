#!/usr/bin/env bash
# Real verbs calls without RDMA hardware: boots a small Linux guest whose kernel has a software RDMA device (rxe) and runs
# the transport's tests in it (native/test/test_rdma.c): unreliable and reliable queue pairs, a killed rank, a pulled cable, loss, fallback.
# Where dist/caravan is there, also whole models by tensor parallelism over RDMA.
# Needs, as Debian packages: qemu-system-x86 busybox-static cpio xz-utils iproute2 ibverbs-providers; the kernel is
# fetched (70 MB) and unpacked into .tools/rdma, nothing is installed. Run by `make verify`.
set -u
cd "$(dirname "$0")/../.."
here=test/rdma
passed=0 failed=0 skipped=0

skip() {
  echo "skipped: RDMA in a virtual machine: $1"
  echo " 1 skip"
  exit 0
}

[ "$(uname -sm)" = "Linux x86_64" ] || skip "only from Linux on x86-64"
for tool in qemu-system-x86_64 busybox cpio xz strip ip tc rdma dpkg-deb apt-get; do
  PATH=$PATH:/sbin:/usr/sbin command -v $tool >/dev/null || skip "$tool is not here (apt-get install qemu-system-x86 busybox-static cpio xz-utils binutils iproute2 ibverbs-providers)"
done
ls /usr/lib/*/libibverbs/librxe-rdmav*.so >/dev/null 2>&1 || skip "libibverbs has no rxe provider here (apt-get install ibverbs-providers)"
[ -x build/test/test_rdma ] || { make --no-print-directory native-tests || exit 1; }
mkdir -p .tools/rdma build/rdma
exec 9>build/rdma/lock
flock -w 600 9 || { echo "another run of $here/run.sh has been busy for ten minutes" >&2; exit 1; }
$here/fetch_kernel.sh .tools/rdma >build/rdma/fetch.log 2>&1 || skip "the kernel package cannot be fetched: $(tail -n 1 build/rdma/fetch.log)"

# guest NAME OPTIONS…: one boot; its ok lines count.
guest() {
  local log=build/rdma/$1.log code p f
  shift
  $here/guest.sh "$@" >"$log" 2>&1
  code=$?
  grep -E '^(ok|not ok|#)' "$log"
  p=$(grep -c '^ok' "$log") f=$(grep -c '^not ok' "$log")
  passed=$((passed + p)) failed=$((failed + f))
  if [ $code -ne 0 ] && [ "$f" -eq 0 ]; then
    echo "not ok - the guest ended with $code (124: out of time, 125: it did not boot); its last lines:"
    tail -n 30 "$log"
    failed=$((failed + 1))
  fi
}

tests=build/test/test_rdma
guest transport -t 150 -f $here/mesh_up.sh -f $tests -c "sh $PWD/$here/mesh_up.sh 4 && $PWD/$tests guest"
if [ -x dist/caravan ]; then
  model=test/golden/data/scout-4bit
  guest models -t 240 -m 1536 -f $here/mesh_up.sh -f $here/guest_models.sh -f $tests -f dist/caravan -f $model/config.json -f $model/model.safetensors \
    -f $model/model.safetensors.index.json -c "sh $PWD/$here/mesh_up.sh 4 && sh $PWD/$here/guest_models.sh $PWD"
else
  echo "skipped: models over RDMA: dist/caravan is not built"
  skipped=$((skipped + 1))
fi
echo " $passed pass"
[ $skipped -eq 0 ] || echo " $skipped skip"
echo " $failed fail"
[ $failed -eq 0 ]
