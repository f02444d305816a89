# What every run.sh does: finds Python and the GPUs, and starts a training script with python or DeepSpeed's launcher.
# Sourced, not run. Of the environment:
#     NUM_GPUS        GPUs of each node (1; all of them where HOSTFILE or LAUNCHER_ARGS is given and this is not)
#     HOSTFILE        nodes, lines such as `node1 slots=8`; needs pdsh and ssh
#     LAUNCHER_ARGS   further arguments of DeepSpeed's launcher (deepspeed --help). Two nodes without ssh, the first
#                     line on node1 and the second on node2:
#         HOSTFILE=hosts LAUNCHER_ARGS="--no_ssh --node_rank 0 --master_addr node1" bash deepspeed_ft/run.sh
#         HOSTFILE=hosts LAUNCHER_ARGS="--no_ssh --node_rank 1 --master_addr node1" bash deepspeed_ft/run.sh
set -euo pipefail
if [ -n "${HOSTFILE:-}" ]; then
    # DeepSpeed would go on without it, on this machine alone.
    if [ ! -f "$HOSTFILE" ]; then
        echo "HOSTFILE: no file $HOSTFILE, expected one with lines such as \`node1 slots=8\`." >&2
        echo "Correct its path and run this again, or leave HOSTFILE out to train on this machine alone." >&2
        exit 1
    fi
    HOSTFILE="$(realpath "$HOSTFILE")"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if ! command -v deepspeed >/dev/null; then source ./setup_env.sh; fi

# Starts a script, named from the repository's root, with its arguments.
launch() {
    local launcher=(python)
    if [ -n "${HOSTFILE:-}${LAUNCHER_ARGS:-}" ] || [ "${NUM_GPUS:-1}" != 1 ]; then
        # Where there is no device that could be a card, each process would tell so.
        if ! compgen -G "/dev/nvidia*" && ! compgen -G "/dev/d[rx]*" && ! compgen -G "/dev/[adk][acf][cdv]*"; then
            export DS_ACCELERATOR=cpu
        fi >/dev/null
        # Ctrl-C goes to the processes on each node, which pass it on; the launcher above them would end with a traceback.
        trap '' INT
        # LAUNCHER_ARGS without quotes: it is several words.
        launcher=(deepspeed --quiet ${HOSTFILE:+--hostfile "$HOSTFILE"} ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} ${LAUNCHER_ARGS:-})
    fi
    exec "${launcher[@]}" "$@"
}
