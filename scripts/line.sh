# Sourced by recipes/*/run.sh, which sets `recipe` (a folder under recipes/) and calls, in this order:
#
#   start_line "$@"                   reads the flags, makes .venv, opens the run folder; sets run_dir, launch and the
#                                     flag arrays text, chat, exam, core
#   stage RECORD COMMAND ...          runs COMMAND ... --run_dir RUN_DIR unless it is known to have finished
#   finish_line                       writes the report
#
# A stage has finished when eval/RECORD.json exists; it is skipped here, without starting Python, when besides that its
# command line and its YAML are the ones it finished with (logs/RECORD.ran). Otherwise the stage's own Python decides:
# it resumes, returns at once, or refuses a folder that belongs to another recipe. Times of every session go to
# sessions.jsonl, which also marks the folder as a run: --fresh deletes nothing else.

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() {
    cat <<USAGE
usage: bash $recipe/run.sh [flags]

Runs every stage of $recipe, from raw text to a report and a sample chat. Run it again and it continues at the first
stage that has not finished.

  --output_dir DIR   the run's folder (default: runs/$(basename "$recipe"))
  --dataset X        text to train on: embedded, a Hub dataset id, a folder of parquet shards with a \`text\` column
                     (last shard = validation) or a .jsonl file (default: what $recipe/pretrain.yaml says)
  --chat_data DIR    a folder of .jsonl conversations, one {"messages": [...]} a line, added to midtraining and SFT
  --eval_data DIR    a folder with GSM8K, ARC, MMLU rows (gsm8k_train.jsonl, arc_easy_test.jsonl, ...): training rows
                     join the mixture, test rows the chat evaluation
  --core_data DIR    a folder with the CORE tasks (core.yaml and one .jsonl a task) for the base evaluation
  --fresh            start over: deletes the run's folder first
  --help             this text

Environment: PYTHON (the interpreter that makes .venv), ACCELERATE_CONFIG (a file instead of the one chosen by the machine).
USAGE
}

start_line() {
    local fresh=no value caller="$PWD"
    run_dir="$root/runs/$(basename "$recipe")"
    text=() chat=() exam=() core=()
    while [ $# -gt 0 ]; do
        case "$1" in
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        esac
        case "$1" in
            --help | -h) usage; exit 0 ;;
            --fresh) fresh=yes; shift; continue ;;
            --output_dir | --dataset | --chat_data | --eval_data | --core_data)
                [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value; bash $recipe/run.sh --help explains it" ;;
            *) fail "unknown flag $1; valid are --output_dir --dataset --chat_data --eval_data --core_data --fresh --help" ;;
        esac
        value="$2"
        case "$value" in /*) ;; *) if [ -e "$caller/$value" ]; then value="$(cd "$caller" && absolute "$value")"; fi ;; esac
        case "$1" in
            --output_dir) case "$value" in /*) run_dir="$value" ;; *) run_dir="$caller/$value" ;; esac ;;
            --dataset) text=(--dataset "$value") ;;
            --chat_data) folder "$1" "$value"; chat=(--chat_data "$value") ;;
            --eval_data) folder "$1" "$value"; exam=(--eval_data "$value") ;;
            --core_data) folder "$1" "$value"; core=(--core_data "$value") ;;
        esac
        shift 2
    done
    cd "$root"
    run_dir="${run_dir#"$root"/}"
    [ "$fresh" = no ] || start_over
    if [ -d "$run_dir" ] && [ ! -f "$run_dir/sessions.jsonl" ] && ! grep -qs '"settings"' "$run_dir"/eval/*.json && [ -n "$(ls -A "$run_dir")" ]; then
        fail "$run_dir is not empty and is no run folder; choose another one with --output_dir"
    fi
    set_up_venv train,eval
    choose_launcher
    mkdir -p "$run_dir/logs" "$run_dir/eval" || fail "cannot write to $run_dir; choose another folder with --output_dir"
    note session_start "$(commit)"
    unfinished=
    trap end_session EXIT
}

absolute() { if [ -d "$1" ]; then (cd "$1" && pwd); else echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"; fi; }

folder() { [ -d "$2" ] || fail "$1 $2: no such folder"; }

start_over() {
    [ -e "$run_dir" ] || return 0
    [ -f "$run_dir/sessions.jsonl" ] || fail "--fresh deletes only run folders, and $run_dir has no sessions.jsonl: delete it yourself"
    echo "== deleting $run_dir"
    rm -rf -- "$run_dir"
}

# Accelerate would start a CPU process with one thread a physical core at most; the tiny run is timed with all of them.
choose_launcher() {
    local config="${ACCELERATE_CONFIG:-}"
    if [ -z "$config" ]; then
        config=accelerate_configs/cpu.yaml
        if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then config=accelerate_configs/single_gpu.yaml; fi
    fi
    [ -f "$config" ] || fail "ACCELERATE_CONFIG: no file $config; accelerate_configs/ holds $(ls accelerate_configs | tr '\n' ' ')"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')}"
    launch=(accelerate launch --quiet --config_file "$config")  # quiet: no traceback after the stage's own message
}

note() { printf '{"time": %s, "event": "%s", "name": "%s"}\n' "$(date +%s)" "$1" "${2:-}" >>"$run_dir/sessions.jsonl"; }

commit() {
    local name
    name="$(git rev-parse --short HEAD 2>/dev/null)" || { echo -; return; }
    if git diff --quiet HEAD; then echo "$name"; else echo "$name (dirty)"; fi
}

stage() {
    local record="$1" ran="$run_dir/logs/$1.ran" argument
    shift
    { printf '%s\n' "$*"; for argument in "$@"; do case "$argument" in *.yaml) cat "$argument" ;; esac; done; } >"$ran.now"
    if [ -f "$run_dir/eval/$record.json" ] && has_folder "$record" && cmp -s "$ran" "$ran.now"; then
        echo "== $record: finished earlier"
        rm "$ran.now"
        return
    fi
    echo "== $record"
    unfinished="$record"
    note stage_start "$record"
    # Ctrl-C is for the stage, which saves first; its launcher would leave at once. Of one that came too early for the
    # stage to notice we know here.
    interrupted=no
    trap 'interrupted=yes' INT
    (trap '' INT; exec "$@" --run_dir "$run_dir") || stop_line "$record" $?
    trap - INT
    [ "$interrupted" = no ] || stop_line "$record" 130
    note stage_end "$record"
    unfinished=
    mv "$ran.now" "$ran"
}

# A model or tokenizer that was deleted is made again; an evaluation has no folder.
has_folder() { case "$1" in tokenizer | base | mid | sft | rl | dpo) [ -d "$run_dir/$1" ] ;; esac; }

# The time of a stage that stopped counts where it has saved something.
end_session() {
    if [ -n "$unfinished" ] && [ -n "$(find "$run_dir/checkpoints/$unfinished" -mindepth 1 -maxdepth 1 -newer "$run_dir/logs/$unfinished.ran.now" 2>/dev/null)" ]; then
        note stage_saved "$unfinished"
    fi
    note session_end
}

stop_line() {
    echo "== stopped in stage $1; finished stages are kept, run the same command again to continue" >&2
    exit "$2"
}

finish_line() {
    note report_start
    python scripts/report.py --run_dir "$run_dir" "$@" || stop_line report $?
}
