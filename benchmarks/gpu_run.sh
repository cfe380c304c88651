# The GPU tests, then benchmarks/gpu.py, in under nine minutes: `bash benchmarks/gpu_run.sh OUT` from the repository's
# root on a machine with one GPU. Without network, put the wheels that are missing (ml_collections, …) into .whl/.
set -o pipefail
OUT=${1:?name a folder for the results}
mkdir -p "$OUT" .gpu
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD/.gpu/site OMP_NUM_THREADS=4
export TORCHINDUCTOR_CACHE_DIR=$PWD/.gpu/inductor TRITON_CACHE_DIR=$PWD/.gpu/triton
if ls .whl/*.whl > /dev/null 2>&1; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .gpu/site .whl/*.whl || exit
fi
START=$SECONDS
{ nvidia-smi; nproc; free -g; python3 -m pip list 2> /dev/null | grep -iE '^(torch|torchvision|triton|numpy|nvidia-cudnn)'
} > "$OUT/machine.txt" 2>&1
for size in 80.7M 61.8M 15.7M 3.4M; do # compilers on the cores while the tests run: nothing is timed yet
  (timeout 170 python3 -m benchmarks.gpu --warm $size > .gpu/warm_$size.txt 2>&1 || touch .gpu/cut_$size) &
done
SLIMFLOW_TEST_DEVICE=cuda timeout 170 python3 -m pytest -p no:cacheprovider -o addopts= --import-mode=importlib -q -rs \
  tests/test_cuda.py > "$OUT/tests.txt" 2>&1
echo "tests: status $?, $((SECONDS - START)) s"; tail -25 "$OUT/tests.txt"
wait
cat .gpu/warm_*.txt > "$OUT/warm.txt"; grep -h compiled "$OUT/warm.txt"
ls .gpu/cut_* > /dev/null 2>&1 && rm -rf .gpu/inductor .gpu/triton # a compiler that was stopped leaves half a file
LEFT=$((520 - SECONDS + START))
timeout $((LEFT + 15)) python3 -m benchmarks.gpu --seconds $((LEFT - 15)) --out "$OUT" 2> "$OUT/errors.txt" | tee "$OUT/gpu.txt"
nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.used --format=csv >> "$OUT/machine.txt"
echo "all: $((SECONDS - START)) s"; tail -5 "$OUT/errors.txt"
