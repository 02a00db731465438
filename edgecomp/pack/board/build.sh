#!/bin/sh
# Builds this archive's TensorRT engines on the board it was packed for: sh build.sh. It needs what JetPack brings, and nothing else.
# What is built already is left as it is, so it can be stopped and run again.
set -u
LC_ALL=C
export LC_ALL
tab=$(printf '\t')
child='' partial='' version='' todo='' ready=''

say() { printf '%s\n' "$*"; }
complain() { printf 'build.sh: %s\n' "$*" >&2; }
fail() { complain "$@"; exit 1; }
size() { awk -v bytes="$1" 'BEGIN { if (bytes < 2 ^ 30) printf "%.0f MiB", bytes / 2 ^ 20; else printf "%.1f GiB", bytes / 2 ^ 30 }'; }

# Is version $1 at least $2?
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]; }
# Does version $1 lie between $2 and $3, without $3? An empty $3 is no end.
between() { at_least "$1" "$2" && { [ -z "$3" ] || ! at_least "$1" "$3"; }; }
# Do two versions agree as far as both go? Python may say 10.3.0 where packages say 10.3.0.30.
agree() { case "$1." in "$2".*) return 0 ;; esac; case "$2." in "$1".*) return 0 ;; esac; return 1; }
# How much of the memory $1 (a line of /proc/meminfo) there is, in bytes.
memory() { awk -v name="$1:" '$1 == name { bytes = $2 * 1024 } END { printf "%.0f\n", bytes }' /proc/meminfo; }

# --- what is here

find_tensorrt() {
    python=$(command -v python3) || python=
    PYTHONPATH=$PWD/builder${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
    export PYTHONPATH PYTHONDONTWRITEBYTECODE
    why="there is no python3"
    if [ -n "$python" ]; then
        said=$("$python" -c 'import tensorrt; tensorrt.Builder; print("version", tensorrt.__version__)' 2>&1)
        version=$(printf '%s\n' "$said" | sed -n 's/^version //p')
        if [ -n "$version" ]; then
            how="Python"
            return
        fi
        why="python3 cannot import tensorrt ($(printf '%s\n' "$said" | tail -n 1))"
    fi
    for trtexec in "$(command -v trtexec)" /usr/src/tensorrt/bin/trtexec /usr/bin/trtexec; do
        [ -x "$trtexec" ] && break
        trtexec=
    done
    installed=$(dpkg-query -W -f='${Version}\n' 'libnvinfer[0-9]*' 2>/dev/null | sed -n 's/^\([0-9.]*\).*/\1/p' | sort -V | tail -n 1)
    [ -n "$trtexec" ] || fail "$why, and there is no trtexec in PATH or /usr/src/tensorrt/bin${installed:+ (installed is TensorRT $installed)}:" \
        "sudo apt install python3-libnvinfer, or the whole of JetPack: sudo apt install nvidia-jetpack"
    how="trtexec"
    say "$why: building with $trtexec. To run the model Python needs it, too: sudo apt install python3-libnvinfer"
    version=$(trtexec_version)
    version=${version:-$installed}
    [ -n "$version" ] || fail "$trtexec does not say which TensorRT it is of: sudo apt install python3-libnvinfer"
}

# From trtexec's first line: [TensorRT v8602] is 8.6.2, [TensorRT v101602] [b10] is 10.16.2.10.
trtexec_version() {
    "$trtexec" --help 2>&1 | sed -n 's/.*\[TensorRT v\([0-9]*\)\]\( \[b\([0-9]*\)\]\)*.*/\1 \3/p' | head -n 1 | {
        read -r number build || return
        if [ "$number" -lt 10000 ]; then thousands=1000 tens=10; else thousands=10000 tens=100; fi
        printf '%s.%s.%s%s\n' $((number / thousands)) $((number / 100 % tens)) $((number % 100)) "${build:+.$build}"
    }
}

check_version() {
    between "$version" "$FROM" "$BEFORE" && return
    other="this board has no JetPack for it that graphs can be packed for: install JetPack $JETPACK"
    for range in $RELEASES; do  # from:before:JetPack
        rest=${range#*:}
        if between "$version" "${range%%:*}" "${rest%%:*}"; then
            other="pack again with: edgecomp pack BUNDLE --device $DEVICE --jetpack ${rest#*:} -o OUT.tar"
        fi
    done
    fail "these graphs are for TensorRT $FROM${BEFORE:+ and newer, before $BEFORE} (JetPack $JETPACK), and this is TensorRT $version: $other"
}

check_board() {
    model=
    [ -r /proc/device-tree/model ] && model=$(tr -d '\000' < /proc/device-tree/model)
    for word in $BOARD; do
        case "$model" in
            *"$word"*) ;;
            *) say "warning: packed for a Jetson $BOARD, and this is ${model:-no Jetson as far as it says}; engines are for the GPU that builds them"
               return ;;
        esac
    done
}

# --- what is to do

# Is the engine of job $1, with key $2, there and whole, and of this TensorRT?
is_done() {
    [ -f "jobs/$1.done" ] || return 1
    read -r _ _ built key < "jobs/$1.done"
    [ "$key" = "$2" ] && agree "$built" "$version" && sha256sum --status -c "jobs/$1.done" 2>/dev/null
}

look() {
    bytes=0 most=0 engines=0
    while IFS=$tab read -r name key engine weights needs label; do
        rm -f "$engine.partial" "$(dirname "$engine")/.$(basename "$engine")".*.partial  # of a build that was killed
        if is_done "$name" "$key"; then
            say "$label: built before"
            ready="$ready $name"
            continue
        fi
        rm -f "jobs/$name.done"
        todo="$todo $name " bytes=$((bytes + weights)) engines=$((engines + 1))
        [ "$needs" -gt "$most" ] && most=$needs
    done < jobs/list
}

tell_needs() {
    free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') * 1024))
    available=$(memory MemAvailable) swap=$(memory SwapFree)
    say "engines to build, one after another: $engines. This takes minutes to an hour."
    say "  disk    about $(size "$bytes"), $(size "$free") are free"
    say "  memory  about $(size "$most") for the largest, $(size "$available") are free, and $(size "$swap") of swap"
    [ "$bytes" -lt "$free" ] || fail "the disk is too full for the engines, about $(size "$bytes"): make room, or move this folder to another disk"
    [ "$most" -lt "$available" ] && return
    swap_file=$(df -P . | awk 'NR == 2 { print $6 }' | sed 's|/$||')/edgecomp.swap
    say "Memory is short. What helps, before the build:"
    say "  end the desktop until the next start:    sudo init 3"
    say "  a swap file, on an NVMe disk at best, instead of the compressed memory that takes from the same memory:"
    say "    sudo systemctl disable --now nvzramconfig"
    say "    sudo fallocate -l 16G $swap_file && sudo chmod 600 $swap_file && sudo mkswap $swap_file && sudo swapon $swap_file"
    [ "$most" -lt $((available + swap)) ] || say "Without it the system is likely to end the build. Going on all the same: what is built by then stays."
}

# --- building

# Waits for the command that was started last, so that a signal reaches us while it works, and then it.
follow() {
    child=$!
    wait "$child"
    status=$?
    child=
    return "$status"
}

build_by_trtexec() {  # name, engine
    set -- "$1" "$2" "$trtexec"
    log=logs/$1.log partial=$2.partial job=jobs/$1.trtexec
    shift 2
    while IFS= read -r argument; do set -- "$@" "$argument"; done < "$job"
    began=$(date +%s)
    "$@" "--saveEngine=$partial" > "$log" 2>&1 &
    follow
    if [ "$status" -ne 0 ] || [ ! -s "$partial" ]; then
        rm -f "$partial"
        if [ "$status" -eq 137 ]; then
            complain "trtexec was killed, as the system does when memory is short: end other programs (sudo init 3), or add swap"
        else
            reason=$(grep -F '[E]' "$log" | head -n 1)
            complain "trtexec gave no engine (exit code $status)${reason:+: $reason}; all of it is in $log"
        fi
        return 1
    fi
    sync "$partial" && mv "$partial" "${partial%.partial}" || return 1
    partial=
    say "  $(size "$(stat -c %s "$engine")") in $(($(date +%s) - began)) s"
}

build() {  # name, key, engine
    mkdir -p "$(dirname "$3")" logs || return 1
    if [ "$how" = Python ]; then
        "$python" builder/build_engine.py "jobs/$1.json" &
        follow || return 1
    else
        build_by_trtexec "$1" "$3" || return 1
    fi
    { printf '# TensorRT %s %s\n' "$version" "$2" && sha256sum "$3"; } > "jobs/$1.done.partial" && mv "jobs/$1.done.partial" "jobs/$1.done"
}

build_all() {
    while IFS=$tab read -r name key engine _ _ label <&3; do
        case "$todo" in *" $name "*) ;; *) continue ;; esac
        say "building $label (what TensorRT says is in logs/$name.log)"
        build "$name" "$key" "$engine" || return 1
        ready="$ready $name"
    done 3< jobs/list
}

enter() {  # engines that are there into the manifest
    if [ -z "$python" ]; then
        say "There is no python3: the engines lie in bundle/engines/$DEVICE without being in the manifest, bundle/edgecomp.json."
        say "To run the model: sudo apt install python3 python3-libnvinfer, and run build.sh again. It will build nothing a second time."
        return
    fi
    # shellcheck disable=SC2086  # names without blanks
    "$python" builder/complete.py "$version" $ready
}

stop() {
    trap '' INT TERM HUP
    [ -z "$child" ] || { kill "$child"; wait "$child"; } 2>/dev/null
    [ -z "$partial" ] || rm -f "$partial"
    [ -z "$ready" ] || enter
    say "stopped: engines that are done stay, and build.sh goes on from there"
    exit 130
}

# --- all of it

cd "$(dirname "$0")" || exit 1
exec 9> .lock
flock -n 9 || fail "another build.sh is at work in $PWD: wait for it, or end it"
say "checking the files"
sha256sum --quiet -c SHA256SUMS || fail "files of the archive are damaged or missing, see above: unpack it again"
# shellcheck source=/dev/null
. jobs/settings.sh
find_tensorrt
check_version
check_board
say "TensorRT $version, by $how"
look
if [ -n "$todo" ]; then
    tell_needs
    trap stop INT TERM HUP
    if ! build_all; then
        [ -z "$ready" ] || enter
        fail "the engines are not all built; build.sh goes on from those that are"
    fi
    trap - INT TERM HUP
fi
enter || exit 1
[ -n "$python" ] || exit 0
say "Next, the runtime, in a Python that sees JetPack's tensorrt (sudo apt install python3-venv python3-libnvinfer, where they are missing):"
say "  cd $PWD"
say "  python3 -m venv --system-site-packages env"
say "  env/bin/pip install ./$WHEEL"
say "  env/bin/python ask.py 'What is in this picture?' photo.jpg"
