#!/bin/sh
# Creates (or completes) the virtual environment $1 from requirements.txt, once per content of that file.
set -eu
venv=$1
python=${PYTHON:-python3}
digest=$(cksum < requirements.txt | tr ' ' '-')
stamp="$venv/.requirements-$digest"
[ -f "$stamp" ] && exit 0
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3.11" >&2
    exit 1
}
echo "setup: creating $venv and installing requirements.txt into it (once)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# shellcheck disable=SC2086  # PIP_FLAGS holds several words on purpose
install() { "$venv/bin/python" -m pip install --disable-pip-version-check ${PIP_FLAGS:-} "$@"; }
# From version 25.1 on pip shows a bar while it unpacks, which takes minutes; an older one, without network, works too.
install --quiet --upgrade pip 2>/dev/null || true
install -r requirements.txt
rm -f "$venv"/.requirements-*
touch "$stamp"
