# The GPU tests, then benchmarks/gpu.py, in under nine minutes: `bash benchmarks/gpu_run.sh OUT` from the repository's
# root on a machine with one GPU. It needs torch, torchvision, numpy, scipy, pillow, matplotlib, scikit-learn,
# tensorboard, tqdm, filelock, absl-py, PyYAML, ml_collections, pytest and pytest-xdist; not lpips, clean-fid and onnx.
# Without network, put wheels of those that are missing (ml_collections 1.1.0 beside the usual ones) into .whl/.
# Further arguments go to benchmarks/gpu.py: `bash benchmarks/gpu_run.sh OUT --tiny` tries all of it without a GPU.
set -o pipefail
OUT=${1:?name a folder for the results}
mkdir -p "$OUT" .gpu
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD/.gpu/site OMP_NUM_THREADS=4
export TORCHINDUCTOR_CACHE_DIR=$PWD/.gpu/inductor TRITON_CACHE_DIR=$PWD/.gpu/triton
if ls .whl/*.whl > /dev/null 2>&1; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .gpu/site \
    .whl/*.whl || exit
fi
START=$SECONDS
{ nvidia-smi; nproc --all; free -g
  python3 -m pip list 2> /dev/null | grep -iE '^(torch|torchvision|triton|numpy|nvidia-cudnn)'
} > "$OUT/machine.txt" 2>&1
python3 -c "import pytest, xdist, evaluation_fid, generate_data, image_sampling, train" || exit # names what is missing
if [[ $* == *--tiny* ]]; then
  export SLIMFLOW_TEST_DEVICE=cpu
else
  export SLIMFLOW_TEST_DEVICE=cuda
  python3 -c "import torch; torch.zeros(1, device='cuda')" || exit
  for size in 80.7M 61.8M 15.7M 3.4M; do # compilers on the cores while the tests run: nothing is timed yet
    (TORCHINDUCTOR_COMPILE_THREADS=4 timeout 170 python3 -m benchmarks.gpu --warm $size > .gpu/warm_$size.txt 2>&1) &
  done
fi
env --default-signal=INT timeout -s INT -k 10 170 python3 -m pytest -p no:cacheprovider -o addopts= --import-mode=importlib -n 4 \
  --dist worksteal -v -rs --durations=8 tests/test_cuda.py > "$OUT/tests.txt" 2>&1 # stopped, it still reports failures
echo "tests: status $?, $((SECONDS - START)) s"; tail -30 "$OUT/tests.txt"
wait
cat .gpu/warm_*.txt > "$OUT/warm.txt" 2> /dev/null; grep -h compiled "$OUT/warm.txt"
find .gpu/inductor -name '*.so' -delete 2> /dev/null # a compiler that was stopped leaves half a library
LEFT=$((520 - SECONDS + START))
timeout $((LEFT + 15)) python3 -m benchmarks.gpu --seconds $((LEFT - 30)) --out "$OUT" "${@:2}" 2> "$OUT/errors.txt" |
  tee "$OUT/gpu.txt"
nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.used --format=csv \
  >> "$OUT/machine.txt" 2>&1
echo "all: $((SECONDS - START)) s"; tail -5 "$OUT/errors.txt"
