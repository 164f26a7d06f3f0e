# Starts the SuperLink on loopback, and names it `mine` for the commands that are run beside it.
set -eu
umask 077
mkdir -p "$FLWR_HOME"
cat >"$FLWR_HOME/config.toml" <<TOML
[superlink.mine]
address = "127.0.0.1:8000"
root-certificates = "/run/secrets/ca.crt"
TOML
exec flower-superlink --ssl-ca-certfile /run/secrets/ca.crt --ssl-certfile /run/secrets/server.crt \
    --ssl-keyfile /run/secrets/server.key --enable-supernode-auth --database /var/lib/flexperts/state.db \
    --disable-runtime-dependency-installation
