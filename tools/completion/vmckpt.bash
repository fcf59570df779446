# Completion of the vmckpt command for bash. Installed as share/bash-completion/completions/vmckpt.
# Verbs and options come from the command's own help, names from `vmckpt list`.
_vmckpt() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} verb=${COMP_WORDS[1]} i
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        mapfile -t COMPREPLY < <(compgen -W "$(vmckpt help 2> /dev/null | sed -n 's/^  \([a-z]*\).*/\1/p')" -- "$word")
        return
    fi
    if [ "$verb" = launch ]; then
        # Behind -- stands another command: its own completion, where there is one.
        for ((i = 2; i < COMP_CWORD; ++i)); do
            [ "${COMP_WORDS[i]}" = -- ] || continue
            if declare -F _command_offset > /dev/null; then _command_offset $((i + 1)); else mapfile -t COMPREPLY < <(compgen -c -- "$word"); fi
            return
        done
    fi
    case $before in
        -d | --image-dir) mapfile -t COMPREPLY < <(compgen -d -- "$word"); return ;;
        -o | --output) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
    esac
    case $word in
        -*)
            mapfile -t COMPREPLY < <(compgen -W "$(vmckpt "$verb" --help 2> /dev/null | grep -o -- '--[a-z][a-z-]*')" -- "$word")
            return
            ;;
    esac
    case $verb in
        checkpoint | attach | logs | stop | kill) mapfile -t COMPREPLY < <(compgen -W "$(vmckpt list --names 2> /dev/null)" -- "$word") ;;
        restart | inspect | verify) mapfile -t COMPREPLY < <(compgen -f -X '!*.ckpt' -- "$word"; compgen -d -- "$word") ;;
        help) mapfile -t COMPREPLY < <(compgen -W "$(vmckpt help 2> /dev/null | sed -n 's/^  \([a-z]*\).*/\1/p')" -- "$word") ;;
    esac
}
complete -F _vmckpt vmckpt
