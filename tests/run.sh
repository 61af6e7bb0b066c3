#!/usr/bin/env bash
# Run the tests of both trees, each in its own environment:  bash tests/run.sh [llm|ldm] [pytest arguments]
# Makes the environments that are missing. Two processes share the files; -n 0 for one, -n 8 for more.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$here"
trees=(llm ldm)
case "${1:-}" in llm | ldm) trees=("$1") && shift ;; esac

# The models of the tests are so small that a second thread costs more than it brings.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Make a tree's environment, or renew it where its requirements have changed.
install() {
  local tree="$1" environment="$here/.venv-$1" requirements="$here/requirements-$1.txt"
  if [ ! -f "$environment/.installed" ] || ! cmp -s "$requirements" "$environment/.installed"; then
    echo "Installing the $tree environment into $environment ..."
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$environment/.installed"
  fi
  local extras="$here/lora-$tree/requirements-extras.txt" # not needed to train, but tested
  if [ -f "$extras" ] && ! cmp -s "$extras" "$environment/.installed-extras"; then
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r "$extras"
    cp "$extras" "$environment/.installed-extras"
  fi
}

installing=()
for tree in "${trees[@]}"; do # the second one while the first tree is tested
  install "$tree" &
  installing+=("$!")
done

typed=(cs_fluctuation.py cs_replay.py judge_checkpoints.py starting.py es_lora base/spec.py text/spec.py)
status=0
for tree in "${trees[@]}"; do
  environment="$here/.venv-$tree"
  wait "${installing[0]}"
  installing=("${installing[@]:1}")
  paths=("tests/$tree")
  if [ "$tree" = "${trees[0]}" ]; then
    echo "Checking style ..."
    "$environment/bin/ruff" check . || status=1
    "$environment/bin/ruff" format --check --quiet . || status=1
    paths=(tests/cs tests/patches "${paths[@]}")
  fi
  if [ "$tree" = llm ]; then
    echo "Checking types ..."
    (cd lora-llm && "$environment/bin/mypy" --config-file ../pyproject.toml "${typed[@]}") || status=1
  fi
  echo "Testing lora-$tree ..."
  "$environment/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${paths[@]}" "$@" || status=1
done
exit "$status"
