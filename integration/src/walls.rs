//! A machine on which programs get no namespaces of their own.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::bin;
use crate::install;

/// Runs a program whose `unshare`, and that of everything it starts, is refused.
const SOURCE: &str = r#"
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int count, char **arguments) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_unshare, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    /* who is not root has to give up privileges first */
    if (geteuid() != 0 && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return perror("prctl"), 1;
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) return perror("seccomp"), 1;
    execv(arguments[1], arguments + 1);
    return perror(arguments[1]), 1;
}
"#;

/// A command that runs `pgcairn` without namespaces, ready to get arguments; what it needs is put
/// into `directory`.
///
/// # Panics
/// When there is no C compiler, without which nothing here could have been built.
pub fn command(directory: &Path) -> Command {
    let (source, wrapper) = (directory.join("walls.c"), directory.join("walls"));
    fs::write(&source, SOURCE).expect("the source can be written");
    let compiled = Command::new("cc").args(["-O1", "-o"]).arg(&wrapper).arg(&source).output();
    let compiled = compiled.expect("there is a C compiler");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let mut command = install::clean(Command::new(wrapper));
    command.arg(bin::path());
    command
}
