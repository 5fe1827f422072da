//! A store into a shared mapping raises no event, and a second one moves no timestamp: such files are followed all the same, while they stay mapped.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use twinbox_tests::gate::{Need, heavy, wait_until};
use twinbox_tests::live::Live;
use twinbox_tests::require;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::Layout;

const WRITER: &str = "
import mmap, sys
file = open(sys.argv[1], 'r+b')
view = mmap.mmap(file.fileno(), 0)
file.close()
for line in sys.stdin:
    at, value = map(int, line.split())
    view[at] = value
    print('stored', flush=True)
";

#[test]
fn stores_into_a_mapping_arrive_while_it_lasts() {
    require!(Need::Program("python3"));
    let _turn = heavy();
    let scratch = Scratch::new("mapped");
    let (root, replica) = (scratch.dir("store"), scratch.dir("replica"));
    fs::create_dir_all(root.join("u")).unwrap();
    for (name, size) in [("u/small.db", 100_000), ("u/large.db", 12 << 20)] {
        fs::write(root.join(name), vec![0; size]).unwrap();
    }
    let mut live = Live::start(&root, &replica, scratch.path(), Layout::Plain);
    live.settle("the first sync", Duration::from_secs(60));
    let magic = rustix::fs::statfs(root.as_path()).unwrap().f_type;
    const TMPFS: i64 = 0x0102_1994;
    if magic as i64 == TMPFS {
        eprintln!("\n*** SKIPPED: the scratch directory is on tmpfs, where a second store moves nothing ***\n");
        return;
    }
    for name in ["u/small.db", "u/large.db"] {
        let mut writer =
            Command::new("python3").args(["-c", WRITER]).arg(root.join(name)).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(writer.stdout.take().unwrap()).lines();
        // Twice into one page, without a pause and with one, then another page: none of it closes or syncs the file.
        for (at, value) in [(5, 1), (6, 2), (7, 3), (50_000, 4), (8, 5)] {
            writeln!(writer.stdin.as_mut().unwrap(), "{at} {value}").unwrap();
            assert_eq!(said.next().unwrap().unwrap(), "stored");
            wait_until(Duration::from_secs(20), &format!("{value} in {name}"), || {
                fs::read(replica.join(name)).is_ok_and(|bytes| bytes[at] == value)
            });
        }
        drop(writer.stdin.take());
        assert!(writer.wait().unwrap().success());
    }
    live.settle("the end", Duration::from_secs(30));
    live.stop();
}
