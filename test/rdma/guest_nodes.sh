# guest_nodes.sh ROOT (inside the guest, after mesh_up.sh 2) — two nodes, each with one of the two devices, make a model's ranks talk over RDMA
# by themselves: they find the devices and the cable, and the instance says what one node says. Then the cable is pulled: TCP, with the reason.
# Ranks on one machine would share memory, so that is taken away first.
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
one=$(says 21001)
note "one node said: $one"
place() {
  post 21001 /cluster/instances '{"model":"tiny","tensor":2,"pipeline":1}' | sed 's/.*"id":"\([^"]*\)".*/\1/'
}
id=$(place)
check "an instance over both is ready" until_shown 240 shown 21001 '"phase":"ready"'
check "its ranks took RDMA by themselves" logged 'ranks connected.*rdma'
two=$(says 21002)
note "both nodes said: $two"
check "both together say what one says" [ "$one" = "$two" -a -n "$one" ]
ip link set vm0_1 down
check "a pulled cable ends the ranks, and they come back over TCP with the reason" until_shown 240 logged 'ranks connected.*tcp.*no RDMA: m0_1 has no active port\|ranks connected.*tcp.*no RDMA: m1_0 has no active port\|ranks connected.*tcp.*no RDMA: .*reaches'
until_shown 120 shown 21002 '"phase":"ready"'
check "and say the same" [ "$(says 21002)" = "$one" ]
note "done"
[ $bad -eq 0 ] || tail -n 25 /tmp/a.log /tmp/b.log
kill $nodes
exit $bad
