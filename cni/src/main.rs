//! CNI plug-in.

fn main() {}
