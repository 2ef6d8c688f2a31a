# Sourced by scripts/line.sh and scripts/test.sh: `set_up_venv EXTRAS` makes .venv in the repository root, installs this
# package in it with those extras, and puts it first on PATH. A second call with nothing changed installs nothing.
#
# Why pip and constraints.txt: the tested versions, on any machine, without another tool. Why torch comes first and
# alone: on Linux PyPI's torch brings gigabytes of CUDA libraries, which a machine without a GPU never loads.
#
#   PYTHON=python3.12 bash scripts/test.sh     # which interpreter makes the venv (default: python3)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

set_up_venv() {
    local extras="$1" python="${PYTHON:-python3}" venv="$root/.venv"
    local stamp="$venv/.installed-${extras//,/-}" wanted
    if [ ! -x "$venv/bin/python" ]; then
        command -v "$python" >/dev/null || fail "no $python on PATH; install Python 3.10 or newer, or name one: PYTHON=..."
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            fail "$("$python" --version) is too old: Python 3.10 or newer is needed, name one with PYTHON=..."
        echo "== making $venv"
        "$python" -m venv "$venv" || fail "could not make $venv (Debian and Ubuntu: apt install python3-venv)"
    fi
    wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "== installing nanochat-hf[$extras] into $venv (a few minutes the first time)"
        "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip -q
        install_cpu_torch "$venv"
        "$venv/bin/python" -m pip install -q -c "$root/constraints.txt" -e "$root[$extras]" ||
            fail "installation failed; the message above says which package (network? disk? Python version?)"
        printf '%s' "$wanted" >"$stamp"
    fi
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
}

# Local wheels (pip's find-links) are asked first, then PyTorch's CPU index.
install_cpu_torch() {
    local python="$1/bin/python" pin
    if [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null; then return 0; fi
    if "$python" -c 'import torch' 2>/dev/null; then return 0; fi
    pin="$(grep '^torch==' "$root/constraints.txt")"
    "$python" -m pip install -q --no-deps --no-index "$pin" 2>/dev/null ||
        "$python" -m pip install -q --no-deps --index-url https://download.pytorch.org/whl/cpu "$pin" ||
        echo "== no CPU-only wheel of $pin was found: PyPI's, with its CUDA libraries, will be taken"
}
