//! The steps a change goes through, timed one by one. How to read the figures is in `benches/README.md`.

#![allow(missing_docs, reason = "criterion's macros make public items without any")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use twinbox_benches::steps::{ALL, Per};

fn steps(c: &mut Criterion) {
    for (name, size, _, set_up) in ALL {
        let mut group = c.benchmark_group(name);
        let mut step = None;
        group.sample_size(20).bench_function(size.to_string(), |b| {
            // Only what was asked for is set up.
            let step = step.get_or_insert_with(|| set_up(size));
            b.iter(|| step.run());
        });
        if let Some(step) = step {
            group.throughput(match step.per {
                Per::Bytes(bytes) => Throughput::Bytes(bytes as u64),
                Per::Elements(count) => Throughput::Elements(count as u64),
            });
        }
        group.finish();
    }
}

criterion_group!(benches, steps);
criterion_main!(benches);
