//! Runs a program and kills it with SIGKILL as it enters its n-th system call of one kind, counted over all its threads.
//!
//! `kill_at KIND N COUNTS PROGRAM ARGS…`; N = 0 only counts; `fail:N` makes that call answer EIO, once, and lets the program live;
//! it counts only once the file COUNTS.armed exists, so that the program may start as it likes. `KIND@TEXT` counts only calls on a descriptor
//! whose path contains TEXT. How often each kind was entered is written to the file COUNTS at the end, with `killed` where it came to that. The program takes this process's place, so it is signalled and waited for as if run directly; the tracer is
//! a child beside it. `strace --inject` counts for each thread apart, and so would never reach the later calls of a quiet thread.
//!
//! A write counts only when it goes to a file: not to a socket, a pipe, an event counter or the log on descriptors 0 to 2.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

const KINDS: [(&str, &[libc::c_long]); 6] = [
    ("sync", &[libc::SYS_fsync, libc::SYS_fdatasync, libc::SYS_syncfs, libc::SYS_sync_file_range, libc::SYS_msync]),
    (
        "rename",
        &[
            #[cfg(target_arch = "x86_64")]
            libc::SYS_rename,
            libc::SYS_renameat,
            libc::SYS_renameat2,
        ],
    ),
    (
        "unlink",
        &[
            #[cfg(target_arch = "x86_64")]
            libc::SYS_unlink,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_rmdir,
            libc::SYS_unlinkat,
        ],
    ),
    (
        "make",
        &[
            #[cfg(target_arch = "x86_64")]
            libc::SYS_mkdir,
            libc::SYS_mkdirat,
            libc::SYS_linkat,
            libc::SYS_symlinkat,
            libc::SYS_openat,
            libc::SYS_openat2,
        ],
    ),
    ("size", &[libc::SYS_ftruncate, libc::SYS_fallocate, libc::SYS_utimensat, libc::SYS_fchmod, libc::SYS_fchown]),
    ("write", &[libc::SYS_pwrite64, libc::SYS_write, libc::SYS_writev, libc::SYS_pwritev, libc::SYS_copy_file_range]),
];

struct Call {
    number: libc::c_long,
    args: [u64; 3],
}

#[cfg(target_arch = "x86_64")]
fn call(pid: Pid) -> nix::Result<Call> {
    let regs = ptrace::getregs(pid)?;
    Ok(Call { number: regs.orig_rax as libc::c_long, args: [regs.rdi, regs.rsi, regs.rdx] })
}

#[cfg(target_arch = "aarch64")]
fn call(pid: Pid) -> nix::Result<Call> {
    let regs = ptrace::getregs(pid)?.regs;
    Ok(Call { number: regs[8] as libc::c_long, args: [regs[0], regs[1], regs[2]] })
}

fn kind(pid: Pid, call: &Call) -> Option<&'static str> {
    let (kind, _) = KINDS.iter().find(|(_, numbers)| numbers.contains(&call.number))?;
    let counts = match *kind {
        // Opening counts where it makes a file; what openat2 was told lies in its memory, and nothing of ours makes files with it alone.
        "make" if call.number == libc::SYS_openat => call.args[2] & libc::O_CREAT as u64 != 0,
        "make" => call.number != libc::SYS_openat2,
        "write" => call.args[0] > 2 && to_file(pid, call.args[0]),
        _ => true,
    };
    counts.then_some(*kind)
}

fn to_file(pid: Pid, fd: u64) -> bool {
    let target = std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
    target.is_absolute() && !target.starts_with("/dev") && !target.to_string_lossy().starts_with("/memfd:")
}

/// Whether the first argument is a descriptor of a path that contains `part`.
fn about(pid: Pid, call: &Call, part: Option<&str>) -> bool {
    let Some(part) = part else { return true };
    let path = std::fs::read_link(format!("/proc/{pid}/fd/{}", call.args[0])).unwrap_or_default();
    path.to_string_lossy().contains(part)
}

/// At the end of a call: it answers EIO, whatever it did.
fn answer_eio(pid: Pid) -> nix::Result<()> {
    let mut regs = ptrace::getregs(pid)?;
    let answer = -i64::from(libc::EIO) as u64;
    #[cfg(target_arch = "x86_64")]
    {
        regs.rax = answer;
    }
    #[cfg(target_arch = "aarch64")]
    {
        regs.regs[0] = answer;
    }
    ptrace::setregs(pid, regs)
}

/// What is to happen at the chosen call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Kill,
    Fail,
}

/// Follows `program` to its end.
fn trace(program: Pid, wanted: &str, fate: Fate, at: u64, counts: &Path) -> nix::Result<()> {
    let (wanted, part) = wanted.split_once('@').map_or((wanted, None), |(kind, part)| (kind, Some(part)));
    let mut chosen = 0;
    let armed = counts.with_extension("armed");
    let mut failing = None;
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_TRACEEXEC | Options::PTRACE_O_EXITKILL;
    ptrace::seize(program, options)?;
    ptrace::interrupt(program)?;
    waitpid(program, Some(WaitPidFlag::__WALL))?;
    ptrace::syscall(program, None)?;
    let _ = std::io::stdout().write_all(b"!").and_then(|()| std::io::stdout().flush());
    let mut seen: BTreeMap<&str, u64> = KINDS.iter().map(|(kind, _)| (*kind, 0)).collect();
    let (mut running, mut killed) = (false, false);
    loop {
        let (pid, pass) = match waitpid(None, Some(WaitPidFlag::__WALL)) {
            Err(Errno::ECHILD) => break,
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error),
            Ok(WaitStatus::PtraceSyscall(pid)) => {
                let entry = ptrace::syscall_info(pid).is_ok_and(|info| info.op == libc::PTRACE_SYSCALL_INFO_ENTRY);
                if entry
                    && running
                    && !killed
                    && let Ok(call) = call(pid)
                    && let Some(kind) = kind(pid, &call)
                {
                    *seen.entry(kind).or_default() += 1;
                    if kind == wanted && about(pid, &call, part) && (fate == Fate::Kill || armed.exists()) {
                        chosen += 1;
                        match fate {
                            _ if chosen != at => {}
                            Fate::Kill => {
                                killed = true;
                                kill(program, Signal::SIGKILL)?;
                            }
                            Fate::Fail => failing = Some(pid),
                        }
                    }
                } else if !entry && failing == Some(pid) {
                    failing = None;
                    answer_eio(pid)?;
                }
                (pid, None)
            }
            Ok(WaitStatus::PtraceEvent(pid, _, event)) => {
                running |= event == libc::PTRACE_EVENT_EXEC;
                (pid, None)
            }
            Ok(WaitStatus::Stopped(pid, signal)) => (pid, Some(signal)),
            Ok(_) => continue,
        };
        match ptrace::syscall(pid, pass) {
            // It is dying; its end comes next.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error),
        }
    }
    let mut text: String = seen.iter().map(|(kind, count)| format!("{kind} {count}\n")).collect();
    if killed {
        text.push_str("killed 1\n");
    }
    let ready = counts.with_extension("part");
    let written = std::fs::write(&ready, text).and_then(|()| std::fs::rename(&ready, counts));
    written.map_err(|_| Errno::EIO)
}

#[expect(clippy::zombie_processes, reason = "the tracer outlives what this process becomes")]
fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let [kind, at, counts, rest @ ..] = &words[..] else {
        eprintln!("usage: kill_at KIND N COUNTS PROGRAM ARGS…");
        return ExitCode::from(2);
    };
    let (kind, at) = (kind.to_string_lossy(), at.to_string_lossy());
    let (fate, at) = at.strip_prefix("fail:").map_or((Fate::Kill, &*at), |at| (Fate::Fail, at));
    let at = at.parse().unwrap_or(0);
    if let [mark, pid] = rest
        && mark == "--tracer"
    {
        let pid = pid.to_string_lossy().parse().map(Pid::from_raw);
        return match pid.map(|pid| trace(pid, &kind, fate, at, Path::new(counts))) {
            Ok(Ok(())) => ExitCode::SUCCESS,
            other => {
                eprintln!("kill_at: {other:?}");
                ExitCode::FAILURE
            }
        };
    }
    let mut tracer = Command::new(std::env::current_exe().expect("own path"));
    tracer.args(&words[..3]).arg("--tracer").arg(std::process::id().to_string()).stdout(Stdio::piped());
    let mut tracer = tracer.spawn().expect("start the tracer");
    let mut ready = [0];
    let asked = tracer.stdout.as_mut().expect("piped").read_exact(&mut ready);
    if asked.is_err() || rest.is_empty() {
        eprintln!("kill_at: cannot trace");
        return ExitCode::FAILURE;
    }
    let error = Command::new(&rest[0]).args(&rest[1..]).exec();
    eprintln!("kill_at: {}: {error}", rest[0].display());
    ExitCode::FAILURE
}
