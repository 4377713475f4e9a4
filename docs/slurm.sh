#!/bin/bash
# A training as a SLURM job that survives pre-emption and its own time limit: docs/launch.md.
#
#   sbatch docs/slurm.sh prcl/train.py --config prcl/configs/voc.json
#
#SBATCH --job-name=semiseg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300

# A task is a process of the run, one a GPU. No launcher stands between SLURM and the run: signals and status pass.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python "$@"' task "$@"
status=$?

# 143: stopped by SIGTERM after a checkpoint. Where pre-emption itself queues the job again, this does nothing more.
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
