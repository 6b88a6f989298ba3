# What .ci/run and .ci/nightly share: environments, each fresh and of its own. To be sourced.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

envs=$(mktemp -d)
trap 'rm -rf "$envs"' EXIT

runs() { # name: prints the first Python of that name that starts
  local p
  for p in "$(command -v "$1" || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"${1#python}".*/bin/python; do
    [ -x "$p" ] && "$p" -c 'import venv, ensurepip' 2>/dev/null && { echo "$p"; return; }
  done
  return 0
}

oldest=$(runs python3.11)
newest=
for name in python3.14 python3.13 python3.12; do
  [ -n "$newest" ] || newest=$(runs "$name")
done
[ -n "$oldest" ] || { echo "PYTHON 3.11 IS NEEDED, THE OLDEST SUPPORTED ONE" >&2; exit 1; }

lowest() { # a constraint for each dependency that users may install: the lowest version allowed
  "$oldest" - <<'PYTHON'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
for line in [*project["dependencies"], *extras["cli"], *extras["examples"], *extras["hub"], *extras["plot"]]:
    print(line.replace(">=", "=="))
PYTHON
}

install() { # python, environment, further arguments of pip: the README's commands
  echo "== $("$1" --version), $(basename "$2") =="
  "$1" -m venv --clear "$2"
  "$2/bin/python" -m pip install -q -e '.[test]' "${@:3}"
  versions "$2"
}

versions() { # environment
  "$1/bin/python" -m pip list --format=freeze |
    grep -iE '^(jax|jaxlib|numpy|flax|optax|orbax-checkpoint|chex|safetensors|typer|rich)=='
}

suite() { # environment, further arguments of pytest
  local start=$SECONDS
  "$1/bin/python" -m pytest -q --durations=20 "${@:2}"
  echo "== $(basename "$1"): $((SECONDS - start)) s =="
}
