# The one entry point. Every recipe is a thin name for a script or cargo command, so that `just` itself is never required.

# List the recipes.
default:
    @just --list

# All that has to pass: formatting, clippy, tests, documentation, dependency rules.
check:
    scripts/check.sh fmt clippy test doc deny

# Tests only.
test *ARGS:
    cargo test --workspace {{ ARGS }}

# Format everything.
fmt:
    cargo fmt --all

# Mirror a sample store and watch the lag.
demo *ARGS:
    cargo run --release -p twinbox -- demo {{ ARGS }}

# Benchmarks.
bench *ARGS:
    cargo bench -p twinbox-benches {{ ARGS }}

# Fuzz one target for some seconds (needs a nightly toolchain and cargo-fuzz).
fuzz TARGET SECONDS="600":
    cargo +nightly fuzz run {{ TARGET }} -- -max_total_time={{ SECONDS }}

# Known vulnerabilities among the dependencies. Apart from `check`: it needs the advisory database from the network.
advisories:
    scripts/check.sh advisories
