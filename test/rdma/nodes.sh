#!/usr/bin/env bash
# Two nodes in the guest of run.sh that find their RDMA devices and the cable between them by themselves (guest_nodes.sh). Two whole nodes on an emulated
# processor: two minutes where little else runs, four beside a second such guest. Not part of `make verify` yet. Needs what run.sh needs, curl, and dist/caravan.
set -u
cd "$(dirname "$0")/../.."
here=test/rdma
skip() {
  echo "skipped: nodes over RDMA: $1"
  echo " 1 skip"
  exit 0
}
[ "$(uname -sm)" = "Linux x86_64" ] || skip "only from Linux on x86-64"
for tool in qemu-system-x86_64 busybox cpio xz strip ip tc rdma dpkg-deb apt-get curl; do
  PATH=$PATH:/sbin:/usr/sbin command -v $tool >/dev/null || skip "$tool is not here (run.sh says which packages)"
done
ls /usr/lib/*/libibverbs/librxe-rdmav*.so >/dev/null 2>&1 || skip "libibverbs has no rxe provider here (apt-get install ibverbs-providers)"
[ -x dist/caravan ] || skip "dist/caravan is not built"
mkdir -p .tools/rdma build/rdma
$here/fetch_kernel.sh .tools/rdma >build/rdma/fetch.log 2>&1 || skip "the kernel package cannot be fetched: $(tail -n 1 build/rdma/fetch.log)"
model=build/rdma/models/tiny
"${BUN:-bun}" -e "import { writeTinyChatModel } from './test/tools/tiny-chat-model.ts'; writeTinyChatModel('$model');" || exit 1
files=(-f $here/mesh_up.sh -f $here/guest_nodes.sh -f "$(command -v curl)" -f dist/caravan)
for file in "$model"/*; do files+=(-f "$file"); done
log=build/rdma/nodes.log
$here/guest.sh -t "${SECONDS_MOST:-600}" -m 2000 "${files[@]}" -c "sh $PWD/$here/mesh_up.sh 2 && sh $PWD/$here/guest_nodes.sh $PWD" >"$log" 2>&1
code=$?
grep -E '^(ok|not ok|#)' "$log"
passed=$(grep -c '^ok' "$log") failed=$(grep -c '^not ok' "$log")
if [ $code -ne 0 ]; then
  echo "not ok - the guest ended with $code (124: out of time, 125: it did not boot); its last lines:"
  tail -n 60 "$log"
  failed=$((failed + 1))
fi
echo " $passed pass"
echo " $failed fail"
[ "$failed" -eq 0 ]
