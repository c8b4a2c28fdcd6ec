#!/usr/bin/env bash
# Everything that only a GPU can show, in one table to paste: the tests marked gpu and those of the fused kernels, what a
# step is counted to take and what it takes, in each precision, by one GPU and by all, and some hundred iterations of
# training on generated images. Without a GPU the tests of a GPU skip, and steps and training are few and small, which
# shows that the script itself works.
# usage: tools/gpu_check.sh [FOLDER]     default: output/gpu_check; PYTHON chooses the interpreter
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
folder=${1:-output/gpu_check}
mkdir -p "$folder"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")') || exit 1
iterations=$([ "$device" = cuda ] && echo 300 || echo 2)
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
failed=0
tables=()
rows=()

check() {  # NAME COMMAND...: runs it into FOLDER/NAME.log and notes a row
    local name=$1 start=$SECONDS status=passed
    shift
    if ! "$@" >"$folder/$name.log" 2>&1; then status=FAILED failed=1; fi
    rows+=("$(printf '| %-16s | %-6s | %4d s | %s |' "$name" "$status" $((SECONDS - start)) "$(tail -n 1 "$folder/$name.log" | cut -c 1-90)")")
}

train() {  # NAME AMP: a detector of COCO's shape on the embedded images
    local name=$1 norm=SyncBN size=800
    [ "$device" = cuda ] || { norm=BN; size=64; }
    check "$name" "$python" tools/train_net.py --config-file "${coco}_lsq_w4a4_aux.yaml" MODEL.DEVICE "$device" \
        MODEL.WEIGHTS "" MODEL.RETINANET.NUM_CLASSES 0 DATASETS.TRAIN "$dataset" DATASETS.TEST "()" OUTPUT_DIR "$folder/$name" \
        SOLVER.AMP.ENABLED "$2" SOLVER.MAX_ITER "$iterations" SOLVER.STEPS "()" SOLVER.IMS_PER_BATCH 2 SEED 1 \
        INPUT.MIN_SIZE_TRAIN "($size,)" INPUT.MIN_SIZE_TEST "$size" MODEL.RESNETS.NORM $norm MODEL.FPN.NORM $norm \
        MODEL.RETINANET.NORM $norm MODEL.AUX.NORM $norm MODEL.QUANT.CALIBRATION.METHOD minmax TEST.EVAL_PERIOD 0
}

steps() {  # NAME LAUNCHER...: whole training steps of the float detector, ours, and ours with the path
    local name=$1
    shift
    local options=(--precision fp32 fp16 bf16 --rounds 20)
    [ "$device" = cuda ] || options=(--precision fp32 bf16 --rounds 1 --size 64 64 MODEL.RESNETS.NORM BN
        MODEL.FPN.NORM BN MODEL.RETINANET.NORM BN MODEL.AUX.NORM BN)
    check "$name" "$@" tools/benchmark.py step --config-file "${coco}_fp_bn.yaml" \
        --config-file "${coco}_lsq_w4a4.yaml" --config-file "${coco}_lsq_w4a4_aux.yaml" "${options[@]}"
    tables+=("$folder/$name.log")
}

dataset="('aqdet_shapes_val',)"
coco=configs/COCO-Detection/retinanet_R_18_FPN_1x
check tests "$python" -m pytest -q -m gpu tests
check kernels "$python" -m pytest -q tests/quantization/test_fused.py tests/quantization/test_fused_norm.py
check count "$python" tools/benchmark.py count --config-file "${coco}_fp_bn.yaml" \
    --config-file "${coco}_lsq_w4a4.yaml" --config-file "${coco}_lsq_w4a4_aux.yaml"
steps step "$python"
[ "$gpus" -gt 1 ] && steps step-all "$python" -m torch.distributed.run --nproc_per_node "$gpus"
train training False
[ "$device" = cuda ] && train training-amp True

"$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU", "torch", torch.__version__)'
echo "| check            | result | time   | last line |"
echo "|------------------|--------|--------|-----------|"
printf '%s\n' "${rows[@]}"
for table in "${tables[@]}"; do grep -A 20 "processes on" "$table"; done
exit $failed
