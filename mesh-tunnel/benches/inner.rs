//! What the inner loops take: `cargo bench -p mesh-tunnel`. Figures of different runs and machines
//! cannot be compared; `cargo xtask instructions` counts what can.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "benches fail loudly"
)]

mod loops;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn all(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("inner");
    for (name, make) in loops::ALL {
        let mut it = make();
        group.throughput(Throughput::Elements(it.packets));
        group.bench_function(*name, |bencher| bencher.iter(&mut it.body));
    }
    group.finish();
}

criterion_group!(inner, all);
criterion_main!(inner);
