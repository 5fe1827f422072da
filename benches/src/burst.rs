//! A burst of mail: messages of a mail store's sizes, ready in memory, delivered as fast as the store takes them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use twinbox_tests::mailload::sized_message;
use twinbox_tests::rng::Rng;

/// Every message with its place.
#[derive(Debug)]
pub struct Burst {
    messages: Vec<(String, String, Vec<u8>)>,
    /// Of all messages.
    pub bytes: u64,
}

impl Burst {
    /// Sizes as in a mail store: many small, few large; scaled so that they add up to about `bytes`.
    #[must_use]
    pub fn new(messages: usize, bytes: usize, users: usize, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let shape = |rng: &mut Rng| match rng.below(100) {
            0..70 => 2_000 + rng.below(10_000),
            70..95 => 12_000 + rng.below(100_000),
            _ => 150_000 + rng.below(600_000),
        };
        let sizes: Vec<usize> = (0..messages).map(|_| shape(&mut rng)).collect();
        let scale = bytes as f64 / sizes.iter().sum::<usize>().max(1) as f64;
        let message = |(n, size): (usize, &usize)| {
            let user = format!("user{:03}", n % users.max(1));
            let name = format!("1700000000.M{n:06}P1.host");
            (format!("{user}/tmp/{name}"), format!("{user}/new/{name}"), sized_message(&mut rng, n, (*size as f64 * scale) as usize))
        };
        let messages: Vec<_> = sizes.iter().enumerate().map(message).collect();
        let bytes = messages.iter().map(|(_, _, body)| body.len() as u64).sum();
        Burst { messages, bytes }
    }

    /// How many messages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Where they come to lie, below the store.
    #[must_use]
    pub fn paths(&self) -> Vec<PathBuf> {
        self.messages.iter().map(|(_, new, _)| new.into()).collect()
    }

    /// Delivers every message as a mail server does: written to `tmp/`, renamed to `new/`.
    ///
    /// # Errors
    /// The file system's.
    pub fn deliver(&self, store: &Path) -> std::io::Result<Duration> {
        let began = Instant::now();
        for (tmp, new, body) in &self.messages {
            fs::write(store.join(tmp), body)?;
            fs::rename(store.join(tmp), store.join(new))?;
        }
        Ok(began.elapsed())
    }
}

/// Empty mailboxes.
///
/// # Errors
/// The file system's.
pub fn mailboxes(store: &Path, users: usize) -> std::io::Result<()> {
    for user in 0..users.max(1) {
        for part in ["cur", "new", "tmp"] {
            fs::create_dir_all(store.join(format!("user{user:03}/{part}")))?;
        }
    }
    Ok(())
}
