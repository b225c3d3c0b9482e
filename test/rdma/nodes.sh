#!/usr/bin/env bash
# Two nodes in the guest of run.sh that find their RDMA devices and the cable between them by themselves (guest_nodes.sh). Two whole nodes on an emulated
# processor need an idle machine: some minutes there. Not part of `make verify`. Needs what run.sh needs, curl, and dist/caravan.
set -u
cd "$(dirname "$0")/../.."
here=test/rdma
for tool in qemu-system-x86_64 curl; do
  command -v $tool >/dev/null || { echo "skipped: nodes over RDMA: $tool is not here"; exit 0; }
done
[ -x dist/caravan ] || { echo "skipped: nodes over RDMA: dist/caravan is not built"; exit 0; }
model=build/rdma/models/tiny
"${BUN:-bun}" -e "import { writeTinyChatModel } from './test/tools/tiny-chat-model.ts'; writeTinyChatModel('$model');" || exit 1
files=(-f $here/mesh_up.sh -f $here/guest_nodes.sh -f "$(command -v curl)" -f dist/caravan)
for file in "$model"/*; do files+=(-f "$file"); done
$here/guest.sh -t "${SECONDS_MOST:-700}" -m 2000 "${files[@]}" -c "sh $PWD/$here/mesh_up.sh 2 && sh $PWD/$here/guest_nodes.sh $PWD"
