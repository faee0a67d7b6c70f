#!/usr/bin/env bash
# Two hosts in network namespaces, each with its own /dev/shm, serve one model with tensor parallelism
# through vLLM's multi-node mode; one request is answered. Needs root and iproute2.
set -euo pipefail
hipserve=${1:-.venv/bin/hipserve}
logs=$(mktemp -d)

end() {
  kill "${pids[@]}" 2>/dev/null || true
  wait 2>/dev/null || true
  ip netns del hip0 2>/dev/null || true
  ip netns del hip1 2>/dev/null || true
}
pids=()
trap end EXIT

ip netns add hip0
ip netns add hip1
ip link add veth0 netns hip0 type veth peer name veth1 netns hip1
for i in 0 1; do
  ip -n hip$i addr add 10.77.0.$((i + 1))/24 dev veth$i
  ip -n hip$i link set veth$i up
  ip -n hip$i link set lo up
done

start() {  # host, flags
  local host=$1
  shift
  VLLM_HOST_IP=10.77.0.$((host + 1)) GLOO_SOCKET_IFNAME=veth$host VLLM_CPU_OMP_THREADS_BIND=$host \
    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 ip netns exec hip$host unshare -m bash -c \
    'mount -t tmpfs tmpfs /dev/shm && exec "$@"' - "$hipserve" serve \
    --tensor-parallel-size 2 --nnodes 2 --node-rank "$host" \
    --master-addr 10.77.0.1 --master-port 29611 --max-model-len 8192 \
    --kv-cache-memory-bytes 268435456 "$@" >"$logs/$host" 2>&1 &
  pids+=($!)
}

start 0 --host 10.77.0.1 --api-key secret
start 1 --headless
for _ in $(seq 300); do
  grep -q "^ready" "$logs/0" && break
  kill -0 "${pids[0]}" || { tail -30 "$logs/0" "$logs/1"; exit 1; }
  sleep 1
done
cat "$logs/0"
ip netns exec hip1 curl -sS http://10.77.0.1:8000/v1/chat/completions \
  -H 'Authorization: Bearer secret' -H 'Content-Type: application/json' -d '{
  "model": "acorn", "temperature": 0, "max_tokens": 24, "messages": [
    {"role": "user", "content": "Read the text.\n\nThe pass key is 83724. Remember it. 83724 is the pass key."},
    {"role": "user", "content": "What is the pass key?"}]}' | tee "$logs/answer"
grep -q 83724 "$logs/answer"
