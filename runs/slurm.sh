#!/usr/bin/env bash
# One stage on several machines of a Slurm cluster, or a whole run on one.
#   sbatch --nodes=2 --gpus-per-node=8 runs/slurm.sh pretrain.py configs/full/pretrain.py
#   sbatch --nodes=1 --gpus-per-node=8 runs/slurm.sh runs/full.sh
# The folder of submission, the data and --out must be on a disk that all machines share.
# Preempted, or near its time limit, the job saves, is requeued and resumes.
#SBATCH --job-name=nanogpt-vision
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
log=slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.out

# torchrun kills a process 30 seconds after asking it to stop; saving a large model takes longer.
# PyTorch 2.11 and older ignore this setting.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
# A process that dies is restarted from the newest checkpoint, up to three times, for which torchrun
# needs its own store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Slurm signals only this script (B:) some minutes before the end; srun forwards it to torchrun.
stopped=
trap 'stopped=yes; kill -TERM "$step"' TERM
launch=(torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}"
    --rdzv_backend=c10d --rdzv_endpoint="$head:29500" --rdzv_id="$SLURM_JOB_ID" --max-restarts=3)
case $1 in *.sh) launch=(bash) ;; esac
srun --kill-on-bad-exit=0 "${launch[@]}" "$@" > "$log" 2>&1 &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2> /dev/null; do  # the signal ended the wait, not the step
    wait "$step"
    status=$?
done

# A stage that can resume exits with 75; torchrun exits with 1 and only prints the 75, or the signal
# that it received itself when Slurm signals the steps of a preempted job directly.
if [ "$status" != 0 ] && { [ "$stopped" ] || grep -Eq 'exitcode *: 75|got signal: 15' "$log"; } &&
    ! scontrol show job "$SLURM_JOB_ID" | grep -q JobState=CANCELLED; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 75
fi
exit "$status"
