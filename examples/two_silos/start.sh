#!/usr/bin/env bash
# A SuperLink and two silos on this machine, as on three machines: TLS, SuperNode keys, own data and state.
#   examples/two_silos/start.sh [FOLDER] [--set KEY=VALUE ...]     about four minutes on two cores
# FOLDER (two_silos by default) is created; BASE, PORT and PATH may be set in the environment.
set -euo pipefail
umask 077

here=$(cd "$(dirname "$0")" && pwd)
folder=two_silos
if [[ $# -gt 0 && $1 != --* ]]; then folder=$1; shift; fi
base=${BASE:-smol-moe}
port=${PORT:-18443}
silos=(clinic law_firm)

mkdir "$folder" || { echo "error: $folder exists: choose another folder, or remove it" >&2; exit 2; }
cd "$folder"
root=$PWD
export FLWR_HOME=$root/flower FLEXPERTS_RUNS=$root/superlink/runs
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
mkdir -p "$FLWR_HOME" superlink

started=()
finish() {  # the newest first; SuperNode and SuperLink stop their own children
    for ((i = ${#started[@]} - 1; i >= 0; i--)); do kill "${started[i]}" 2>/dev/null || true; done
    wait
}
trap finish EXIT

start() {  # start LOG COMMAND...
    local log=$1
    shift
    "$@" >"$log" 2>&1 &
    started+=($!)
}

wait_for() {  # wait_for WHAT LOG COMMAND...: until the command succeeds
    local what=$1 log=$2
    shift 2
    for ((i = 0; i < 600; i++)); do
        if "$@" >/dev/null 2>&1; then return; fi
        kill -0 "${started[-1]}" 2>/dev/null || break
        sleep 0.5
    done
    echo "error: $what did not come up; its log:" >&2
    tail -n 20 "$log" >&2
    exit 1
}

# The server's machine: its own CA, a certificate, the SuperLink.
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 \
    -keyout superlink/ca.key -out superlink/ca.crt -subj "/CN=two silos CA" 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
    -keyout superlink/server.key -out superlink/server.csr -subj "/CN=localhost" 2>/dev/null
openssl x509 -req -in superlink/server.csr -CA superlink/ca.crt -CAkey superlink/ca.key -CAcreateserial -days 365 \
    -extfile <(printf 'subjectAltName=DNS:localhost,IP:127.0.0.1') -out superlink/server.crt 2>/dev/null
start superlink/log flower-superlink --host 127.0.0.1 --port "$port" --database superlink/state.db \
    --ssl-ca-certfile superlink/ca.crt --ssl-certfile superlink/server.crt --ssl-keyfile superlink/server.key \
    --enable-supernode-auth
cat >"$FLWR_HOME/config.toml" <<TOML
[superlink]
default = "demo"

[superlink.demo]
address = "127.0.0.1:$port"
root-certificates = "$root/superlink/ca.crt"
TOML
wait_for "the SuperLink" superlink/log flwr supernode list demo

# Each silo's machine: its rows, its key, its worker, its SuperNode.
flexperts data make-silos rows >/dev/null
node_port=$port
for silo in "${silos[@]}"; do
    mkdir "$silo"
    mv "rows/$silo" "$silo/data"
    cat >"$silo/silo.toml" <<TOML
name = "$silo"
state = "state"
base = "$base"

[data]
train = "data/train.jsonl"
test = "data/test.jsonl"
TOML
    ssh-keygen -q -t ecdsa -b 384 -N "" -f "$silo/key"
    flwr supernode register "$silo/key.pub" demo >/dev/null
    start "$silo/worker.log" flexperts silo serve "$silo/silo.toml"
    wait_for "the worker of $silo" "$silo/worker.log" test -S "$silo/state/worker.sock"
    node_port=$((node_port + 1))
    start "$silo/supernode.log" flower-supernode --superlink "127.0.0.1:$port" \
        --root-certificates superlink/ca.crt --auth-supernode-private-key "$silo/key" \
        --host 127.0.0.1 --port "$node_port" --node-config "silo=\"$root/$silo/silo.toml\""
done

flexperts run "$here/recipe.toml" --engine superlink://demo --out two_silos "$@"
