# guest_nodes.sh ROOT (inside the guest, after mesh_up.sh 2) — two nodes, each with one of the two devices, make a model's ranks talk over RDMA
# by themselves: they find the devices and the cable, and the instance says what one node says. Then the cable is pulled: TCP, with the reason.
# Ranks on one machine would share memory, so that is taken away first. On a busy host the nodes may lose each other for a moment, which ends the
# ranks and places them again: each check waits until it holds, within a limit.
root=$1
export HOME=/tmp CARAVAN_MODELS_DIR=$root/build/rdma/models CARAVAN_CACHE_DIR=/tmp/cache CARAVAN_RDMA_QUEUE_PAIRS=uc-apple-rules
caravan=$root/dist/caravan
bad=0 nodes=
note() { echo "# $1, $(cut -d' ' -f1 /proc/uptime) s after the start"; }
check() { # check NAME COMMAND…
  name=$1
  shift
  if "$@"; then echo "ok - $name"; else echo "not ok - $name"; bad=1; fi
}
# until_shown SECONDS COMMAND…: repeats it until it succeeds.
until_shown() {
  limit=$(($(cut -d. -f1 /proc/uptime) + $1))
  shift
  until "$@"; do
    [ "$(cut -d. -f1 /proc/uptime)" -lt $limit ] || return 1
    sleep 3
  done
}
get() { curl -s -m 60 "http://127.0.0.1:$1$2"; }
post() { curl -s -m 120 -H 'content-type: application/json' -d "$3" "http://127.0.0.1:$1$2"; }
shown() { get "$1" /cluster/state | grep -q "$2"; }
says() { post "$1" /v1/completions '{"model":"tiny","prompt":"Hello there","max_tokens":8,"temperature":0}' | sed 's/.*"text":"\(.*\)","\(logprobs\|index\|finish\).*/\1/; s/"\(logprobs\|index\|finish\).*//'; }
logged() { grep -h "$1" /tmp/a.log /tmp/b.log; }
# Whether the ranks that were connected last are so: what came before a fault counts no more.
last_ranks() { grep -h 'ranks connected' /tmp/a.log /tmp/b.log | sort | tail -n 1 | grep "$1"; }
says_so() { [ "$(says $1)" = "$2" ]; }
# The first sentence that is none of an error's, within some tries.
said() {
  for try in 1 2 3 4 5 6 7 8; do
    text=$(says $1)
    case $text in *'"error"'* | '') sleep 3 ;; *) echo "$text" && return ;; esac
  done
  echo "$text"
}

mount -o remount,ro /dev/shm
CARAVAN_DATA_DIR=/tmp/a $caravan cluster create lab >/dev/null || exit 1
mkdir -p /tmp/b/cluster && cp /tmp/a/cluster/cluster.json /tmp/b/cluster/
node() { # node NAME API_PORT CLUSTER_PORT PEER DEVICE
  CARAVAN_DATA_DIR=/tmp/$1 CARAVAN_NODE_NAME=$1 "$caravan" serve --port $2 --cluster-port $3 --discovery-port 0 --peer 127.0.0.1:$4 --rdma $5 --threads 1 --device cpu --log-level info >/tmp/$1.log 2>&1 &
  nodes="$nodes $!"
}
node a 21001 22001 22002 m0_1
node b 21002 22002 22001 m1_0
until_shown 240 shown 21001 "\"reachable\":true.*\"reachable\":true"
note "nodes run"
check "two nodes find the devices and the cable between them" until_shown 240 shown 21001 '"kind":"rdma"[^}]*"devices":\["m'
note "the cable is found"
get 21001 /cluster/state | sed 's/.*"links":\(\[[^]]*\].*\),"instances".*/# links: \1/; s/\(.\{500\}\).*/\1/'
one=$(said 21001)
note "one node said: $one"
case $one in *'"error"'* | '') check "one node answers" false ;; esac
placed() { post 21001 /cluster/instances '{"model":"tiny","tensor":2,"pipeline":1}' | grep -q '"id"'; }
check "an instance over both is asked for" until_shown 60 placed
check "its ranks took RDMA by themselves" until_shown 240 last_ranks 'transport=rdma'
check "it is ready" until_shown 240 shown 21001 '"phase":"ready"'
check "both together say what one says" until_shown 120 says_so 21002 "$one"
note "both nodes said it"
ip link set vm0_1 down
check "a pulled cable ends the ranks, and they come back over TCP with the reason" until_shown 240 last_ranks 'transport=tcp.*no RDMA: \(m0_1 has no active port\|m1_0 has no active port\|.*reaches\)'
check "and say the same" until_shown 120 says_so 21002 "$one"
note "done"
[ $bad -eq 0 ] || tail -n 25 /tmp/a.log /tmp/b.log
kill $nodes
exit $bad
