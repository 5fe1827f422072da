//! Writes the committed seed corpora from real encodings: `cargo run --manifest-path fuzz/Cargo.toml --example seeds`.
//!
//! Deterministic, so that running it again changes nothing unless an encoding changed. Files it does not write (regressions
//! found by fuzzing, added by hand) are left alone.

mod node;
mod state;
mod wire;

use std::path::Path;

/// Writes one seed.
fn seed(target: &str, name: &str, bytes: &[u8]) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    std::fs::create_dir_all(&dir).expect("the corpus directory can be made");
    std::fs::write(dir.join(name), bytes).expect("the seed can be written");
}

fn main() {
    wire::log_frame();
    wire::control();
    node::expander();
    node::config();
    node::pair_code();
    node::glob();
    state::redo();
    state::ops_sequence();
}
