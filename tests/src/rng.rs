//! Seeded choices (splitmix64): the same seed gives the same choices on every machine.

/// A small deterministic generator; not for secrets.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator whose choices follow from `seed` alone.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x5DEE_CE66_D1CE_4E5B)
    }

    /// A generator for part `n` of the same run: independent of how many choices this one made.
    #[must_use]
    pub fn part(seed: u64, n: u64) -> Self {
        Self::new(Self::new(seed).next_u64() ^ n.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number in `0..n` (`n` > 0).
    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n as u64) as usize
    }

    /// True `percent` times in a hundred.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of `items` (not empty).
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// `len` bytes that do not compress.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend_from_slice(&self.next_u64().to_le_bytes());
        }
        out.truncate(len);
        out
    }
}

/// The run's seed: `TWINBOX_TEST_SEED` where given, else the clock. Prints itself when the test panics.
#[derive(Debug)]
pub struct Seed(pub u64);

impl Seed {
    /// Chooses the seed of this run.
    #[must_use]
    pub fn from_env() -> Self {
        let seed = std::env::var("TWINBOX_TEST_SEED").ok().map_or_else(
            || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |d| d.as_millis() as u64),
            |text| text.parse().expect("TWINBOX_TEST_SEED is a whole number"),
        );
        Self(seed)
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let test = std::thread::current().name().unwrap_or("TEST").to_owned();
            eprintln!("replay: TWINBOX_TEST_SEED={} cargo test -p twinbox-tests {test}", self.0);
        }
    }
}
