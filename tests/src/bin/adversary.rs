//! Adversarial writers for as long as wanted, the standby killed under them: `cargo run -p twinbox-tests --bin adversary [-- --seconds N] [--kills N] [--mail]`.
//! With `--mail` a Dovecot under load (maildir, then mdbox; `--rate N`: messages a second, else as fast as it goes) in their place, and a second one that reads each recovered replica.
//! Root needed (network namespaces). Ends with a panic at the first state that never was; says what was looked at.

use std::time::Duration;

use twinbox_tests::adversary::Sizes;
use twinbox_tests::besieged;
use twinbox_tests::tree::Layout;

fn option(name: &str, default: usize) -> usize {
    let mut words = std::env::args().skip_while(|w| w != name).skip(1);
    words.next().map_or(default, |w| w.parse().unwrap_or_else(|_| panic!("{name} wants a number")))
}

/// What it can be told; anything else is refused, since a run takes ten minutes.
fn refuse_others() {
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--mail" => {}
            "--seconds" | "--kills" | "--layout" | "--rate" => drop(words.next()),
            _ => {
                eprintln!("adversary [--seconds N] [--kills N] [--mail [--layout maildir|mdbox] [--rate N]]: not known: {word}");
                std::process::exit(2);
            }
        }
    }
}

fn main() {
    refuse_others();
    let (time, kills) = (Duration::from_secs(option("--seconds", 600) as u64), option("--kills", 100));
    if std::env::args().any(|w| w == "--mail") {
        let only = std::env::args().skip_while(|w| w != "--layout").nth(1);
        let layouts =
            [Layout::Maildir, Layout::Mdbox].into_iter().filter(|layout| only.as_deref().is_none_or(|name| name == layout.name()));
        let layouts: Vec<Layout> = layouts.collect();
        let share = layouts.len().max(1) as u32;
        for layout in layouts {
            let mail = besieged::mail(layout, time / share, kills / share as usize, option("--rate", 0));
            println!("{}: {} kills in {} s; the load: {:?}", layout.name(), mail.shown.len(), mail.took.as_secs(), mail.done);
            println!("messages shown after each kill, and of how many users: {:?}", mail.shown);
        }
        return;
    }
    let sizes = Sizes { between: 20 << 20, large: 64 << 20 };
    let seen = besieged::run(time, kills, sizes);
    println!("{seen:#?}");
}
