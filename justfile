# The one entry point. Every recipe is a thin name for a script or cargo command, so that `just` itself is never required.

# List the recipes.
default:
    @just --list

# All that has to pass: formatting, clippy, tests, documentation, dependency rules.
check:
    scripts/check.sh fmt clippy test doc deny

# Tests only.
test *ARGS:
    cargo test --workspace --no-fail-fast {{ ARGS }}

# Format everything.
fmt:
    cargo fmt --all

# Mirror a sample store and watch the lag.
demo *ARGS:
    cargo run --release -p twinbox -- demo {{ ARGS }}

# Twinbox beside rsync, lsyncd, syncthing and unison: every workload, round after round (root; about half an hour a round). See benches/README.md.
bench *ARGS:
    cargo run --release -p twinbox-benches --bin compare -- {{ ARGS }}

# The single steps, timed.
micro *ARGS:
    cargo bench -p twinbox-benches --bench micro -- {{ ARGS }}

# Keeps the instruction counts as they are now, after a change that is meant to cost more (or costs less).
bless-instructions:
    TWINBOX_BLESS=1 cargo test -p twinbox-benches --test instructions

# The simulation, seed after seed, until stopped or until one fails.
soak FROM="1":
    TWINBOX_SIM_FROM={{ FROM }} TWINBOX_SIM_SEEDS=1000000 cargo test -p twinbox --lib whatever_happens -- --nocapture

# The simulation of both nodes (root), likewise.
soak-nodes FROM="1":
    TWINBOX_SIM_FROM={{ FROM }} TWINBOX_SIM_SEEDS=1000000 cargo test -p twinbox --lib two_nodes_on_disks -- --nocapture

# The simulation of both nodes with promotions and returns (root), likewise.
soak-roles FROM="1":
    TWINBOX_SIM_FROM={{ FROM }} TWINBOX_SIM_SEEDS=1000000 cargo test -p twinbox --lib two_nodes_that_change_roles -- --nocapture

# Fuzz one target for some seconds (needs cargo-fuzz; RUSTC_BOOTSTRAP lets a stable toolchain instrument). See CONTRIBUTING.md.
fuzz TARGET SECONDS="600" *ARGS:
    mkdir -p fuzz/work/{{ TARGET }}
    RUSTC_BOOTSTRAP=1 cargo fuzz run {{ TARGET }} fuzz/work/{{ TARGET }} fuzz/corpus/{{ TARGET }} -- -max_total_time={{ SECONDS }} -timeout=20 {{ ARGS }}

# Write the committed seed corpora anew, after an encoding changed.
fuzz-seeds:
    cargo run --manifest-path fuzz/Cargo.toml --example seeds

# Known vulnerabilities among the dependencies. Apart from `check`: it needs the advisory database from the network.
advisories:
    scripts/check.sh advisories
