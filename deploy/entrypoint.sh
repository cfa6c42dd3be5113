#!/bin/sh
# The server image: arguments are those of text-generation-launcher. Port 80, as in TGI's image, unless told otherwise.
set -eu
export PORT="${PORT:-${AIP_HTTP_PORT:-80}}"
exec text-generation-launcher "$@"
