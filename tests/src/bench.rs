//! What the measuring programs share: order statistics, floors, memory of a process, what `rsync` says it moved.

use std::fs;
use std::io;
use std::net::UdpSocket;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Measured durations.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<Duration>);

impl Samples {
    /// Takes one more.
    pub fn push(&mut self, sample: Duration) {
        self.0.push(sample);
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value that `percent` in a hundred do not exceed (nearest rank).
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or_default()
    }
}

impl std::fmt::Display for Samples {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |percent| self.percentile(percent).as_secs_f64() * 1e3;
        write!(f, "n {:>5}   p50 {:>9.3} ms   p99 {:>9.3} ms   max {:>9.3} ms", self.len(), ms(50), ms(99), ms(100))
    }
}

/// The floor under any durable mirror: 4 KiB made durable (`fdatasync`) in `dir`, and one round trip over loopback UDP.
pub fn floor(dir: &Path, count: usize) -> io::Result<Samples> {
    let path = dir.join("floor");
    let file = fs::OpenOptions::new().create(true).truncate(true).write(true).open(&path)?;
    let echo = UdpSocket::bind("127.0.0.1:0")?;
    let client = UdpSocket::bind("127.0.0.1:0")?;
    client.connect(echo.local_addr()?)?;
    client.set_read_timeout(Some(Duration::from_secs(5)))?;
    echo.set_read_timeout(Some(Duration::from_secs(5)))?;
    let block = crate::rng::Rng::new(1).bytes(4096);
    let mut samples = Samples::default();
    std::thread::scope(|scope| {
        let answering = scope.spawn(|| -> io::Result<()> {
            let mut buffer = [0; 2048];
            for _ in 0..count {
                let (len, from) = echo.recv_from(&mut buffer)?;
                echo.send_to(&buffer[..len], from)?;
            }
            Ok(())
        });
        let mut buffer = [0; 2048];
        for n in 0..count {
            let began = Instant::now();
            file.write_all_at(&block, n as u64 * 4096)?;
            rustix::fs::fdatasync(&file)?;
            client.send(&block[..1200])?;
            client.recv(&mut buffer)?;
            samples.push(began.elapsed());
        }
        answering.join().expect("the echo panicked")
    })?;
    fs::remove_file(path)?;
    Ok(samples)
}

/// Resident memory of a process, in KiB.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Now.
    pub resident: u64,
    /// At its highest.
    pub peak: u64,
}

/// Reads `VmRSS` and `VmHWM` (proc(5)).
pub fn memory(pid: u32) -> io::Result<Memory> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        line.trim_end_matches("kB").trim().parse().ok()
    };
    match (field("VmRSS:"), field("VmHWM:")) {
        (Some(resident), Some(peak)) => Ok(Memory { resident, peak }),
        _ => Err(io::Error::other("no memory figures")),
    }
}

/// Brings `replica` up to date with `rsync`'s delta algorithm, through its pipe; the bytes it sent and received.
pub fn rsync(source: &Path, replica: &Path) -> io::Result<u64> {
    let mut from = source.as_os_str().to_owned();
    from.push("/");
    let out = Command::new("rsync")
        // Times to the nanosecond, or changes within a second of the last run are not seen.
        .args(["-a", "--delete", "--no-whole-file", "--modify-window=-1", "--stats", "--no-human-readable"])
        .arg(from)
        .arg(replica)
        .env("LC_ALL", "C")
        .output()?;
    let text = String::from_utf8_lossy(&out.stdout);
    if !out.status.success() {
        return Err(io::Error::other(format!("rsync: {}", String::from_utf8_lossy(&out.stderr))));
    }
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        line.chars().filter(char::is_ascii_digit).collect::<String>().parse().ok()
    };
    match (field("Total bytes sent:"), field("Total bytes received:")) {
        (Some(sent), Some(received)) => Ok(sent + received),
        _ => Err(io::Error::other(format!("rsync --stats: {text}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let mut samples = Samples::default();
        assert_eq!(samples.percentile(50), Duration::ZERO);
        for n in (1..=200).rev() {
            samples.push(Duration::from_millis(n));
        }
        assert_eq!(samples.percentile(50), Duration::from_millis(100));
        assert_eq!(samples.percentile(99), Duration::from_millis(198));
        assert_eq!(samples.percentile(100), Duration::from_millis(200));
    }
}
