#!/bin/sh
# Makes the environments of engines that can't live beside the others: engine_venvs.sh FOLDER PYTHON [heavy].
#   tflite-runtime   ends at Python 3.11 and needs NumPy 1
#   ort-openvino     ONNX Runtime with the OpenVINO provider replaces plain onnxruntime
# With "heavy" those of gigabytes instead, for `make test-engines`; the suite runs inside them:
#   executorch       needs NumPy 2, and PyTorch, which thereby is here as well
#   torch            PyTorch alone, only where ExecuTorch has no wheel
#   ort-plugin       ONNX Runtime with an execution provider from a library of its own, which runs on any CPU
# Where one can't be made it says so, and the tests that need it skip and say so too.
set -u
folder=$1
python=$2
mkdir -p "$folder"

make_venv() { # NAME PYTHON REQUIREMENT…
    name=$1 interpreter=$2
    shift 2
    [ -x "$folder/$name/bin/python" ] && return
    if ! "$interpreter" -m venv "$folder/$name" >/dev/null 2>&1 ||
        ! "$folder/$name/bin/python" -m pip install -q "$@" >"$folder/$name.log" 2>&1; then
        echo "note: no environment for $name ($(tail -n 1 "$folder/$name.log" 2>/dev/null)); its tests will be skipped" >&2
        rm -rf "${folder:?}/$name"
    fi
}

if [ "${3-}" = heavy ]; then
    suite="pytest>=8.3 pytest-asyncio>=0.25 pytest-timeout>=2.3"
    # shellcheck disable=SC2086 # a list of words
    make_venv executorch "$python" 'executorch>=1.0' 'torch>=2.9' 'numpy>=2' $suite
    # shellcheck disable=SC2086
    [ -x "$folder/executorch/bin/python" ] || make_venv torch "$python" 'torch>=2.4' 'numpy>=1.26' $suite
    # A real model; what its package asks for besides is not needed to read it.
    for name in executorch torch; do
        [ ! -x "$folder/$name/bin/python" ] || "$folder/$name/bin/python" -m pip install -q --no-deps silero-vad ||
            echo "note: silero-vad can't be had; the test of a real TorchScript model will be skipped" >&2
    done
    make_venv ort-plugin "$python" 'onnxruntime>=1.24' 'onnxruntime-ggml>=0.2' 'onnx>=1.17' 'numpy>=1.26'
    exit
fi
older=$(for name in python3.11 python3.10; do
    path=$(command -v "$name") && "$path" -c 'import sys; print(sys.executable)' 2>/dev/null && break
done)
if [ -n "$older" ]; then
    make_venv tflite-runtime "$older" 'tflite-runtime>=2.13' 'numpy>=1.23,<2'
else
    echo "note: no Python 3.10 or 3.11 here, and tflite-runtime has no wheel after that; its tests will be skipped" >&2
fi
make_venv ort-openvino "$python" 'onnxruntime-openvino>=1.20' 'onnx>=1.17' 'numpy>=1.26'
