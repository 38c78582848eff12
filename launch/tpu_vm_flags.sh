# Sourced by the scripts for Cloud TPU VMs: their common flags, and how they call gcloud.
# shellcheck shell=bash

# shellcheck disable=SC2034  # the scripts' usage shows it
common_flags='  --name=NAME        of the TPU VM; default covseg
  --zone=ZONE        for example us-west4-a
  --project=PROJECT  default: the one that gcloud is set to
  --dry_run          print the commands and run none'

# Also read by the scripts that source this file.
name=covseg zone='' project='' dry_run=false program_flags=() own=()
label=made_by=covseg_jax # of what create_tpu_vm.sh makes, and delete_tpu_vm.sh may delete

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
  find_same_vm
}

# The common flags, for another script.
find_same_vm() {
  same_vm=(--name="$name" --zone="$zone" ${project:+--project="$project"})
  if [ "$dry_run" = true ]; then
    same_vm+=(--dry_run)
  fi
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
  in_zone tpu-vm "$@"
}

# queued VERB ARGUMENTS...: gcloud's command for the queued resource that the VM is made by; it has
# the VM's name.
queued() {
  in_zone queued-resources "$@"
}

in_zone() {
  call gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"}
}

# list_states KIND: a line of name and state for each of the zone's queued-resources or tpu-vm.
list_states() {
  local state=state
  if [ "$1" = queued-resources ]; then
    state=state.state
  fi
  in_zone "$1" list --format="value(name.basename(),$state)"
}

# find_state KIND: of the one by this name; NONE where there is none. It fails where gcloud does not
# answer: nothing is known then.
find_state() {
  local listed
  listed="$(list_states "$1")" || return 1
  awk -v name="$name" '$1 == name { state = $2 } END { print state ? state : "NONE" }' \
    <<<"$listed"
}

# on_workers COMMAND: runs it in a shell on every worker of the VM. Its lines become one.
on_workers() {
  tpu_vm ssh "$name" --worker=all --command="${1//$'\n'/ }"
}
