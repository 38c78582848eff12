# Sourced by the scripts for Cloud TPU VMs: their common flags, and how they call gcloud.
# shellcheck shell=bash

# shellcheck disable=SC2034  # the scripts' usage shows it
common_flags='  --name=NAME        of the TPU VM; default covseg
  --zone=ZONE        for example us-west4-a
  --project=PROJECT  default: the one that gcloud is set to
  --dry_run          print the commands and run none'

# Also read by the scripts that source this file.
name=covseg zone='' project='' dry_run=false program_flags=() own=()

fail() {
  echo "error: $*" >&2
  exit 2
}

# Takes a flag of the script's own: `own` names variables, with a = those that take a value.
take_flag() {
  local key="${1#--}" value=true
  if [[ "$key" == *=* ]]; then
    value="${key#*=}" key="${key%%=*}="
  fi
  [[ " ${own[*]} " == *" $key "* ]] && printf -v "${key%=}" %s "$value"
}

# Takes the common flags, and others by take_flag. What comes after -- is the program's, and left in
# program_flags.
take_flags() {
  local flag
  while [ "$#" -gt 0 ]; do
    flag="$1"
    shift
    case "$flag" in
      --) program_flags=("$@") && break ;;
      --name=*) name="${flag#*=}" ;;
      --zone=*) zone="${flag#*=}" ;;
      --project=*) project="${flag#*=}" ;;
      --dry_run) dry_run=true ;;
      --help) usage && exit 0 ;;
      *) take_flag "$flag" || fail "$flag is not a flag of $(basename "$0"); see --help" ;;
    esac
  done
  [ -n "$zone" ] || fail '--zone=ZONE is missing'
}

# Runs a command, or prints it as one could type it.
call() {
  if [ "$dry_run" = true ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# tpu_vm VERB ARGUMENTS...: gcloud's command for this VM.
tpu_vm() {
  local verb="$1"
  shift
  call gcloud compute tpus tpu-vm "$verb" "$@" --zone="$zone" ${project:+--project="$project"}
}

# on_workers COMMAND: runs it in a shell on every worker of the VM. Its lines become one.
on_workers() {
  tpu_vm ssh "$name" --worker=all --command="${1//$'\n'/ }"
}
