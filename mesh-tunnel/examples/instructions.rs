//! Runs one inner loop so many times, for `cargo xtask instructions`, which counts under valgrind.
//! Without arguments: which loops there are, and how many packets each handles in a turn.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a tool fails loudly"
)]

#[path = "../benches/loops/mod.rs"]
mod loops;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (Some(name), Some(turns)) = (arguments.next(), arguments.next()) else {
        for (name, make) in loops::ALL {
            println!("{} {name}", make().packets);
        }
        return;
    };
    let (_, make) = loops::ALL.iter().find(|(known, _)| *known == name).unwrap();
    let mut it = make();
    for _ in 0..turns.parse::<u32>().unwrap() {
        (it.body)();
    }
}
