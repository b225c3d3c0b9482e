#!/bin/bash
# netlab.sh up PREFIX N | down PREFIX | name PREFIX I
# N hosts as network namespaces PREFIX0 … joined by a bridge in one more namespace, PREFIXsw, so that this machine's own network
# is never touched. Host I has 10.79.0.(I+1)/24 and an IPv6 link-local address on eth0; its cable is the port pI in PREFIXsw;
# the switch itself is 10.79.0.254.
set -euo pipefail
prefix=${2:?prefix}
switch=${prefix}sw
case ${1:-} in
up)
  count=${3:?number of hosts}
  ip netns add "$switch"
  ip -n "$switch" link set lo up
  ip -n "$switch" link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0
  ip -n "$switch" addr add 10.79.0.254/24 dev br0
  ip -n "$switch" link set br0 up
  for ((i = 0; i < count; i++)); do
    host=$prefix$i
    ip netns add "$host"
    ip -n "$host" link set lo up
    ip -n "$host" link add eth0 type veth peer name "p$i" netns "$switch"
    ip -n "$switch" link set "p$i" master br0 up
    ip -n "$host" addr add "10.79.0.$((i + 1))/24" brd + dev eth0
    ip -n "$host" link set eth0 up
    # Multicast needs a route.
    ip -n "$host" route add default dev eth0
  done
  ;;
down)
  for host in $(ip netns list | awk '{print $1}' | grep -E "^${prefix}([0-9]+|sw)$" || true); do
    ip netns del "$host"
  done
  ;;
*)
  echo "usage: netlab.sh up PREFIX N | down PREFIX" >&2
  exit 2
  ;;
esac
