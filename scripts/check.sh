#!/usr/bin/env bash
# Runs the named steps of the check, in the given order: fmt clippy test doc deny advisories. `just check` and .ci/run both call this,
# so that a change that passes on a desk passes there too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

deny_version=0.20.2

step() { printf '\n==> %s\n' "$*" >&2; }

have_deny() {
    if cargo deny --version >/dev/null 2>&1; then
        return 0
    fi
    step "cargo-deny is missing; installing $deny_version (takes some minutes; unoptimised, for it runs for seconds)"
    CARGO_PROFILE_DEV_DEBUG=0 cargo install --locked --debug cargo-deny --version "$deny_version" </dev/null
}

for name in "$@"; do
    case "$name" in
    fmt)
        step "cargo fmt"
        cargo fmt --all -- --check
        ;;
    clippy)
        step "cargo clippy"
        cargo clippy --workspace --all-targets --locked -- -D warnings
        ;;
    test)
        # The README's test command, word for word.
        step "cargo test --workspace --no-fail-fast"
        cargo test --workspace --no-fail-fast
        ;;
    doc)
        step "cargo doc"
        RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items --locked
        ;;
    deny)
        have_deny
        step "cargo deny"
        cargo deny --locked check bans licenses sources
        ;;
    advisories)
        have_deny
        step "cargo deny (advisories)"
        cargo deny --locked check advisories
        ;;
    *)
        printf 'check.sh: no step is called %s\n' "$name" >&2
        exit 2
        ;;
    esac
done
