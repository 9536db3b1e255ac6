#!/bin/sh
# One host of the mesh, as root: ./host.sh CONTROL TOKEN_FILE [ZTUNNEL_STATE]
# The token is spent at the first start; afterwards the host renews with its certificate, across reboots.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
export ZTUNNEL_STATE_DIR="${3:-/var/lib/ztunnel}"
# Our own packets carry this mark, by which the rules let them pass.
export PACKET_MARK=1337
[ -e "$ZTUNNEL_STATE_DIR/enrolment.json" ] || ztunnel enroll --server "$1" --token-file "$2"
nft -f "$here/capture.nft"
if id systemd-resolve >/dev/null 2>&1; then
  nft insert rule inet hbone_dns output meta skuid systemd-resolve accept
fi
exec ztunnel run
