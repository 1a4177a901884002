//! Compiles `src/programs.c`, `src/policy.c` and `src/mapping.c` for the kernel.

use std::{
    env, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

/// Each becomes an object of its own.
const SOURCES: [&str; 3] = ["src/programs.c", "src/policy.c", "src/mapping.c"];
/// What they include.
const PARTS: [&str; 11] = [
    "src/change.h",
    "src/services.c",
    "src/sockmap.c",
    "src/common.h",
    "src/parse.h",
    "src/tracked.c",
    "src/packets.c",
    "src/errors.c",
    "src/masquerade.c",
    "src/hooks.c",
    "src/redirect.c",
];

fn main() -> ExitCode {
    for source in SOURCES.iter().chain(&PARTS) {
        println!("cargo::rerun-if-changed={source}");
    }
    println!("cargo::rerun-if-env-changed=CLANG");
    match compile() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            for line in message.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn compile() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo set no OUT_DIR")?);
    let header = out.join("ebpf_abi.h");
    fs::write(&header, ebpf_abi::CHeader.to_string())
        .map_err(|error| format!("cannot write {}: {error}", header.display()))?;

    SOURCES
        .iter()
        .try_for_each(|source| compile_one(source, &out))
}

fn compile_one(source: &str, out: &Path) -> Result<(), String> {
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let object = Path::new(source).with_extension("o");
    let object = out.join(object.file_name().unwrap_or_default());
    // -mcpu=v3: 32-bit and atomic instructions, in every kernel that can load these programs.
    let output = Command::new(&clang)
        .args(["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-std=gnu11"])
        .args(["-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing"])
        .arg("-I")
        .arg(out)
        .args(multiarch_include())
        .args(["-c", source, "-o"])
        .arg(object)
        .output()
        .map_err(|error| match error.kind() == ErrorKind::NotFound {
            true => format!("no {clang} to compile the eBPF programs: apt-get install clang"),
            false => format!("cannot run {clang}: {error}"),
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{}{said}", missing_package(&said)))
}

/// Debian keeps `asm/types.h` here, and clang does not look there when it compiles for BPF.
fn multiarch_include() -> Vec<String> {
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let abi = if arch == "arm" { "gnueabihf" } else { "gnu" };
    let folder = format!("/usr/include/{arch}-linux-{abi}");
    if Path::new(&folder).is_dir() {
        vec!["-idirafter".to_owned(), folder]
    } else {
        Vec::new()
    }
}

fn missing_package(said: &str) -> &'static str {
    let missing = |header: &str| said.contains(&format!("'{header}' file not found"));
    if missing("bpf/bpf_helpers.h") || missing("bpf/bpf_endian.h") {
        "libbpf's headers are not there: apt-get install libbpf-dev\n"
    } else if missing("linux/bpf.h") || missing("linux/types.h") || missing("asm/types.h") {
        "the kernel's headers are not there: apt-get install linux-libc-dev\n"
    } else {
        ""
    }
}
