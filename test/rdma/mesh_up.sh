# mesh_up.sh RANKS (inside the guest) — a "cable" between each pair of ranks: a veth pair with a software RDMA device at each end, as in a
# Thunderbolt mesh. Rank a's device towards rank b is m<a>_<b>, on interface vm<a>_<b>. The software device works in the first network namespace
# only, so rules make packets between two local addresses leave through their cable; netem and `ip link set down` then act on it.
ranks=${1:-2}
echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
table=100
a=0
while [ $a -lt $ranks ]; do
  b=$((a + 1))
  while [ $b -lt $ranks ]; do
    net=10.80.$((a * 16 + b)) here=m${a}_$b there=m${b}_$a
    ip link add v$here type veth peer name v$there
    ip addr add $net.1/30 dev v$here
    ip addr add $net.2/30 dev v$there
    for end in v$here v$there; do
      ip link set $end mtu 4200 up
      echo 1 >/proc/sys/net/ipv4/conf/$end/accept_local
      echo 0 >/proc/sys/net/ipv4/conf/$end/rp_filter
      ip rule add pref 10 iif $end lookup local
    done
    ip route add $net.2 dev v$here table $table
    ip rule add pref 20 from $net.1 to $net.2 lookup $table
    table=$((table + 1))
    ip route add $net.1 dev v$there table $table
    ip rule add pref 20 from $net.2 to $net.1 lookup $table
    table=$((table + 1))
    rdma link add $here type rxe netdev v$here
    rdma link add $there type rxe netdev v$there
    b=$((b + 1))
  done
  a=$((a + 1))
done
ip rule add pref 100 lookup local
ip rule del pref 0
