# guest_models.sh ROOT (inside the guest) — a model on one rank and on several over RDMA: the same tokens, logits within 2e-4.
root=$1
export HOME=/tmp
caravan=$root/dist/caravan model=$root/test/golden/data/scout-4bit
printf '{"tokens":[%s]}' "$(seq -s, 3 18)" >/tmp/tokens.json
logits() { # logits NAME OPTIONS…
  out=/tmp/$1.npy
  shift
  "$caravan" logits "$model" --tokens-file /tmp/tokens.json --out "$out" --compute exact --threads 1 --prefill 14 --piece 10 "$@" 2>/tmp/errors && return
  tr '\r' '\n' </tmp/errors | tail -n 5
  return 1
}
bad=0
logits one || { echo "not ok - the model does not run on one rank in the guest"; exit 1; }
for kind in uc-apple-rules rc; do
  for ranks in 2 4; do
    name="tensor $ranks over RDMA ($kind) gives the tokens of one rank"
    if CARAVAN_RDMA_QUEUE_PAIRS=$kind logits several --tensor $ranks --transport rdma; then
      "$root/build/test/test_rdma" compare "$name" /tmp/one.npy /tmp/several.npy || bad=1
    else
      echo "not ok - $name: it failed"
      bad=1
    fi
    rm -f /tmp/several.npy
    echo "# $(cut -d' ' -f1 /proc/uptime) s after the start"
  done
done
exit $bad
