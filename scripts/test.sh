#!/usr/bin/env bash
# Style check and the whole test suite, offline; makes .venv first where it is missing.
#
#   bash scripts/test.sh                              # what continuous integration runs
#   bash scripts/test.sh -m slow                      # the tests that take minutes; -m gpu: those that need CUDA
#   bash scripts/test.sh tests/test_tokenizer.py -k template
#
# Arguments go to pytest. Tests marked slow or gpu stay out unless -m asks for them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
set_up_venv dev

ruff check .
ruff format --check .
case " $* " in
    *" -m "*) ;;
    *) set -- -m "not slow and not gpu" "$@" ;;
esac
python -m pytest "$@"
