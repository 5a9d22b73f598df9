#!/usr/bin/env bash
# Fetch into .whl/ what a GPU machine without a package registry lacks. Run it in the project's root, where pip can
# download; the machine's own torch, triton, transformers, accelerate, tokenizers and pyarrow are used.
#
#   PYTHON_VERSION=3.12   of the GPU machine        CUDA=130      bitsandbytes keeps its library for this CUDA alone
#   PEERS=1               TRL, Liger and axolotl beside loratune, for `benchmarks/gpu.py`
#
# There, with .whl/ beside the project's files:
#   python3 -m pip install --no-index --no-deps --target /tmp/site .whl/*.whl
#   PYTHONPATH=/tmp/site bash benchmarks/gpu_session.sh
set -euo pipefail
[ -d loratune ] || { echo "run this in the project's root" >&2; exit 2; }
PYTHON=${PYTHON:-python3}
ours="pydantic pydantic_core annotated-types typing_extensions typing-inspection typer peft bitsandbytes"
peers="datasets dill multiprocess trl==1.16.0 liger-kernel==0.8.5 axolotl==0.21.0"
platforms=()
for kind in _2_28 _2_27 _2_24 _2_17 2014 1; do platforms+=(--platform "manylinux${kind}_x86_64"); done
rm -rf .whl && mkdir .whl

for name in $ours $([ "${PEERS:-0}" = 0 ] || echo "$peers"); do
  pinned=$(grep -i "^${name//[-_]/[-_]}==" constraints.txt | head -1 || true)  # one version of each, the one tested here
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: -d .whl \
    --python-version "${PYTHON_VERSION:-3.12}" --implementation cp --ignore-requires-python \
    "${platforms[@]}" "${pinned:-$name}" || echo "$name can't be had: its arm will be left out" >&2
done
"$PYTHON" - "${CUDA:-130}" <<'PY'
# bitsandbytes brings a library for each version of CUDA, 300 MB in all: one is enough, and the CPU's for the tests
import pathlib
import re
import sys
import zipfile

for wheel in pathlib.Path(".whl").glob("bitsandbytes-*.whl"):
    other = re.compile(rf"libbitsandbytes_(?!cpu\.so|cuda{sys.argv[1]}\.so)")
    small = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as part:
        for item in whole.infolist():
            data = whole.read(item)
            if item.filename.endswith("/RECORD"):
                data = b"".join(line for line in data.splitlines(True) if not other.search(line.decode()))
            if not other.search(item.filename):
                part.writestr(item, data)
    small.replace(wheel)
PY
ls -l .whl | awk 'NR > 1 {s += $5; printf "%10d  %s\n", $5, $9} END {printf "%.1f MB\n", s / 1e6}'
