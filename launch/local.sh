#!/usr/bin/env bash
# Sets up this checkout on a machine with nothing but Python >= 3.11, and runs it.
#   launch/local.sh predict SCAN [OUTPUT] [flags]
#                                  segments a scan, or a folder of them, with the model that comes with
#                                  the code, and says which page to open in a browser; OUTPUT is
#                                  covseg_output in this checkout, if not named
#   launch/local.sh run  [flags]   the main job, by default on phantom studies
#   launch/local.sh test [flags]   lint, import contracts, tests
#   launch/local.sh setup          the environment alone
# The environment is made in .venv, once; VENV=FOLDER puts it elsewhere, PYTHON=... chooses another
# interpreter.
set -euo pipefail

caller="$PWD"
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python >= 3.11 found; install one, or name it: PYTHON=/path/to/python $0" >&2
  return 1
}

make_environment() {
  # The stamp is a copy of the requirements that were installed: other ones install again.
  local stamp="$venv/requirements.installed" python
  if cmp -s requirements.txt "$stamp"; then
    return
  fi
  python="$(find_python)"
  echo "setup: installs requirements.txt into $venv, which takes some minutes; once" >&2
  "$python" -m venv "$venv"
  # --no-compile: half the time. What is imported is compiled then, which is little of it.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
    -r requirements.txt
  cp requirements.txt "$stamp"
}

as_absolute() { # PATH, as the caller names it
  case "$1" in
    /* | gs://*) echo "$1" ;;
    *) echo "$caller/$1" ;;
  esac
}

command="${1:-}"
case "$command" in
  predict)
    shift
    if [ $# = 0 ] || [[ "$1" == --* ]]; then
      echo "usage: $0 predict SCAN [OUTPUT] [flags]" >&2
      exit 2
    fi
    scan="$(as_absolute "$1")" output="$PWD/covseg_output"
    shift
    if [ $# != 0 ] && [[ "$1" != --* ]]; then
      output="$(as_absolute "$1")"
      shift
    fi
    make_environment
    exec "$venv/bin/python" -m covseg_jax.main --input="$scan" --output="$output" --preview --report \
      "$@"
    ;;
  run)
    shift
    make_environment
    has_config=false
    for argument in "$@"; do
      case "$argument" in --config=* | --config) has_config=true ;; esac
    done
    if [ "$has_config" = false ]; then
      set -- --config=configs/transunet.py:phantom "$@"
    fi
    exec "$venv/bin/python" -m covseg_jax.main "$@"
    ;;
  test)
    shift
    make_environment
    "$venv/bin/ruff" check .
    "$venv/bin/ruff" format --check .
    "$venv/bin/lint-imports"
    "$venv/bin/shellcheck" -x launch/*.sh
    exec "$venv/bin/python" -m pytest "$@"
    ;;
  setup)
    make_environment
    ;;
  *)
    echo "usage: $0 predict SCAN [OUTPUT] | run | test | setup [flags]" >&2
    exit 2
    ;;
esac
