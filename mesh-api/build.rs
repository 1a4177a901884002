//! Compiles `proto/*.proto`, without `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["control.proto", "admin.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .btree_map(".")
        .type_attribute(
            "holdfast.control.v1.ResourceKey",
            "#[derive(PartialOrd, Ord)]",
        )
        .compile_fds(descriptors)?;
    Ok(())
}
