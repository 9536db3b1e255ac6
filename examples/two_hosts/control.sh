#!/bin/sh
# The control plane of the mesh, on its own machine: ./control.sh ADDRESS [STATE]
# ADDRESS is what the hosts dial; STATE is made on the first run and holds the mesh's root: keep it private, back it up.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec miniistiod run --config "$here/config" --state "${2:-./state}" --init --listen "$1:15012"
