#!/usr/bin/env bash
# On a machine with a CUDA card: builds the engine, runs the GPU tests, measures kernels and decode speed; the command behind docs/cuda.md.
#
#   tools/gpu.sh [build] [test] [older] [kernels] [models] [bench] [short] [host] [steps]      all steps if none is named
#
# Results go to $HYLRA_GPU_OUT (default docs/cuda), models of random weights (45 GB) to $HYLRA_GPU_WORK (default /tmp/hylra-gpu). `bench` with four
# sequences of 131072 tokens needs a card of 96 GB. HYLRA_CUDA_ARCHITECTURES: for which cards (default native); HYLRA_LLAMA_CPP_SOURCE: see CMakeLists.txt.
# `test` decodes a real model too where HYLRA_NEEDLE_MODEL names one (tests/conftest.py).
# With LLAMA_CPP_LIB_PATH set, that library is taken and nothing is built; it has check-cuda and bench-cuda beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
BUILD=${HYLRA_GPU_BUILD:-build/gpu} OUT=${HYLRA_GPU_OUT:-docs/cuda} WORK=${HYLRA_GPU_WORK:-/tmp/hylra-gpu} PYTHON=${PYTHON:-python3}
export LLAMA_CPP_LIB_PATH=${LLAMA_CPP_LIB_PATH:-$PWD/$BUILD/lib}
HYLRA_COMMIT=${HYLRA_COMMIT:-$(git rev-parse --short HEAD 2> /dev/null || true)} # named in the results
export HYLRA_COMMIT
mkdir -p "$OUT" "$WORK"

build() {
    CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $PYTHON -m pip install --quiet llama-cpp-python==0.3.36 numpy gguf cffi tqdm scipy pytest matplotlib
    cmake -B "$BUILD" -G Ninja -DGGML_CUDA=ON -DHYLRA_BUILD_TOOLS=ON -DCMAKE_CUDA_ARCHITECTURES="${HYLRA_CUDA_ARCHITECTURES:-native}" \
        ${HYLRA_LLAMA_CPP_SOURCE:+-DHYLRA_LLAMA_CPP_SOURCE="$HYLRA_LLAMA_CPP_SOURCE"}
    ninja -C "$BUILD" hylra check-cuda bench-cuda
    cp ggml_patch/src/hylra.h "$BUILD/check-cuda" "$BUILD/bench-cuda" "$LLAMA_CPP_LIB_PATH/"
}

run_tests() { # the sanitizer takes a part of the matrix: it is slow
    "$LLAMA_CPP_LIB_PATH/check-cuda" all > "$OUT/check.txt" || { grep -v '^ok' "$OUT/check.txt"; exit 1; }
    for tool in memcheck racecheck initcheck synccheck; do
        compute-sanitizer --tool $tool "$LLAMA_CPP_LIB_PATH/check-cuda" small > "$WORK/$tool.txt" 2>&1 || true
        tail -n 1 "$WORK/$tool.txt" | tee "$OUT/$tool.txt"
    done
    $PYTHON -m pytest -rA -q tests/test_cuda.py | tee "$OUT/test_cuda.txt" | grep -E "CUDA graphs:|KL divergence|passed|failed"
}

older() { # what cards before Hopper run, on this one: kernels as PTX for sm_75 and sm_80, which the driver compiles
    for arch in 75 80; do
        cmake -B "$BUILD-$arch" -G Ninja -DGGML_CUDA=ON -DHYLRA_BUILD_TOOLS=ON -DCMAKE_CUDA_ARCHITECTURES="$arch-virtual" \
            ${HYLRA_LLAMA_CPP_SOURCE:+-DHYLRA_LLAMA_CPP_SOURCE="$HYLRA_LLAMA_CPP_SOURCE"}
        ninja -C "$BUILD-$arch" check-cuda
        "$BUILD-$arch/check-cuda" all > "$OUT/check-$arch.txt" || { grep -v '^ok' "$OUT/check-$arch.txt"; exit 1; }
    done
}

kernels() { # name, flags: one layer of a model's shape
    "$LLAMA_CPP_LIB_PATH/bench-cuda" "${@:2}" > "$OUT/kernels-$1.json" 2> "$WORK/kernels.log"
}

run_kernels() {
    kernels llama-3.1-8b         --heads 32 --n-kv 8192,16384,32768,65536,131072
    kernels llama-3.1-8b-4       --heads 32 --streams 4 --n-kv 65536,131072
    kernels llama-3.1-8b-8       --heads 32 --streams 8 --n-kv 65536
    kernels qwq-32b              --heads 40 --n-kv 8192,61440,131072
    kernels qwq-32b-4            --heads 40 --streams 4 --n-kv 61440
    kernels qwen3-32b            --heads 64 --n-kv 61440,131072
    kernels llama-3.1-8b-q8_0    --heads 32 --type q8_0 --n-kv 8192,65536,131072
    kernels llama-3.1-8b-q8_0-4  --heads 32 --type q8_0 --streams 4 --n-kv 65536
    kernels llama-3.1-8b-q4_0    --heads 32 --type q4_0 --n-kv 8192,65536,131072
    kernels qwq-32b-q8_0         --heads 40 --type q8_0 --n-kv 61440
    kernels deepseek-r1          --mla 1 --heads 128 --n-kv 8192,61440,131072
    kernels deepseek-r1-4        --mla 1 --heads 128 --streams 4 --n-kv 61440
    kernels deepseek-v2-lite     --mla 1 --heads 16 --n-kv 8192,61440
}

model() { # shape, policy name, flags of the policy
    $PYTHON tools/random_model.py "$1" "$WORK/$1.gguf" --policy "$WORK/$1-$2.json" "${@:3}"
}

# UCM's published layers for Qwen3-32B: dense 0-6, 61-63; select 7 8 10 12-20 24 30 32 33 34 36 38 39 45
UCM=FFFFFFFSSRSRSSSSSSSSSRRRSRRRRRSRSSSRSRSSRRRRRSRRRRRRRRRRRRRRRFFF

make_models() {
    model llama-3.1-8b per-head --every 8 --lists 0
    model llama-3.1-8b sparse   --every 8 --lists 0 --sparse-select
    model llama-3.1-8b shared   --every 8
    model qwq-32b      per-head --every 8 --lists 0
    model qwq-32b      sparse   --every 8 --lists 0 --sparse-select
    model qwq-32b      shared   --every 8
    model qwq-32b      ucm      --roles $UCM
}

bench() { # result, shape, policies, flags
    local policies=()
    for name in $3; do policies+=(--policy "$WORK/$2-$name.json"); done
    $PYTHON -m hylra_gguf bench "$WORK/$2.gguf" -ngl 99 -t 1 --arms stock-fa1,hylra "${policies[@]}" -n 24 -r 3 -o json --no-progress "${@:4}" > "$OUT/$1.json" || echo "bench $1 failed" >&2
    echo "bench $1 after $SECONDS s" >&2
}

run_bench() {
    bench llama-3.1-8b-8  llama-3.1-8b "per-head sparse" -d 65536 -np 8
    bench qwq-32b         qwq-32b "per-head shared ucm sparse" -d 8192,32768,61440
    bench qwq-32b-4       qwq-32b "per-head ucm sparse" -d 61440 -np 4
    bench llama-3.1-8b-4  llama-3.1-8b "per-head sparse" -d 131072 -np 4
    bench llama-3.1-8b    llama-3.1-8b "per-head shared sparse" -d 4096,8192,16384,32768,65536,131072
    bench llama-3.1-8b-q8_0 llama-3.1-8b "per-head sparse" -d 65536 -ctk q8_0 -ctv q8_0
    bench llama-3.1-8b-q8_0-4 llama-3.1-8b "per-head sparse" -d 32768 -np 4 -ctk q8_0 -ctv q8_0
}

run_short() { # where HyLRA begins with several sequences: each cache is short, all of them are not
    for n in 2 4 8; do
        bench llama-3.1-8b-$n-short llama-3.1-8b "per-head sparse" -d 4096,8192 -np $n
        bench qwq-32b-$n-short      qwq-32b "per-head ucm sparse" -d 4096,8192 -np $n
    done
    bench llama-3.1-8b-q8_0-short   llama-3.1-8b "per-head sparse" -d 4096,8192 -ctk q8_0 -ctv q8_0
    bench llama-3.1-8b-q8_0-4-short llama-3.1-8b "per-head sparse" -d 4096,8192 -np 4 -ctk q8_0 -ctv q8_0
}

run_host() { # the processor attends: nothing else may run beside
    bench llama-3.1-8b-host llama-3.1-8b "per-head sparse" -d 8192,32768 -n 8 -r 3 -nkvo -t "$(nproc)"
}

steps() { # sequences, depth: where the time of a step goes
    $PYTHON tools/step_time.py "$WORK/llama-3.1-8b.gguf" --policy "$WORK/llama-3.1-8b-per-head.json" --policy "$WORK/llama-3.1-8b-sparse.json" \
        -np "$1" -d "$2" > "$OUT/steps-llama-3.1-8b-$1.json"
}

STEPS=("$@")
[ ${#STEPS[@]} -gt 0 ] || STEPS=(build test older kernels models bench short host steps)
for step in "${STEPS[@]}"; do
    case $step in
        build) build ;;
        test) run_tests ;;
        older) older ;;
        kernels) run_kernels ;;
        models) make_models ;;
        bench) run_bench ;;
        short) run_short ;;
        host) run_host ;;
        steps) steps 8 65536; steps 4 131072 ;;
        *) echo "tools/gpu.sh: $step: expected build, test, older, kernels, models, bench, short, host or steps" >&2; exit 2 ;;
    esac
    echo "$step done after $SECONDS s" >&2
done
