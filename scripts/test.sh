#!/usr/bin/env bash
# Style check and the whole test suite, offline; makes .venv first where it is missing.
#
#   bash scripts/test.sh                              # what continuous integration runs
#   bash scripts/test.sh -m slow                      # the tests that take minutes; -m gpu: those that need CUDA
#   bash scripts/test.sh tests/test_tokenizer.py -k template
#
# Arguments go to pytest. Tests marked slow or gpu stay out unless -m asks for them. The whole suite runs in two
# processes of one thread each: most tests are too small for a second thread, many wait for a process they started.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
set_up_venv dev

ruff check .
ruff format --check .
if [ $# -eq 0 ]; then
    export OMP_NUM_THREADS=1
    set -- -n 2 --dist loadfile
fi
case " $* " in
    *" -m "*) ;;
    *) set -- -m "not slow and not gpu" "$@" ;;
esac
python -m pytest "$@"
